"""`innerloop lag`: how far the groups are behind, and what that means, for people or, with --json, for programs."""

import math
import sys
import time
from contextlib import nullcontext

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
    """Show the same once a second until Ctrl-C: in place on a terminal, one below the other in a file or a pipe."""
    console = Console()
    show = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    with LagReader(settings) as reader, show as live:
        watch = LagWatch(settings, reader, quality=True)
        while True:
            groups = watch.look()
            if live is None:
                console.print(_shown(groups))
            else:
                live.update(_shown(groups), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _flat(judged: JudgedLag) -> dict[str, object]:
    """One object for programs; the time to catch up is null when that never comes."""
    known = {"owner": judged.owner, "status": judged.status, "catch_up_seconds": judged.catch_up_seconds}
    return msgspec.structs.asdict(judged.lag) | known


def _shown(groups: list[GroupLag]) -> Group:
    """What it means comes first: a small terminal cuts off the end."""
    sentences = (_sentence(group) for group in groups)
    return Group(*sentences, Text(), *(part for group in groups for part in (_table(group), Text())))


def _table(group: GroupLag) -> Table:
    """Without lines between the columns, and with the owner last, it fits a terminal of 80 columns."""
    table = Table(title=group.group, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("partition", no_wrap=True)
    for name in ("committed", "end", "behind", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("owner", overflow="ellipsis")
    for each in group.partitions:
        table.add_row(*_row(each))
    return table


def _row(judged: JudgedLag) -> list[str | Text]:
    lag = judged.lag
    committed = "none yet" if lag.committed is None else f"{lag.committed:,}"
    seconds = "unknown" if lag.seconds is None else f"{lag.seconds:,.1f}"
    place = Text(f"{lag.topic}[{lag.partition}]")
    numbers = [committed, f"{lag.end:,}", f"{lag.offsets:,}", seconds]
    return [place, *numbers, Text(judged.status, _STYLES[judged.status]), judged.owner or "nobody"]


def _sentence(group: GroupLag) -> Text:
    return Text(f"{group.group} {group.status}: {_outlook(group)}", _STYLES[group.status])


def _outlook(group: GroupLag) -> str:
    if group.offsets == 0:
        return "nothing waits."
    age = "nobody knows how long" if math.isnan(group.seconds) else f"the oldest for {group.seconds:,.1f} s"
    behind = f"{group.offsets:,} records wait, {age}"
    if math.isinf(group.catch_up_seconds):
        return f"{behind}; at this pace they are never caught up with."
    return f"{behind}; caught up in {group.catch_up_seconds:,.0f} s at this pace."
