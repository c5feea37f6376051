"""Users' items in their order, read from a file, and the splits of the `sequence` protocol.

A file has the columns user_id, item_id and either a time (any column that `event_table` knows as one) or a `position`,
or both: then the time orders, and the position what is of one time. Items of one user that nothing orders are put in
random order, the same for the same seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl
import scipy.sparse
import torch

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import TIMES, actions_of, event_columns, read_table
from innerloop.evaluation.outcome import Ints
from innerloop.learning.softmax_training import Histories

_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
_TIMELESS = "no time"  # the name of a column that no file has


@dataclass(frozen=True)
class Sequences:
    """B users' items, oldest first, one user after another. Items are numbered 0 .. `catalogue` - 1."""

    items: Ints  # [E]
    starts: Ints  # [B + 1]
    catalogue: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.starts)

    @property
    def users(self) -> Ints:
        """Whose each item is, [E]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def recency(self) -> Ints:
        """How many items of the same user come after each item, [E]."""
        return np.repeat(self.starts[1:], self.lengths) - 1 - np.arange(len(self.items))

    @property
    def counts(self) -> Ints:
        """How often each item occurs, [catalogue]."""
        return np.bincount(self.items, minlength=self.catalogue).astype(np.int64)

    def first(self, lengths: Ints) -> "Sequences":
        """Every user's first `lengths` [B] items."""
        kept = np.arange(len(self.items)) < np.repeat(self.starts[:-1] + lengths, self.lengths)
        return Sequences(self.items[kept], _starts(lengths), self.catalogue)

    def without_last(self, count: int) -> "Sequences":
        """Every user's items but the last `count`; who has fewer is left with none."""
        return self.first(np.maximum(self.lengths - count, 0))

    def last(self) -> Ints:
        """Every user's last item, [B]. Each user needs one."""
        return self.items[self.starts[1:] - 1]

    def take(self, rows: Ints) -> "Sequences":
        """Those users, in that order."""
        lengths = self.lengths[rows]
        starts = _starts(lengths)
        at = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        return Sequences(self.items[at], starts, self.catalogue)

    def matrix(self, decay: float = 1.0) -> scipy.sparse.csr_matrix:
        """[B, catalogue] float32 with decay^(number of later items) where a user has an item; the newest counts."""
        weights = np.power(np.float32(decay), self.recency, dtype=np.float32)
        order = np.lexsort((self.recency, self.items, self.users))
        users, items = self.users[order], self.items[order]
        first = np.ones(len(order), bool)
        first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
        shape = (len(self), self.catalogue)
        return scipy.sparse.csr_matrix((weights[order][first], (users[first], items[first])), shape=shape)

    def histories(self, capacity: int, *, hold_last: bool = False) -> Histories:
        """The `capacity` newest items of each, padded; `hold_last` makes the last ones the held-out period."""
        lengths = np.minimum(self.lengths, capacity)
        width = max(1, int(lengths.max(initial=1)))
        steps = np.arange(width)
        mask = steps < lengths[:, None]
        at = np.where(mask, (self.starts[1:] - lengths)[:, None] + steps, 0)
        items = np.where(mask, self.items[at] if len(self.items) else 0, 0)
        held = (steps == (lengths - 1)[:, None]) & hold_last
        return Histories(torch.from_numpy(items), torch.from_numpy(lengths), torch.from_numpy(held))


@dataclass(frozen=True)
class SequenceFile:
    """A file's sequences, and what else it says of each of their items.

    `events` [E] are in the order of the items: event_type, category (null where unknown) and event_time (epoch ms; 0
    everywhere without a clock).
    """

    sequences: Sequences
    events: pl.DataFrame
    clock: bool

    @property
    def times(self) -> Ints:
        """When each item was, [E]."""
        found: Ints = self.events["event_time"].to_numpy()
        return found

    @property
    def ends(self) -> Ints:
        """When each user's last item was, [B]."""
        return self.times[self.sequences.starts[1:] - 1]

    def known(self, delay_ms: int) -> Sequences:
        """Of every user's items what was over by more than `delay_ms` when the last one came. Needs a clock."""
        over = self.times < np.repeat(self.ends - delay_ms, self.sequences.lengths)
        return self.sequences.first(np.add.reduceat(over, self.sequences.starts[:-1], dtype=np.int64))


