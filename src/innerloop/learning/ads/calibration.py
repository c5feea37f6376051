"""Platt scaling: probabilities that mean what they say, from matured labels.

p = sigmoid(slope * logit + intercept), slope and intercept fitted by penalised likelihood on predictions whose labels
are final (Platt 1999). The penalty draws to slope 1 and intercept 0, so that few labels change little.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.learning.ads.logistic import Normal, Tasks, map_estimate

_FIXED = 1e9
_PRECISION = (50.0, 4.0)  # of the slope around 1, of the intercept around 0


@dataclass(frozen=True)
class Platt:
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor) -> "Platt":
        """From logits [N] and final labels [N] of 0 and 1; the identity when N is 0."""
        return cls._fit(logits, labels, 1.0, _PRECISION)

    def recentred(self, logits: Tensor, labels: Tensor) -> "Platt":
        """The same slope, and the intercept that these logits [N] and labels [N] need; itself when N is 0.

        For a head that has been learned on all examples: where its logits lie is told by the very examples it was
        learned on, how far they can be trusted only by a head that hadn't seen them.
        """
        return self._fit(logits, labels, self.slope, (_FIXED, _PRECISION[1])) if len(labels) else self

    @classmethod
    def _fit(cls, logits: Tensor, labels: Tensor, slope: float, precision: tuple[float, float]) -> "Platt":
        if not len(labels):
            return cls()
        x = torch.stack([logits.double(), torch.ones_like(logits, dtype=torch.float64)], -1)
        prior = Normal(torch.tensor([slope, 0.0], dtype=torch.float64), torch.tensor(precision, dtype=torch.float64))
        tasks = Tasks(x[None], labels.double()[None], torch.ones(1, len(labels), dtype=torch.float64))
        found, _ = map_estimate(tasks, prior, steps=20)
        return cls(*found[0].tolist())

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities of the same shape."""
        return torch.sigmoid(self.slope * logits + self.intercept)
