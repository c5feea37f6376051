"""Bayesian logistic regression: shared weights with learned priors, and a user's own in a few Newton steps.

p = sigmoid(x . w). Shared weights are N(mean, 1 / precision), with one precision for each group of features found by
maximising the evidence under Laplace's approximation (MacKay 1992). A user's own have the prior N(mean, 1 / precision)
too; their posterior is Laplace's, N(MAP, inverse(second derivative)). All in float64: the systems are small.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

_ROUNDS, _STEPS = 12, 4
_LEAST, _MOST = 1.0, 1e6
_FREE = 1e-3  # precision of the intercept
_HALVINGS = 10


@dataclass(frozen=True)
class Tasks:
    """Examples of T tasks, padded to S each, float64; an example of weight 0 is padding and is not looked at."""

    features: Tensor  # [T, S, F]
    labels: Tensor  # [T, S] 0 or 1
    weights: Tensor  # [T, S] >= 0


@dataclass(frozen=True)
class Normal:
    """A Gaussian with a diagonal covariance: `mean` [F], `precision` [F], float64."""

    mean: Tensor
    precision: Tensor


def fit_shared(features: Tensor, labels: Tensor, groups: Tensor, mean: Tensor | None = None) -> Normal:
    """Weights [F], as the mean, and the precisions [F] that were found for them.

    `features` [N, F] with the intercept in column 0, `labels` [N] of 0 and 1; `groups` [F] says which features share a
    precision, and `mean` [F] is what the weights are drawn to (0 when not given). Raises ValueError without examples.
    """
    if not len(labels):
        raise ValueError("There is no example to learn from.")
    x, y = features.double(), labels.double()
    tasks = Tasks(x[None], y[None], torch.ones_like(y)[None])
    centre = torch.zeros(x.shape[1], dtype=torch.float64) if mean is None else mean.double()
    precision = torch.full_like(centre, 10.0)
    precision[0] = _FREE
    weights = centre[None]
    for _ in range(_ROUNDS):
        weights, hessian = map_estimate(tasks, Normal(centre, precision), weights)
        precision = _evidence(weights[0] - centre, precision, torch.linalg.inv(hessian[0]), groups)
    weights, _ = map_estimate(tasks, Normal(centre, precision), weights, steps=3 * _STEPS)
    return Normal(weights[0], precision)


def _evidence(away: Tensor, precision: Tensor, covariance: Tensor, groups: Tensor) -> Tensor:
    """The fixed point precision = gamma / |w - mean|^2 of each group; the intercept keeps its own."""
    count = int(groups.max()) + 1
    gamma = torch.zeros(count, dtype=torch.float64).index_add(0, groups, 1.0 - precision * covariance.diagonal())
    square = torch.zeros(count, dtype=torch.float64).index_add(0, groups, away.square())
    found = (gamma / square.clamp(min=1e-9)).clamp(_LEAST, _MOST)[groups]
    found[0] = _FREE
    return found


def map_estimate(
    tasks: Tasks, prior: Normal, start: Tensor | None = None, *, steps: int = _STEPS
) -> tuple[Tensor, Tensor]:
    """For each task the MAP [T, F] and minus the log posterior's second derivative [T, F, F] there.

    Newton's method from `start` [T, F] or the prior's mean, each step halved until it gains. A task without examples
    gets the prior's mean bit for bit.
    """
    found = (prior.mean.expand(len(tasks.features), -1) if start is None else start).clone()
    value = _objective(tasks, prior, found)
    for _ in range(steps):
        gradient, hessian = _derivatives(tasks, prior, found)
        step = torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
        found, value = _climb(tasks, prior, found, step, value)
    found = torch.where((tasks.weights == 0).all(1, keepdim=True), prior.mean, found)
    return found, _derivatives(tasks, prior, found)[1]


def _climb(tasks: Tasks, prior: Normal, at: Tensor, step: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Where the longest of step, step / 2, step / 4 .. that does not lose leads to, task by task, and its value."""
    share = torch.ones(len(at), 1, dtype=at.dtype, device=at.device)
    moved = _objective(tasks, prior, at + share * step)
    for _ in range(_HALVINGS):
        worse = ~(moved >= value)
        if not bool(worse.any()):
            break
        share[worse] /= 2
        moved = _objective(tasks, prior, at + share * step)
    better = moved >= value
    return torch.where(better.unsqueeze(-1), at + share * step, at), torch.where(better, moved, value)


def _objective(tasks: Tasks, prior: Normal, at: Tensor) -> Tensor:
    logits = (tasks.features @ at.unsqueeze(-1)).squeeze(-1)
    likelihood = (tasks.weights * (tasks.labels * logits - softplus(logits))).sum(1)
    return likelihood - 0.5 * (prior.precision * (at - prior.mean).square()).sum(1)


def _derivatives(tasks: Tasks, prior: Normal, at: Tensor) -> tuple[Tensor, Tensor]:
    x = tasks.features
    p = torch.sigmoid((x @ at.unsqueeze(-1)).squeeze(-1))
    pull = (x.mT @ (tasks.weights * (tasks.labels - p)).unsqueeze(-1)).squeeze(-1)
    curvature = (tasks.weights * p * (1 - p)).unsqueeze(-1)
    return pull - prior.precision * (at - prior.mean), (x * curvature).mT @ x + torch.diag(prior.precision)
