"""What followed what over the whole history: item-kNN with sequential rules (Ludewig and Jannach 2018).

Over all pairs of one task's events k <= 10 steps apart, M[i, j] sums 0.7^(k - 1) where j came after i and half of that
where it came before. A pair says M[i, j] / (n_i^0.4 n_j^0.2), n counting events, of which each item keeps the largest
`KEPT`. After a history, an item j has the sum over the history's newest items of what they say of j, times 0.7 for each
later one. Live co-visits (`trends`) know what is going on and forget; this knows the long run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.episodes import Log

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

KEPT = 64
_WINDOW, _DECAY, _BACKWARD = 10, 0.7, 0.5
_FROM_POWER, _TO_POWER = 0.4, 0.2
_FORGET, _NEWEST = 0.7, 10


@dataclass(frozen=True)
class Transitions:
    """For each of N items the `KEPT` others that go with it most, -1 where there are fewer, and how much."""

    neighbours: Tensor  # [N, K] int32
    weights: Tensor  # [N, K] float32

    @classmethod
    def learn(cls, log: Log) -> Self:
        """Count over a history, each of whose items is in at least one event."""
        count = len(log.item_ids)
        pairs = _pairs(log, count)
        met = np.maximum(np.bincount(log.items.numpy(), minlength=count), 1).astype(np.float32)
        pairs.data *= np.repeat(met**-_FROM_POWER, np.diff(pairs.indptr)) * (met**-_TO_POWER)[pairs.indices]
        rows = np.repeat(np.arange(count), np.diff(pairs.indptr))
        order = np.lexsort((-pairs.data, rows))
        column = np.arange(len(order)) - pairs.indptr[rows]  # `order` keeps the rows together
        kept = column < KEPT
        neighbours, weights = np.full((count, KEPT), -1, np.int32), np.zeros((count, KEPT), np.float32)
        neighbours[rows[kept], column[kept]] = pairs.indices[order][kept]
        weights[rows[kept], column[kept]] = pairs.data[order][kept]
        return cls(torch.from_numpy(neighbours), torch.from_numpy(weights))

    def state(self) -> dict[str, Tensor]:
        return {"neighbours": self.neighbours, "weights": self.weights}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> Self:
        return cls(state["neighbours"], state["weights"])

    def faults(self, items: int) -> list[str]:
        """What is wrong with them, in a release of so many items."""
        of, says = self.neighbours, self.weights
        if (
            of.shape != (items, KEPT)
            or says.shape != of.shape
            or of.dtype != torch.int32
            or says.dtype != torch.float32
        ):
            return [f"transitions that are not of shape {(items, KEPT)}"]
        if not bool(((of >= -1) & (of < items)).all()) or not bool((says.isfinite() & (says >= 0)).all()):
            return ["transitions to items that there are not, or of no weight"]
        return []

    def matrix(self, place_of_row: Ints, places: int) -> scipy.sparse.csr_matrix:
        """The same as [places, places] over a catalogue, given where the N items are in it."""
        there = (self.neighbours >= 0).numpy()
        rows = np.repeat(place_of_row, there.sum(1))
        columns = place_of_row[self.neighbours.numpy()[there]]
        shape = (places, places)
        return scipy.sparse.csr_matrix((self.weights.numpy()[there], (rows, columns)), shape)


def followers(recent: Ints, matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """What follows tasks' newest items `recent` [T, S], newest first, -1 for none: [T, places], indices in order."""
    newest = recent[:, :_NEWEST]
    known = (newest >= 0) & (newest < matrix.shape[0])
    step = np.nonzero(known)[1]
    says = np.float32(_FORGET) ** step.astype(np.float32)
    starts = np.concatenate(([0], np.cumsum(known.sum(1))))
    history = scipy.sparse.csr_matrix((says, newest[known], starts), (len(recent), matrix.shape[0]))
    found = scipy.sparse.csr_matrix(history @ matrix)
    found.sort_indices()
    return found


def best_followers(found: scipy.sparse.csr_matrix, k: int) -> Ints:
    """The k largest of each row, as places [T, k] in no order, -1 where there are fewer."""
    sizes = np.diff(found.indptr)
    width = max(k + 1, int(sizes.max(initial=0)))
    task = np.repeat(np.arange(len(sizes)), sizes)
    column = np.arange(len(task)) - np.repeat(found.indptr[:-1], sizes)
    table = np.zeros((len(sizes), width), np.float32)
    table[task, column] = found.data
    places = np.full((len(sizes), width), -1)
    places[task, column] = found.indices
    best = np.argpartition(table, -k, axis=1)[:, -k:]
    return np.take_along_axis(places, best, 1)


def says_of(found: scipy.sparse.csr_matrix, tasks: Ints, places: Ints) -> Floats:
    """What `followers` says of candidates [M]: nothing of a place that its matrix is too small for."""
    span = found.shape[1]
    sizes = np.diff(found.indptr)
    keys = np.repeat(np.arange(len(sizes)), sizes) * span + found.indices
    wanted = tasks * span + places
    if not len(keys):
        return np.zeros(len(wanted), np.float32)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((places < span) & (keys[at] == wanted), found.data[at], np.float32(0.0))


def _pairs(log: Log, count: int) -> scipy.sparse.csr_matrix:
    at = np.arange(len(log.items))
    items, first = log.items.numpy().astype(np.int32), log.first.numpy()
    before, after, says = [], [], []
    for step in range(1, _WINDOW + 1):
        same = at - step >= first
        left, right = items[at[same] - step], items[at[same]]
        differ = left != right
        before.append(left[differ])
        after.append(right[differ])
        says.append(np.full(int(differ.sum()), _DECAY ** (step - 1), np.float32))
    forth = scipy.sparse.csr_matrix(
        (np.concatenate(says), (np.concatenate(before), np.concatenate(after))), (count, count)
    )
    return scipy.sparse.csr_matrix(forth + np.float32(_BACKWARD) * forth.T.tocsr())
