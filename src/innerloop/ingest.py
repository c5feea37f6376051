"""Ingest: event records in; support sets, adaptation requests and dead letters out.

The order of every batch, which the guarantees rest on:
1. decode; what is bad becomes a dead letter
2. one database transaction: support sets, ads, and the partition ledger (new items get their numbers just before)
3. produce requests and dead letters
4. flush, with nothing undelivered
5. the loop commits the offsets

Killed before 2 commits: nothing has happened, the batch is read again. Killed after 2: the batch is read again, the
ledger shows that its events are in, so they change nothing; their users' requests are sent again. Killed after 4: the
same once more. A request names a version, so repeats are harmless.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import structlog
import xxhash

from innerloop import metrics
from innerloop.activity import ActivityLog
from innerloop.config import Settings
from innerloop.errors import RetryError, StopError
from innerloop.events import CODES, Event, decode_many
from innerloop.scores import AdaptationRequest
from innerloop.store import items, support_sets
from innerloop.store.database import Database, Transaction, transaction
from innerloop.store.ledger import Ledger
from innerloop.streams.batch import Batch, Partition
from innerloop.streams.dead_letters import send_dead_letter
from innerloop.streams.publisher import Publisher
from innerloop.support import EXAMPLE, Examples, Ints, Merged, SupportCache, SupportSets, gather, merge, newest
from innerloop.trends import activity_of

_LOG = structlog.get_logger(__name__)
_FLUSH_SECONDS = 5.0
_MAX_CONFLICTS = 10


@dataclass
class _Users:
    """The distinct users of some events, and each event's position among them."""

    names: list[str]
    positions: Ints  # [N]

    @classmethod
    def of(cls, events: Sequence[Event]) -> "_Users":
        numbers: dict[str, int] = {}
        positions = [numbers.setdefault(event.user_id, len(numbers)) for event in events]
        return cls(list(numbers), np.array(positions, np.int64))


@dataclass
class _Answer:
    """What the users of a batch are asked to be adapted to."""

    users: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    newest: list[int] = field(default_factory=list)

    def add(self, users: list[str], versions: Ints, times: Ints) -> None:
        self.users += users
        self.versions += versions.tolist()
        self.newest += times.tolist()


