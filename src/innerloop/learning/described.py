"""What the shop says of its items, and what that foretells of the taste of those that nobody has met.

Taste is learned from what is clicked together (see `encoder`), so an item without a history has none. Where the shop
describes its items, a ridge regression over those with a history foretells the taste t of the others from their content
x:

    t(item) = W' x(item),   W = argmin  sum_i |t_i - W' x_i|^2 + ridge |W|^2

x is 1 for the item's category, 1 for its price bucket, and 1 / sqrt(n) for each hash bucket of the n words and
neighbouring pairs of its text (see `item_encoder.ContentCode`). A fifth of the items chooses the ridge, and another
fifth says whether content foretells more than the mean of the category that its events name; if not, training leaves it
out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
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

_WORD_BUCKETS = 2_048
_MOST_FEATURES = 3_000  # the regression solves a system of so many: those that most items have
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0)
_PARTS = 5  # of the items: one chooses the ridge, one judges
_LEAST_ITEMS = 50
_SURE = 2.0  # standard errors by which content must foretell more than the category does


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

    def besides(self, encoder: Encoder, most: int) -> list[str]:
        """The first `most` that aren't in the encoder's table.

        Where items of the table have categories, only those of such a category: the regression knows no other.
        """
        known, named = set(encoder.item_ids), set(encoder.categories)
        described = zip(self.item_ids, self.names, strict=True)
        others = (item for item, name in described if item not in known and (not named or name in named))
        return list(islice(others, most))

    def digest(self) -> str:
        """Of all that it says."""
        content = self.content
        told = (content.categories, content.prices, content.words, content.word_starts)
        parts = [repr((self.item_ids, self.code)).encode(), *(part.numpy().tobytes() for part in told)]
        return hashlib.sha256(b"".join(parts)).hexdigest() if self.item_ids else ""

    def category_names(self, item_ids: Sequence[str]) -> list[str | None]:
        """The category of each of some items, all of which it describes."""
        return [self.names[self._rows[item]] for item in item_ids]


class Worth(NamedTuple):
    """The share of the taste of held-out items that is foretold: of its squares, below 0 where zero would do better."""

    content: float
    category: float
    """By the mean of their category."""
    sure: bool
    """Whether content foretells more of them, beyond chance."""


def with_described(
    encoder: Encoder, described: Described, *, most: int, seed: int = 0, told: Mapping[str, str] | None = None
) -> tuple[Encoder, Worth | None]:
    """The encoder with a taste for `most` described items that aren't in its table, and what that is worth.

    It is worth what it foretells beyond the categories that events have `told` of items (all of the encoder's without
    it): of an item that nobody has met, a service knows no other.
    The encoder as it was, and None, when too few of its items are described to learn from.
    """
    lesson = _Lesson.of(encoder, described, told)
    if len(lesson.taste) < _LEAST_ITEMS:
        return encoder, None
    part = np.random.default_rng(seed).permutation(len(lesson.taste)) % _PARTS
    learned = _Regression(lesson.features[part > 1], lesson.taste[part > 1])
    left = {ridge: lesson.left(learned.weights(ridge), part == 0) for ridge in _RIDGES}
    ridge = min(left, key=lambda each: float(left[each].sum()))
    worth = _worth(lesson, learned.weights(ridge), part)
    ids = described.besides(encoder, most)
    weights = _Regression(lesson.features, lesson.taste).weights(ridge)
    taste = _features(described.content_of(ids), described.code) @ weights
    return replace(encoder, described_ids=ids, described_vectors=torch.from_numpy(taste).float()), worth


def _worth(lesson: "_Lesson", weights: NDArray[np.float64], part: NDArray[np.int64]) -> Worth:
    """Judged on part 1 of the items, of which neither the weights nor their ridge know anything."""
    judged, taste = part == 1, lesson.taste[part == 1]
    whole = max(float(np.square(taste).sum()), 1e-12)
    by_content, by_category = lesson.left(weights, judged), lesson.left_by_category(part > 1, judged)
    gain = by_category - by_content
    sure = float(gain.mean()) > _SURE * float(gain.std(ddof=1)) / len(gain) ** 0.5
    return Worth(1.0 - float(by_content.sum()) / whole, 1.0 - float(by_category.sum()) / whole, sure)


@dataclass(frozen=True)
class _Lesson:
    """The M items that have both a taste and a description."""

    features: csr_matrix  # [M, F]
    taste: NDArray[np.float32]  # [M, d - 2]
    categories: Tensor  # [M] int64, -1 for none

    @classmethod
    def of(cls, encoder: Encoder, described: Described, told: Mapping[str, str] | None) -> "_Lesson":
        taste = encoder.vectors[:, :-FIXED]
        # An item that was never met with another has none: zeros, from which there is nothing to learn.
        rows = np.flatnonzero(described.knows(encoder.item_ids) & taste.any(1).numpy()).tolist()
        items = [encoder.item_ids[row] for row in rows]
        categories = (
            encoder.item_categories[rows]
            if told is None
            else encoder.category_rows_of([told.get(item) for item in items])
        )
        return cls(_features(described.content_of(items), described.code), taste[rows].numpy(), categories)

    def left(self, weights: NDArray[np.float64], some: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The squares [m] of some items' taste that the weights leave unexplained."""
        squares: NDArray[np.float64] = np.square(self.taste[some] - self.features[some] @ weights).sum(1)
        return squares

    def left_by_category(self, learned: NDArray[np.bool_], some: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The same by the mean taste of the category, of the `learned` items."""
        count = int(self.categories.max()) + 1
        known, asked = torch.from_numpy(learned), torch.from_numpy(some)
        means = category_means(self.categories[known], torch.from_numpy(self.taste[learned]), count)
        foretold = torch.cat([means, means.new_zeros(1, means.shape[1])])[self.categories[asked]]  # -1 is the last
        squares: NDArray[np.float64] = np.square(self.taste[some] - foretold.numpy()).sum(1).astype(np.float64)
        return squares


class _Regression:
    """Ridge regression of targets [N, k] on the commonest features of [N, F], for several ridges."""

    def __init__(self, features: csr_matrix, targets: NDArray[np.float32]) -> None:
        counts = np.bincount(features.indices, minlength=features.shape[1])
        order = np.lexsort((np.arange(len(counts)), -counts))[:_MOST_FEATURES]
        self._width, self._used = len(counts), np.sort(order[counts[order] > 0])
        used = features[:, self._used]
        self._gram = (used.T @ used).toarray()
        self._moments = used.T @ targets.astype(np.float64)

    def weights(self, ridge: float) -> NDArray[np.float64]:
        """W [F, k]; 0 for a feature that is left out."""
        system = self._gram.copy()
        system[np.diag_indices_from(system)] += ridge
        weights = np.zeros((self._width, self._moments.shape[1]))
        weights[self._used] = cho_solve(cho_factor(system, overwrite_a=True), self._moments)
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
