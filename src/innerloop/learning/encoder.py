"""Items to vectors: what is clicked together lies together. Learned in closed form from the history, then frozen.

Coordinates of a vector of dimension d:

    0 .. d-3   taste: unit length. for the history's items from co-occurrence
    d-2        log-popularity in [0, 1], 0 for an item that isn't in the history
    d-1        1

The co-occurrence matrix M[i, j] sums 1/k over all pairs of events k <= 5 steps apart in one task. Its positive
pointwise mutual information with context smoothing 3/4,

    PPMI[i, j] = max(0, log(M[i, j] * sum_j r_j^0.75 / (r_i * r_j^0.75))),   r_i = sum_j M[i, j]

is factorised by a truncated SVD; U sqrt(S), each row scaled to length 1, is taste (Levy and Goldberg 2014, Levy et al.
2015: skip-gram with negative sampling approximates the same). A second's work for 100 thousand events; no learning
rate, no early stop.

An item that isn't in the history gets the taste that its content foretells, where the shop describes it (see
`described`), else its category's mean, plus a signature, a pseudo-random direction made from its identifier alone. Two
such directions are nearly orthogonal, so that an item of which nothing is known can still be told from the others once
a task has clicked it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from innerloop.learning.episodes import Log

FIXED = 2  # coordinates that aren't taste
_WINDOW = 5
_SMOOTHING = 0.75
_OVERSAMPLING = 8
_CATEGORY_PRIOR = 3.0  # a category's mean is drawn to zero as if by this many items
_CHUNK = 65_536


@dataclass(frozen=True)
class Encoder:
    """The frozen table of N items, and what an item that isn't in it gets."""

    item_ids: list[str]
    vectors: Tensor  # [N, d] float32
    categories: list[str]
    category_vectors: Tensor  # [C, d - 2] float32
    item_categories: Tensor  # [N] int64, rows of `categories`, -1 for none
    described_ids: list[str] = field(default_factory=list)
    """Items that aren't in the table and have a foretold taste all the same."""
    described_vectors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [X, d - 2] float32
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)
    _described_rows: dict[str, int] = field(init=False, repr=False, compare=False)
    _category_rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {name: n for n, name in enumerate(self.item_ids)})
        if not self.described_ids:
            object.__setattr__(self, "described_vectors", self.vectors.new_zeros(0, max(0, self.dimension - FIXED)))
        object.__setattr__(self, "_described_rows", {name: n for n, name in enumerate(self.described_ids)})
        object.__setattr__(self, "_category_rows", {name: n for n, name in enumerate(self.categories)})

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    def item_category_names(self) -> list[str | None]:
        """The category of each of `item_ids`, where it has one."""
        names = [None, *self.categories]
        return [names[row + 1] for row in self.item_categories.tolist()]

    def rows_of(self, item_ids: Sequence[str]) -> Tensor:
        """Where items are in the table, [M] int64; -1 for what isn't."""
        return _rows_in(self._rows, item_ids)

    def described_rows_of(self, item_ids: Sequence[str]) -> Tensor:
        """Where items are among `described_ids`, [M] int64; -1 for what isn't."""
        return _rows_in(self._described_rows, item_ids)

    def category_rows_of(self, categories: Sequence[str | None]) -> Tensor:
        """Where categories are among `categories`, [M] int64; -1 for None and what isn't."""
        return _rows_in(self._category_rows, categories)

    def vector_of(self, item_id: str, category: str | None = None) -> Tensor:
        """Return the vector [d] of one item, in the table or not."""
        return self.vectors_for([item_id], [category])[0]

    def vectors_for(self, item_ids: Sequence[str], categories: Sequence[str | None] | None = None) -> Tensor:
        """Return the vectors [N, d] of any items; `categories`, where known, serve those that aren't in the table."""
        at = self.rows_of(item_ids)
        found = self.vectors[at.clamp(min=0)] if len(self.vectors) else torch.zeros(len(at), self.dimension)
        unknown = (at < 0).nonzero().squeeze(1).tolist()
        if unknown:
            names = [categories[n] for n in unknown] if categories is not None else [None] * len(unknown)
            found[unknown] = self._fallback([item_ids[n] for n in unknown], names)
        return found

    def _fallback(self, item_ids: Sequence[str], categories: Sequence[str | None]) -> Tensor:
        vectors = torch.zeros(len(item_ids), self.dimension)
        vectors[:, :-FIXED] = signatures(item_ids, self.dimension - FIXED)
        vectors[:, -1] = 1.0
        at = self.category_rows_of(categories)
        known = at >= 0
        foretold = self.described_rows_of(item_ids)
        described = foretold >= 0
        known &= ~described
        vectors[known, :-FIXED] += self.category_vectors[at[known]]
        vectors[described, :-FIXED] += self.described_vectors[foretold[described]]
        return vectors


