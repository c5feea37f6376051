"""Reading files of events for the stream protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import in_one_order, read_actions

_READABLE = (".csv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class EventTable:
    """Events `in_one_order`; those from row `own_from` on are the data's own, the others its history's."""

    events: pl.DataFrame
    own_from: int


def read_table(path: Path, *, history: Path | None = None, columns: Mapping[str, str] | None = None) -> EventTable:
    """Read a file or a folder of events, behind those of `history` that are earlier.

    `columns` maps names, in both, as in `event_table.read_events`.

    Raises SettingsError if there are none, of either.
    """
    table = _table(path, columns)
    if table.is_empty():
        raise SettingsError(f"{path} has no events: name a file or a folder with some.")
    if history is None:
        return EventTable(table, 0)
    before = _table(history, columns).filter(pl.col("event_time") < table["event_time"][0])
    if before.is_empty():
        raise SettingsError(f"{history} has no event before the first of {path}: name earlier events, or none.")
    return EventTable(pl.concat([before, table], how="diagonal_relaxed"), before.height)


def _table(path: Path, columns: Mapping[str, str] | None) -> pl.DataFrame:
    if not path.is_dir():
        return in_one_order(read_actions(path, columns=columns))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READABLE)
    if not files:
        raise SettingsError(f"{path} holds none of {', '.join(_READABLE)} files: put the events there or name a file.")
    tables = [read_actions(file, columns=columns) for file in files]
    return in_one_order(pl.concat(tables, how="diagonal_relaxed"))
