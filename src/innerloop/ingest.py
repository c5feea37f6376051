"""Ingest: event records in; support sets, adaptation requests and dead letters out.

The order of every batch, which the guarantees rest on:
0. erasures, if there are any, in a transaction of their own with the same steps (see `erasure`)
1. decode; what is bad becomes a dead letter
2. one database transaction: support sets, impressions, ads, and the partition ledger (new items get their numbers just
   before)
3. produce dead letters and flush; then produce requests: while dead letters are refused nobody is asked again and again
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
from innerloop.erasure import Suppression, decode_erasures, past_and_base
from innerloop.errors import BreakerError, DeadLetterError, RetryError
from innerloop.events import CODES, IMPRESSION, Event, EventType, decode_many
from innerloop.impressions import Impressions, Shown, Written
from innerloop.scores import AdaptationRequest
from innerloop.store import erasures, items, support_sets
from innerloop.store.database import Database, Transaction, transaction
from innerloop.store.ledger import Ledger
from innerloop.streams.batch import Batch, Record
from innerloop.streams.dead_letters import send_dead_letter
from innerloop.streams.partitions import Partition
from innerloop.streams.processor import LogEnds
from innerloop.streams.publisher import Publisher
from innerloop.support import EXAMPLE, Examples, Ints, Merged, SupportCache, SupportSets, gather, merge, newest
from innerloop.tracing import Spans, Traces
from innerloop.trends import activity_of

_LOG = structlog.get_logger(__name__)
_FLUSH_SECONDS = 5.0
_MAX_CONFLICTS = 10


_Bad = tuple[Record, DeadLetterError]


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
    erased: bool = False
    replayed: int = 0
    """Events that were in the database before."""

    def add(self, users: list[str], versions: Ints, times: Ints) -> None:
        self.users += users
        self.versions += versions.tolist()
        self.newest += times.tolist()


class Ingest:
    """The processor behind `innerloop ingest`; see the module for its order, `streams.processor` for its contract."""

    def __init__(
        self,
        settings: Settings,
        engine: Database,
        ledger: Ledger,
        publisher: Publisher,
        traces: Traces | None = None,
    ) -> None:
        self._settings, self._engine, self._ledger, self._publisher = settings, engine, ledger, publisher
        self._traces = traces or Traces()
        self._cache = SupportCache(settings.ingest.cached_users, settings.support.capacity)
        self._impressions = Impressions(settings.support.impressions, settings.ingest.cached_users)
        self._numbers = items.ItemNumbers(engine)
        weights = settings.support.weights
        self._weights = np.array([0.0, *(weights.get(name, 1.0) for name in CODES), 0.0], np.float32)
        self._breaker = _Breaker(settings.ingest.breaker_window)
        self._activity = ActivityLog(settings.trends)
        self._encode = msgspec.json.Encoder().encode
        self._suppression = Suppression()
        self._unsure = False
        self._counted: Batch | None = None

    # --- the loop's contract

    def assigned(self, committed: Mapping[Partition, int | None], log_ends: LogEnds) -> Mapping[Partition, int | None]:
        """Claim, and start where both the broker and the ledger say that everything before is done.

        A ledger that knows nothing of the partition starts it at its oldest record: an empty database is rebuilt.
        """
        claims = self._ledger.claim(list(committed))
        self._forget_all()  # the partition's last owner may have written since we read
        return {
            partition: _start(offset, claims[partition].next_offset, partition, log_ends)
            for partition, offset in committed.items()
        }

    def stands_at(self, partition: Partition) -> int | None:
        return self._ledger[partition].next_offset

    def revoked(self, partitions: Sequence[Partition]) -> None:
        self._ledger.release(partitions)

    def gap(self, partition: Partition, from_offset: int, to_offset: int) -> None:
        """Record the gap, and go on behind it. Raises RetryError."""
        self._ledger.gap(partition, from_offset, to_offset)

    def idle(self) -> None:
        """Tell of the last activity, should no batch follow. Raises RetryError."""
        if self._activity.due:
            with transaction(self._engine) as connection:
                self._activity.write(connection)
            self._activity.written()

    def handle(self, batch: Batch) -> None:
        """Store, request, dead-letter; see the module. Raises RetryError and StopError."""
        with self._traces.spans("innerloop.ingest", batch.trace_parents, len(batch)) as spans:
            self._handle(batch, spans)

    def _handle(self, batch: Batch, spans: Spans) -> None:
        started = int(time.time() * 1000)
        self._publisher.flush(0)  # what an earlier try left behind goes first, or this waits again
        if self._unsure:
            self._ledger.reload()
        latest = started + int(self._settings.ingest.max_ahead_seconds * 1000)
        events, erasing = self._parted(batch)
        answers: list[_Answer] = []
        bad: list[_Bad] = []
        if erasing is not None:
            answers.append(self._erase(erasing, latest, bad))
        if len(events):
            answers.append(self._take_in(events, latest, bad, whole=batch))
            metrics.observe_since(metrics.EVENT_TO_STORED, events.appended_ms)
        with metrics.STEP_SECONDS.labels("publish").time():
            for record, error in bad:
                send_dead_letter(
                    self._publisher,
                    self._settings.topics.dead_letters,
                    record,
                    error,
                    group=self._settings.kafka.ingest_group,
                )
            if bad:
                self._publisher.flush(_FLUSH_SECONDS)
            for answer in answers:
                self._request(answer, started, max(0, batch.appended_ms), spans)
            self._publisher.flush(_FLUSH_SECONDS)
        _count_done(batch, answers, bad)

    def _take_in(self, batch: Batch, latest: int, bad: list[_Bad], *, whole: Batch) -> _Answer:
        """Steps 1 and 2 for events; what can't be decoded is added to `bad`."""
        replayed = self._already_stored(batch)
        with metrics.STEP_SECONDS.labels("decode").time():
            events, positions, refused = decode_many(
                batch.values, latest_ms=latest, max_bytes=self._settings.ingest.max_record_bytes
            )
        letters = [(batch.record(position), error) for position, error in refused]
        if whole is not self._counted:  # a batch that is tried again counts once
            self._breaker.saw(len(batch), letters)
            self._counted = whole
        bad += letters
        old = [] if replayed is None else [e for e, at in zip(events, positions, strict=True) if replayed[at]]
        new = events if replayed is None else [e for e, at in zip(events, positions, strict=True) if not replayed[at]]
        answer = self._store(new, batch.next_offsets, old)
        answer.replayed = len(old)
        return answer

    # --- step 0

    def _parted(self, batch: Batch) -> tuple[Batch, Batch | None]:
        """The events of a batch, and its erasures: nearly always none."""
        topic = self._settings.topics.erasures
        if all(name != topic for name, _ in batch.next_offsets):
            return batch, None
        return batch.keeping(lambda p: p[0] != topic), batch.keeping(lambda p: p[0] == topic)

    def _erase(self, batch: Batch, latest: int, bad: list[_Bad]) -> _Answer:
        """Carry out erasures, in one transaction; what can't be decoded is added to `bad`."""
        requested, refused = decode_erasures(batch.values, latest_ms=latest)
        bad += [(batch.record(position), error) for position, error in refused]
        moved = self._moved(batch.next_offsets)
        try:
            with transaction(self._engine) as connection:
                erased = erasures.erase(connection, requested)
                if moved:
                    self._ledger.advance(connection, moved)
                self._suppression.check(connection, [])
        except RetryError:
            self._unsure = True
            self._forget_all()
            # It has read receipts of its own, which may not have been committed; their numbers may be given again.
            self._suppression = Suppression()
            raise
        self._ledger.advanced(moved)
        self._unsure = False
        self._forget(list(erased))
        _LOG.info("erased", users=len(erased))
        each = erased.values()
        return _Answer(list(erased), [of.version for of in each], [of.until for of in each], erased=True)

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
        moved = self._moved(offsets)
        did = [event for event in new if event.event_type != IMPRESSION]
        work = self._work(did, [] if len(did) == len(new) else [e for e in new if e.event_type == IMPRESSION])
        for _ in range(_MAX_CONFLICTS):
            try:
                return self._try_to_store(work, moved, old)
            except support_sets.SupportConflictError:
                metrics.CONFLICTS.inc()
                self._forget(work.names)
            except RetryError:
                # The commit may or may not have happened: believe nothing until the ledger has been read.
                self._unsure = True
                self._forget_all()
                raise
        raise RetryError(f"{len(work.names)} users are being written by another process as well")

    def _work(self, did: list[Event], seen: list[Event]) -> "_Work":
        """What is to be stored of what users did and of what they were shown; items get their numbers."""
        columns = _Columns.of(did)
        examples = self._examples(columns)
        work = _Work(_Users.of(did), examples, {ad: int(examples["item"][at]) for ad, at in columns.ads.items()})
        if not seen or not self._impressions.capacity:
            work.dropped = len(seen)
            return work
        columns, users = _Columns.of(seen), _Users.of(seen)
        examples = self._examples(columns)
        work.ads.update({ad: int(examples["item"][at]) for ad, at in columns.ads.items()})
        work.shown = Shown(users.names, users.positions, examples)
        return work

    def _forget(self, users: list[str]) -> None:
        self._cache.forget(users)
        self._impressions.forget(users)

    def _forget_all(self) -> None:
        self._cache.clear()
        self._impressions.clear()

    def _moved(self, offsets: Mapping[Partition, int]) -> dict[Partition, int]:
        """Offsets never go back: a batch that lies below the ledger leaves it where it is."""
        return {p: n for p, n in offsets.items() if n > (self._ledger[p].next_offset or 0)}

    def _try_to_store(self, work: "_Work", offsets: Mapping[Partition, int], old: list[Event]) -> _Answer:
        answer, users, examples = _Answer(), work.users, work.examples
        with transaction(self._engine) as connection:
            positions, counting, base = self._without_erased(connection, users, examples)
            sets, found = self._read(connection, users.names)
            versions = np.maximum(found, base)
            with metrics.STEP_SECONDS.labels("merge").time():
                merged = merge(sets, positions, counting, self._settings.support.capacity)
            changed = np.flatnonzero(merged.changed)
            names = [users.names[row] for row in changed]
            written = gather(merged.sets, changed)
            with metrics.STEP_SECONDS.labels("database").time():
                if names:
                    reborn = int((found < versions)[changed].sum())
                    support_sets.write(connection, names, written, versions[changed] + 1, reborn=reborn)
                shown = self._write_shown(connection, work.shown)
                self._suppression.check(connection, work.names)
                items.see_ads(connection, work.ads)
                if offsets:
                    self._ledger.advance(connection, offsets)
            answer.add(names, versions[changed] + 1, written.newest)
            again = list({event.user_id for event in old if event.event_type != IMPRESSION} - set(names))
            answer.add(*_asked_again(connection, again))
            if told := self._activity.due:
                self._activity.write(connection)
        if told:
            self._activity.written()
        self._activity.add(activity_of(merged.sets, merged.fresh, int(time.time() * 1000)))
        self._ledger.advanced(offsets)
        self._unsure = False
        self._cache.put(names, written, versions[changed] + 1)
        self._count(merged, len(positions))
        metrics.EVENTS.labels("suppressed").inc(len(examples) - len(counting))
        metrics.EVENTS.labels("dropped").inc(work.dropped)
        if shown is not None and work.shown is not None:
            what, kept = shown
            self._impressions.written(what)
            self._count(what.merged, kept)
            metrics.EVENTS.labels("suppressed").inc(len(work.shown.examples) - kept)
        return answer

    def _write_shown(self, connection: Transaction, shown: Shown | None) -> tuple[Written, int] | None:
        """Impressions, without those of an erased past: what is written, and of how many."""
        if shown is None:
            return None
        erased = self._suppression.among(connection, shown.users)
        if erased:
            self._impressions.forget(list(erased))
            shown = shown.after(past_and_base(erased, shown.users)[0])
        return self._impressions.write(connection, shown), len(shown.examples)

    def _without_erased(
        self, connection: Transaction, users: _Users, examples: Examples
    ) -> tuple[Ints, Examples, Ints | int]:
        """Positions and examples without an erased past, and what each user's version goes on above, 0 for all."""
        erased = self._suppression.among(connection, users.names)
        if not erased:
            return users.positions, examples, 0
        self._cache.forget(list(erased))  # what it has may be of before
        past, base = past_and_base(erased, users.names)
        counts = examples["time"] > past[users.positions]
        return users.positions[counts], examples[counts], base

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

    def _request(self, answer: _Answer, started: int, appended: int, spans: Spans) -> None:
        topic, send, encode = self._settings.topics.requests, self._publisher.send, self._encode
        for user, version, time_ms in zip(answer.users, answer.versions, answer.newest, strict=True):
            request = encode(AdaptationRequest(user, version, time_ms, started, appended, answer.erased))
            send(topic, user, request, headers=spans.headers(user))