def read_sequences(data: Path, *, seed: int, columns: Mapping[str, str] | None = None) -> SequenceFile:
    """Read a file, or all such files of a folder as one; `columns` as for `read_events`, and for the position.

    Raises SettingsError when there is no such file, a column is missing or empty, or nobody has two items.
    """
    table, clock = _table(data, columns or {})
    order = np.random.default_rng(seed).permutation(table.height)
    by = ("user", "event_time", "position") if clock else ("user", "position")
    events = table[order].sort(*by, maintain_order=True)
    items = events["item_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    lengths = np.bincount(events["user"].to_numpy())
    if not len(lengths) or lengths.max() < 2:  # noqa: PLR2004 - one to learn from and one to foresee
        raise SettingsError(f"{data} has no user with two items: nothing can be foreseen from a history.")
    sequences = Sequences(items.astype(np.int64), _starts(lengths), int(items.max()) + 1)
    return SequenceFile(sequences, events.select("event_type", "category", "event_time"), clock)


def _files(data: Path) -> list[Path]:
    if not data.is_dir():
        return [data]
    found = sorted(path for path in data.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise SettingsError(f"{data} holds none of {', '.join(_SUFFIXES)} files: put the sequences there or name one.")
    return found


def _table(data: Path, mapped: Mapping[str, str]) -> tuple[pl.DataFrame, bool]:
    """All events with users numbered 0, 1, .., sorted by row of the files, and whether they have a clock."""
    found = {path: _columns(path) for path in _files(data)}
    position = mapped.get("position", "position").lower()
    times = {mapped["event_time"].lower()} if "event_time" in mapped else set(TIMES)
    times -= {position}
    clock = all(times & columns.keys() for columns in found.values() if columns)
    if not clock and any(times & columns.keys() and position not in columns for columns in found.values()):
        raise SettingsError(f"{data} has files with times and files without: give all of them times, or positions.")
    others = {ours: theirs for ours, theirs in mapped.items() if ours != "position"}
    events = pl.concat([_read(path, columns.get(position), others, clock=clock) for path, columns in found.items()])
    if not events.height:
        raise SettingsError(f"{data} is empty: name a file with user_id, position and item_id.")
    return events.with_columns((pl.col("user_id").rank("dense").cast(pl.Int64) - 1).alias("user")), clock


def _read(path: Path, position: str | None, mapped: Mapping[str, str], *, clock: bool) -> pl.DataFrame:
    """The columns user_id, item_id, event_type, event_time, category and position of a file; see SequenceFile."""
    raw = read_table(path, "events")
    if not clock:
        if position is None:
            _refuse_unordered(raw, mapped, path)
        raw, mapped = raw.with_columns(pl.lit(0).alias(_TIMELESS)), {**mapped, "event_time": _TIMELESS}
    if position is None:
        events = actions_of(raw, path, columns=mapped).with_columns(position=0.0)
    else:
        # An event table has no place for it: it travels as the value, a number that no sequence needs.
        events = actions_of(raw, path, columns={**mapped, "value": position}).rename({"value": "position"})
        if empty := int((~events["position"].is_finite().fill_null(value=False)).sum()):
            raise SettingsError(f"{path} has {empty} rows without a usable position: give them numbers or remove them.")
    if "category" not in events.columns:
        events = events.with_columns(category=pl.lit(None, pl.String))
    whole = pl.col("event_time").cast(pl.Int64)
    return events.select("user_id", "item_id", "event_type", whole, "category", "position")


def _refuse_unordered(raw: pl.DataFrame, mapped: Mapping[str, str], path: Path) -> NoReturn:
    """Raises SettingsError: for users and items that are not found, before an order that is not."""
    event_columns(raw, mapped, path, required=("user_id", "item_id"))
    raise SettingsError(
        f"{path} has the columns {', '.join(raw.columns)}, none of which orders a user's items, as event_time or "
        "position: map one with --column event_time=NAME or --column position=NAME."
    )


def _columns(path: Path) -> dict[str, str]:
    """The file's columns by their names in lower case; none where it can't be read, which `read_table` explains."""
    scans: dict[str, Callable[[Path], pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": pl.scan_csv,
        ".jsonl": pl.scan_ndjson,
        ".ndjson": pl.scan_ndjson,
    }
    if not path.is_file() or path.suffix.lower() not in scans:
        return {}
    try:
        return {name.lower(): name for name in scans[path.suffix.lower()](path).collect_schema().names()}
    except (pl.exceptions.PolarsError, OSError):
        return {}


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
