"""`innerloop replay`: past events from a file onto the event topics, at a chosen rate, as the shop would send them."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from innerloop.config import Settings
from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import read_events
from innerloop.events import CODES, IMPRESSION
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.topics import require_topics

from .processes import stop_on_signals

__all__ = ["EventProducer", "Pace", "ReplayReport", "encode_events", "replay", "run_replay"]

_COLUMNS = (
    *("event_id", "event_type", "user_id", "item_id", "event_time"),
    *("session_id", "category", "ad_id", "price", "quantity", "currency", "value"),
)
_OPTIONAL = _COLUMNS[5:]
_CHUNK = 50_000  # encoded at once: some 10 MB, about 0.1 s
_FULL_SPEED_STEP = 1_000
_STEP_SECONDS = 0.002
_PROGRESS_SECONDS = 0.5

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayReport:
    """What was done.

    `sent` events are at the broker, `purchases` of them purchases; `skipped` have a type that the event topics don't
    take; `stopped` tells that `stop` ended it early; it took `seconds`.
    """

    sent: int
    purchases: int
    skipped: int
    seconds: float
    stopped: bool

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.sent / self.seconds if self.seconds else 0.0


def run_replay(  # noqa: PLR0917 - the command line's options, one for one
    settings: Settings,
    file: Path,
    rate: str,
    columns: Mapping[str, str],
    start: float,
    limit: int | None,
    *,
    shift_to_now: bool,
) -> None:
    """`innerloop replay`: send with a progress bar until the end or a signal, then say what was sent.

    `rate` is events per second, or max. Raises SettingsError and ServiceError as `replay` does.
    """
    stopping = stop_on_signals()
    console = Console()
    bar = Progress(TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar:
        task = bar.add_task("", total=None)
        report = replay(
            settings,
            file,
            rate=parse_rate(rate),
            columns=columns,
            start=start,
            limit=limit,
            shift_to_now=shift_to_now,
            on_progress=lambda sent, total: bar.update(task, completed=sent, total=total),
            stop=stopping,
        )
    skipped = f"; {report.skipped} of other types were left out" if report.skipped else ""
    early = " Stopped before the end." if report.stopped else ""
    console.print(
        f"{report.sent} events ({report.purchases} purchases) in {report.seconds:.1f} s, "
        f"{report.rate:.0f} a second{skipped}.{early}",
        highlight=False,
    )


def parse_rate(text: str) -> float | None:
    """Events per second, None for max; raises SettingsError for anything else."""
    if text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SettingsError(f"{text} is no rate: give a number of events per second above 0, or max.")
    return rate


def replay(
    settings: Settings,
    path: Path | str,
    *,
    rate: float | None = None,
    columns: Mapping[str, str] | None = None,
    start: float = 0.0,
    end: float = 1.0,
    limit: int | None = None,
    shift_to_now: bool = False,
    on_progress: OnProgress = lambda _sent, _total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ReplayReport:
    """Send the events of a file, oldest first, keyed by user, and wait until all are at the broker.

    `rate` is in events per second, None as fast as the broker takes them. `start` and `end` are shares of the file's
    rows (0.8 to 1.0 is the newest fifth), `limit` a number of events after that. `shift_to_now` moves all times alike,
    so that the newest event is of now. `on_progress` gets (sent, total) twice a second, `stop` ends it early.
    Raises SettingsError for a file or share that cannot be used, ServiceError when the broker or a topic is missing or
    some of the events were not delivered.
    """
    _check(rate, start, end, limit)
    table = read_events(path, columns=columns)
    part = table.slice(round(table.height * start), round(table.height * end) - round(table.height * start))
    known = part.filter(pl.col("event_type").is_in([*CODES, IMPRESSION]))
    events = known if limit is None else known.head(limit)
    require_topics(settings, [*settings.topics.events, settings.topics.impressions])
    producer = EventProducer(settings)
    began = time.monotonic()
    purchases = _send(producer, _shifted(events) if shift_to_now else events, rate, on_progress, stop)
    producer.finish()
    return ReplayReport(
        sent=producer.sent,
        purchases=purchases,
        skipped=part.height - known.height,
        seconds=time.monotonic() - began,
        stopped=producer.sent < events.height,
    )


def encode_events(frame: pl.DataFrame) -> list[bytes]:
    """Encode each row of an event table as an event of `schemas/event.v1.json`; what is null is left out."""
    wanted = frame.select(
        name for name in _COLUMNS if name in frame.columns and frame[name].null_count() < frame.height
    )
    # polars writes a million rows a second. Inside a JSON string a quote has a backslash before it, so what is cut out
    # here cannot be part of one.
    text = wanted.write_ndjson()
    for name in _OPTIONAL:
        text = text.replace(f',"{name}":null', "")
    return text.encode().splitlines()


def _check(rate: float | None, start: float, end: float, limit: int | None) -> None:
    if rate is not None and not rate > 0:
        raise SettingsError(f"A rate of {rate} events per second is none: give a number above 0, or max.")
    if not 0 <= start <= end <= 1:
        raise SettingsError(f"From {start} to {end} is no part of the file: give shares between 0 and 1 in order.")
    if limit is not None and limit < 0:
        raise SettingsError(f"A limit of {limit} events is none: give a number from 0.")


def _shifted(events: pl.DataFrame) -> pl.DataFrame:
    newest = events["event_time"].max()
    if not isinstance(newest, int):  # no events
        return events
    return events.with_columns(pl.col("event_time") + (int(time.time() * 1000) - newest))


def _send(
    producer: EventProducer, events: pl.DataFrame, rate: float | None, on_progress: OnProgress, stop: Callable[[], bool]
) -> int:
    """Send all of them, or until `stop`; the number of purchases among those sent."""
    pace = Pace(rate)
    purchases = 0
    reported = time.monotonic()
    for chunk in events.iter_slices(_CHUNK):
        rows = list(zip(chunk["user_id"], chunk["event_type"], encode_events(chunk), strict=True))
        at = 0
        while at < len(rows):
            if stop():
                return purchases
            due = pace.due()
            if due == 0:
                time.sleep(_STEP_SECONDS)
            for user_id, event_type, payload in rows[at : at + due]:
                producer.send(user_id, event_type, payload)
                purchases += event_type == "purchase"
            at += due
            if time.monotonic() - reported >= _PROGRESS_SECONDS:
                reported = time.monotonic()
                on_progress(producer.sent, events.height)
    on_progress(producer.sent, events.height)
    return purchases


class Pace:
    """How many events are due, in steps of some 2 ms; what a pause of this process held back is caught up with."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._began = time.monotonic()
        self._given = 0

    def due(self) -> int:
        """Count out the events that are due now, the first at once."""
        if self._rate is None:
            return _FULL_SPEED_STEP
        due = int((time.monotonic() - self._began) * self._rate) + 1 - self._given
        self._given += due
        return due
