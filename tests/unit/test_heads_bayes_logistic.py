"""Binary labels and uncertainty of the Bayesian head, against scipy and plain linear algebra in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from innerloop.learning.heads import RESTORE, BayesHead, Likelihood, Support

D, HALF_LIFE, NOISE = 6, 1800.0, 0.7


def _support(counts: list[int], d: int = D, seed: int = 0) -> Support:
    rng = np.random.default_rng(seed)
    mask = np.arange(max(counts)) < np.array(counts)[:, None]
    shape = mask.shape
    arrays = (
        rng.standard_normal((*shape, d)),
        rng.integers(0, 2, shape),
        rng.uniform(0.1, 4, shape),
        rng.exponential(3600, shape),
    )
    features, labels, weights, ages = (torch.tensor(a, dtype=torch.float32) for a in arrays)
    return Support(features, labels, weights, ages, torch.tensor(mask))


def _head(steps: int = 3, d: int = D) -> BayesHead:
    rng = np.random.default_rng(1)
    root = torch.tensor(0.5 * rng.standard_normal((d, d)), dtype=torch.float32)
    return BayesHead(
        torch.tensor(rng.standard_normal(d), dtype=torch.float32), root, NOISE, HALF_LIFE, "logistic", steps
    )


def _task(head: BayesHead, support: Support, t: int) -> tuple[np.ndarray, ...]:
    """X, y, weights c, m and A of one task in float64."""
    real = support.mask[t].numpy()
    x, y, weight, age = (
        v[t].double().numpy()[real] for v in (support.features, support.labels, support.weights, support.ages)
    )
    root = head.root.double().numpy()
    c = weight * 0.5 ** (age / head.half_life) / head.noise
    return x, y, c, head.mean.double().numpy(), np.linalg.inv(root @ root.T)


def _optimum(head: BayesHead, support: Support, t: int) -> np.ndarray:
    x, y, c, m, a = _task(head, support, t)

    def loss(w: np.ndarray) -> float:
        f = x @ w
        return float((c * (np.logaddexp(0.0, f) - y * f)).sum() + 0.5 * (w - m) @ a @ (w - m))

    def slope(w: np.ndarray) -> np.ndarray:
        step: np.ndarray = x.T @ (c * (expit(x @ w) - y)) + a @ (w - m)
        return step

    found: np.ndarray = minimize(loss, m, jac=slope, method="BFGS", options={"gtol": 1e-10}).x
    return found


@pytest.mark.parametrize("counts", [[1, 0, 3, 5], [4, 8, 20, 60]], ids=["dual", "primal"])
def test_newton_reaches_the_penalised_optimum(counts: list[int]) -> None:
    support, head = _support(counts), _head(steps=8)
    expected = np.stack([_optimum(head, support, t) for t in range(len(counts))])
    np.testing.assert_allclose(head.adapt(support).numpy(), expected, atol=2e-4)


def test_three_steps_are_close_to_it() -> None:
    support, head = _support([1, 2, 5, 10, 30]), _head()
    for t, found in enumerate(head.adapt(support).numpy()):
        expected = _optimum(head, support, t)
        assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected - head.mean.numpy())


def test_it_is_the_penalised_regression_of_scikit_learn() -> None:
    support = _support([40])
    ones = torch.ones_like(support.labels)
    plain = replace(support, weights=ones, ages=torch.zeros_like(ones))
    head = BayesHead(torch.zeros(D), 1.5 * torch.eye(D), likelihood="logistic", newton_steps=8)
    oracle = LogisticRegression(C=1.5**2, fit_intercept=False, tol=1e-10)
    oracle.fit(plain.features[0].double().numpy(), plain.labels[0].numpy())
    np.testing.assert_allclose(head.adapt(plain)[0].numpy(), oracle.coef_[0], atol=1e-4)


@pytest.mark.parametrize("strength", [10.0, 100.0])
def test_newton_does_not_fly_off_from_a_prior_that_is_sure_and_wrong(strength: float) -> None:
    """Whole Newton steps do, from scores this far on the wrong side."""
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.9, 0.0]]])
    labels, ones = torch.zeros(1, 3), torch.ones(1, 3)
    support = Support(features, labels, ones, torch.zeros(1, 3), ones.bool())
    head = BayesHead(torch.tensor([strength, 0.0]), 3.0 * torch.eye(2), likelihood="logistic", newton_steps=12)
    np.testing.assert_allclose(head.adapt(support)[0].numpy(), _optimum(head, support, 0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])
@pytest.mark.parametrize("counts", [[1, 0, 3], [4, 20, 60]], ids=["few", "many"])
def test_variance_is_that_of_the_posterior(likelihood: Likelihood, counts: list[int]) -> None:
    support = _support(counts)
    head = replace(_head(steps=8), likelihood=likelihood)
    candidates = np.random.default_rng(2).standard_normal((9, D))
    found = head.variance(support, torch.tensor(candidates, dtype=torch.float32)).numpy()
    for t in range(len(counts)):
        x, _, c, _, a = _task(head, support, t)
        p = expit(x @ head.adapt(support)[t].double().numpy())
        curvature = c if likelihood == "gaussian" else c * p * (1 - p)
        covariance = np.linalg.inv(a + x.T @ (curvature[:, None] * x))
        expected = np.einsum("nd,de,ne->n", candidates, covariance, candidates)
        np.testing.assert_allclose(found[t], expected, rtol=2e-3)


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])
def test_no_low_precision_gets_into_the_solve(likelihood: Likelihood) -> None:
    """Not by autocast and not by the process's choice for float32 products, which is as it was afterwards."""
    support, head = _support([40, 12, 3], d=48), replace(_head(d=48), likelihood=likelihood)
    candidates = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    expected, sure = head.adapt(support), head.variance(support, candidates)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (candidates @ candidates.T).dtype == torch.bfloat16  # autocast is at work around it
            assert torch.equal(head.adapt(support), expected)
            assert torch.equal(head.variance(support, candidates), sure)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_tf32_gets_into_the_solve_on_a_gpu() -> None:
    support, head = _support([40, 12, 3], d=48), _head(d=48)
    there = BayesHead(head.mean.cuda(), head.root.cuda(), NOISE, HALF_LIFE)
    moved = Support(*(getattr(support, name).cuda() for name in ("features", "labels", "weights", "ages", "mask")))
    expected, before = there.adapt(moved), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(there.adapt(moved), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_weights_that_overwhelm_the_prior_get_jitter_and_spoil_nobody_else() -> None:
    """The same example sixty times with a weight of a hundred million: in float32 its system is indefinite."""
    d = 64
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 60, d, generator=g)
    features[1] = features[1, :1]
    ones = torch.ones(3, 60)
    weights = ones.clone()
    weights[1] = 1e8
    support = Support(features, ones, weights, torch.zeros(3, 60), ones.bool())
    head = BayesHead(torch.zeros(d), torch.eye(d))
    found = head.adapt(support)
    assert bool(found.isfinite().all())
    assert float(features[1, 0] @ found[1]) == pytest.approx(1.0, abs=0.05)
    for task in (0, 2):
        torch.testing.assert_close(head.adapt(support.take(slice(task, task + 1)))[0], found[task])


def test_an_example_that_is_no_number_spoils_its_own_task_alone() -> None:
    support, head = _support([5, 5, 5]), replace(_head(), likelihood="gaussian")
    expected = head.adapt(support)
    support.features[1, 0, 0] = torch.nan
    found = head.adapt(support)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert bool(found[1].isnan().any())


def test_likelihood_and_steps_survive_the_state_and_old_states_are_read() -> None:
    head = _head(steps=5)
    restored = RESTORE["bayes"](head.state())
    assert isinstance(restored, BayesHead)
    assert (restored.likelihood, restored.newton_steps) == ("logistic", 5)
    old = RESTORE["bayes"]({**head.state(), "numbers": torch.tensor([0.5, 60.0], dtype=torch.float64)})
    assert isinstance(old, BayesHead)
    assert (old.noise, old.half_life, old.likelihood) == (0.5, 60.0, "gaussian")
