"""Items to vectors by learned embeddings: one of the identifier plus those of what is known about the item.

    vector = identifier + category + price bucket + mean of the text's hashed words

While training, each identifier is replaced by one shared "unknown" vector with the probability of the ID dropout, as
DropoutNet does (Volkovs, Yu, Poutanen 2017): content then has to carry what it can, and the shared vector is what an
item gets that was never trained on. Absent content adds nothing.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import torch
import xxhash
from torch import Tensor, nn

_INIT = 0.02
_WORD = re.compile(r"\w+")
_MOST_WORDS = 64
UNSEEN = -1  # the row of an item that isn't in the table


@dataclass(frozen=True)
class ItemContent:
    """What is known of N items. Category and price bucket 0 mean unknown; item n's words are a slice of `words`."""

    categories: Tensor  # [N] int64
    prices: Tensor  # [N] int64
    words: Tensor  # [W] int64 hash buckets
    word_starts: Tensor  # [N + 1] int64

    def __len__(self) -> int:
        return len(self.categories)

    def to(self, device: torch.device | str) -> "ItemContent":
        parts = (self.categories, self.prices, self.words, self.word_starts)
        return ItemContent(*(part.to(device) for part in parts))

    def take(self, rows: Tensor) -> "ItemContent":
        """The content of rows [M], in that order."""
        starts, counts = self.word_starts[rows], self.word_starts[rows + 1] - self.word_starts[rows]
        ends = counts.cumsum(0)
        first = torch.repeat_interleave(starts - (ends - counts), counts)
        words = self.words[first + torch.arange(len(first), device=first.device)]
        return ItemContent(self.categories[rows], self.prices[rows], words, torch.cat([ends.new_zeros(1), ends]))


@dataclass(frozen=True)
class ContentCode:
    """How content becomes numbers: the categories' names, the price buckets' upper edges, the number of hash buckets.

    Everything in it is text and numbers, so it goes into a card as it is.
    """

    categories: tuple[str, ...] = ()
    price_edges: tuple[float, ...] = ()
    word_buckets: int = 0

    @classmethod
    def of(cls, items: pl.DataFrame, *, price_buckets: int = 16, word_buckets: int = 4_096) -> "ContentCode":
        """Learn it from the columns `category`, `price` and `text` of `items`, each of which may be missing.

        Price buckets hold equally many of the items that have a price.
        """
        categories: tuple[str, ...] = ()
        edges: tuple[float, ...] = ()
        if "category" in items.columns:
            categories = tuple(items["category"].cast(pl.String).drop_nulls().unique().sort().to_list())
        prices = items["price"].cast(pl.Float64).drop_nulls().to_numpy() if "price" in items.columns else np.empty(0)
        if (prices := prices[np.isfinite(prices)]).size:
            cuts = np.quantile(prices, np.linspace(0, 1, price_buckets + 1)[1:-1])
            edges = tuple(float(edge) for edge in np.unique(cuts))
        has_text = "text" in items.columns and items["text"].null_count() < items.height
        return cls(categories, edges, word_buckets if has_text else 0)

    def encode(self, items: pl.DataFrame) -> ItemContent:
        """Encode the same columns of any items; what is missing or was never met is unknown."""
        count = items.height
        none = torch.zeros(count, dtype=torch.int64)
        words, starts = self._words(items["text"].to_list() if "text" in items.columns else [None] * count)
        return ItemContent(
            self._categories(items["category"]) if self.categories and "category" in items.columns else none,
            self._prices(items["price"]) if "price" in items.columns else none,
            words,
            starts,
        )

    def _categories(self, names: pl.Series) -> Tensor:
        rows = {name: row for row, name in enumerate(self.categories, 1)}
        return torch.tensor([rows.get(name, 0) for name in names.cast(pl.String)], dtype=torch.int64)

    def _prices(self, prices: pl.Series) -> Tensor:
        values = prices.cast(pl.Float64).fill_null(np.nan).to_numpy()
        if not self.has_price:
            return torch.zeros(len(values), dtype=torch.int64)
        buckets = np.searchsorted(np.asarray(self.price_edges), values, side="left") + 1
        return torch.from_numpy(np.where(np.isnan(values), 0, buckets).astype(np.int64))

    def _words(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        words, ends = array("q"), array("q", [0])
        for text in texts:
            words.extend(self.hashed(text or ""))
            ends.append(len(words))
        return torch.from_numpy(np.array(words, np.int64)), torch.from_numpy(np.array(ends, np.int64))

    def hashed(self, text: str) -> list[int]:
        """Hash buckets of the first words and of neighbouring pairs (the hashing trick, Weinberger et al. 2009)."""
        if not self.word_buckets:
            return []
        words = _WORD.findall(text.lower())[:_MOST_WORDS]
        parts = [*words, *(" ".join(pair) for pair in pairwise(words))]
        return [xxhash.xxh3_64_intdigest(part.encode()) % self.word_buckets for part in parts]

    @property
    def has_price(self) -> bool:
        return bool(self.price_edges)


class ItemEncoder(nn.Module):
    """Embeddings of `items` identifiers and of content coded by `code`, in `dimension` coordinates."""

    def __init__(self, items: int, dimension: int, *, code: ContentCode | None = None, id_dropout: float = 0.0) -> None:
        super().__init__()
        code = code or ContentCode()
        self.id_dropout = id_dropout
        self.identifiers = nn.Embedding(items + 1, dimension)  # the last row is the unknown identifier's
        nn.init.normal_(self.identifiers.weight, std=_INIT)
        self.categories = _embedding(len(code.categories), dimension)
        self.prices = _embedding(len(code.price_edges) + 1 if code.has_price else 0, dimension)
        self.words: nn.EmbeddingBag | None = None
        if code.word_buckets:
            self.words = nn.EmbeddingBag(code.word_buckets, dimension, mode="mean", include_last_offset=True)
            nn.init.normal_(self.words.weight, std=_INIT)

    @property
    def items(self) -> int:
        return self.identifiers.num_embeddings - 1

    def forward(self, rows: Tensor, content: ItemContent | None = None) -> Tensor:
        """Vectors [M, d] of rows [M] int64, `UNSEEN` for an item that isn't in the table; `content` is of these M."""
        rows = torch.where(rows < 0, self.items, rows)
        if self.training and self.id_dropout:
            dropped = torch.rand(rows.shape, device=rows.device) < self.id_dropout
            rows = torch.where(dropped, self.items, rows)
        vectors: Tensor = self.identifiers(rows)
        if content is None:
            return vectors
        if self.categories is not None:
            vectors = vectors + self.categories(content.categories)
        if self.prices is not None:
            vectors = vectors + self.prices(content.prices)
        if self.words is not None:
            vectors = vectors + self.words(content.words, content.word_starts)
        return vectors

    def table(self, content: ItemContent | None = None) -> Tensor:
        """The vectors [N, d] of every item of the table, without dropout's effect only in eval mode."""
        return self(torch.arange(self.items, device=self.identifiers.weight.device), content)  # type: ignore[no-any-return]


def _embedding(names: int, dimension: int) -> nn.Embedding | None:
    """Row 0, which stays zero, is the unknown's; None where there is nothing to embed."""
    if not names:
        return None
    embedding = nn.Embedding(names + 1, dimension, padding_idx=0)
    with torch.no_grad():
        embedding.weight[1:].normal_(std=_INIT)
        embedding.weight[0].zero_()
    return embedding
