"""A trained sequence model, frozen: what a task's items in their order make likely next.

    score of item v after a history  =  q . e_v + b_v

e_v and b_v are the item's learned vector and bias; q is the history encoder's vector, adapted by a head where one was
taught (see `history_head`). An item that wasn't trained on has the vector of the unknown identifier plus its
category's, and those of its price and words where the shop tells them, which ID dropout taught, and a low bias:
nothing speaks for it yet.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from innerloop.learning.history_encoder import KINDS, history_encoder, last_of
from innerloop.learning.history_head import HistoryHead
from innerloop.learning.item_encoder import UNSEEN, ItemContent
from innerloop.learning.softmax_training import SequenceModel

_KINDS = tuple(sorted(KINDS))  # the order is what a release keeps
_HISTORY, _HEAD = "history.", "head."
_UNSEEN_BIAS = 0.1  # quantile
_TASKS_AT_ONCE = 64  # what a solve goes through stays in the cache


@dataclass(frozen=True)
class SequenceEncoder:
    """The table of N items, their last coordinate the bias, and what turns a task's vectors into its query."""

    vectors: Tensor  # [N, d + 1] float32
    unseen: Tensor  # [d + 1]
    category_vectors: Tensor  # [C, d + 1], the bias's column zero
    described: Tensor  # [X, d + 1], of items that aren't in the table and are described
    kind: str
    capacity: int
    layers: int
    history: nn.Module = field(repr=False)
    head: HistoryHead | None = field(repr=False, default=None)

    @classmethod
    def of(cls, model: SequenceModel, kind: str, capacity: int, layers: int, described: ItemContent) -> Self:
        """Freeze a trained model; `described` is the content of X items that it wasn't trained on."""
        vectors, bias = (part.cpu() for part in model.table())
        unseen, of_category = model.items.identifiers.weight.detach()[-1].cpu(), model.items.categories
        theirs = unseen.new_zeros(0, len(unseen)) if of_category is None else of_category.weight.detach()[1:].cpu()
        low = bias.kthvalue(1 + int(_UNSEEN_BIAS * len(bias))).values if len(bias) else bias.new_zeros(())
        of_described = _of_unseen(model, described, low)
        history = model.history.cpu().eval().requires_grad_(requires_grad=False)
        head = None if model.head is None else model.head.cpu().eval().requires_grad_(requires_grad=False)
        return cls(
            torch.cat([vectors, bias.unsqueeze(1)], 1),
            torch.cat([unseen, low.view(1)]),
            nn.functional.pad(theirs, (0, 1)),
            of_described,
            kind,
            capacity,
            layers,
            history,
            head,
        )

    @property
    def dimension(self) -> int:
        """Of vectors and queries, d + 1."""
        return self.vectors.shape[1]

    def unseen_vectors(self, categories: Tensor) -> Tensor:
        """Vectors [M, d + 1] of items that aren't in the table, by the rows of their categories [M], -1 for none."""
        known = categories >= 0
        found = self.unseen.expand(len(categories), -1).clone()
        found[known] += self.category_vectors[categories[known]]
        return found

    @torch.inference_mode()
    def queries(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Queries [T, d + 1] of histories' vectors [T, S, d + 1], oldest first, of which the first `lengths` [T] count.

        Only the newest `capacity` are looked at. A task without any gets the biases alone.
        """
        found = vectors.new_zeros(len(vectors), self.dimension)
        found[:, -1] = 1.0
        parts = zip(torch.split(vectors[..., :-1], _TASKS_AT_ONCE), torch.split(lengths, _TASKS_AT_ONCE), strict=True)
        for number, (whole, length) in enumerate(parts):
            some, count = _newest(whole, length, self.capacity)
            query = last_of(self.history, some, count)
            query = query if self.head is None else self.head(query, some, count)
            rows = slice(number * _TASKS_AT_ONCE, number * _TASKS_AT_ONCE + len(some))
            found[rows, :-1] = torch.where((count > 0).unsqueeze(1), query, 0.0)
        return found

    def on(self, device: torch.device) -> Self:
        """The same whose queries are made on that device; the table stays where it is."""
        if device.type == "cpu":
            return self
        head = None if self.head is None else deepcopy(self.head).to(device)
        return replace(self, history=deepcopy(self.history).to(device), head=head)

    def faults(self, items: int, categories: int, described: int) -> list[str]:
        """What is wrong with it, in a release of so many items, categories and described items beside them."""
        width = self.dimension
        expected = {
            "item vectors": (self.vectors, (items, width)),
            "an unseen item's vector": (self.unseen, (width,)),
            "category vectors": (self.category_vectors, (categories, width)),
            "vectors of described items": (self.described, (described, width)),
        }
        faults = [
            f"{what} that are not finite float32 of shape {shape}"
            for what, (tensor, shape) in expected.items()
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())
        ]
        inner = [*self.history.parameters(), *(() if self.head is None else self.head.parameters())]
        if not all(bool(parameter.isfinite().all()) for parameter in inner):
            faults.append("a history encoder that is not finite")
        return faults

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors by name, for a release."""
        numbers = torch.tensor([_KINDS.index(self.kind), self.capacity, self.layers])
        table = {
            "vectors": self.vectors,
            "unseen": self.unseen,
            "category_vectors": self.category_vectors,
            "described": self.described,
        }
        parts = {_HISTORY + name: value for name, value in self.history.state_dict().items()}
        if self.head is not None:
            parts |= {_HEAD + name: value for name, value in self.head.state_dict().items()}
        return {**table, "numbers": numbers, **parts}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> Self:
        """The encoder that `state()` is of. Raises KeyError, ValueError or RuntimeError when it doesn't fit."""
        kind, capacity, layers = state["numbers"].tolist()
        width = state["unseen"].shape[0] - 1
        history = history_encoder(_KINDS[kind], width, capacity=capacity, layers=layers, dropout=0.0)
        history.load_state_dict(_part(state, _HISTORY))
        head = None
        if of_head := _part(state, _HEAD):
            head = HistoryHead(width)
            head.load_state_dict(of_head)
            head.eval().requires_grad_(requires_grad=False)
        return cls(
            state["vectors"],
            state["unseen"],
            state["category_vectors"],
            state.get("described", state["vectors"][:0]),  # a release of before there were any
            _KINDS[kind],
            capacity,
            layers,
            history.eval().requires_grad_(requires_grad=False),
            head,
        )


def _of_unseen(model: SequenceModel, content: ItemContent, bias: Tensor) -> Tensor:
    """The vectors [X, d + 1] of items of that content and an identifier that nobody has met."""
    device = model.bias.device
    unseen = torch.full((len(content),), UNSEEN, device=device)
    with torch.inference_mode():
        vectors = model.items.eval()(unseen, content.to(device)).cpu()
    return torch.cat([vectors, bias.expand(len(content), 1)], 1)


def _newest(vectors: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The newest `capacity` of each history [T, S, d], moved to the front, and how many these are."""
    if vectors.shape[1] <= capacity:
        return vectors, lengths
    kept = lengths.clamp(max=capacity)
    at = (lengths - kept).unsqueeze(1) + torch.arange(capacity, device=vectors.device)
    at = at.clamp(max=vectors.shape[1] - 1)
    return vectors.gather(1, at.unsqueeze(2).expand(-1, -1, vectors.shape[2])), kept


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
