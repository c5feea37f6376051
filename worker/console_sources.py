"""What the console shows, read from where it is true: the broker, the database, and the processes themselves."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from innerloop.config import Settings
from innerloop.errors import InnerloopError
from innerloop.evaluation.quality_record import QualityWindow
from innerloop.store import accounts, releases
from innerloop.store.database import connect, transaction
from innerloop.store.releases import RegisteredRelease
from innerloop.streams.dead_letter_queue import DeadLetterQueue
from innerloop.streams.lag import LagReader
from innerloop.streams.offsets import LogEnds

from .console_quality import KEPT, WindowReader
from .dead_letters import Group, grouped
from .lag_watch import GroupLag, LagWatch
from .scrape import Latency, Scraped, scrape

_Found = TypeVar("_Found")
_RARELY_SECONDS = 5.0
_RELEASES = 5


@dataclass(frozen=True)
class Flow:
    """A topic: records it has taken in all, and per second since the look before."""

    total: int = 0
    per_second: float = 0.0


@dataclass(frozen=True)
class Stored:
    """What the database holds."""

    users: int = 0
    some_user: str | None = None
    releases: tuple[RegisteredRelease, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """One look at everything; `at` in epoch seconds, latencies in seconds (NaN: nothing was answered)."""

    at: float
    flows: dict[str, Flow] = field(default_factory=dict)
    groups: tuple[GroupLag, ...] = ()
    p50: float = math.nan
    p99: float = math.nan
    processes: tuple[Scraped, ...] = ()
    stored: Stored = Stored()
    letters: tuple[Group, ...] = ()
    """Dead letters by reason and topic."""
    windows: tuple[QualityWindow, ...] = ()
    """The last ones that `innerloop quality` closed, oldest first."""
    troubles: tuple[str, ...] = ()
    """What could not be read, a sentence each: the rest is as it was."""


class Sources:
    """Connections that stay open; `look` may be called from one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        topics = settings.topics
        self.topics = (*topics.events, topics.requests, topics.recommendations, topics.ads, topics.dead_letters)
        self._engine = connect(settings.database)
        self._ends = LogEnds(settings, self.topics)
        self._reader = LagReader(settings)
        self._lag = LagWatch(settings, self._reader)
        self._latency = Latency()
        self._last = Snapshot(at=time.time())
        self._totals: dict[str, int] = {}
        self._stored_at = self._letters_read = float("-inf")
        self._letters_at = 0
        self._quality: WindowReader | None = None
        self._closed: deque[QualityWindow] = deque(maxlen=KEPT)
        self._troubles: list[str] = []

    def look(self) -> Snapshot:
        """Read everything once; what cannot be read stays as it was, and says so."""
        self._troubles, last, now = [], self._last, time.time()
        totals = self._tried(self._ends.read, self._totals)
        flows = {topic: self._flow(topic, total, now - last.at) for topic, total in totals.items()}
        self._totals = totals
        processes = scrape(self._settings.console.targets)
        p50, p99 = self._latency.since(processes, 0.5, 0.99)
        self._last = Snapshot(
            at=now,
            flows=flows,
            groups=self._tried(lambda: tuple(self._lag.look()), last.groups),
            p50=p50,
            p99=p99,
            processes=tuple(processes),
            stored=self._stored(),
            letters=self._letters(flows),
            windows=self._tried(self._windows, last.windows),
            troubles=tuple(dict.fromkeys(self._troubles)),
        )
        return self._last

    def close(self) -> None:
        self._reader.close()
        if self._quality is not None:
            self._quality.close()
        self._engine.dispose()

    def _flow(self, topic: str, total: int, seconds: float) -> Flow:
        grown = total - self._totals.get(topic, total)
        return Flow(total, grown / seconds if seconds > 0 else 0.0)

    def _stored(self) -> Stored:
        """Counting a table is not for every second."""
        if time.monotonic() - self._stored_at < _RARELY_SECONDS:
            return self._last.stored
        self._stored_at = time.monotonic()
        return self._tried(self._count, self._last.stored)

    def _letters(self, flows: dict[str, Flow]) -> tuple[Group, ...]:
        """The topic is read again only when it has grown: it is small, or the breaker has stopped ingest."""
        topic = self._settings.topics.dead_letters
        total = flows.get(topic, Flow()).total
        if total == self._letters_at or time.monotonic() - self._letters_read < _RARELY_SECONDS:
            return self._last.letters
        self._letters_at, self._letters_read = total, time.monotonic()
        return self._tried(lambda: tuple(grouped(DeadLetterQueue(self._settings))), self._last.letters)

    def _windows(self) -> tuple[QualityWindow, ...]:
        self._quality = self._quality or WindowReader(self._settings)
        self._closed.extend(self._quality.new())
        return tuple(self._closed)

    def _count(self) -> Stored:
        with transaction(self._engine) as connection:
            return Stored(
                accounts.users(connection),
                accounts.some_user(connection),
                tuple(releases.newest_few(connection, _RELEASES)),
            )

    def _tried(self, read: Callable[[], _Found], otherwise: _Found) -> _Found:
        try:
            return read()
        except InnerloopError as error:
            self._troubles.append(str(error))
            return otherwise


def group_named(snapshot: Snapshot, name: str) -> GroupLag | None:
    """The group as the snapshot has it, None before the first look."""
    return next((group for group in snapshot.groups if group.group == name), None)
