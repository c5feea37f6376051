"""A small network per task, all tasks at once: scores and their derivatives by explicit batched products.

    score(x) = skip . x + second . tanh(first x + bias) + level

A task's parameters are one row of P = d + H d + 2 H + 1 numbers, in the order skip, first, bias, second, level.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # hidden units held at a time when many candidates are scored


class Layers(NamedTuple):
    """The layers of T tasks, or of all with T = 1."""

    skip: Tensor  # [T, d]
    first: Tensor  # [T, H, d]
    bias: Tensor  # [T, H]
    second: Tensor  # [T, H]
    level: Tensor  # [T, 1]

    @classmethod
    def unpack(cls, parameters: Tensor, dimension: int) -> "Layers":
        """See rows [T, P] as layers."""
        hidden = hidden_units(parameters.shape[-1], dimension)
        skip, first, bias, second, level = torch.split_with_sizes(
            parameters, [dimension, hidden * dimension, hidden, hidden, 1], dim=-1
        )
        return cls(skip, first.view(*first.shape[:-1], hidden, dimension), bias, second, level)

    def pack(self) -> Tensor:
        """Return the rows [T, P]."""
        return torch.cat([layer.flatten(1) for layer in self], dim=1)

    def expand(self, tasks: int) -> "Layers":
        return Layers(*(layer.expand(tasks, *layer.shape[1:]) for layer in self))

    def plus(self, gradient: "Layers", size: Tensor) -> "Layers":
        """Move by size [T, 1] times the gradient."""
        steps = (size.view(-1, *[1] * (layer.ndim - 1)) for layer in self)
        return Layers(*(a + step * b for a, b, step in zip(self, gradient, steps, strict=True)))

    def detach(self) -> "Layers":
        return Layers(*(layer.detach() for layer in self))


def hidden_units(parameters: int, dimension: int) -> int:
    """H of P and d."""
    return (parameters - dimension - 1) // (dimension + 2)


def forward(layers: Layers, features: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, S] and hidden units [T, S, H] of features [T, S, d] or [S, d]."""
    hidden = torch.tanh(features @ layers.first.mT + layers.bias.unsqueeze(1))
    linear, bent = features @ layers.skip.unsqueeze(-1), hidden @ layers.second.unsqueeze(-1)
    return (linear + bent).squeeze(-1) + layers.level, hidden


def gradient(layers: Layers, features: Tensor, hidden: Tensor, pull: Tensor) -> Layers:
    """Return the sum over examples of pull [T, S] times d score / d layer, for features [T, S, d], hidden [T, S, H]."""
    row = pull.unsqueeze(1)  # [T, 1, S]
    before = pull.unsqueeze(-1) * layers.second.unsqueeze(1) * (1.0 - hidden.square())  # [T, S, H]
    return Layers(
        skip=(row @ features).squeeze(1),
        first=before.mT @ features,
        bias=before.sum(1),
        second=(row @ hidden).squeeze(1),
        level=pull.sum(1, keepdim=True),
    )


def blocks(candidates: int, numbers: int) -> Iterator[slice]:
    """Split `candidates` that need `numbers` hidden units each into ranges that fit memory."""
    step = max(1, _AT_ONCE // max(1, numbers))
    for first in range(0, max(1, candidates), step):
        yield slice(first, first + step)


def scores(parameters: Tensor, features: Tensor) -> Tensor:
    """Scores [T, N] of features [N, d] or [T, N, d] under parameters [T, P]."""
    layers = Layers.unpack(parameters, features.shape[-1])
    numbers = len(parameters) * layers.bias.shape[-1]
    return torch.cat([forward(layers, features[..., some, :])[0] for some in blocks(features.shape[-2], numbers)], 1)
