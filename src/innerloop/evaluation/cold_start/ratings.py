"""Reading a folder of ratings: items, users, meta_training and one or more `*_testing` files, parquet or CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import identifiers_of, read_table, refuse_lists
from innerloop.learning.rating_model import Ratings

_SUFFIXES = (".parquet", ".csv")
_TESTING = "_testing"
_COLUMNS = ("user_id", "item_id", "rating")


@dataclass(frozen=True)
class RatingData:
    """Ratings of users and items by number: a number is the place in `user_ids` [U] or `item_ids` [M].

    Those are everyone that any file speaks of, sorted. `users` and `items` are the tables as read, with identifiers as
    text; `tests` is by name, in order of the protocol.
    """

    user_ids: Sequence[str]
    item_ids: Sequence[str]
    users: pl.DataFrame
    items: pl.DataFrame
    training: Ratings
    tests: dict[str, Ratings]


def read_rating_data(folder: Path) -> RatingData:
    """Read `folder`; a user's second rating of an item replaces the first.

    Raises SettingsError when a file or column is missing, unreadable or empty, or a rating is not a number.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder: name one with items, users, meta_training and *_testing files.")
    users, items = _entities(folder, "users", "user_id"), _entities(folder, "items", "item_id")
    training = _ratings(_only(folder, "meta_training"))
    tests = {name: _ratings(_only(folder, name + _TESTING)) for name in _test_names(folder)}
    tables = [training, *tests.values()]
    user_ids = _everyone("user_id", [users, *tables])
    item_ids = _everyone("item_id", [items, *tables])
    return RatingData(
        user_ids.to_list(),
        item_ids.to_list(),
        users,
        items,
        _numbered(training, user_ids, item_ids),
        {name: _numbered(table, user_ids, item_ids) for name, table in tests.items()},
    )


def _test_names(folder: Path) -> list[str]:
    files = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.stem.endswith(_TESTING))
    names = {path.stem.removesuffix(_TESTING) for path in files}
    if not names:
        raise SettingsError(
            f"{folder} has no file to test on: hold users and items out of meta_training and write their ratings "
            "(user_id, item_id, rating) as user_cold_testing, item_cold_testing or user_and_item_cold_testing."
        )
    first = ("user_cold", "item_cold", "user_and_item_cold")
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def _only(folder: Path, stem: str) -> Path:
    found = [path for path in sorted(folder.iterdir()) if path.stem == stem and path.is_file()]
    for suffix in _SUFFIXES:
        for path in found:
            if path.suffix.lower() == suffix:
                return path
    raise SettingsError(f"{folder} has no {stem}.parquet or {stem}.csv: a folder of ratings needs it.")


def _read(path: Path) -> pl.DataFrame:
    table = read_table(path, "ratings")
    if table.is_empty():
        raise SettingsError(f"{path} has no rows: give it some or take it away.")
    return table


def _entities(folder: Path, stem: str, key: str) -> pl.DataFrame:
    path = _only(folder, stem)
    table = _with_columns(_read(path), (key,), path)
    return table.with_columns(identifiers_of(table[key])).drop_nulls(key)


def _ratings(path: Path) -> pl.DataFrame:
    table = _with_columns(_read(path), _COLUMNS, path)
    rating = table["rating"].cast(pl.Float64, strict=False)
    table = table.select(identifiers_of(table["user_id"]), identifiers_of(table["item_id"]), rating)
    whole = table.filter(
        pl.col("rating").is_finite() & pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null()
    )
    if missing := table.height - whole.height:
        raise SettingsError(f"{path} has {missing} rows without a user, an item or a number as rating: remove them.")
    return whole.unique(["user_id", "item_id"], keep="last").sort("user_id", "item_id")


def _with_columns(table: pl.DataFrame, names: Sequence[str], path: Path) -> pl.DataFrame:
    for name in names:
        if name not in table.columns:
            raise SettingsError(f"{path} has the columns {', '.join(table.columns)}, but no {name}: add or rename it.")
    refuse_lists(table, names, path)
    return table


def _everyone(key: str, tables: Sequence[pl.DataFrame]) -> pl.Series:
    return pl.concat([table[key] for table in tables]).unique().sort()


def _numbered(table: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series) -> Ratings:
    return Ratings(
        user_ids.search_sorted(table["user_id"]).to_numpy().astype("int64"),
        item_ids.search_sorted(table["item_id"]).to_numpy().astype("int64"),
        table["rating"].to_numpy(),
    )
