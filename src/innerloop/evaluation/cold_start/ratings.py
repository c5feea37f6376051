"""Reading a folder of ratings: items, users, meta_training and one or more `*_testing` files, parquet or CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import NAMES, find_columns, identifiers_of, numbers_of, read_table, refuse_lists
from innerloop.learning.rating_model import Ratings

_SUFFIXES = (".parquet", ".csv")
_TESTING = "_testing"
_COLUMNS = {"user_id": NAMES["user_id"], "item_id": NAMES["item_id"], "rating": ("rating", "stars", "score")}


@dataclass(frozen=True)
class RatingData:
    """Ratings of users and items by number: a number is the place in `user_ids` [U] or `item_ids` [M].

    Those are everyone that any file speaks of, sorted. `users` and `items` are the tables as read, with identifiers as
    text; `tests` is by name, in order of the protocol. `repeated` ratings of meta_training were in a test file, too,
    and are left out: what is asked must not have been told.
    """

    user_ids: Sequence[str]
    item_ids: Sequence[str]
    users: pl.DataFrame
    items: pl.DataFrame
    training: Ratings
    tests: dict[str, Ratings]
    repeated: int = 0

    def over(self, unit: float) -> "RatingData":
        """The same with all ratings divided by `unit`."""
        tests = {name: test.over(unit) for name, test in self.tests.items()}
        return replace(self, training=self.training.over(unit), tests=tests)


def read_rating_data(folder: Path, columns: Mapping[str, str] | None = None) -> RatingData:
    """Read `folder`; a user's second rating of an item replaces the first. `columns` as for `event_table.read_events`.

    Raises SettingsError when a file or column is missing, unreadable or empty, or a rating is not a number.
    """
    columns = columns or {}
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder: name one with items, users, meta_training and *_testing files.")
    whole = _ratings(_only(folder, "meta_training"), columns, must=True)
    users, items = _entities(folder, "users", "user_id", columns), _entities(folder, "items", "item_id", columns)
    tests = {name: _ratings(_only(folder, name + _TESTING), columns) for name in _test_names(folder)}
    training = whole.join(pl.concat(tests.values()), on=["user_id", "item_id"], how="anti", maintain_order="left")
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
        repeated=whole.height - training.height,
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


def _entities(folder: Path, stem: str, key: str, columns: Mapping[str, str]) -> pl.DataFrame:
    """Those that the file describes; their column may have the usual name whatever it is called in the ratings."""
    path = _only(folder, stem)
    raw = _read(path)
    table = _named(raw, {key: _COLUMNS[key]}, {key: columns[key]} if columns.get(key) in raw.columns else {}, path)
    if path.suffix.lower() == ".csv":  # whose columns are text, also those of numbers
        numbers = (numbers_of(table[name]) for name in table.columns if name != key)
        table = table.with_columns(column for column in numbers if column is not None)
    return table.with_columns(identifiers_of(table[key])).drop_nulls(key)


def _ratings(path: Path, columns: Mapping[str, str], *, must: bool = False) -> pl.DataFrame:
    """A file `must` have the columns that are mapped, or may have them under the usual names."""
    raw = _read(path)
    mapped = {ours: theirs for ours, theirs in columns.items() if must or theirs in raw.columns}
    table = _named(raw, _COLUMNS, mapped, path)
    rating = table["rating"].cast(pl.Float64, strict=False)
    table = table.select(identifiers_of(table["user_id"]), identifiers_of(table["item_id"]), rating)
    whole = table.filter(
        pl.col("rating").is_finite() & pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null()
    )
    if missing := table.height - whole.height:
        raise SettingsError(f"{path} has {missing} rows without a user, an item or a number as rating: remove them.")
    return whole.unique(["user_id", "item_id"], keep="last").sort("user_id", "item_id")


def _named(
    raw: pl.DataFrame, names: Mapping[str, Sequence[str]], mapped: Mapping[str, str], path: Path
) -> pl.DataFrame:
    """The table with the columns that `names` asks for under our names, and all others under their own."""
    table, advice = "a file of ratings", "map one with --column {}=NAME"
    found = find_columns(raw, mapped, path, names=names, required=list(names), table=table, advice=advice)
    refuse_lists(raw, found.values(), path)
    others = [name for name in raw.columns if name not in found and name not in found.values()]
    return raw.select(*(pl.col(theirs).alias(ours) for ours, theirs in found.items()), *others)


def _everyone(key: str, tables: Sequence[pl.DataFrame]) -> pl.Series:
    return pl.concat([table[key] for table in tables]).unique().sort()


def _numbered(table: pl.DataFrame, user_ids: pl.Series, item_ids: pl.Series) -> Ratings:
    return Ratings(
        user_ids.search_sorted(table["user_id"]).to_numpy().astype("int64"),
        item_ids.search_sorted(table["item_id"]).to_numpy().astype("int64"),
        table["rating"].to_numpy(),
    )
