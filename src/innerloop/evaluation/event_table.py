"""Reading a shop's past events from a file into the one table that training and replay use.

An event table is a polars DataFrame, sorted by event_time (events of one millisecond keep their order), with

    event_id    String   unique
    event_type  String   click, cart, favorite, purchase, impression; other names as they come, in lower case
    user_id     String
    item_id     String
    event_time  Int64    epoch milliseconds

and, where the file has them, session_id, category, currency, ad_id (String), price, value (Float64), quantity (Int64).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from innerloop.errors import SettingsError
from innerloop.events import IMPRESSION

TIMES = ("event_time", "ts_ms", "timestamp", "time", "ts")
"""The columns that are taken for the time of an event."""
NAMES: dict[str, tuple[str, ...]] = {
    "event_id": ("event_id",),
    "event_type": ("event_type", "event", "behavior", "behaviour", "action_type", "type"),
    "user_id": ("user_id", "userid", "visitorid", "visitor_id", "customer_id"),
    "item_id": ("item_id", "itemid", "product_id", "article_id"),
    "event_time": TIMES,
    "session_id": ("session_id", "user_session"),
    "category": ("category", "category_id", "categoryid", "category_code"),
    "price": ("price",),
    "quantity": ("quantity",),
    "currency": ("currency",),
    "value": ("value",),
    "ad_id": ("ad_id",),
}
"""By our name of a column the usual names of it, in lower case."""
_REQUIRED = ("user_id", "item_id", "event_time")
_NUMBERS: dict[str, pl.DataType] = {"price": pl.Float64(), "value": pl.Float64(), "quantity": pl.Int64()}
_TYPES = {
    "click": ("click", "view", "pv", "view_item", "select_item", "product_view", "detail", "clickout_item"),
    "cart": ("cart", "add_to_cart", "addtocart"),
    "favorite": ("favorite", "favourite", "fav", "like", "add_to_wishlist", "wishlist"),
    "purchase": ("purchase", "buy", "transaction", "order", "checkout"),
    "impression": ("impression", "view_item_list", "view_promotion"),
}
_SYNONYMS = {name: kind for kind, names in _TYPES.items() for name in names}
# Epoch numbers by size: seconds until the year 5138, then milliseconds, microseconds, nanoseconds.
_SECONDS, _MILLISECONDS, _MICROSECONDS = 1e11, 1e14, 1e17
_BEYOND = 2.0**63
_DAYS = 19_000_101, 21_001_231
_INFERRED = 10_000  # rows that say a column's type; where they don't hold for the others, all rows are asked


def read_events(path: Path | str, *, columns: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Read a .csv, .jsonl / .ndjson or .parquet file of events into an event table.

    `columns` maps names of the table to names in the file (`{"item_id": "sku"}`) and goes before the usual names; None
    where nobody was asked for it.
    Raises SettingsError when the file is missing or unreadable, or a column cannot be found or understood.
    """
    path = Path(path)
    return _events(read_table(path, "events"), path, columns)


def read_actions(path: Path | str, *, columns: Mapping[str, str] | None = None) -> pl.DataFrame:
    """The same without impressions: what was shown is nothing that anybody did. Raises SettingsError likewise."""
    path = Path(path)
    return actions_of(read_table(path, "events"), path, columns=columns)


def actions_of(raw: pl.DataFrame, path: Path, *, columns: Mapping[str, str] | None = None) -> pl.DataFrame:
    """The same of what was read from `path` with `read_table`. Raises SettingsError likewise."""
    return _events(raw, path, columns).filter(pl.col("event_type") != IMPRESSION)


def in_one_order(events: pl.DataFrame) -> pl.DataFrame:
    """Sorted by event_time and, within a millisecond, by all else that is said: in whatever order the rows came.

    The identifiers of events have no say: where a file has none they tell the number of the row.
    """
    first = ["event_time", "user_id", "item_id", "event_type"]
    return events.sort(*first, *(name for name in events.columns if name not in (*first, "event_id")))


def read_table(path: Path, what: str) -> pl.DataFrame:
    """Read a file of `what`, whatever its columns; a CSV's are all text. Raises SettingsError when it can't be read."""
    readers = {
        ".csv": lambda: _texts(path),
        ".jsonl": lambda: _inferred(path),
        ".ndjson": lambda: _inferred(path),
        ".parquet": lambda: pl.read_parquet(path),
    }
    if not path.is_file():
        raise SettingsError(f"{path} is not a file: name a CSV, JSON Lines or Parquet file of {what}.")
    if path.suffix.lower() not in readers:
        raise SettingsError(f"{path} ends in none of {', '.join(readers)}: convert it or rename it.")
    try:
        return readers[path.suffix.lower()]()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SettingsError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}.") from None


