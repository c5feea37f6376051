"""A file of past events for the conversion protocol: numbered, and purchases attributed to clicks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import in_one_order, read_actions
from innerloop.evaluation.outcome import Ints
from innerloop.learning.ads.attribution import attribute
from innerloop.learning.ads.click_log import ConversionLog
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.stream_log import in_time

_OTHER = len(KINDS)
_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


def read_log(path: Path, *, window: int, columns: Mapping[str, str] | None = None, seed: int = 0) -> ConversionLog:
    """Read a file of events, or every such file of a folder; the attribution window in ms.

    `columns` maps names, as in `event_table.read_events`. Events of one millisecond are shuffled, the same for the same
    seed: the order of the rows says nothing.

    Raises SettingsError without clicks or without purchases.
    """
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"{path} holds no file of events: name a CSV, JSONL or Parquet file.")
    table = pl.concat([read_actions(file, columns=columns) for file in files], how="diagonal_relaxed")
    table = in_one_order(table)
    table = table[in_time(table["event_time"].to_numpy(), seed)]
    kinds = np.array([KINDS.index(k) if k in KINDS else _OTHER for k in table["event_type"].to_list()], np.int64)
    for kind in ("click", "purchase"):
        if not (kinds == KINDS.index(kind)).any():
            raise SettingsError(f"{path} has no event of type {kind}: conversion needs clicks and purchases.")
    users, items = _codes(table["user_id"]), _codes(table["item_id"])
    categories = _codes(table["category"]) if "category" in table.columns else np.full(len(kinds), -1)
    times = table["event_time"].to_numpy()
    attribution = attribute(users, items, times, kinds == 0, kinds == KINDS.index("purchase"), window=window)
    return ConversionLog(users, items, categories, kinds, times, attribution)


def _codes(column: pl.Series) -> Ints:
    known = column.drop_nulls().unique().sort()
    codes = column.replace_strict(known, np.arange(len(known)), default=-1, return_dtype=pl.Int64)
    return codes.to_numpy()
