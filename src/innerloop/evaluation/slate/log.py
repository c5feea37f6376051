"""Reading a log of search sessions: what was done to which item, and at a click-out the list that was shown.

Columns: user_id, session_id, ts_ms (or event_time, timestamp; as in an event table), action_type, item_id or reference,
impressions (a list, or text with the items between `|`; filled where a list was shown and one of it chosen), and where
the file has them prices (as impressions), step (the order within one time), platform and device.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import (
    NAMES,
    are_whole,
    event_times,
    find_columns,
    identifiers_of,
    read_table,
    refuse_lists,
)
from innerloop.evaluation.outcome import Bools, Floats, Ints

_REQUIRED = ("user_id", "session_id", "event_time", "action_type", "item_id", "impressions")
_NAMES: dict[str, tuple[str, ...]] = {
    "user_id": NAMES["user_id"],
    "session_id": NAMES["session_id"],
    "event_time": ("ts_ms", *NAMES["event_time"]),  # the more exact of two
    "action_type": ("action_type", "event_type", "action", "event"),
    "item_id": ("item_id", "reference", *NAMES["item_id"]),
    "impressions": ("impressions",),
    "prices": ("prices",),
    "step": ("step",),
    "platform": ("platform",),
    "device": ("device",),
}
_CONTEXT = ("platform", "device")
_LISTS = ("impressions", "prices")
_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class SlateLog:
    """N actions in order of time. Numbers stand for names; item -1 is none; `shown[n]` is empty where no list was."""

    users: Ints
    sessions: Ints
    times: Ints  # epoch ms
    actions: Ints
    action_names: list[str]
    items: Ints
    shown: Sequence[Ints]
    prices: Sequence[Floats]  # NaN where unknown
    contexts: Ints  # [N, C] of platform, device: a number for each level
    context_names: list[str]
    stepped: Bools  # [N] whether the file says where the action stands among those of its time

    def __len__(self) -> int:
        return len(self.users)


def read_log(path: Path, *, seed: int = 0, columns: Mapping[str, str] | None = None) -> SlateLog:
    """Read a file, or every such file of a folder, each with columns and types of its own.

    Actions of one time and step, or without one, are put in random order. `columns` maps our names to those of a file
    and goes before the usual ones. Raises SettingsError when nothing is there to read, a column is missing or cannot be
    understood, an action has no user, session or time, (nearly) no list holds the item that was chosen, or the prices
    of a file are not its lists'.
    """
    raws, mapped = {file: read_table(file, "actions") for file in _files(path)}, columns or {}
    _refuse_missing(raws.values(), mapped, path)
    table = pl.concat([_typed(raw, file, mapped) for file, raw in raws.items()], how="diagonal_relaxed")
    _refuse_gaps(table, path)
    shuffled = table[np.random.default_rng(seed).permutation(table.height)]
    table = shuffled.sort([name for name in ("event_time", "step") if name in table.columns], maintain_order=True)
    log = _numbered(table)
    _refuse_unsplit(log, path)
    return log


def _files(path: Path) -> list[Path]:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SettingsError(f"{path} is no file of actions nor a folder with some: name a CSV, JSONL or Parquet file.")
    return files


def _found(raw: pl.DataFrame, file: Path, mapped: Mapping[str, str]) -> dict[str, str]:
    """By our names the columns that a file has; another one may have those that are missing."""
    own = {ours: theirs for ours, theirs in mapped.items() if theirs in raw.columns or ours not in _NAMES}
    return find_columns(raw, own, file, names=_NAMES, required=(), table="a log of lists", advice="")


def _refuse_missing(raws: Collection[pl.DataFrame], mapped: Mapping[str, str], path: Path) -> None:
    """One of several files may lack a column: what was done where no list was shown needs no impressions."""
    columns = dict.fromkeys(name for raw in raws for name in raw.columns)
    there = f"{path} has the columns {', '.join(columns) or '(none)'}"
    found = set().union(*(_found(raw, path, mapped) for raw in raws))
    for ours, theirs in mapped.items():
        if theirs not in columns:
            raise SettingsError(f"{there}, none of them {theirs}, which {ours} is mapped to.")
    for name in _REQUIRED:
        if name not in found:
            raise SettingsError(f"{there}, none of which is known as {name}: map one with --column {name}=NAME.")


def _typed(raw: pl.DataFrame, file: Path, mapped: Mapping[str, str]) -> pl.DataFrame:
    """The columns that the file has, under our names and with the types that they have in every file."""
    found = _found(raw, file, mapped)
    refuse_lists(raw, (theirs for ours, theirs in found.items() if ours not in _LISTS), file)
    table = pl.DataFrame({ours: _as(ours, raw[theirs], file) for ours, theirs in found.items()})
    if "prices" in table.columns:
        _refuse_unpriced(table["prices"], file)
    return table


def _as(ours: str, column: pl.Series, file: Path) -> pl.Series:
    if ours == "event_time":
        return event_times(column, file)
    if ours == "step":
        return column.cast(pl.Float64, strict=False).fill_nan(None)
    return _listed(column, file) if ours in _LISTS else identifiers_of(column)


def _refuse_gaps(table: pl.DataFrame, path: Path) -> None:
    if table.is_empty() or table["event_time"].null_count():
        raise SettingsError(f"{path} has no actions, or some without a time: give every action one.")
    for name in ("user_id", "session_id"):
        if empty := table[name].null_count():
            raise SettingsError(f"{path} has {empty} actions without a {name}: remove them, or give every action one.")


def _refuse_unsplit(log: SlateLog, path: Path) -> None:
    """Text with other signs between the items is a list of one, which holds the choice only where one was shown."""
    lists = [(shown, item) for shown, item in zip(log.shown, log.items, strict=True) if len(shown)]
    if not lists:
        raise SettingsError(f"{path} has no row with impressions: give a log with the lists that were shown.")
    chosen = sum(bool((shown == item).any()) for shown, item in lists)
    single = all(len(shown) == 1 for shown, _ in lists)
    if chosen == 0 or (single and chosen < len(lists) / 2):
        raise SettingsError(
            f"{path} has {len(lists)} rows with impressions, and in {chosen} the item is one of them: write the "
            "impressions as a list, or as text with `|` between the items, by the names that the items have."
        )


def _refuse_unpriced(prices: pl.Series, file: Path) -> None:
    """Text with digits and not one number has other signs between the prices."""
    told = prices.list.join("").str.contains(r"\d").sum()
    if told and not prices.explode().cast(pl.Float64, strict=False).is_not_null().any():
        raise SettingsError(
            f"{file} has {told} rows with prices, none of them a number for each item: write them as the impressions, "
            "as a list, or as text with `|` between the numbers, or leave the column out."
        )


def _listed(column: pl.Series, file: Path) -> pl.Series:
    """Lists of text from lists of numbers or text, or from text with `|` between the items."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    inner = column.explode() if isinstance(column.dtype, pl.List) else column
    refuse_lists(inner.to_frame(), [column.name], file)
    if not isinstance(column.dtype, pl.List):
        return column.cast(pl.String).replace("", None).str.split("|")
    if inner.dtype.is_float():  # as `identifiers_of` has them
        kind = pl.List(pl.Int64() if are_whole(inner) else inner.dtype)
        column = column.list.eval(pl.element().fill_nan(None)).cast(kind)
    return column.cast(pl.List(pl.String))


