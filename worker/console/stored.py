"""What the console shows of what changes slowly or is slow to read: nothing that is shown each second waits for it."""

import time
from dataclasses import dataclass

from innerloop.config import Settings
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.store import accounts, releases
from innerloop.store.database import connect, transaction
from innerloop.store.releases import RegisteredRelease
from innerloop.streams.dead_letter_queue import DeadLetterQueue
from innerloop.streams.lag import LagReader
from innerloop.streams.offsets import LogEnds
from innerloop.worker.dead_letters import Group, grouped
from innerloop.worker.lag_watch import GroupLag, LagWatch

from .quality import WindowReader
from .repeated import Tries

STATEMENT_SECONDS = 5.0
"""The console gives up a statement that takes longer: behind a lock, or over a table that is too large for it."""
_EXACT_USERS = 1_000_000
_RELEASES = 5
_REST = 5.0
"""The dead letters are read again after so many times as long as it took: the console is no heavy reader."""


@dataclass(frozen=True)
class Stored:
    """One look."""

    at: float
    """Epoch seconds."""
    users: int = 0
    exact: bool = True
    """Whether users were counted; else it is the database's own estimate."""
    some_user: str | None = None
    releases: tuple[RegisteredRelease, ...] = ()
    """The newest first, which is in force."""
    letters: tuple[Group, ...] = ()
    """Dead letters by reason and topic."""
    windows: tuple[QualityWindow, ...] = ()
    """The last hour of those that `innerloop quality` closed, oldest first."""
    quality: GroupLag | None = None
    """The lag of quality's group; None where it has never run."""
    troubles: tuple[str, ...] = ()
    """What could not be read, a sentence each: the rest is as it was."""


class StoredSource:
    """Connections that stay open; `look` may be called from one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._engine = connect(settings.database, statement_seconds=STATEMENT_SECONDS)
        self._letters = _Letters(settings)
        self._windows = WindowReader(settings)
        self._reader = LagReader(settings)
        self._lag = _QualityLag(settings, self._reader)
        self._tries = Tries()
        self._last = Stored(at=time.time())

    def look(self) -> Stored:
        """Read everything once."""
        self._tries.begin()
        last, tried = self._last, self._tries
        users, exact, some_user = tried("The users", self._users, (last.users, last.exact, last.some_user))
        self._last = Stored(
            at=time.time(),
            users=users,
            exact=exact,
            some_user=some_user,
            releases=tried("The releases", self._releases, last.releases),
            letters=tried("The dead letters", self._letters.read, last.letters),
            windows=tried("The quality windows", self._windows.read, last.windows),
            quality=tried("The lag of quality", self._quality, last.quality),
            troubles=tuple(tried.troubles),
        )
        return self._last

    def close(self) -> None:
        self._reader.close()
        self._windows.close()
        self._engine.dispose()

    def _users(self) -> tuple[int, bool, str | None]:
        with transaction(self._engine) as connection:
            return *accounts.users_about(connection, exact_up_to=_EXACT_USERS), accounts.some_user(connection)

    def _releases(self) -> tuple[RegisteredRelease, ...]:
        with transaction(self._engine) as connection:
            return tuple(releases.newest_few(connection, _RELEASES))

    def _quality(self) -> GroupLag | None:
        (group,) = self._lag.look()
        known = any(each.lag.committed is not None or each.owner for each in group.partitions)
        return group if known else None


class _Letters:
    """Reads the topic again only when it has grown: it is small, or the breaker has stopped ingest."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._topic = settings, settings.topics.dead_letters
        self._ends = LogEnds(settings, [self._topic])
        self._known, self._not_before = 0, 0.0
        self._groups: tuple[Group, ...] = ()

    def read(self) -> tuple[Group, ...]:
        end = self._ends.read()[self._topic]
        began = time.monotonic()
        if end != self._known and began >= self._not_before:
            self._groups = tuple(grouped(DeadLetterQueue(self._settings)))
            took = time.monotonic() - began
            self._known, self._not_before = end, began + took + _REST * took
        return self._groups


class _QualityLag(LagWatch):
    def look(self) -> list[GroupLag]:
        topics = self._settings.topics
        read = [topics.clicks, topics.purchases, topics.recommendations, topics.ads]
        return [self._look(self._settings.kafka.quality_group, read)]