class Ingest:
    """The processor behind `innerloop ingest`; see the module for its order and `streams.loop` for its contract."""

    def __init__(self, settings: Settings, engine: Database, ledger: Ledger, publisher: Publisher) -> None:
        self._settings, self._engine, self._ledger, self._publisher = settings, engine, ledger, publisher
        self._cache = SupportCache(settings.ingest.cached_users, settings.support.capacity)
        self._numbers = items.ItemNumbers(engine)
        weights = settings.support.weights
        self._weights = np.array([0.0, *(weights.get(name, 1.0) for name in CODES)], np.float32)
        self._breaker = _Breaker(settings.ingest.breaker_window)
        self._activity = ActivityLog(settings.trends)
        self._encode = msgspec.json.Encoder().encode
        self._unsure = False
        self._counted: Batch | None = None

    # --- the loop's contract

    def assigned(self, committed: Mapping[Partition, int | None]) -> Mapping[Partition, int | None]:
        """Claim, and start where both the broker and the ledger say that everything before is done.

        A ledger that knows nothing of the partition starts it at its oldest record: an empty database is rebuilt.
        """
        claims = self._ledger.claim(list(committed))
        self._cache.clear()  # the partition's last owner may have written since we read
        return {partition: _earlier(offset, claims[partition].next_offset) for partition, offset in committed.items()}

    def revoked(self, partitions: Sequence[Partition]) -> None:
        self._ledger.release(partitions)

    def idle(self) -> None:
        """Tell of the last activity, should no batch follow. Raises RetryError."""
        if self._activity.due:
            with transaction(self._engine) as connection:
                self._activity.write(connection)
            self._activity.written()

    def handle(self, batch: Batch) -> None:
        """Store, request, dead-letter; see the module. Raises RetryError and StopError."""
        started = int(time.time() * 1000)
        self._publisher.flush(0)  # what an earlier try left behind goes first, or this waits again
        if self._unsure:
            self._ledger.reload()
        metrics.BATCH_SIZE.observe(len(batch))
        replayed = self._already_stored(batch)
        with metrics.STEP_SECONDS.labels("decode").time():
            latest = started + int(self._settings.ingest.max_ahead_seconds * 1000)
            events, positions, bad = decode_many(
                batch.values, latest_ms=latest, max_bytes=self._settings.ingest.max_record_bytes
            )
        if batch is not self._counted:  # a batch that is tried again counts once
            self._breaker.saw(len(batch), len(bad))
            self._counted = batch
        old = [] if replayed is None else [e for e, at in zip(events, positions, strict=True) if replayed[at]]
        new = events if replayed is None else [e for e, at in zip(events, positions, strict=True) if not replayed[at]]
        answer = self._store(new, batch.next_offsets, old)
        with metrics.STEP_SECONDS.labels("publish").time():
            self._request(answer, started)
            for position, error in bad:
                metrics.DEAD_LETTERS.labels(error.reason).inc()
                send_dead_letter(
                    self._publisher,
                    self._settings.topics.dead_letters,
                    batch.record(position),
                    error,
                    group=self._settings.kafka.ingest_group,
                )
            self._publisher.flush(_FLUSH_SECONDS)
        metrics.EVENTS.labels("dead_letter").inc(len(bad))
        metrics.EVENTS.labels("replayed").inc(len(old))

    # --- step 1

    def _already_stored(self, batch: Batch) -> list[bool] | None:
        """Which records the ledger has; None when it has none of them, as nearly always."""
        stored = {partition: self._ledger[partition].next_offset or 0 for partition in batch.next_offsets}
        if all(first >= stored[partition] for partition, first in batch.first_offsets.items()):
            return None
        return [offset < stored[partition] for partition, offset in zip(batch.partitions, batch.offsets, strict=True)]

    # --- step 2

    def _store(self, new: list[Event], offsets: Mapping[Partition, int], old: list[Event]) -> _Answer:
        """One transaction for the batch; again when another writer had one of its users."""
        # Offsets never go back: a batch that lies below the ledger leaves it where it is.
        moved = {p: n for p, n in offsets.items() if n > (self._ledger[p].next_offset or 0)}
        users, columns = _Users.of(new), _Columns.of(new)
        examples = self._examples(columns)
        for _ in range(_MAX_CONFLICTS):
            try:
                return self._try_to_store(users, columns, examples, moved, old)
            except support_sets.SupportConflictError:
                metrics.CONFLICTS.inc()
                self._cache.forget(users.names)
            except RetryError:
                # The commit may or may not have happened: believe nothing until the ledger has been read.
                self._unsure = True
                self._cache.clear()
                raise
        raise RetryError(f"{len(users.names)} users are being written by another process as well")

    def _try_to_store(
        self, users: _Users, columns: "_Columns", examples: Examples, offsets: Mapping[Partition, int], old: list[Event]
    ) -> _Answer:
        answer = _Answer()
        with transaction(self._engine) as connection:
            sets, versions = self._read(connection, users.names)
            with metrics.STEP_SECONDS.labels("merge").time():
                merged = merge(sets, users.positions, examples, self._settings.support.capacity)
            changed = np.flatnonzero(merged.changed)
            names = [users.names[row] for row in changed]
            written = gather(merged.sets, changed)
            with metrics.STEP_SECONDS.labels("database").time():
                if names:
                    support_sets.write(connection, names, written, versions[changed] + 1)
                items.see_ads(connection, {ad: int(examples["item"][at]) for ad, at in columns.ads.items()})
                if offsets:
                    self._ledger.advance(connection, offsets)
            answer.add(names, versions[changed] + 1, written.newest)
            again = list({event.user_id for event in old} - set(names))
            answer.add(*_asked_again(connection, again))
            if told := self._activity.due:
                self._activity.write(connection)
        if told:
            self._activity.written()
        self._activity.add(activity_of(merged.sets, merged.fresh))
        self._ledger.advanced(offsets)
        self._unsure = False
        self._cache.put(names, written, versions[changed] + 1)
        self._count(merged, len(users.positions))
        return answer

    def _read(self, connection: Transaction, users: list[str]) -> tuple[SupportSets, Ints]:
        """Sets and versions of `users`, from the cache and what it lacks from the table; (empty, 0) if new."""
        missing = self._cache.missing(users)
        if missing:
            found, sets, versions = support_sets.read(connection, missing)
            self._cache.put(found, newest(sets, self._settings.support.capacity), versions)
            unknown = self._cache.missing(missing)
            self._cache.put(unknown, SupportSets.empty(len(unknown)), np.zeros(len(unknown), np.int64))
        return self._cache.get(users)

    def _examples(self, columns: "_Columns") -> Examples:
        examples = np.empty(len(columns.items), EXAMPLE)
        examples["time"], examples["hash"], examples["type"] = columns.times, columns.hashes, columns.types
        examples["item"] = self._numbers.intern(columns.items, columns.categories)
        examples["weight"] = self._weights[columns.types]
        return examples

    @staticmethod
    def _count(merged: Merged, events: int) -> None:
        metrics.EVENTS.labels("stored").inc(events - merged.duplicates - merged.too_late)
        metrics.EVENTS.labels("duplicate").inc(merged.duplicates)
        metrics.EVENTS.labels("too_late").inc(merged.too_late)

    # --- step 3

    def _request(self, answer: _Answer, started: int) -> None:
        topic, send, encode = self._settings.topics.requests, self._publisher.send, self._encode
        for user, version, time_ms in zip(answer.users, answer.versions, answer.newest, strict=True):
            send(topic, user, encode(AdaptationRequest(user, version, time_ms, started)))
        metrics.REQUESTS.labels("sent").inc(len(answer.users))


