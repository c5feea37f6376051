import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.logistic import Normal, Tasks, fit_shared, map_estimate


def _tasks(count: int, examples: int, size: int, seed: int = 0) -> Tasks:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, examples, size, generator=rng, dtype=torch.float64)
    labels = (torch.rand(count, examples, generator=rng) < 0.3).double()
    weights = torch.rand(count, examples, generator=rng).double().round()
    return Tasks(x, labels, weights)


def _prior(size: int) -> Normal:
    return Normal(torch.linspace(-1, 1, size, dtype=torch.float64), torch.full((size,), 2.0, dtype=torch.float64))


def test_the_map_is_sklearns() -> None:
    tasks = _tasks(1, 200, 4)
    prior = Normal(torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64))
    found, _ = map_estimate(tasks, prior, steps=30)
    oracle = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=1000)
    oracle.fit(tasks.features[0].numpy(), tasks.labels[0].numpy(), tasks.weights[0].numpy())
    np.testing.assert_allclose(found[0].numpy(), oracle.coef_[0], atol=1e-5)


def test_the_second_derivative_is_autograds() -> None:
    tasks, prior = _tasks(1, 30, 3), _prior(3)
    found, hessian = map_estimate(tasks, prior, steps=10)

    def loss(w: torch.Tensor) -> torch.Tensor:
        logits = tasks.features[0] @ w
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, tasks.labels[0], tasks.weights[0], reduction="sum"
        )
        return likelihood + 0.5 * (prior.precision * (w - prior.mean).square()).sum()

    expected = torch.autograd.functional.hessian(loss, found[0])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(hessian[0], expected)


def test_tasks_do_not_depend_on_each_other() -> None:
    tasks, prior = _tasks(6, 20, 3), _prior(3)
    together, _ = map_estimate(tasks, prior)
    for at in range(6):
        alone = Tasks(tasks.features[[at]], tasks.labels[[at]], tasks.weights[[at]])
        torch.testing.assert_close(map_estimate(alone, prior)[0][0], together[at])


def test_padding_is_not_looked_at() -> None:
    tasks, prior = _tasks(2, 20, 3), _prior(3)
    junk = torch.where(tasks.weights.unsqueeze(-1) == 0, torch.tensor(77.0, dtype=torch.float64), tasks.features)
    changed = Tasks(junk, torch.where(tasks.weights == 0, 1 - tasks.labels, tasks.labels), tasks.weights)
    torch.testing.assert_close(map_estimate(changed, prior)[0], map_estimate(tasks, prior)[0])


def test_a_task_without_examples_gets_the_prior_bit_for_bit() -> None:
    tasks, prior = _tasks(3, 8, 3), _prior(3)
    tasks.weights[1] = 0
    found, _ = map_estimate(tasks, prior)
    assert torch.equal(found[1], prior.mean)
    assert not torch.equal(found[0], prior.mean)


def test_separable_labels_and_huge_features_still_converge() -> None:
    x = torch.cat([torch.ones(40, 1), torch.linspace(-500, 500, 40)[:, None]], 1).double()
    found = fit_shared(x, (x[:, 1] > 0).double(), torch.tensor([0, 1]))
    assert torch.isfinite(found.mean).all()
    predicted = x @ found.mean > 0
    assert torch.equal(predicted, x[:, 1] > 0)


def test_useless_features_are_held_to_nothing_and_useful_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.ones((3_000, 1)), rng.normal(size=(3_000, 9))], 1)
    y = rng.random(3_000) < 1 / (1 + np.exp(-(-1 + 1.5 * x[:, 1])))
    groups = torch.tensor([0, 1, *[2] * 8])
    found = fit_shared(torch.from_numpy(x), torch.from_numpy(y.astype(float)), groups)
    assert found.mean[1] == pytest.approx(1.5, abs=0.2)
    assert found.mean[2:].abs().max() < 0.06
    assert found.precision[2] > 20 * found.precision[1]


def test_without_examples_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="no example"):
        fit_shared(torch.zeros(0, 2), torch.zeros(0), torch.tensor([0, 1]))


def test_calibration_mends_probabilities_that_are_twice_too_sure() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(-2, 1, 20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-true))).astype(float)
    scaling = Platt.fit(torch.from_numpy(2 * true + 1), torch.from_numpy(labels))
    assert scaling.slope == pytest.approx(0.5, abs=0.05)
    assert float(scaling(torch.from_numpy(2 * true + 1)).mean()) == pytest.approx(labels.mean(), abs=0.005)


def test_another_heads_logits_keep_the_slope_and_get_the_intercept_that_they_need() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(-3, 1, 20_000)
    labels = torch.from_numpy((rng.random(20_000) < 1 / (1 + np.exp(-true))).astype(float))
    logits = torch.from_numpy(true + 1.5)
    scaling = Platt(0.8, 0.5).recentred(logits, labels)
    assert scaling.slope == pytest.approx(0.8, abs=1e-5)
    assert float(scaling(logits).mean()) == pytest.approx(float(labels.mean()), rel=0.005)
    assert Platt(0.8, 0.5).recentred(logits[:0], labels[:0]) == Platt(0.8, 0.5)


def test_calibration_without_labels_changes_nothing() -> None:
    assert Platt.fit(torch.zeros(0), torch.zeros(0)) == Platt()