def _texts(path: Path) -> pl.DataFrame:
    """A CSV knows no types: 007 as a number would be 7, and category 1.10 would be 1.1.

    Only a column of whole numbers with gaps, which many write as 12.0 and NaN, is whole numbers again.
    """
    table = pl.read_csv(path, infer_schema=False)
    return table.with_columns(
        pl.col(name).replace(["NaN", "nan"], None).str.replace(r"\.0$", "")
        for name in table.columns
        if table[name].str.contains(r"^(-?\d+(\.0)?|NaN|nan)$").all() and table[name].str.contains(r"\d").any()
    )


def _inferred(path: Path) -> pl.DataFrame:
    """A column of numbers that turns into text further down is text from its first row on."""
    try:
        return pl.read_ndjson(path, infer_schema_length=_INFERRED)
    except pl.exceptions.ComputeError:
        return pl.read_ndjson(path, infer_schema_length=None)


def event_columns(
    raw: pl.DataFrame, mapped: Mapping[str, str] | None, path: Path, *, required: Sequence[str] = _REQUIRED
) -> dict[str, str]:
    """`find_columns` of the event table; nobody was asked for a map where it is None. Raises SettingsError likewise."""
    advice = "rename one" if mapped is None else "map one with --column {}=NAME"
    table = "the event table"
    return find_columns(raw, mapped or {}, path, names=NAMES, required=required, table=table, advice=advice)


def find_columns(
    raw: pl.DataFrame,
    mapped: Mapping[str, str],
    path: Path,
    *,
    names: Mapping[str, Sequence[str]],
    required: Sequence[str],
    table: str,
    advice: str,
) -> dict[str, str]:
    """By each of our `names` the column of `raw` that has it: the one it is mapped to, else the first of the usual.

    A usual name in other letters than small ones does, too, where there is none in small ones.
    Raises SettingsError when one of the `required` is missing, or one that it is mapped to.
    """
    there = f"{path} has the columns {', '.join(raw.columns) or '(none)'}"
    for ours, theirs in mapped.items():
        if ours not in names:
            raise SettingsError(f"{ours} is no column of {table}: those are {', '.join(names)}.")
        if theirs not in raw.columns:
            raise SettingsError(f"{there}, none of them {theirs}, which {ours} is mapped to.")
    lower = {name.lower(): name for name in reversed(raw.columns)} | {name: name for name in raw.columns}
    found = {ours: next((lower[n] for n in usual if n in lower), None) for ours, usual in names.items()}
    found |= mapped
    for ours in required:
        if found[ours] is None:
            raise SettingsError(f"{there}, none of which is known as {ours}: {advice.format(ours)}.")
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def refuse_lists(raw: pl.DataFrame, names: Iterable[str], path: Path) -> None:
    """Raises SettingsError when one of those columns has lists or structs."""
    for name in names:
        if raw[name].dtype.is_nested():
            raise SettingsError(f"{path} has more than one value in a row of {name}: give text or a number.")


def _events(raw: pl.DataFrame, path: Path, columns: Mapping[str, str] | None) -> pl.DataFrame:
    found = event_columns(raw, columns, path)
    refuse_lists(raw, found.values(), path)
    table = raw.select(pl.col(theirs).alias(ours) for ours, theirs in found.items())
    table = _typed(table, path)
    if "event_id" not in table.columns:
        table = table.with_columns(_event_ids(table))
    order = [name for name in NAMES if name in table.columns]
    return table.select(order).sort("event_time", maintain_order=True)


