"""The Bayesian head against the formulas it comes from, solved plainly in float64."""

import itertools

import numpy as np
import pytest
import torch

from innerloop.learning.heads import BayesHead, Support
from innerloop.learning.heads.bayes import Prior, learn_prior
from innerloop.learning.heads.solve import dual, primal

D = 12
ALPHA, NOISE, HALF_LIFE = 0.05, 0.3, 1800.0


def _problem(examples: int, tasks: int = 5, d: int = D) -> tuple[Support, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(examples)
    count = rng.integers(0, examples + 1, tasks)
    count[0] = examples
    mask = np.arange(examples) < count[:, None]
    shape = mask.shape
    arrays = (
        rng.standard_normal((*shape, d)),
        rng.uniform(0, 1, shape),
        rng.uniform(0.1, 4, shape),
        rng.exponential(3600, shape),
    )
    features, labels, weights, ages = (torch.tensor(a, dtype=torch.float32) for a in arrays)
    support = Support(features, labels, weights, ages, torch.tensor(mask))
    root, items = rng.standard_normal((d, d)), rng.standard_normal((40, d))
    return support, rng.standard_normal(d), root @ root.T + 0.5 * np.eye(d), items


def _oracle(support: Support, mu: np.ndarray, precision: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Ridge regression on the examples and on every item labelled 0, stacked, one task at a time."""
    answers = []
    for t in range(len(support.mask)):
        real = support.mask[t].numpy()
        x = support.features[t].double().numpy()[real]
        y = support.labels[t].double().numpy()[real]
        age, weight = support.ages[t].double().numpy()[real], support.weights[t].double().numpy()[real]
        w = np.concatenate([weight * 0.5 ** (age / HALF_LIFE) / NOISE, np.full(len(items), ALPHA)])
        stacked, labels = np.concatenate([x, items]), np.concatenate([y, np.zeros(len(items))])
        left = precision + stacked.T @ (w[:, None] * stacked)
        answers.append(np.linalg.solve(left, precision @ mu + stacked.T @ (w * labels)))
    return np.stack(answers)


@pytest.mark.parametrize("examples", [1, 5, 11, 12, 13, 64])
def test_adapt_equals_ridge_regression_with_every_item_as_a_negative(examples: int) -> None:
    support, mu, precision, items = _problem(examples)
    gram = torch.tensor(items.T @ items)
    head = BayesHead.from_prior(
        torch.tensor(mu), torch.tensor(precision), gram, alpha=ALPHA, noise=NOISE, half_life=HALF_LIFE
    )
    np.testing.assert_allclose(
        head.adapt(support).numpy(), _oracle(support, mu, precision, items), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize(("examples", "d"), [(3, 64), (64, 64), (64, 16), (1, 2)])
def test_primal_and_dual_agree_with_each_other_and_with_float64(examples: int, d: int) -> None:
    g = torch.Generator().manual_seed(examples)
    z, r = torch.randn(7, examples, d, generator=g), torch.randn(7, examples, generator=g)
    z64 = z.double()
    exact = torch.linalg.solve(torch.eye(d) + z64.mT @ z64, (z64.mT @ r.double().unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(primal(z, r), exact.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(dual(z, r), exact.float(), rtol=1e-3, atol=1e-5)


def test_older_examples_say_less() -> None:
    support, mu, precision, items = _problem(1, tasks=1)
    head = BayesHead.from_prior(
        torch.tensor(mu), torch.tensor(precision), torch.tensor(items.T @ items), alpha=0.0, noise=1.0, half_life=60.0
    )
    steps = []
    for age in (0.0, 60.0, 120.0, 6000.0):
        aged = Support(support.features, support.labels, support.weights, torch.full((1, 1), age), support.mask)
        steps.append(float((head.adapt(aged) - head.prior).norm()))
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < 1e-6 < steps[0]


def _tasks_of_a_known_prior(tasks: int, examples: int) -> tuple[Support, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mu, root = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[1.0, 0, 0], [0.6, 0.5, 0], [0.0, 0.3, 0.2]])
    w = mu + torch.randn(tasks, 3, generator=g) @ root.T
    x = torch.randn(tasks, examples, 3, generator=g)
    y = (x @ w.unsqueeze(-1)).squeeze(-1) + 0.1 * torch.randn(tasks, examples, generator=g)
    ones = torch.ones(tasks, examples)
    return Support(x, y, ones, torch.zeros_like(ones), ones.bool()), mu, root @ root.T


def test_em_finds_the_prior_that_tasks_were_drawn_from() -> None:
    support, mu, covariance = _tasks_of_a_known_prior(tasks=4_000, examples=6)
    prior = learn_prior(support, torch.zeros(3, 3), alpha=0.0, noise=0.01, half_life=1.0, iterations=30)
    np.testing.assert_allclose(prior.mu, mu, atol=0.06)
    np.testing.assert_allclose(np.linalg.inv(prior.precision.double()), covariance, atol=0.08)


def test_em_stands_a_task_of_one_example_over_and_over_at_the_largest_weight() -> None:
    """In float32 its precision is no longer positive definite; the prior of everybody must not fail for it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 64, 64, generator=generator)
    features[0] = features[0, 0]
    weights = torch.ones(20, 64)
    weights[0] = 1000.0
    support = Support(features, torch.ones(20, 64), weights, torch.zeros(20, 64), torch.ones(20, 64, dtype=torch.bool))
    prior = learn_prior(support, features[1].T @ features[1], alpha=0.001, noise=0.02, half_life=float("inf"))
    assert bool(prior.mu.isfinite().all())
    assert bool(prior.head().root.isfinite().all())


def _log_evidence(prior: Prior, support: Support, noise: float) -> float:
    """Log p(y | X) under the prior, task by task, from the marginal N(X mu, X Sigma X' + noise I)."""
    sigma = np.linalg.inv(prior.precision.double().numpy())
    total = 0.0
    for x, y in zip(support.features.double().numpy(), support.labels.double().numpy(), strict=True):
        cov = x @ sigma @ x.T + noise * np.eye(len(y))
        r = y - x @ prior.mu.double().numpy()
        total -= 0.5 * (np.linalg.slogdet(cov)[1] + r @ np.linalg.solve(cov, r))
    return total


def test_em_never_loses_evidence() -> None:
    support, _, _ = _tasks_of_a_known_prior(tasks=60, examples=3)
    evidence = [
        _log_evidence(
            learn_prior(support, torch.zeros(3, 3), alpha=0.0, noise=0.05, half_life=1.0, iterations=n), support, 0.05
        )
        for n in (1, 2, 4, 8, 16)
    ]
    assert all(later > earlier for earlier, later in itertools.pairwise(evidence))
