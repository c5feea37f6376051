"""Erasure on a real broker and database: who was erased stays out, whatever is replayed, crashes or races."""

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from confluent_kafka import Message, Producer, TopicPartition, murmur2
from offsets import committed, log_ends
from sqlalchemy import text

from innerloop import ingest as ingest_module
from innerloop import metrics
from innerloop.client import ScoreReader
from innerloop.config import AdaptSettings, IngestSettings, KafkaSettings, Settings
from innerloop.erasure import Suppression
from innerloop.errors import FencedError, RetryError, ServiceError, SettingsError
from innerloop.events import Event
from innerloop.ingest import Ingest
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads import BayesHead
from innerloop.learning.releases import Card, DataSummary, Release, save
from innerloop.scores import AdaptationRequest
from innerloop.store import erasures, releases, support_sets
from innerloop.store.database import Database, connect, transaction
from innerloop.store.erasures import Receipt, erase, hash_of, read_salt, receipts
from innerloop.store.history import read_history
from innerloop.store.ledger import Ledger
from innerloop.streams import clients
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import ensure_topics, topic_ids
from innerloop.worker import processes
from innerloop.worker.erase import run_erase

SECONDS = 30.0
NOW = int(time.time() * 1000)
HOUR = 3_600_000
MODELS = ("recommendations", "ads")


class Crash(BaseException):
    """Not an error that anybody handles."""


@lru_cache
def producer_at(bootstrap_servers: str) -> Producer:
    """One for all tests: an idempotent producer takes up to a second until it may send."""
    return clients.producer(KafkaSettings(bootstrap_servers=bootstrap_servers))


