"""What a head is: a rule that turns a task's few examples into the task's parameters, and these into scores.

A task here is anything with a support set. What its parameters are is the head's own matter: for a linear head the
weights of the features, for others a context vector or the layers of a small network.
"""

from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Likelihood = Literal["gaussian", "logistic"]
"""How labels come from scores: a number with noise, or yes or no with probability sigmoid(score)."""


@dataclass(frozen=True)
class Support:
    """The examples of T tasks, padded to S each. Where mask is False nothing else is looked at."""

    features: Tensor  # [T, S, d] float32
    labels: Tensor  # [T, S] float32; 1 for what was clicked or bought
    weights: Tensor  # [T, S] float32, >= 0: how much the kind of event says
    ages: Tensor  # [T, S] float32 seconds before the task's newest example, >= 0
    mask: Tensor  # [T, S] bool

    def take(self, rows: Tensor | slice) -> "Support":
        """Return the tasks `rows`: indices [t], a mask [T] or a slice."""
        return Support(*(getattr(self, field.name)[rows] for field in fields(self)))

    def shortened(self, width: int) -> "Support":
        """Return the same with `width` places a task: what is behind them must be padding."""
        return Support(*(getattr(self, field.name)[:, :width] for field in fields(self)))

    def cleaned(self) -> "Support":
        """Return the same with zeros where padded, so that gradients through it are finite whatever was there."""
        padded = ~self.mask
        return Support(
            features=self.features.masked_fill(padded.unsqueeze(-1), 0.0),
            labels=self.labels.masked_fill(padded, 0.0),
            weights=self.weights.masked_fill(padded, 0.0),
            ages=self.ages.masked_fill(padded, 0.0),
            mask=self.mask,
        )

    def confidence(self, half_life: float | Tensor) -> Tensor:
        """How much each example says: weight * 2^(-age / half_life), [T, S]; 0 where padded."""
        return (self.weights * torch.exp2(-self.ages / half_life)).masked_fill(~self.mask, 0.0)


class Head(Protocol):
    """One way to adapt. Every implementation keeps these promises, and tests/property/test_heads.py holds it to them.

    The order of a task's examples does not matter, nor do the other tasks of the batch or the padding (to rounding;
    `placebo` alone looks at other tasks, which is what it is for). A task without examples gets the prior, bit for bit.
    The inputs are not changed. Results are float32 on the device of the support set, also under autocast.
    """

    @property
    def name(self) -> str: ...

    @property
    def linear(self) -> bool:
        """Whether the score is features @ parameters, so that an index of item vectors can be searched with them."""
        ...

    @property
    def prior(self) -> Tensor:
        """The parameters of a task of which nothing is known, [P]; P is the features' d for a linear head."""
        ...

    def adapt(self, support: Support) -> Tensor:
        """Return the parameters of each task, [T, P] float32, on the device of the support set."""
        ...

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        """Score candidates, [T, N], given parameters [T, P] and features [N, d], the same for all, or [T, N, d]."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything the head was taught, by name: what a release keeps, and what `heads.restore` reads."""
        ...


@runtime_checkable
class Uncertain(Protocol):
    """A head that also knows how sure it is."""

    def variance(self, support: Support, features: Tensor) -> Tensor:
        """Return the posterior variance of each candidate's score [T, N], >= 0; features as in `Head.score`."""
        ...


def linear_scores(parameters: Tensor, features: Tensor) -> Tensor:
    """Scores [T, N] of features [N, d] or [T, N, d] under parameters [T, d]."""
    if features.ndim == 2:  # noqa: PLR2004  # shared by all tasks
        return parameters @ features.T
    return (features @ parameters.unsqueeze(-1)).squeeze(-1)
