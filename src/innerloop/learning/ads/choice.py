"""Conditional logit: which item of a list is chosen, with weights that are shared and weights that are a user's own.

In list n with candidates x_1 .. x_P [P, F] candidate c is chosen with probability softmax(X w)_c (McFadden 1974). The
weights have a Gaussian prior. Shared weights: N(0, 1 / precision), one precision for each group of features, found by
maximising the evidence under Laplace's approximation (MacKay 1992, the fixed point precision = gamma / |w|^2). A user's
own weights: N(shared, variance), and the MAP found in a few Newton steps from the lists that the user has chosen from.
Without any list that is the shared weights, bit for bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_STEPS = 12
_ROUNDS, _ROUNDS_AGAIN, _STEPS_A_ROUND = 6, 1, 2
_LEAST, _MOST = 1e-2, 1e6
_HALVINGS = 12
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Lists:
    """N lists of up to P candidates: `features` [N, P, F], `mask` [N, P], `chosen` [N] columns."""

    features: NDArray[np.float32]
    mask: Bools
    chosen: Ints

    def __len__(self) -> int:
        return len(self.chosen)


def probabilities(features: NDArray[np.float32], mask: Bools, weights: Floats) -> Floats:
    """The chance of each candidate, [N, P]; 0 where masked."""
    logits = np.where(mask, features @ weights, -np.inf)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(odds / odds.sum(-1, keepdims=True), np.float64)


def log_likelihood(lists: Lists, weights: Floats) -> float:
    """Sum of the log-probabilities of what was chosen, in nats."""
    p = probabilities(lists.features, lists.mask, weights)
    return float(np.log(np.maximum(p[np.arange(len(lists)), lists.chosen], 1e-300)).sum())


def maximum_a_posteriori(
    lists: Lists, mean: Floats, precision: Floats, *, start: Floats | None = None, steps: int = _STEPS
) -> tuple[Floats, Floats]:
    """Weights [F] under the prior N(mean, 1 / precision) (both [F]), and the Hessian [F, F] there.

    Newton's method; a step that would not raise the posterior is halved.
    """
    weights = mean.copy() if start is None else start.copy()
    hessian = np.diag(precision)
    if not len(lists):
        return weights, hessian
    value = _objective(lists, weights, mean, precision)
    for _ in range(steps):
        gradient, hessian = _derivatives(lists, weights, mean, precision)
        step = np.asarray(np.linalg.solve(hessian, gradient), np.float64)
        weights, gained = _climb(lists, weights, step, mean, precision, value)
        value += gained
        if gained <= 1e-8 * max(1.0, abs(value)):
            break
    return weights, _derivatives(lists, weights, mean, precision)[1]


def fit_shared(lists: Lists, groups: Ints, *, start: tuple[Floats, Floats] | None = None) -> tuple[Floats, Floats]:
    """Shared weights [F] and their precisions [F]; `groups` [F] says which features share a precision.

    `start` is what this returned for fewer lists: fewer rounds do from there.
    """
    count = int(groups.max()) + 1
    zero = np.zeros(len(groups))
    weights, precision = start or (zero, np.ones(len(groups)))
    for _ in range(_ROUNDS if start is None else _ROUNDS_AGAIN):
        weights, hessian = maximum_a_posteriori(lists, zero, precision, start=weights, steps=_STEPS_A_ROUND)
        determined = 1.0 - precision * np.diag(np.linalg.inv(hessian))  # gamma of each feature, 0 to 1
        gamma = np.bincount(groups, determined, count)
        square = np.bincount(groups, weights**2, count)
        precision = np.clip(gamma / np.maximum(square, 1e-9), _LEAST, _MOST)[groups]
    return maximum_a_posteriori(lists, zero, precision, start=weights)[0], precision


def _objective(lists: Lists, weights: Floats, mean: Floats, precision: Floats) -> float:
    return log_likelihood(lists, weights) - 0.5 * float(precision @ (weights - mean) ** 2)


def _derivatives(lists: Lists, weights: Floats, mean: Floats, precision: Floats) -> tuple[Floats, Floats]:
    """Gradient [F] of the log posterior, and minus its second derivative [F, F]."""
    gradient = -precision * (weights - mean)
    hessian = np.diag(precision).astype(np.float64)
    for first in range(0, len(lists), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        x, mask, chosen = lists.features[part], lists.mask[part], lists.chosen[part]
        p = probabilities(x, mask, weights)
        expected = np.einsum("np,npf->nf", p, x)
        gradient += (x[np.arange(len(x)), chosen] - expected).sum(0)
        spread = (x * np.sqrt(p)[:, :, None]).reshape(-1, x.shape[2])
        hessian += spread.T @ spread - expected.T @ expected
    return gradient, hessian


def _climb(  # noqa: PLR0917 - the objective's arguments and a step
    lists: Lists, weights: Floats, step: Floats, mean: Floats, precision: Floats, value: float
) -> tuple[Floats, float]:
    """The weights after the longest of step, step / 2, step / 4 .. that gains anything, and what it gains."""
    share = 1.0
    for _ in range(_HALVINGS):
        moved = weights + share * step
        gained = _objective(lists, moved, mean, precision) - value
        if gained >= 0:
            return moved, gained
        share /= 2
    return weights, 0.0