def _numbered(table: pl.DataFrame) -> SlateLog:
    item = table["item_id"].fill_null("")
    # An item chosen outside of the list that was shown, or a list without a choice, is no choice among the shown.
    shown = table["impressions"].fill_null([])
    names = {name: at for at, name in enumerate(pl.concat([item, shown.explode().drop_nulls()]).unique().sort())}
    none: Ints = np.zeros(0, np.int64)  # one for all: most actions are shown no list
    lists = [_numbers(names, some) if some else none for some in shown.to_list()]
    items = np.array([names[one] if one else -1 for one in item.to_list()], np.int64)
    actions, action_names = _codes(table["action_type"])
    contexts = [name for name in _CONTEXT if name in table.columns]
    levels = [_codes(table[name]) for name in contexts]
    return SlateLog(
        users=_codes(table["user_id"])[0],
        sessions=_codes(table["session_id"])[0],
        times=table["event_time"].to_numpy(),
        actions=actions,
        action_names=action_names,
        items=items,
        shown=lists,
        prices=_prices(table, lists),
        contexts=np.stack([codes for codes, _ in levels], 1) if levels else np.zeros((len(items), 0), np.int64),
        context_names=contexts,
        stepped=table["step"].is_not_null().to_numpy() if "step" in table.columns else np.zeros(len(items), bool),
    )


def _numbers(names: Mapping[str, int], items: Sequence[str | None]) -> Ints:
    """A place of a list without an item is left out; its prices then have another length, and are unknown."""
    return np.array([names[one] for one in items if one is not None], np.int64)


def _codes(column: pl.Series) -> tuple[Ints, list[str]]:
    names, codes = np.unique(column.cast(pl.String).fill_null("").to_numpy().astype(str), return_inverse=True)
    return codes.astype(np.int64), names.tolist()


def _prices(table: pl.DataFrame, lists: Sequence[Ints]) -> list[Floats]:
    none: Floats = np.zeros(0)
    if "prices" not in table.columns:
        return [np.full(len(some), np.nan) if len(some) else none for some in lists]
    given = table["prices"].cast(pl.List(pl.Float64), strict=False).to_list()
    return [_priced(some, len(shown)) if len(shown) else none for some, shown in zip(given, lists, strict=True)]


def _priced(given: Sequence[float | None] | None, count: int) -> Floats:
    prices = np.array(given, np.float64) if given is not None and len(given) == count else np.full(count, np.nan)
    return np.where(np.isfinite(prices), prices, np.nan)