@dataclass(frozen=True)
class _Columns:
    """The events of a batch by column."""

    items: list[str]
    types: Ints
    times: Ints
    hashes: Ints
    ads: dict[str, int]
    """Ad -> position of its newest event here."""
    categories: dict[str, str]
    """Item -> category, of the events that name one."""

    @classmethod
    def of(cls, events: Sequence[Event]) -> "_Columns":
        digest = xxhash.xxh3_64_intdigest
        return cls(
            items=[event.item_id for event in events],
            types=np.array([CODES[event.event_type] for event in events], np.int64),
            times=np.array([event.event_time for event in events], np.int64),
            hashes=np.array([digest(event.event_id.encode()) for event in events], np.uint64).view(np.int64),
            ads={event.ad_id: at for at, event in enumerate(events) if event.ad_id is not None},
            categories={event.item_id: event.category for event in events if event.category is not None},
        )


class _Breaker:
    """Stops the worker when most of `window` records in a row are bad: then the code is wrong, not the data."""

    def __init__(self, window: int) -> None:
        self._window, self._records, self._bad = window, 0, 0

    def saw(self, records: int, bad: int) -> None:
        """Count a batch; raises StopError before anything of it is dead-lettered."""
        self._records += records
        self._bad += bad
        if self._records >= self._window:
            if 2 * self._bad > self._records:
                raise StopError(
                    f"{self._bad} of the last {self._records} records are bad: stopped before dead-lettering a whole"
                    " topic. See why in the dead letters, then start again or correct the producer."
                )
            self._records = self._bad = 0


def _earlier(committed: int | None, stored: int | None) -> int | None:
    return None if committed is None or stored is None else min(committed, stored)


def _asked_again(connection: Transaction, users: list[str]) -> tuple[list[str], Ints, Ints]:
    if not users:
        return [], np.zeros(0, np.int64), np.zeros(0, np.int64)
    found, sets, versions = support_sets.read(connection, users)
    return found, versions, sets.newest