def _typed(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    kind = _event_types(table["event_type"]) if "event_type" in table.columns else pl.lit("click")
    identifiers = [name for name in table.columns if name not in _NUMBERS and name not in ("event_time", "event_type")]
    table = table.with_columns(
        event_times(table["event_time"], path),
        kind.alias("event_type"),
        *(identifiers_of(table[name]) for name in identifiers),
        *(_number(name, dtype) for name, dtype in _NUMBERS.items() if name in table.columns),
    )
    for name in _REQUIRED:
        if empty := table[name].null_count():
            raise SettingsError(f"{path} has {empty} rows without a usable {name}: remove them or map another column.")
    return table


def _number(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    as_float = column.cast(pl.Float64, strict=False)  # 2.0 as text is a whole number, too
    return pl.coalesce(column.cast(dtype, strict=False), as_float.cast(dtype, strict=False))


def _event_types(column: pl.Series) -> pl.Series:
    name = as_text(column).str.strip_chars().str.to_lowercase()
    known = name.str.replace_all(r"[\s-]+", "_")
    return known.replace_strict(_SYNONYMS, default=name).fill_null("click")


def identifiers_of(column: pl.Series) -> pl.Series:
    """As text; 12.0, which a column of whole numbers with gaps turns into, is 12. A gap, which NaN is too, is null.

    Raises SettingsError for bytes that are no text.
    """
    if column.dtype.is_float():
        column = column.fill_nan(None)
        if are_whole(column):
            column = column.cast(pl.Int64)
    return as_text(column).replace("", None)


def as_text(column: pl.Series) -> pl.Series:
    """Raises SettingsError for bytes that are no text."""
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError as error:
        raise SettingsError(f"{column.name} is no text ({error}): write it as UTF-8.") from None


def are_whole(numbers: pl.Series) -> bool:
    """Whether floats, NaN and null apart, are whole numbers that 64 bits hold."""
    known = numbers.fill_nan(None).drop_nulls()
    return bool(((known % 1 == 0) & (known.abs() < _BEYOND)).all())


def event_times(column: pl.Series, path: Path) -> pl.Series:
    """Epoch milliseconds from numbers (unit by size, or days as 20261231), dates, RFC 3339 text or numbers as text.

    Null where the number is NaN, infinite or beyond 64 bits. Raises SettingsError for anything else.
    """
    if column.dtype == pl.String:
        numbers = numbers_of(column)
        if numbers is None:
            return _parsed(column, path)
        column = numbers
    if column.dtype in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("ms")).cast(pl.Int64)
    if not column.dtype.is_numeric():
        raise SettingsError(f"{path} has times of type {column.dtype}: give epoch numbers or RFC 3339 text.")
    usable = column.cast(pl.Float64).abs() < _BEYOND  # which NaN is not, either
    column = pl.select(pl.when(usable).then(column).alias(column.name)).to_series()
    if (days := _days(column)) is not None:
        return days
    largest = float(column.abs().max() or 0)  # type: ignore[arg-type]
    if largest < _SECONDS:
        return (column.cast(pl.Float64) * 1000).round().cast(pl.Int64)
    divisor = 1 if largest < _MILLISECONDS else 1_000 if largest < _MICROSECONDS else 1_000_000
    return column.cast(pl.Int64) // divisor


def _days(numbers: pl.Series) -> pl.Series | None:
    """The starts of days that are written as 20261231; None where a number is no such day: as seconds, it's of 1970."""
    if not numbers.drop_nulls().is_between(*_DAYS).all() or not are_whole(numbers):
        return None
    days = numbers.cast(pl.Int64).cast(pl.String).str.to_date("%Y%m%d", strict=False)
    return None if days.null_count() > numbers.null_count() else days.cast(pl.Datetime("ms")).cast(pl.Int64)


def spanned(times: NDArray[np.int64]) -> str:
    """From the first of some times (epoch ms) to the last: who reads that sees whether their unit was understood."""
    first, last = (np.datetime_as_string(np.datetime64(int(at), "ms"), "s") for at in (times.min(), times.max()))
    return f"{first}Z to {last}Z"


def numbers_of(column: pl.Series) -> pl.Series | None:
    """Text as whole numbers, else as floats, which lose the last digits of nanoseconds; None where some is neither."""
    read = (column.cast(kind, strict=False) for kind in (pl.Int64, pl.Float64))
    return next((numbers for numbers in read if numbers.null_count() == column.null_count()), None)


def _parsed(column: pl.Series, path: Path) -> pl.Series:
    """RFC 3339 and its usual loosenings: a blank for the T, no offset (UTC), ` UTC` at the end, a day for its start."""
    text = column.str.strip_chars().str.replace(r"^(\d{4}-\d\d-\d\d)$", "${1}T00:00:00")
    text = text.str.replace(r"\s*(UTC|Z|z)$", "+00:00").str.replace(" ", "T", literal=True)
    text = pl.select(
        pl.when(text.str.contains(r"[+-]\d\d:?\d\d$")).then(text).otherwise(text + "+00:00").alias(column.name)
    ).to_series()
    times = text.str.to_datetime(format="%+", time_unit="ms", time_zone="UTC", strict=False)
    if unread := times.null_count() - column.null_count():
        example = column.filter(times.is_null() & column.is_not_null())[0]
        raise SettingsError(f"{path} has {unread} times that are not RFC 3339, such as {example!r}: correct them.")
    return times.cast(pl.Int64)


def _event_ids(table: pl.DataFrame) -> pl.Series:
    """Names from row number and contents, not from the file's name: the same on every run, never twice."""
    rows = table.select("user_id", "item_id", "event_type", "event_time").iter_rows()
    names = (f"{n}|{'|'.join(map(str, row))}" for n, row in enumerate(rows))
    return pl.Series("event_id", [hashlib.blake2b(n.encode(), digest_size=12).hexdigest() for n in names], pl.String)
