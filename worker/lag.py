"""`innerloop lag`: how far both groups are behind, for people or, with --json, for programs."""

import json
import sys

import msgspec
from rich.console import Console
from rich.table import Table

from innerloop.config import Settings
from innerloop.streams.lag import LagReader, PartitionLag


def show_lag(settings: Settings, *, as_json: bool = False) -> int:
    """Print the lag of ingest over the events and of adapt over the requests, and return the exit code.

    Raises ServiceError when no broker answers or a topic does not exist.
    """
    with LagReader(settings) as reader:
        lags = reader.read(settings.kafka.ingest_group, settings.topics.events)
        lags += reader.read(settings.kafka.adapt_group, [settings.topics.requests])
    if as_json:
        json.dump(msgspec.to_builtins(lags), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        Console().print(_table(lags))
    return 0


def _table(lags: list[PartitionLag]) -> Table:
    table = Table("group", "topic")
    for name in ("partition", "committed", "end", "behind", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in lags:
        committed = "none yet" if each.committed is None else f"{each.committed:,}"
        seconds = "unknown" if each.seconds is None else f"{each.seconds:,.1f}"
        numbers = (str(each.partition), committed, f"{each.end:,}", f"{each.offsets:,}", seconds)
        table.add_row(each.group, each.topic, *numbers)
    return table