def _rows_in(rows: Mapping[str, int], names: Sequence[str | None]) -> Tensor:
    return torch.tensor([-1 if name is None else rows.get(name, -1) for name in names], dtype=torch.int64)


def learn_encoder(log: Log, dimension: int, categories: Mapping[str, str] | None = None, seed: int = 0) -> Encoder:
    """Learn the encoder of a history whose items are 0 .. N-1 of `log.item_ids`, each in at least one event.

    Popularity counts all of the history alike; `with_popularity` changes that.
    """
    count = len(log.item_ids)
    taste = _factors(_pmi(_pairs(log), count), dimension - FIXED, seed)
    names, means, of_item = _category_means(log.item_ids, taste, categories or {})
    vectors = torch.cat([taste, torch.zeros(count, 1), torch.ones(count, 1)], dim=1)
    return with_popularity(Encoder(log.item_ids, vectors, names, means, of_item), log, float("inf"))


def with_popularity(encoder: Encoder, log: Log, half_life: float) -> Encoder:
    """Return the same encoder with popularity counted so that an event's weight halves every `half_life` seconds."""
    ages = (log.times.max() - log.times).float() / 1000.0 if len(log.times) else log.times.float()
    counts = torch.zeros(len(encoder.item_ids)).index_add_(0, log.items, log.weights * torch.exp2(-ages / half_life))
    vectors = encoder.vectors.clone()
    vectors[:, -FIXED] = counts.log1p() / counts.log1p().max().clamp(min=1e-9)
    return replace(encoder, vectors=vectors)


def signatures(item_ids: Sequence[str], dimension: int) -> Tensor:
    """Make unit vectors [N, dimension] with entries +-1/sqrt(dimension), from a hash of each identifier."""
    size = (dimension + 7) // 8
    drawn = b"".join(hashlib.shake_128(name.encode()).digest(size) for name in item_ids)
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8).reshape(-1, size), axis=1)[:, :dimension]
    return torch.tensor(bits, dtype=torch.float32).mul_(2.0).sub_(1.0).div_(dimension**0.5)


def _pairs(log: Log) -> Tensor:
    """M as a coalesced sparse [N, N]."""
    count, at = len(log.item_ids), torch.arange(len(log.items))
    indices, values = [], []
    for step in range(1, _WINDOW + 1):
        before = at - step
        same = before >= log.first
        left, right = log.items[at[same]], log.items[before[same]]
        differ = left != right
        indices += [torch.stack([left, right])[:, differ], torch.stack([right, left])[:, differ]]
        values += [torch.full((int(differ.sum()),), 1.0 / step)] * 2
    return torch.sparse_coo_tensor(
        torch.cat(indices, dim=1), torch.cat(values), (count, count), check_invariants=False
    ).coalesce()


def _pmi(pairs: Tensor, count: int) -> Tensor:
    """PPMI of a coalesced sparse [N, N], in the same shape."""
    (left, right), values = pairs.indices(), pairs.values()
    totals = torch.zeros(count).index_add_(0, left, values)
    smooth = totals**_SMOOTHING
    information = (values * smooth.sum() / (totals[left] * smooth[right])).log().clamp(min=0.0)
    return torch.sparse_coo_tensor(
        pairs.indices(), information, (count, count), check_invariants=False, is_coalesced=True
    )


def _factors(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """U sqrt(S) [N, rank] of the truncated SVD, rows of unit length; a row of zeros stays one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        q = min(rank + _OVERSAMPLING, len(matrix))
        u, s, _ = torch.svd_lowrank(matrix, q=q, niter=3)
    factors = torch.zeros(len(matrix), rank)
    width = min(rank, q)
    factors[:, :width] = u[:, :width] * s[:width].sqrt()
    return torch.nn.functional.normalize(factors, dim=1, eps=1e-6)


def _category_means(
    item_ids: Sequence[str], taste: Tensor, categories: Mapping[str, str]
) -> tuple[list[str], Tensor, Tensor]:
    """Names and mean taste [C, d - 2] of the categories, drawn to zero where there are few items; each item's [N]."""
    names = sorted(set(categories.values()))
    rows = {name: n for n, name in enumerate(names)}
    of_item = torch.tensor([rows[categories[item]] if item in categories else -1 for item in item_ids])
    of_item = of_item.to(torch.int64)
    return names, category_means(of_item, taste, len(names)), of_item


def category_means(of_item: Tensor, taste: Tensor, count: int) -> Tensor:
    """The mean taste [C, k] of `count` categories, drawn to zero where there are few items; `of_item` [N], -1: none."""
    known = of_item >= 0
    sums, counts = torch.zeros(count, taste.shape[1]), torch.zeros(count)
    sums.index_add_(0, of_item[known], taste[known])
    counts.index_add_(0, of_item[known], torch.ones(int(known.sum())))
    return sums / (counts + _CATEGORY_PRIOR).unsqueeze(1)
