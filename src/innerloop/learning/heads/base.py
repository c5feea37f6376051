"""What a head is: a rule that turns a task's few examples into the task's parameters.

A task here is anything with a support set. The score of an item for a task is features @ parameters.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Support:
    """The examples of T tasks, padded to S each. Where mask is False nothing else is looked at."""

    features: Tensor  # [T, S, d] float32
    labels: Tensor  # [T, S] float32; 1 for what was clicked or bought
    weights: Tensor  # [T, S] float32, >= 0: how much the kind of event says
    ages: Tensor  # [T, S] float32 seconds before the task's newest example, >= 0
    mask: Tensor  # [T, S] bool


class Head(Protocol):
    """One way to adapt. Every implementation keeps these promises, and tests/property/test_heads.py holds it to them.

    The order of a task's examples does not matter, nor do the other tasks of the batch or the padding (to rounding).
    A task without examples gets the prior, bit for bit. The inputs are not changed.
    """

    @property
    def name(self) -> str: ...

    @property
    def prior(self) -> Tensor:
        """The parameters of a task of which nothing is known, [d]."""
        ...

    def adapt(self, support: Support) -> Tensor:
        """Return the parameters of each task, [T, d] float32, on the device of the support set."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything the head was taught, by name: what a release keeps, and what `heads.restore` reads."""
        ...