@dataclass
class World:
    """What a shop and its services do, and what a person finds in the database."""

    settings: Settings
    engine: Database
    folder: Path

    def __post_init__(self) -> None:
        self.producer = producer_at(self.settings.kafka.bootstrap_servers)
        self.released = False

    def release(self) -> None:
        """Something for adapt to score with."""
        if not self.released:
            location = save(_release(), self.folder)
            with self.engine.begin() as connection:
                releases.register(connection, 1, json.loads(location.read_bytes()), str(location))
        self.released = True

    # --- the shop

    def send(self, user: str, *times: int, kind: str = "click", partition: int = -1) -> None:
        """An event at each of these times, with an identifier that follows from it."""
        topics = self.settings.topics
        for at in times:
            event = {"event_id": f"{user}-{at}", "event_type": kind, "user_id": user, "event_time": at}
            value = json.dumps({**event, "item_id": f"i{at % 9}", "ad_id": f"ad{at % 3}"}).encode()
            topic = {"purchase": topics.purchases, "impression": topics.impressions}.get(kind, topics.clicks)
            self.producer.produce(topic, value, user, partition=partition)
        assert self.producer.flush(SECONDS) == 0

    def erase(self, user: str, at: int) -> None:
        record = json.dumps({"user_id": user, "requested_at": at}).encode()
        self.producer.produce(self.settings.topics.erasures, record, user)
        assert self.producer.flush(SECONDS) == 0

    # --- the database

    def sets(self, table: str = "support_sets") -> dict[str, list[int]]:
        """The event times of each user's set."""
        with self.engine.connect() as connection:
            rows = connection.execute(text(f"SELECT user_id, event_times FROM {table}"))
            return {row.user_id: row.event_times for row in rows}

    def versions(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT user_id, version FROM support_sets"))
            return {row.user_id: row.version for row in rows}

    def receipts(self, user: str) -> list[Receipt]:
        with self.engine.connect() as connection:
            return receipts(connection, [hash_of(user, read_salt(connection))])

    def run(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    # --- the broker

    def ends(self, topics: Sequence[str]) -> dict[tuple[str, int], int]:
        return log_ends(self.settings.kafka, topics, self.settings.topics.partitions)

    def committed(self, group: str, topics: Sequence[str]) -> dict[tuple[str, int], int]:
        return committed(self.settings.kafka, group, topics, self.settings.topics.partitions)

    def log(self, topic: str, partitions: int | None = None) -> list[Message]:
        count = partitions or self.settings.topics.partitions
        messages: list[Message] = []
        with clients.consumer(self.settings.kafka, "test") as consumer:
            ends = [consumer.get_watermark_offsets(TopicPartition(topic, n), 10)[1] for n in range(count)]
            consumer.assign([TopicPartition(topic, n, 0) for n in range(count)])
            until = time.monotonic() + SECONDS
            while len(messages) < sum(ends):
                assert time.monotonic() < until
                messages += consumer.consume(10_000, 0.1)
        return messages

    def requests(self, user: str) -> list[AdaptationRequest]:
        mine = [m.value() or b"" for m in self.log(self.settings.topics.requests) if m.key() == user.encode()]
        return [msgspec.json.decode(value, type=AdaptationRequest) for value in mine]

    def last(self, user: str) -> dict[str, dict[str, Any] | None]:
        """The user's last record on each score topic that has one; None for a tombstone."""
        found: dict[str, dict[str, Any] | None] = {}
        for model in MODELS:
            mine = [m.value() for m in self.log(getattr(self.settings.topics, model)) if m.key() == user.encode()]
            if mine:
                found[model] = None if mine[-1] is None else json.loads(mine[-1])
        return found

    def is_forgotten(self, user: str) -> bool:
        """Whether the user's last record on every score topic that had one is a tombstone."""
        last = self.last(user)
        return bool(last) and all(record is None for record in last.values())

    def read_scores(self, user: str) -> list[Any]:
        """What a new subscriber knows of the user."""
        found = []
        for model in MODELS:
            with ScoreReader(self.settings, model) as reader:  # type: ignore[arg-type]
                reader.wait_until_current(SECONDS)
                found.append(reader.get(user))
        return found

    # --- waiting

    def caught_up(self, *threads: "Thread") -> None:
        """Every record is handled: stored, or adapted to, and its offset committed."""
        kafka, topics = self.settings.kafka, self.settings.topics
        wanted = self.ends(topics.ingested)
        until(lambda: self.committed(kafka.ingest_group, topics.ingested) == wanted, "ingest", *threads)
        if any(thread.what == "adapt" for thread in threads):
            asked = self.ends([topics.requests])
            until(lambda: self.committed(kafka.adapt_group, [topics.requests]) == asked, "adapt", *threads)


def until(look: Callable[[], object], what: str, *threads: "Thread") -> None:
    deadline = time.monotonic() + SECONDS
    while not look():
        for thread in threads:
            assert thread.error is None, repr(thread.error)
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.03)


class Thread(threading.Thread):
    """`innerloop ingest` or `innerloop adapt`, in a thread."""

    def __init__(self, settings: Settings, what: str) -> None:
        super().__init__(daemon=True)
        self.settings, self.what = settings, what
        self.asked = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            if self.what == "ingest":
                processes.run_ingest(self.settings)
            else:
                processes.run_adapt(self.settings, "cpu", 1)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


@contextmanager
def running(world: World, *whats: str, fails: bool = False) -> Iterator[list[Thread]]:
    if "adapt" in whats:
        world.release()
    threads = [Thread(world.settings, what) for what in whats]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.asked.set()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
    assert fails or all(thread.error is None for thread in threads), [thread.error for thread in threads]


@pytest.fixture(autouse=True)
def _threads_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Callable[[], bool]:
        member = threading.current_thread()
        assert isinstance(member, Thread)
        return member.asked.is_set

    monkeypatch.setattr(processes, "stop_on_signals", asked)


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Iterator[World]:
    kafka = KafkaSettings(**{**dict(settings.kafka), "properties": {"heartbeat.interval.ms": "200"}})
    changed = {
        "kafka": kafka,
        "ingest": IngestSettings(batch_size=50, cached_users=200),
        "adapt": AdaptSettings(top=3, refresh_seconds=0.1),
    }
    settings = settings.model_copy(update=changed)
    ensure_topics(settings)
    engine = connect(settings.database)
    yield World(settings, engine, tmp_path)
    engine.dispose()


def _release() -> Release:
    draw, size = torch.Generator().manual_seed(0), 6
    names = [f"i{n}" for n in range(9)]
    encoder = Encoder(names, torch.randn(9, size, generator=draw), [], torch.zeros(0, size - 2), torch.full((9,), -1))
    head = BayesHead(torch.randn(size, generator=draw), torch.eye(size), 0.5, 3_600.0)
    data = DataSummary(events=1, users=1, items=9, first_event_time=0, last_event_time=1)
    return Release(Card(1, "2026-01-01T00:00:00Z", "bayes", size, data, {}, {}, "0"), encoder, head)


# --- the promise


@pytest.mark.parametrize("forgotten", ["the ledger", "everything"])
def test_after_an_erasure_replaying_every_topic_from_zero_leaves_the_user_absent(world: World, forgotten: str) -> None:
    old = [NOW - n * HOUR for n in range(1, 6)]
    for user in ("gone", "stays"):
        world.send(user, *old)
        world.send(user, *old, kind="purchase")
        world.send(user, *[at + 1 for at in old], kind="impression")
    with running(world, "ingest") as threads:  # adapt starts when the ads are known, so that there are lists of them
        world.caught_up(*threads)
    with running(world, "ingest", "adapt") as threads:
        world.caught_up(*threads)
        until(lambda: len(world.last("gone")) == 2, "scores", *threads)
        kept, shown = world.sets()["stays"], world.sets("impressions")["stays"]
        world.erase("gone", NOW)
        until(lambda: world.is_forgotten("gone"), "tombstones", *threads)
        world.caught_up(*threads)
    assert (world.sets(), world.sets("impressions")) == ({"stays": kept}, {"stays": shown})
    [receipt] = world.receipts("gone")
    assert (receipt.events, receipt.impressions, receipt.erased_until, receipt.requested_at) == (5, 5, NOW, NOW)

    more = "" if forgotten == "the ledger" else ", support_sets, impressions, items, ads, erasures"
    world.run(f"TRUNCATE partition_ledger{more}")
    suppressed = metrics.EVENTS.labels("suppressed")._value.get()
    group = world.settings.kafka.model_copy(update={"ingest_group": world.settings.kafka.ingest_group + ".anew"})
    world.settings = world.settings.model_copy(update={"kafka": group})
    with running(world, "ingest", "adapt") as threads:
        world.caught_up(*threads)
    assert (world.sets(), world.sets("impressions")) == ({"stays": kept}, {"stays": shown})
    assert len(world.receipts("gone")) == 1
    if forgotten == "the ledger":
        assert metrics.EVENTS.labels("suppressed")._value.get() - suppressed == 15
    assert world.last("gone") == {"recommendations": None, "ads": None}
    assert world.read_scores("gone") == [None, None]
    assert None not in world.read_scores("stays")
    with world.engine.connect() as connection:
        assert set(read_history(connection)["user_id"]) == {"stays"}


def test_a_user_who_comes_back_begins_anew_above_the_old_version(world: World) -> None:
    world.send("u", *[NOW - n * HOUR for n in range(1, 4)])
    with running(world, "ingest", "adapt") as threads, ScoreReader(world.settings, tombstones=True) as reader:
        world.caught_up(*threads)
        before = world.versions()["u"]
        world.erase("u", NOW)
        until(lambda: world.is_forgotten("u"), "tombstones", *threads)
        world.send("u", NOW - 2 * HOUR, NOW, NOW + 1_000, NOW + 2_000)
        world.caught_up(*threads)
        assert world.sets() == {"u": [NOW + 1_000, NOW + 2_000]}, "what is not later than the erasure stays out"
        assert world.versions()["u"] > world.receipts("u")[0].version > before
        until(lambda: (world.last("u")["ads"] or {}).get("support_version") == world.versions()["u"], "ads", *threads)
        reader.wait_until_current(SECONDS)
        record = reader.get("u")
        assert record is not None
        assert (record.support_version, record.support_size) == (world.versions()["u"], 2)
        # And once more: an erasure of somebody who came back.
        world.erase("u", NOW + 60_000)
        until(lambda: not world.sets(), "erased again", *threads)
        until(lambda: world.is_forgotten("u"), "tombstones", *threads)
    first, second = world.receipts("u")
    assert second.version > first.version
    assert second.events == 2


def test_the_same_erasure_delivered_again_takes_nothing_of_a_user_who_came_back(world: World) -> None:
    world.send("u", NOW - HOUR)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
        for at in (NOW, NOW, NOW - HOUR):
            world.erase("u", at)
            world.caught_up(*threads)
            world.send("u", NOW + 1_000)
            world.caught_up(*threads)
            assert world.sets() == {"u": [NOW + 1_000]}
    assert len(world.receipts("u")) == 1


def test_what_a_clock_ahead_of_ours_has_dated_goes_and_stays_away_too(world: World) -> None:
    world.send("u", NOW - HOUR, NOW + HOUR)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
        world.erase("u", NOW)
        world.caught_up(*threads)
        assert world.sets() == {}
        world.send("u", NOW - HOUR, NOW + HOUR)
        world.caught_up(*threads)
    assert world.sets() == {}
    assert world.receipts("u")[0].erased_until == NOW + HOUR


def test_a_user_nobody_knows_gets_a_receipt_of_nothing(world: World) -> None:
    with running(world, "ingest", "adapt") as threads:
        world.erase("nobody", NOW)
        until(lambda: world.last("nobody") == {"recommendations": None, "ads": None}, "tombstones", *threads)
        world.send("nobody", NOW - HOUR)
        world.send("nobody", NOW + 1)
        world.caught_up(*threads)
    assert [receipt.events for receipt in world.receipts("nobody")] == [0]
    assert world.sets() == {"nobody": [NOW + 1]}


def test_many_erasures_and_events_in_one_batch(world: World) -> None:
    users = [f"u{n}" for n in range(30)]
    for user in users:
        world.send(user, NOW - HOUR)
    for user in users[::2]:
        world.erase(user, NOW)
    for user in users:
        world.send(user, NOW + 5)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    found = world.sets()
    assert found.keys() <= set(users)
    for n, user in enumerate(users):
        if n % 2:
            assert found[user] == [NOW - HOUR, NOW + 5]
        else:  # whether the later event came before or after the erasure is the partitions' affair
            assert found.get(user, []) in ([], [NOW + 5])
            assert found.get(user, [NOW + 5])[0] > NOW


def test_an_erasure_that_is_none_is_a_dead_letter_and_says_why(world: World) -> None:
    bad: list[bytes | None] = [
        b"u",
        None,
        b'{"user_id": "u"}',
        b'{"user_id": "", "requested_at": 1}',
        json.dumps({"user_id": "a\0b", "requested_at": 1}).encode(),
        json.dumps({"user_id": "u", "requested_at": NOW * 1_000}).encode(),
    ]
    world.send("u", NOW - HOUR)
    for value in bad:
        world.producer.produce(world.settings.topics.erasures, value, b"u")
    world.erase("v", NOW)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    assert world.sets() == {"u": [NOW - HOUR]}
    letters = world.log(world.settings.topics.dead_letters, 1)
    assert [letter.value() for letter in letters] == bad
    says = [dict(letter.headers() or [])["__connect.errors.exception.message"] for letter in letters]
    for message, word in zip(says, ("JSON", "empty", "requested_at", "user_id", "user_id", "too far"), strict=True):
        assert word in str(message)


# --- crashes


def _once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
    """The first call fails, before or after it has done its work; those that follow work."""
    original, calls = getattr(owner, name), itertools.count()

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls):
            return original(*arguments, **named)
        if after:
            original(*arguments, **named)
        raise Crash("says the test")

    monkeypatch.setattr(owner, name, call)


POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the transaction": lambda patch: _once(patch, Ingest, "_erase"),
    "before anything is deleted": lambda patch: _once(patch, erasures, "erase"),
    "deleted, before the ledger moves": lambda patch: _once(patch, erasures, "erase", after=True),
    "before the transaction commits": lambda patch: _once(patch, Ledger, "advance", after=True),
    "after the transaction": lambda patch: _once(patch, Ledger, "advanced"),
    "before the request is sent": lambda patch: _once(patch, Ingest, "_request"),
    "with the request sent, not flushed": lambda patch: _once(patch, Ingest, "_request", after=True),
    "before the offsets are committed": lambda patch: _once(patch, Ingest, "handle", after=True),
}


@pytest.mark.parametrize("point", POINTS)
def test_an_erasure_that_a_crash_cut_short_is_finished_by_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    old = [NOW - n * HOUR for n in range(1, 4)]
    world.send("u", *old)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    world.erase("u", NOW)
    with monkeypatch.context() as patch:
        POINTS[point](patch)
        with running(world, "ingest", fails=True) as [crashing]:
            crashing.join(SECONDS)
        assert isinstance(crashing.error, Crash)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    assert world.sets() == {}
    [receipt] = world.receipts("u")
    assert (receipt.events, receipt.erased_until) == (3, NOW)
    asked = [request for request in world.requests("u") if request.erased]
    assert asked, "adapt is told"
    assert asked[-1].support_version == receipt.version
    world.run("TRUNCATE partition_ledger")
    with running(world, "ingest") as threads:
        until(lambda: _ledger(world) == world.ends(world.settings.topics.ingested), "replayed", *threads)
    assert world.sets() == {}


