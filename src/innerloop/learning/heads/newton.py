"""Logistic regression of many small tasks at once, by Newton's method in coordinates in which the prior is N(0, I).

With scores f = f0 + Bu (B = XR, f0 = Xm) a task minimises  sum c_i loss(f_i, y_i) + |u|^2 / 2. Newton's step is the
weighted least-squares problem (iteratively reweighted, McCullagh and Nelder 1989)

    (I + B'VB) u' = B' (V Bu + c (y - p)),    p = sigmoid(f),  V = diag(c p (1 - p))

which is the gaussian head's system with Z = V^(1/2) B and r = V^(1/2) Bu + c (y - p) / V^(1/2).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from innerloop.learning.heads.solve import whitened_step

_LEAST_CURVATURE = 0.01  # a sure example's p (1 - p) would divide by nearly nothing; only the path changes, not the end
_ROUNDING = 1e-4  # of a loss
_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0)  # of a step: a whole one overshoots where the prior is far off


class Whitened(NamedTuple):
    """Examples of T tasks against a prior N(0, I): score = offset + inputs @ u. Rows that are padded are zero."""

    inputs: Tensor  # B [T, S, d]
    offset: Tensor  # f0 [T, S]
    labels: Tensor  # y [T, S]
    scale: Tensor  # c^(1/2) [T, S]: the root of how much an example says

    def along(self, step: Tensor) -> Tensor:
        """What a step u [T, d] adds to the scores, [T, S]."""
        return (self.inputs @ step.unsqueeze(-1)).squeeze(-1)


def curvature(scores: Tensor) -> Tensor:
    """The second derivative p (1 - p) of the logistic loss at scores of any shape."""
    return scores.sigmoid() * (-scores).sigmoid()


def newton_step(white: Whitened, step: Tensor) -> Tensor:
    """Return the next u [T, d] from the present one, as far along the way as the loss does not grow."""
    added = white.along(step)
    root = curvature(white.offset + added).clamp(min=_LEAST_CURVATURE).sqrt()
    residual = white.labels - (white.offset + added).sigmoid()
    target = whitened_step(
        white.inputs * (white.scale * root).unsqueeze(-1), white.scale * (root * added + residual / root)
    )
    towards, move = white.along(target) - added, target - step
    with torch.no_grad():
        losses = torch.stack([_loss(white, added + part * towards, step + part * move) for part in _FRACTIONS])
        # The longest that is no step up. Near the end losses differ by rounding alone, which must not choose.
        falls = losses <= losses[-1] * (1.0 + _ROUNDING)
        part = torch.tensor(_FRACTIONS, dtype=step.dtype, device=step.device)[falls.byte().argmax(0)]
    return step + part.unsqueeze(-1) * move


def _loss(white: Whitened, added: Tensor, step: Tensor) -> Tensor:
    """The penalised loss of each task, [T]."""
    scores = white.offset + added
    data = functional.softplus(scores) - white.labels * scores
    return (white.scale.square() * data).sum(-1) + step.square().sum(-1) / 2.0
