"""Content features of items or users: whatever columns a table has, as one sparse matrix with named groups.

A column becomes a group. Which kind of column it is, is read off its values:

    categories  text, truth values, whole numbers of few different values: a column for each value
    lists       text split at | or , (where many values have one), list columns: a column for a token, 1 / sqrt(count)
    text        almost every value different, with blanks in it: lower-case words, as a list
    numbers     hat functions at quantiles (linear interpolation), level beyond the first and last quantile

Only tokens that are there often enough in the rows that are trained on get a column, the most frequent first, so that
the width is bounded whatever the table. An unknown token, a missing value or an unknown identifier gives zeros.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

_FEW_VALUES = 32
_SEPARATORS = ("|", ",")
_SEPARATED = 0.1  # the share of values with a separator that makes a column a list
_WORDED = 0.5  # the share of values with a blank that makes a column text
_KNOTS = 9
_MOST_TOKENS = (800, 400, 200, 100, 50)  # of a column; fewer when all columns together would be too wide
_WIDEST = 1_600
_LEAST_COUNT = 3


@dataclass(frozen=True)
class Content:
    """Features [N, F] of N rows; `groups` [F] numbers the column that each came from, `names` names those."""

    features: csr_matrix
    groups: NDArray[np.int64]
    names: tuple[str, ...]


def read_content(table: pl.DataFrame, key: str, identifiers: Sequence[object], trained: NDArray[np.bool_]) -> Content:
    """Features of `identifiers` [N] by the rows of `table` with that `key`; `trained` [N] marks those to learn from.

    The first feature is 1 for everyone, a group named `constant`.
    """
    rows = pl.DataFrame({key: identifiers}, schema={key: table[key].dtype}).join(
        table.unique(key, keep="first", maintain_order=True), on=key, how="left", maintain_order="left"
    )
    columns = rows.drop(key).get_columns()
    for most in _MOST_TOKENS:
        found = {column.name: block for column in columns if (block := _column(column, trained, most)).shape[1]}
        if sum(block.shape[1] for block in found.values()) <= _WIDEST:
            break
    blocks, names = [csr_matrix(np.ones((rows.height, 1))), *found.values()], ["constant", *found]
    groups = np.repeat(np.arange(len(blocks)), [block.shape[1] for block in blocks])
    return Content(csr_matrix(hstack(blocks)), groups, tuple(names))


def _column(column: pl.Series, trained: NDArray[np.bool_], most: int) -> csr_matrix:
    if column.dtype.is_numeric() and column.n_unique() > _FEW_VALUES:
        return _hats(column.cast(pl.Float64).to_numpy(), trained)
    return _token_columns(_tokens(column), trained, most)


def _hats(values: NDArray[np.float64], trained: NDArray[np.bool_]) -> csr_matrix:
    finite = np.isfinite(values)
    known = values[trained & finite]
    knots = np.unique(np.quantile(known, np.linspace(0, 1, _KNOTS))) if len(known) else np.empty(0)
    if len(knots) <= 1:
        return csr_matrix((len(values), 0))
    hats = np.stack([np.interp(np.where(finite, values, knots[0]), knots, row) for row in np.eye(len(knots))], 1)
    hats[~finite] = 0.0
    return csr_matrix(hats)


def _tokens(column: pl.Series) -> list[list[str]]:
    if isinstance(column.dtype, (pl.List, pl.Array)):
        lists = column.cast(pl.List(pl.String)).to_list()
        return [[token for token in tokens or [] if token] for tokens in lists]
    text = column.cast(pl.String).fill_null("").str.strip_chars()
    given = text.filter(text != "")
    if given.is_empty():
        return [[] for _ in text]
    for separator in _SEPARATORS:
        if _share(given.str.contains(separator, literal=True)) >= _SEPARATED:
            return [[t for part in value.split(separator) if (t := part.strip())] for value in text]
    if given.n_unique() > len(given) / 2 and _share(given.str.contains(" ", literal=True)) >= _WORDED:
        return [value.lower().split() for value in text]
    return [[value] if value else [] for value in text]


def _share(true: pl.Series) -> float:
    return float(true.to_numpy().mean())


def _token_columns(tokens: list[list[str]], trained: NDArray[np.bool_], most: int) -> csr_matrix:
    counts = Counter(token for at in np.flatnonzero(trained) for token in dict.fromkeys(tokens[at]))
    frequent = sorted((-count, token) for token, count in counts.items() if count >= _LEAST_COUNT)[:most]
    number = {token: at for at, (_, token) in enumerate(frequent)}
    rows, columns, values = [], [], []
    for row, mine in enumerate(tokens):
        known = [number[token] for token in dict.fromkeys(mine) if token in number]
        rows += [row] * len(known)
        columns += known
        values += [1.0 / np.sqrt(max(len(set(mine)), 1))] * len(known)
    return csr_matrix((values, (rows, columns)), shape=(len(tokens), len(number)))