@dataclass
class _Work:
    """What a batch's events are to change: the users' examples, the ads seen with their items, what was shown."""

    users: _Users
    examples: Examples
    ads: dict[str, int]
    shown: Shown | None = None
    dropped: int = 0
    """Impressions that nobody keeps."""

    @property
    def names(self) -> list[str]:
        return self.users.names if self.shown is None else list({*self.users.names, *self.shown.users})


_TYPE_CODES = CODES | {IMPRESSION: int(EventType.IMPRESSION)}


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
            types=np.array([_TYPE_CODES[event.event_type] for event in events], np.int64),
            times=np.array([event.event_time for event in events], np.int64),
            hashes=np.array([digest(event.event_id.encode()) for event in events], np.uint64).view(np.int64),
            ads={event.ad_id: at for at, event in enumerate(events) if event.ad_id is not None},
            categories={event.item_id: event.category for event in events if event.category is not None},
        )


class _Breaker:
    """Stops the worker when most of `window` records in a row are bad: then the code is wrong, not the data."""

    def __init__(self, window: int) -> None:
        self._window, self._records, self._bad = window, 0, 0
        self._first = ""

    def saw(self, records: int, bad: Sequence[_Bad]) -> None:
        """Count a batch; raises BreakerError before anything of it is dead-lettered."""
        self._records += records
        self._bad += len(bad)
        if bad and not self._first:
            record, error = bad[0]
            self._first = f"{record.topic}[{record.partition}] at offset {record.offset} ({error.reason}: {error})"
        if self._records >= self._window:
            if 2 * self._bad > self._records:
                metrics.BREAKER_STOPS.inc()
                raise BreakerError(
                    f"{self._bad} of the last {self._records} records are bad, the first is {self._first}: stopped"
                    " before dead-lettering a whole topic. Correct the producer, or raise ingest.breaker_window to let"
                    " them through, and start again."
                )
            self._records = self._bad = 0
            self._first = ""