def _ledger(world: World) -> dict[tuple[str, int], int]:
    with world.engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM partition_ledger WHERE next_offset IS NOT NULL"))
        return {(row.topic, row.partition): row.next_offset for row in rows}


def test_a_commit_of_unknown_outcome_is_looked_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.send("u", NOW - HOUR)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    world.erase("u", NOW)
    original, tries = transaction, itertools.count()

    @contextmanager
    def unsure(engine: Any) -> Iterator[Any]:
        with original(engine) as connection:
            yield connection
        if next(tries) == 0:
            raise RetryError("nobody knows, says the test")

    monkeypatch.setattr(ingest_module, "transaction", unsure)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
        world.send("u", NOW + 1)
        world.caught_up(*threads)
    assert next(tries) > 1
    assert world.sets() == {"u": [NOW + 1]}
    assert len(world.receipts("u")) == 1


def test_a_receipt_that_was_rolled_back_hides_no_other_of_its_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that crashes before it has written may give a number again, and another process may be the next."""
    original, lost = transaction, threading.Event()

    @contextmanager
    def crashing(engine: Any) -> Iterator[Any]:
        try:
            with original(engine) as connection:
                yield connection
                if not lost.is_set() and connection.execute(text("SELECT count(*) FROM erasures")).scalar_one():
                    raise RetryError("gone, says the test")  # noqa: TRY301 - in the transaction, which rolls back
        except RetryError:
            lost.set()
            world.run("ALTER TABLE erasures ALTER COLUMN number RESTART")
            _erase(world, "another", NOW)
            raise

    monkeypatch.setattr(ingest_module, "transaction", crashing)
    world.erase("u", NOW)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
        world.send("another", NOW - HOUR, NOW + 1)
        world.caught_up(*threads)
    assert lost.is_set()
    assert len(world.receipts("u")) == len(world.receipts("another")) == 1
    assert world.sets() == {"another": [NOW + 1]}, "no past of who was erased"


# --- races


def _ingest(world: World) -> Ingest:
    """An ingest process without its loop, used by hand."""
    ledger = Ledger(world.engine, topic_ids(world.settings, world.settings.topics.ingested))
    return Ingest(world.settings, connect(world.settings.database), ledger, Publisher(world.settings.kafka))


def _event(user: str, at: int) -> Event:
    return Event(event_id=f"{user}-{at}", event_type="click", user_id=user, item_id="i1", event_time=at)


MOMENTS = {
    "read, not written": (support_sets, "write", False),
    "written, receipts not looked for": (Suppression, "check", False),
    "receipts looked for, not committed": (Suppression, "check", True),
}


@pytest.mark.parametrize("known", [True, False], ids=["known user", "new user"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_writer_under_way_never_brings_back_who_is_erased_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch, moment: str, *, known: bool
) -> None:
    writer = _ingest(world)
    if known:
        writer._store([_event("u", NOW - HOUR)], {}, [])
    owner, name, after = MOMENTS[moment]
    original, calls = getattr(owner, name), itertools.count()
    erasing = threading.Thread(target=lambda: _erase(world, "u", NOW))

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        if next(calls):
            return original(*arguments, **named)
        if after:
            original(*arguments, **named)
        erasing.start()
        erasing.join(0.5)  # it may have to wait for us
        return None if after else original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, meanwhile)
        writer._store([_event("u", NOW - 1), _event("v", NOW - 1)], {}, [])
    erasing.join(SECONDS)
    assert not erasing.is_alive()
    assert world.sets() == {"v": [NOW - 1]}
    # Its cache is of before the erasure.
    writer._store([_event("u", NOW - 2), _event("v", NOW)], {}, [])
    assert world.sets() == {"v": [NOW - 1, NOW]}
    writer._store([_event("u", NOW), _event("u", NOW + 1)], {}, [])
    assert world.sets() == {"u": [NOW + 1], "v": [NOW - 1, NOW]}
    assert world.versions()["u"] == world.receipts("u")[0].version + 1
    writer._engine.dispose()


def _erase(world: World, user: str, at: int) -> None:
    with transaction(world.engine) as connection:
        erase(connection, {user: at})


def test_a_set_that_a_person_deleted_is_not_written_back_by_a_cache(world: World) -> None:
    writer = _ingest(world)
    writer._store([_event("u", NOW)], {}, [])
    world.run("DELETE FROM support_sets")
    writer._store([_event("u", NOW + 1)], {}, [])
    assert world.sets() == {"u": [NOW + 1]}
    writer._engine.dispose()


def test_processes_that_share_users_and_erase_them_agree_with_the_receipts(world: World) -> None:
    """Keys on any partition, so that every process has every user, while their erasures come from a third place."""
    rng, users = random.Random(7), [f"u{n}" for n in range(12)]
    sent: defaultdict[str, set[int]] = defaultdict(set)
    with running(world, "ingest", "ingest") as threads:
        until(lambda: len(_claimed(world)) == 4 * len(world.settings.topics.ingested), "partitions", *threads)
        for step in range(60):
            for user in rng.sample(users, 6):
                at = NOW + 10 * step + rng.randrange(-200, 10)
                sent[user].add(at)
                world.send(user, at, partition=rng.randrange(4))
            if step % 4 == 3:
                world.erase(rng.choice(users), NOW + 10 * step)
        world.caught_up(*threads)
    found = world.sets()
    for user in users:
        until_ms = max((receipt.erased_until for receipt in world.receipts(user)), default=0)
        assert found.get(user, []) == sorted(at for at in sent[user] if at > until_ms), user
    assert any(world.receipts(user) for user in users)


def _claimed(world: World) -> list[Any]:
    with world.engine.connect() as connection:
        return list(connection.execute(text("SELECT 1 FROM partition_ledger")))


def test_a_process_that_lost_the_partition_erases_nothing(world: World) -> None:
    world.send("u", NOW - HOUR)
    with running(world, "ingest", fails=True) as [thread]:
        world.caught_up(thread)
        partition = murmur2(b"u", world.settings.topics.partitions)
        other = Ledger(world.engine, topic_ids(world.settings, world.settings.topics.ingested))
        other.claim([(world.settings.topics.erasures, partition)])
        world.erase("u", NOW)
        thread.join(SECONDS)
        assert isinstance(thread.error, FencedError)
    assert world.sets() == {"u": [NOW - HOUR]}
    assert world.receipts("u") == []


# --- the score topics


def test_a_strangers_list_of_a_user_without_a_set_is_answered_with_a_tombstone(world: World) -> None:
    facts = {"model_version": 1, "support_version": 5, "support_size": 5, "event_time": 1, "scored_at": 1}
    value = json.dumps({"user_id": "u", "model": "recommendations", "method": "bayes", "items": [], **facts}).encode()
    world.send("v", NOW)
    with running(world, "ingest", "adapt") as threads:
        world.caught_up(*threads)
        until(lambda: world.last("v"), "watching", *threads)
        partition = murmur2(b"u", world.settings.topics.partitions)
        world.producer.produce(world.settings.topics.recommendations, value, b"u", partition=partition)
        world.producer.flush(SECONDS)
        until(lambda: world.last("u") == {"recommendations": None, "ads": None}, "a tombstone", *threads)


def test_a_strangers_tombstone_of_a_user_with_a_set_is_answered_with_the_list(world: World) -> None:
    """A worker that slept since the user was away wakes, and buries who has come back."""
    world.send("u", NOW)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    with running(world, "adapt") as threads:
        until(lambda: len(world.last("u")) == 2, "scores", *threads)
        partition = murmur2(b"u", world.settings.topics.partitions)
        headers: list[tuple[str, str | bytes | None]] = [("innerloop.owner_epoch", b"0")]
        topic = world.settings.topics.ads
        world.producer.produce(topic, None, b"u", partition=partition, headers=headers)
        world.producer.flush(SECONDS)
        until(lambda: world.last("u")["ads"] is not None and len(world.log(topic)) >= 3, "the list", *threads)
        time.sleep(1.0)
        assert len(world.log(topic)) == 3, "it does not answer itself"


# --- the command


def test_the_command_waits_and_prints_the_receipts(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.send("u", NOW - HOUR, NOW - 2 * HOUR)
    with running(world, "ingest", "adapt") as threads:
        world.caught_up(*threads)
        run_erase(world.settings, ["u", "nobody"], SECONDS)
    said = "".join(line for line in capsys.readouterr().out.splitlines(keepends=True) if "[info" not in line)
    assert "u: erased at 20" in said
    assert "2 stored events and 0 impressions removed" in said
    assert "nobody: erased at 20" in said
    assert world.receipts("u")[0].user_hash.hex() in said
    assert said.count("\n") == 3
    assert world.sets() == {}
    assert world.last("u") == {"recommendations": None, "ads": None}


def test_the_command_says_who_has_not_answered_and_the_erasure_is_done_later(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.send("u", NOW - HOUR)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
    with pytest.raises(ServiceError, match=r"innerloop ingest") as nobody:
        run_erase(world.settings, ["u"], 1.0)
    assert "\n" not in str(nobody.value)
    with running(world, "ingest") as threads:
        world.caught_up(*threads)
        assert world.sets() == {}
        with pytest.raises(ServiceError, match=r"innerloop adapt"):
            run_erase(world.settings, ["u"], 6.0)
    assert "0 stored events and 0 impressions removed" in capsys.readouterr().out
    with running(world, "adapt") as threads:
        until(lambda: world.last("u") == {"recommendations": None, "ads": None}, "tombstones", *threads)


@pytest.mark.parametrize("user", ["", "a\0b", "x" * 257])
def test_an_identifier_that_is_none_is_one_sentence(world: World, user: str) -> None:
    with pytest.raises(SettingsError, match="is no user"):
        run_erase(world.settings, [user], 1.0)
    assert world.ends([world.settings.topics.erasures]) == {}


def test_the_salt_is_this_databases_own_and_the_hash_is_no_name(world: World, settings: Settings) -> None:
    with world.engine.connect() as connection:
        salt = read_salt(connection)
    assert len(salt) == 32
    assert hash_of("u", salt) == hash_of("u", salt) != hash_of("u", bytes(32))
    assert hash_of("u", salt) != hash_of("v", salt)
    with suppress(UnicodeDecodeError):
        assert "u" not in hash_of("u" * 16, salt).decode()
    assert settings.database.url.get_secret_value()
