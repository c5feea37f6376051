"""`innerloop lag`: how far the groups are behind, and what that means, for people or, with --json, for programs."""

import math
import sys
import time

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from innerloop.config import Settings
from innerloop.streams.lag import LagReader

from .lag_watch import WINDOW_LOOKS, GroupLag, JudgedLag, LagWatch

_LOOK_SECONDS = 0.5
_WATCH_SECONDS = 1.0
_STYLES = {"ok": "green", "warning": "yellow", "stalled": "red", "stopped": "red"}


def show_lag(settings: Settings, *, as_json: bool = False) -> int:
    """Print the lag of ingest, of adapt, and of quality where it exists, and return the exit code.

    Where somebody lags all are looked at for five seconds: one look can't tell a pause from a standstill.
    Raises ServiceError when no broker answers or a topic does not exist.
    """
    with LagReader(settings) as reader:
        watch = LagWatch(settings, reader, quality=True)
        groups = watch.look()
        looks = 1
        while looks < WINDOW_LOOKS and any(group.status in {"warning", "stalled"} for group in groups):
            time.sleep(_LOOK_SECONDS)
            groups = watch.look()
            looks += 1
    if as_json:
        flat = [_flat(each) for group in groups for each in group.partitions]
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(flat)).decode() + "\n")
    else:
        Console().print(_shown(groups))
    return 0


def watch_lag(settings: Settings) -> None:
    """Show the same once a second until Ctrl-C."""
    with LagReader(settings) as reader, Live(console=Console(), auto_refresh=False) as live:
        watch = LagWatch(settings, reader, quality=True)
        while True:
            live.update(_shown(watch.look()), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _flat(judged: JudgedLag) -> dict[str, object]:
    """One object for programs; the time to catch up is null when that never comes."""
    known = {"owner": judged.owner, "status": judged.status, "catch_up_seconds": judged.catch_up_seconds}
    return msgspec.structs.asdict(judged.lag) | known


def _shown(groups: list[GroupLag]) -> Group:
    return Group(*(part for group in groups for part in (_table(group), _sentence(group), Text())))


def _table(group: GroupLag) -> Table:
    table = Table("topic", title=group.group, title_justify="left")
    for name in ("partition", "committed", "end", "behind", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("owner", overflow="fold")
    for each in group.partitions:
        table.add_row(*_row(each))
    return table


def _row(judged: JudgedLag) -> list[str | Text]:
    lag = judged.lag
    committed = "none yet" if lag.committed is None else f"{lag.committed:,}"
    seconds = "unknown" if lag.seconds is None else f"{lag.seconds:,.1f}"
    numbers = [lag.topic, str(lag.partition), committed, f"{lag.end:,}", f"{lag.offsets:,}", seconds]
    return [*numbers, Text(judged.status, _STYLES[judged.status]), judged.owner or "nobody"]


def _sentence(group: GroupLag) -> Text:
    return Text(f"{group.status}: {_outlook(group)}", _STYLES[group.status])


def _outlook(group: GroupLag) -> str:
    if group.offsets == 0:
        return "nothing waits."
    age = "nobody knows how long" if math.isnan(group.seconds) else f"the oldest for {group.seconds:,.1f} s"
    behind = f"{group.offsets:,} records wait, {age}"
    if math.isinf(group.catch_up_seconds):
        return f"{behind}; at this pace they are never caught up with."
    return f"{behind}; caught up in {group.catch_up_seconds:,.0f} s at this pace."
