"""No adaptation: every task gets the prior. What the other heads are measured against."""

from typing import ClassVar

from torch import Tensor

from innerloop.learning.heads.base import Support


class NoneHead:
    """Parameters [d] that are the same for all."""

    name: ClassVar[str] = "none"

    def __init__(self, prior: Tensor) -> None:
        self._prior = prior

    @property
    def prior(self) -> Tensor:
        return self._prior

    def adapt(self, support: Support) -> Tensor:
        return self._prior.to(support.features.device).expand(len(support.features), -1).clone()  # [T, d]

    def state(self) -> dict[str, Tensor]:
        return {"prior": self._prior}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "NoneHead":
        return cls(state["prior"])
