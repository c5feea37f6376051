"""Reading a log of search sessions: what was done to which item, and at a click-out the list that was shown.

Columns: user_id, session_id, ts_ms (or event_time, timestamp; as in an event table), action_type, item_id, impressions
(a list, or text with the items between `|`; filled where a list was shown and one of it chosen), and where the file has
them prices (as impressions), step (the order within one time), platform and device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import TIMES, event_times, identifiers_of
from innerloop.evaluation.outcome import Floats, Ints

_TIMES = ("ts_ms", *(name for name in TIMES if name != "ts_ms"))
_NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user_id",),
    "session": ("session_id",),
    "time": _TIMES,
    "action": ("action_type", "event_type"),
    "item": ("item_id", "reference"),
    "impressions": ("impressions",),
}
_CONTEXT = ("platform", "device")
_READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".parquet": pl.read_parquet,
    ".csv": pl.read_csv,
    ".jsonl": pl.read_ndjson,
    ".ndjson": pl.read_ndjson,
}


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
    stepped: bool  # whether the file says the order of the actions of one time

    def __len__(self) -> int:
        return len(self.users)


def read_log(path: Path) -> SlateLog:
    """Read a file, or every such file of a folder.

    Raises SettingsError when nothing is there to read, a column is missing, or no list holds the item that was chosen.
    """
    raw = pl.concat([_read(file) for file in _files(path)], how="diagonal_relaxed")
    found = _columns(raw, path)
    table = raw.select(pl.col(theirs).alias(ours) for ours, theirs in found.items())
    table = table.with_columns(_time(table["time"], path), _listed(table["impressions"]))
    if "prices" in found:
        table = table.with_columns(_listed(table["prices"]))
    table = table.with_columns(identifiers_of(table["item"]))
    if "step" in found:
        table = table.with_columns(pl.col("step").cast(pl.Float64, strict=False))
    table = table.sort([name for name in ("time", "step") if name in found], maintain_order=True)
    log = _numbered(table)
    if not any(len(shown) for shown in log.shown):
        raise SettingsError(f"{path} has no row with impressions: give a log with the lists that were shown.")
    return log


def _files(path: Path) -> list[Path]:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _READERS) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SettingsError(f"{path} is no file of actions nor a folder with some: name a CSV, JSONL or Parquet file.")
    return files


def _read(file: Path) -> pl.DataFrame:
    if file.suffix.lower() not in _READERS:
        raise SettingsError(f"{file} ends in none of {', '.join(_READERS)}: convert it or rename it.")
    try:
        return _READERS[file.suffix.lower()](file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SettingsError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from None


def _columns(raw: pl.DataFrame, path: Path) -> dict[str, str]:
    found = {}
    for ours, names in _NAMES.items():
        theirs = next((name for name in names if name in raw.columns), None)
        if theirs is None:
            have = ", ".join(raw.columns) or "(none)"
            raise SettingsError(f"{path} has the columns {have}, but none named {names[0]}: rename or add it.")
        found[ours] = theirs
    return found | {name: name for name in ("prices", "step", *_CONTEXT) if name in raw.columns}


def _time(column: pl.Series, path: Path) -> pl.Series:
    times = event_times(column, path)
    if len(times) == 0 or times.null_count():
        raise SettingsError(f"{path} has no actions, or some without a time: give every action one.")
    return times


def _listed(column: pl.Series) -> pl.Series:
    """Lists of text from lists of anything, or from text with `|` between the items."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        inner = column.explode()
        if inner.dtype.is_float() and bool((inner.drop_nulls() % 1 == 0).all()):
            column = column.cast(pl.List(pl.Int64))  # whole numbers, as `identifiers_of` has them
        return column.cast(pl.List(pl.String))
    text = column.cast(pl.String)
    return text.replace("", None).str.split("|")


def _numbered(table: pl.DataFrame) -> SlateLog:
    item = table["item"].fill_null("")
    # An item chosen outside of the list that was shown, or a list without a choice, is no choice among the shown.
    shown = table["impressions"].fill_null([])
    names = {name: at for at, name in enumerate(pl.concat([item, shown.explode().drop_nulls()]).unique().sort())}
    none: Ints = np.zeros(0, np.int64)  # one for all: most actions are shown no list
    lists = [_numbers(names, some) if some else none for some in shown.to_list()]
    items = np.array([names[one] if one else -1 for one in item.to_list()], np.int64)
    actions, action_names = _codes(table["action"])
    contexts = [name for name in _CONTEXT if name in table.columns]
    levels = [_codes(table[name]) for name in contexts]
    return SlateLog(
        users=_codes(table["user"])[0],
        sessions=_codes(table["session"])[0],
        times=table["time"].to_numpy(),
        actions=actions,
        action_names=action_names,
        items=items,
        shown=lists,
        prices=_prices(table, lists),
        contexts=np.stack([codes for codes, _ in levels], 1) if levels else np.zeros((len(items), 0), np.int64),
        context_names=contexts,
        stepped="step" in table.columns,
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
    known = given is not None and len(given) == count
    return np.array(given, np.float64) if known else np.full(count, np.nan)
