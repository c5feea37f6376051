"""What the console shows of this second, read where it is true: the broker and the processes themselves."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from innerloop.config import Settings
from innerloop.streams.lag import LagReader
from innerloop.streams.offsets import LogEnds
from innerloop.worker.lag_watch import GroupLag, LagWatch
from innerloop.worker.scrape import Latency, Scraped, scrape

from .repeated import Tries

MINUTE_LOOKS = 60
"""Looks are a second apart."""
STORED, SCORED, WHOLE = "event to stored", "request to score", "event to score"
_HISTOGRAMS = {
    STORED: "innerloop_event_to_stored_seconds",
    SCORED: "innerloop_request_to_score_seconds",
    WHOLE: "innerloop_event_to_score_seconds",
}


@dataclass(frozen=True)
class Flow:
    """A topic: records it has taken in all, and per second since the look before, NaN where that is not known."""

    total: int = 0
    per_second: float = math.nan


@dataclass(frozen=True)
class Percentiles:
    """Seconds; NaN where nothing was observed."""

    p50: float = math.nan
    p99: float = math.nan


@dataclass(frozen=True)
class Live:
    """One look."""

    at: float
    """Epoch seconds."""
    flows: Mapping[str, Flow] = field(default_factory=dict)
    groups: tuple[GroupLag, ...] = ()
    """Ingest's and adapt's."""
    latencies: Mapping[str, Percentiles] = field(default_factory=dict)
    """Of the last minute, by way."""
    latency: Percentiles = Percentiles()
    """From event to score, since the look before."""
    processes: tuple[Scraped, ...] = ()
    troubles: tuple[str, ...] = ()
    """What could not be read, a sentence each: the rest is as it was."""


class LiveSource:
    """Connections that stay open; `look` may be called from one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        topics = settings.topics
        self._ends = LogEnds(
            settings, [*topics.ingested, topics.requests, topics.recommendations, topics.ads, topics.dead_letters]
        )
        self._totals: dict[str, int] = {}
        self._totals_at = 0.0
        self._reader = LagReader(settings)
        self._lag = LagWatch(settings, self._reader)
        self._latency = {way: Latency(name, looks=MINUTE_LOOKS) for way, name in _HISTOGRAMS.items()}
        self._tries = Tries()
        self._last = Live(at=time.time())

    def look(self) -> Live:
        """Read everything once."""
        self._tries.begin()
        last, now, tried = self._last, time.time(), self._tries
        unknown = {topic: Flow(flow.total) for topic, flow in last.flows.items()}
        flows = tried("The ends of the topics", self._flows, unknown)
        groups = tried("The lag", lambda: tuple(self._lag.look()), last.groups)
        processes = tried("The processes' metrics", self._scrape, last.processes)
        for latency in self._latency.values():
            latency.add(processes)
        self._last = Live(
            at=now,
            flows=flows,
            groups=groups,
            latencies={way: Percentiles(*each.percentiles(0.5, 0.99)) for way, each in self._latency.items()},
            latency=Percentiles(*self._latency[WHOLE].percentiles(0.5, 0.99, looks=1)),
            processes=processes,
            troubles=tuple(tried.troubles),
        )
        return self._last

    def close(self) -> None:
        self._reader.close()

    def _scrape(self) -> tuple[Scraped, ...]:
        return tuple(scrape(self._settings.console.targets))

    def _flows(self) -> dict[str, Flow]:
        """Rates are since the last time that this went well: after a failure they are a mean, not a spike."""
        totals, now = self._ends.read(), time.monotonic()
        seconds = now - self._totals_at if self._totals else math.nan
        before, self._totals, self._totals_at = self._totals, totals, now
        return {
            topic: Flow(total, max(0, total - before.get(topic, total)) / seconds) for topic, total in totals.items()
        }


def group_named(live: Live, name: str) -> GroupLag | None:
    """The group as the look found it, None before the first."""
    return next((group for group in live.groups if group.group == name), None)
