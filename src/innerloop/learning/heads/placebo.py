"""A control: each task is adapted on the examples of another. What such a head gains isn't owed to the task's own."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.learning.heads.base import Head, Support

_INNER = "inner."
_NAME = "inner_name"
_SEED = 0


class PlaceboHead:
    """Another head, given another task's support set of the same batch.

    The sets of the tasks that have any examples are passed on around one cycle, fixed by how many they are: nobody
    keeps their own, every set is used once. A task without examples, or the only one with any, gets the prior. Tasks
    of a batch should belong to different users.
    """

    name: ClassVar[str] = "placebo"

    def __init__(self, inner: Head) -> None:
        self.inner = inner

    @property
    def linear(self) -> bool:
        return self.inner.linear

    @property
    def prior(self) -> Tensor:
        return self.inner.prior

    def adapt(self, support: Support) -> Tensor:
        own = torch.arange(len(support.mask), device=support.mask.device)
        others = own.clone()
        filled = support.mask.any(1).nonzero().squeeze(1)
        order = torch.randperm(len(filled), generator=torch.Generator().manual_seed(_SEED)).to(filled.device)
        cycle = filled[order]
        others[cycle] = cycle.roll(1)
        given = support.take(others)
        alone = (others == own) & support.mask.any(1)
        masked = given.mask & ~alone.unsqueeze(1)
        return self.inner.adapt(Support(given.features, given.labels, given.weights, given.ages, masked))

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        return self.inner.score(parameters, features)

    def state(self) -> dict[str, Tensor]:
        name = torch.frombuffer(bytearray(self.inner.name.encode()), dtype=torch.uint8)
        return {_NAME: name} | {f"{_INNER}{key}": value for key, value in self.inner.state().items()}

    @classmethod
    def restore(
        cls, state: dict[str, Tensor], restorers: Mapping[str, Callable[[dict[str, Tensor]], Head]]
    ) -> "PlaceboHead":
        """Restore with the head inside, by `restorers` (heads.RESTORE)."""
        inner = {key.removeprefix(_INNER): value for key, value in state.items() if key.startswith(_INNER)}
        return cls(restorers[bytes(state[_NAME].tolist()).decode()](inner))