def _count_done(batch: Batch, answers: Sequence[_Answer], bad: Sequence[_Bad]) -> None:
    """Count a batch that is done: one that is tried again counts once."""
    metrics.BATCH_SIZE.observe(len(batch))
    metrics.REQUESTS.labels("sent").inc(sum(len(answer.users) for answer in answers))
    metrics.EVENTS.labels("replayed").inc(sum(answer.replayed for answer in answers))
    metrics.EVENTS.labels("dead_letter").inc(len(bad))
    for _, error in bad:
        metrics.DEAD_LETTERS.labels(error.reason).inc()


def _start(committed: int | None, stored: int | None, partition: Partition, log_ends: LogEnds) -> int | None:
    """Where to read from, None for the oldest record.

    Where the broker has forgotten the group, nobody knows whose requests were sent: all that is left is read again. But
    the ledger's own place has to be in the log, or records that were never stored would be passed in silence.
    """
    if stored is None or stored == committed:
        return stored
    first, end = log_ends(partition)
    if not first <= stored <= end:
        return stored
    return first if committed is None else max(first, min(committed, stored))


def _asked_again(connection: Transaction, users: list[str]) -> tuple[list[str], Ints, Ints]:
    if not users:
        return [], np.zeros(0, np.int64), np.zeros(0, np.int64)
    found, sets, versions = support_sets.read(connection, users)
    return found, versions, sets.newest
