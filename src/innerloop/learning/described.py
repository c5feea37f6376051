"""What the shop says of its items, and what that foretells of the taste of those that nobody has met.

Taste is learned from what is clicked together (see `encoder`), so an item without a history has none, and until now is
known by its category's mean. Where the shop describes its items, a ridge regression over those with a history foretells
the taste t of the others from their content x:

    t(item) = W' x(item),   W = argmin  sum_i |t_i - W' x_i|^2 + ridge |W|^2

x is 1 for the item's category, 1 for its price bucket, and 1 / sqrt(n) for each hash bucket of the n words and
neighbouring pairs of its text (see `item_encoder.ContentCode`). The ridge is chosen on a fifth of the items, which the
regression has not seen; training leaves the whole out where it foretells those no better than their categories' means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix
from torch import Tensor

from innerloop.learning.encoder import FIXED, Encoder, category_means
from innerloop.learning.item_encoder import ContentCode, ItemContent

COLUMNS = {"item_id": pl.String(), "category": pl.String(), "price": pl.Float64(), "text": pl.String()}
"""What a table of items has; all but the first may be null."""

_WORD_BUCKETS = 2_048  # the regression solves a system of so many
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
_HELD_OUT = 5  # one item in so many
_LEAST_ITEMS = 50


@dataclass(frozen=True)
class Described:
    """The items that the shop tells of, and their content as numbers; the last row is of an item it says nothing of."""

    item_ids: list[str]
    names: list[str | None]  # of their categories
    code: ContentCode
    content: ItemContent
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {item: row for row, item in enumerate(self.item_ids)})

    @classmethod
    def of(cls, items: pl.DataFrame, categories: Mapping[str, str]) -> "Described":
        """Read a table with `COLUMNS`; the category that events name for an item goes before the table's."""
        items = items.select(*COLUMNS).unique("item_id", keep="last", maintain_order=True)
        named = pl.Series("category", [categories.get(item) for item in items["item_id"]], dtype=pl.String)
        items = items.with_columns(named.fill_null(items["category"]))
        unknown = pl.DataFrame({name: [None] for name in COLUMNS}, schema=COLUMNS)
        code = ContentCode.of(items, word_buckets=_WORD_BUCKETS)
        content = code.encode(pl.concat([items, unknown]))
        return cls(items["item_id"].to_list(), items["category"].to_list(), code, content)

    @classmethod
    def none(cls) -> "Described":
        """Of a shop that tells nothing of its items."""
        return cls.of(pl.DataFrame(schema=COLUMNS), {})

    def content_of(self, item_ids: Sequence[str]) -> ItemContent:
        """The content of any items; of those that it says nothing of, nothing."""
        nothing = len(self.item_ids)
        return self.content.take(torch.tensor([self._rows.get(item, nothing) for item in item_ids], dtype=torch.int64))

    def knows(self, item_ids: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([item in self._rows for item in item_ids], np.bool_)

    def besides(self, item_ids: Sequence[str]) -> list[str]:
        """Those that it describes and that aren't among `item_ids`."""
        known = set(item_ids)
        return [item for item in self.item_ids if item not in known]

    def category_names(self, item_ids: Sequence[str]) -> list[str | None]:
        """The category of each of some items, all of which it describes."""
        return [self.names[self._rows[item]] for item in item_ids]


class Worth(NamedTuple):
    """The share of the taste of held-out items that is foretold: of its squares, below 0 where zero would do better."""

    content: float
    category: float
    """By the mean of their category."""


def worth_of_content(encoder: Encoder, described: Described, seed: int = 0) -> Worth | None:
    """How well the described items of the encoder's table foretell a fifth of them; None when they are too few."""
    lesson = _Lesson.of(encoder, described)
    if len(lesson.taste) < _LEAST_ITEMS:
        return None
    held = lesson.held_out(seed)
    return Worth(max(lesson.foretold(held).values()), _by_category(lesson.categories, lesson.taste, held))


def with_described(encoder: Encoder, described: Described, seed: int = 0) -> Encoder:
    """The encoder with a taste for the described items that aren't in its table, where its own teach one."""
    lesson = _Lesson.of(encoder, described)
    ids = described.besides(encoder.item_ids)
    if len(lesson.taste) < _LEAST_ITEMS or not ids:
        return encoder
    foretold = lesson.foretold(lesson.held_out(seed))
    weights = _Regression(lesson.features, lesson.taste).weights(max(foretold, key=foretold.__getitem__))
    taste = _features(described.content_of(ids), described.code) @ weights
    return replace(encoder, described_ids=ids, described_vectors=torch.from_numpy(taste).float())


@dataclass(frozen=True)
class _Lesson:
    """The M items that have both a taste and a description."""

    features: csr_matrix  # [M, F]
    taste: Tensor  # [M, d - 2]
    categories: Tensor  # [M] int64, -1 for none

    @classmethod
    def of(cls, encoder: Encoder, described: Described) -> "_Lesson":
        rows = np.flatnonzero(described.knows(encoder.item_ids)).tolist()
        content = described.content_of([encoder.item_ids[row] for row in rows])
        return cls(_features(content, described.code), encoder.vectors[rows, :-FIXED], encoder.item_categories[rows])

    def held_out(self, seed: int) -> NDArray[np.bool_]:  # [M]
        drawn: NDArray[np.bool_] = np.random.default_rng(seed).permutation(len(self.taste)) % _HELD_OUT == 0
        return drawn

    def foretold(self, held: NDArray[np.bool_]) -> dict[float, float]:
        """By ridge the share of the held-out items' taste that the others' regression foretells."""
        learned = _Regression(self.features[~held], self.taste[torch.from_numpy(~held)])
        asked, taste = self.features[held], self.taste[torch.from_numpy(held)]
        return {ridge: _explained(learned.weights(ridge), asked, taste) for ridge in _RIDGES}


class _Regression:
    """Ridge regression of targets [N, k] on features [N, F], for several ridges."""

    def __init__(self, features: csr_matrix, targets: Tensor) -> None:
        self._gram = (features.T @ features).toarray()
        self._moments = features.T @ targets.double().numpy()

    def weights(self, ridge: float) -> NDArray[np.float64]:
        """W [F, k]."""
        factor = cho_factor(self._gram + ridge * np.eye(len(self._gram)), overwrite_a=True)
        weights: NDArray[np.float64] = cho_solve(factor, self._moments)
        return weights


def _features(content: ItemContent, code: ContentCode) -> csr_matrix:
    """The content x of N items [N, F]: categories, price buckets, words."""
    counts = content.word_starts.diff().numpy()
    of_word = np.repeat(np.arange(len(content)), counts)
    prices = len(code.categories)
    words = prices + (len(code.price_edges) + 1 if code.has_price else 0)
    parts = [
        _one_hot(content.categories.numpy(), 0),
        _one_hot(content.prices.numpy(), prices),
        (of_word, words + content.words.numpy(), 1.0 / np.sqrt(counts[of_word])),
    ]
    rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return csr_matrix((values, (rows, columns)), shape=(len(content), words + code.word_buckets))


def _one_hot(
    numbers: NDArray[np.int64], first: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rows, columns from `first` on and ones for numbers [N] from 1; 0 is unknown."""
    rows = np.flatnonzero(numbers)
    return rows, first + numbers[rows] - 1, np.ones(len(rows))


def _explained(weights: NDArray[np.float64], features: csr_matrix, taste: Tensor) -> float:
    """The share of the squares of taste [N, k] that is foretold; below 0 where nothing would be better."""
    left = taste.numpy() - features @ weights
    return float(1.0 - np.square(left).sum() / max(float(taste.square().sum()), 1e-12))


def _by_category(categories: Tensor, taste: Tensor, held: NDArray[np.bool_]) -> float:
    """The same by the mean taste of the category [N], -1 for none, of the items that aren't held out."""
    there = torch.from_numpy(held)
    means = category_means(categories[~there], taste[~there], int(categories.max()) + 1 if len(categories) else 0)
    foretold = torch.cat([means, means.new_zeros(1, means.shape[1])])[categories[there]]  # -1 is the last
    left = taste[there] - foretold
    return float(1.0 - left.square().sum() / taste[there].square().sum().clamp(min=1e-12))
