"""The ingest processor behind the real loop, on a real broker and database, against sets written plainly."""

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import pytest
import xxhash
from confluent_kafka import Message, Producer, TopicPartition
from counters import counted, counted_since
from offsets import committed as committed_by
from offsets import log_ends
from shell import outer_environment
from sqlalchemy import text

from innerloop import ingest as ingest_module
from innerloop import metrics
from innerloop.config import DatabaseSettings, IngestSettings, KafkaSettings, Settings, SupportSettings, TrendsSettings
from innerloop.errors import RetryError, StopError
from innerloop.events import Event
from innerloop.ingest import Ingest
from innerloop.scores import AdaptationRequest
from innerloop.store import support_sets
from innerloop.store.database import connect, transaction
from innerloop.store.ledger import Ledger
from innerloop.store.migrate import migrate
from innerloop.streams import clients
from innerloop.streams.loop import Loop
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import catalogue, ensure_topics, topic_ids
from innerloop.trends import ACTIVITY
from innerloop.worker.servers.services import Services, running_services

SECONDS = 30.0
CAPACITY = 8
BATCH = 50
TIME = 1_700_000_000_000
HEADER = "__connect.errors."
Sent = dict[str, Any]
# (time, hash of the event id, item, type, weight)
Example = tuple[int, int, str, int, float]
Sets = dict[str, list[Example]]
CODES = {"click": (1, 1.0), "cart": (2, 2.0), "favorite": (3, 2.0), "purchase": (4, 4.0)}


@pytest.fixture
def small(settings: Settings) -> Settings:
    """Small batches and sets; the topics that ingest needs are made."""
    return shrunk(settings)


def shrunk(settings: Settings, **ingest: Any) -> Settings:
    # A member learns of a rebalance with its heartbeat: the fewer to wait for, the quicker the tests.
    properties = {"heartbeat.interval.ms": "200"}
    settings = settings.model_copy(
        update={"kafka": KafkaSettings(**{**dict(settings.kafka), "properties": properties})}
    )
    needed = ("clicks", "purchases", "impressions", "erasures", "requests", "dead_letters")
    ensure_topics(settings, {name: catalogue()[name] for name in needed})
    return settings.model_copy(
        update={
            "support": SupportSettings(capacity=CAPACITY),
            "ingest": IngestSettings(**{"batch_size": BATCH, "cached_users": 2 * BATCH, **ingest}),
        }
    )


def with_ingest(settings: Settings, **changed: Any) -> Settings:
    return settings.model_copy(update={"ingest": settings.ingest.model_copy(update=changed)})


def events_of(count: int, *, users: int = 40, seed: int = 0, kinds: tuple[str, ...] = tuple(CODES)) -> list[Sent]:
    """Events of all kinds, some of equal times, in an order that has little to do with their times."""
    rng = random.Random(seed)
    events = [
        {
            "event_id": f"e{n}",
            "event_type": rng.choice(kinds),
            "user_id": f"u{int(users * rng.random() ** 2)}",
            "item_id": f"i{rng.randrange(60)}",
            "event_time": TIME + 1_000 * (n // 3),
        }
        for n in range(count)
    ]
    for at in range(count):  # each up to 60 places from where it belongs
        other = min(count - 1, at + rng.randrange(60))
        events[at], events[other] = events[other], events[at]
    return events


def on_one_topic(events: list[Sent]) -> list[Sent]:
    """Without purchases: members that share partitions as they come have two writers of one user, whose last requests
    may overtake each other; on one topic each user has one."""
    return [event for event in events if event["event_type"] != "purchase"]


def oracle(events: list[Sent], capacity: int = CAPACITY) -> Sets:
    """What the support sets are, said plainly."""
    distinct: defaultdict[str, dict[str, Example]] = defaultdict(dict)
    for event in events:
        code, weight = CODES[event["event_type"]]
        hashed = xxhash.xxh3_64_intdigest(event["event_id"].encode())
        signed = hashed - 2**64 if hashed >= 2**63 else hashed
        example = (event["event_time"], signed, event["item_id"], code, weight)
        distinct[event["user_id"]].setdefault(event["event_id"], example)
    return {user: sorted(each.values())[-capacity:] for user, each in distinct.items()}


# --- what is in the broker and the database


@lru_cache
def producer_at(bootstrap_servers: str) -> Producer:
    """One for all tests: an idempotent producer takes up to a second until it may send."""
    return clients.producer(KafkaSettings(bootstrap_servers=bootstrap_servers), message_max_bytes=2_000_000)


def send(settings: Settings, events: list[Sent], partition: int = -1, topic: str | None = None) -> None:
    producer = producer_at(settings.kafka.bootstrap_servers)
    for event in events:
        own = settings.topics.purchases if event["event_type"] == "purchase" else settings.topics.clicks
        producer.produce(topic or own, json.dumps(event).encode(), event["user_id"], partition=partition)
    assert producer.flush(SECONDS) == 0


def read(settings: Settings, topic: str, partitions: int) -> list[Message]:
    """Everything in a topic, in offset order within each partition."""
    messages: list[Message] = []
    with clients.consumer(settings.kafka, "reader") as consumer:
        ends = [consumer.get_watermark_offsets(TopicPartition(topic, n), 10) for n in range(partitions)]
        consumer.assign([TopicPartition(topic, n, low) for n, (low, _) in enumerate(ends)])
        deadline = time.monotonic() + SECONDS
        while len(messages) < sum(high - low for low, high in ends):
            assert time.monotonic() < deadline
            messages += consumer.consume(10_000, 0.1)
    assert not any(message.error() for message in messages)
    return messages


def requests(settings: Settings) -> dict[str, list[AdaptationRequest]]:
    """Of each user in the order they were sent: a user is on one partition."""
    found: defaultdict[str, list[AdaptationRequest]] = defaultdict(list)
    for message in read(settings, settings.topics.requests, settings.topics.partitions):
        request = msgspec.json.decode(message.value() or b"", type=AdaptationRequest)
        assert message.key() == request.user_id.encode()
        found[request.user_id].append(request)
    return dict(found)


def query(settings: Settings, statement: str) -> list[Any]:
    engine = connect(settings.database)
    with engine.connect() as connection:
        rows = list(connection.execute(text(statement)).all())
    engine.dispose()
    return rows


def stored(settings: Settings) -> tuple[Sets, dict[str, int]]:
    """Sets and versions, by plain SQL."""
    rows = query(settings, "SELECT * FROM support_sets")  # before the items, of which some may come meanwhile
    items = {row.item_no: row.item_id for row in query(settings, "SELECT * FROM items")}
    sets, versions = {}, {}
    for row in rows:
        columns = (row.event_times, row.event_hashes, row.items, row.event_types, row.weights)
        sets[row.user_id] = [(t, h, items[i], k, w) for t, h, i, k, w in zip(*columns, strict=True)]
        versions[row.user_id] = row.version
    return sets, versions


def ledger(settings: Settings) -> dict[tuple[str, int], int]:
    rows = query(settings, "SELECT topic, partition, next_offset FROM partition_ledger WHERE next_offset IS NOT NULL")
    return {(row.topic, row.partition): row.next_offset for row in rows}


def ends(settings: Settings) -> dict[tuple[str, int], int]:
    return log_ends(settings.kafka, settings.topics.events, settings.topics.partitions)


def committed(settings: Settings) -> dict[tuple[str, int], int]:
    kafka, topics = settings.kafka, settings.topics
    return committed_by(kafka, kafka.ingest_group, topics.events, topics.partitions)


def reset(settings: Settings, offsets: Mapping[tuple[str, int], int]) -> None:
    """Move the group back, as a person would; nobody is in it."""
    with clients.consumer(settings.kafka, settings.kafka.ingest_group) as consumer:
        wanted = [TopicPartition(topic, n, offset) for (topic, n), offset in offsets.items()]
        consumer.commit(offsets=wanted, asynchronous=False)


def check(settings: Settings, events: list[Sent], *, ordered: bool = True) -> None:
    """All is stored and asked for: sets as the oracle has them, each user's last request of the last version."""
    sets, versions = stored(settings)
    assert sets == oracle(events, settings.support.capacity)
    asked = requests(settings)
    assert asked.keys() == versions.keys()
    for user, version in versions.items():
        last = asked[user][-1] if ordered else max(asked[user], key=lambda request: request.support_version)
        assert (user, last.support_version) == (user, version)
        assert last.event_time == sets[user][-1][0]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.04)


# --- one member of the group


class Member:
    """`innerloop ingest` in a thread: the same parts, put together in the same way."""

    def __init__(self, settings: Settings, prepare: Callable[["Member"], object] | None = None) -> None:
        self.settings = settings
        self.engine = connect(settings.database)
        self.ledger = Ledger(self.engine, topic_ids(settings, settings.topics.events))
        self.publisher = Publisher(settings.kafka)
        self.ingest = Ingest(settings, self.engine, self.ledger, self.publisher)
        self.halt = threading.Event()
        self.loop = Loop(
            settings.kafka,
            group=settings.kafka.ingest_group,
            topics=settings.topics.events,
            processor=self.ingest,
            batch_size=settings.ingest.batch_size,
            poll_seconds=settings.ingest.poll_seconds,
            stopping=self.halt.is_set,
        )
        self.handled = 0
        self.error: BaseException | None = None
        self._expected = False
        if prepare:
            prepare(self)
        handle = self.ingest.handle

        def counted(batch: Any) -> None:
            handle(batch)
            self.handled += len(batch)

        self.ingest.handle = counted  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        finally:
            self.engine.dispose()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.halt.set()
        self._thread.join(SECONDS)
        if kind is None:
            assert not self._thread.is_alive()
            assert self._expected or self.error is None, repr(self.error)

    @property
    def owned(self) -> list[tuple[str, int]]:
        return sorted(self.loop._owned)

    def joined(self, partitions: int = 8) -> None:
        until(lambda: self.error is not None or len(self.loop._owned) == partitions, "no partitions")

    def caught_up(self) -> None:
        wanted = ends(self.settings)
        until(lambda: self.error is not None or ledger(self.settings) == wanted, "not caught up")
        assert self.error is None, repr(self.error)

    def has_handled(self, records: int) -> None:
        until(lambda: self.error is not None or self.handled >= records, f"has not handled {records}")
        assert self.error is None, repr(self.error)

    def has_left(self) -> BaseException:
        self._expected = True
        self._thread.join(SECONDS)
        assert self.error is not None, "still runs, or left by itself"
        return self.error


def run(settings: Settings) -> int:
    """Run until everything is stored and committed, and stop cleanly; how many records were handled."""
    with Member(settings) as member:
        member.caught_up()
        # What a crash left unanswered may lie on another partition than the last record stored.
        until(lambda: member.error is not None or committed(settings) == ends(settings), "not committed")
    return member.handled


# --- without trouble


def test_events_become_sets_and_requests(small: Settings) -> None:
    events = events_of(600)
    send(small, events)
    assert run(small) == 600
    check(small, events)
    assert committed(small) == ledger(small) == ends(small)
    sizes = Counter(event["user_id"] for event in events)
    assert max(sizes.values()) > 2 * CAPACITY, "some users have more events than a set takes"
    assert min(sizes.values()) < CAPACITY
    asked = requests(small)
    for user, each in asked.items():
        versions = [request.support_version for request in each]
        assert versions == list(range(1, len(versions) + 1)), f"{user}: one request a version"
        assert all(abs(request.ingested_at / 1000 - time.time()) < 60 for request in each)


@pytest.mark.parametrize("batch_size", [1, 7, 2_000])
def test_duplicates_and_late_events_change_nothing_whatever_the_batches(small: Settings, batch_size: int) -> None:
    rng = random.Random(batch_size)
    events = events_of(100, users=8)
    repeated = rng.sample(events, 30)
    late = [{**event, "event_id": f"late{n}", "event_time": n} for n, event in enumerate(events[:20])]
    before = _outcomes()
    send(small, events)
    send(small, repeated)
    send(small, late)
    run(with_ingest(small, batch_size=batch_size, cached_users=2 * batch_size))
    check(small, events + late)
    stored_now, duplicate, too_late = (now - then for now, then in zip(_outcomes(), before, strict=True))
    assert stored_now + duplicate + too_late == 150
    assert duplicate + too_late >= 30


def _outcomes() -> list[float]:
    return [metrics.EVENTS.labels(name)._value.get() for name in ("stored", "duplicate", "too_late")]


def test_a_second_wave_finds_the_first_in_the_cache_or_in_the_table(small: Settings) -> None:
    """Many more users than the cache holds, so that it evicts between the waves."""
    events = events_of(900, users=260)
    tiny = with_ingest(small, batch_size=20, cached_users=40)
    with Member(tiny) as member:
        for wave in range(3):
            send(tiny, events[wave::3])
            member.caught_up()
    check(tiny, events)


def test_a_lower_capacity_keeps_the_newest_of_what_is_stored(small: Settings) -> None:
    events = events_of(400, users=10)
    send(small, events[:200])
    run(small)
    lower = small.model_copy(update={"support": SupportSettings(capacity=3)})
    touched = events[200:]
    send(lower, touched)
    run(lower)
    sets, _ = stored(lower)
    expected = oracle(events, 3)
    assert {user: sets[user] for user in {event["user_id"] for event in touched}} == {
        user: expected[user] for user in {event["user_id"] for event in touched}
    }


def test_ads_are_seen_with_their_newest_item(small: Settings) -> None:
    events = events_of(6, kinds=("click",))
    for n, event in enumerate(events):
        event.update(ad_id=f"ad{n % 2}", user_id="one", event_time=TIME + n)
    send(small, events)
    run(small)
    rows = query(small, "SELECT ad_id, item_id FROM ads JOIN items USING (item_no) ORDER BY 1")
    assert [(row.ad_id, row.item_id) for row in rows] == [("ad0", events[4]["item_id"]), ("ad1", events[5]["item_id"])]


# --- bad records


BAD: list[tuple[bytes | None, str, str]] = [
    (b"\xff\xfe\x00", "undecodable", "not JSON"),
    (b"", "undecodable", "empty"),
    (None, "undecodable", "empty"),
    (b'{"event_type":"click"}', "invalid_field", "event_id"),
    (json.dumps({**events_of(1)[0], "user_id": "x" * 257}).encode(), "invalid_field", "user_id"),
    (json.dumps({**events_of(1)[0], "item_id": "a\0b"}).encode(), "invalid_field", "item_id"),
    (json.dumps({**events_of(1)[0], "event_time": 2**52}).encode(), "invalid_field", "event_time"),
    (json.dumps({**events_of(1)[0], "note": "x" * 5_000}).encode(), "too_large", "5"),
]


def said_by(letter: Message) -> dict[str, str]:
    pairs: list[tuple[str, bytes | None]] = letter.headers() or []  # type: ignore[assignment]
    return {name: (value or b"").decode(errors="replace") for name, value in pairs}


def test_what_is_bad_goes_to_the_dead_letters_and_its_batch_goes_on(small: Settings) -> None:
    events = events_of(40, kinds=("click",))
    producer = producer_at(small.kafka.bootstrap_servers)
    for n, event in enumerate(events):
        if n < len(BAD):
            headers: list[tuple[str, str | bytes | None]] = [("trace", f"t{n}".encode())]
            producer.produce(small.topics.clicks, BAD[n][0], f"k{n}", partition=1, headers=headers)
        producer.produce(small.topics.clicks, json.dumps(event).encode(), event["user_id"], partition=1)
    producer.flush(SECONDS)
    run(with_ingest(small, max_record_bytes=4_000))
    check(small, events)
    letters = read(small, small.topics.dead_letters, 1)
    assert len(letters) == len(BAD)
    for n, (letter, (value, reason, says)) in enumerate(zip(letters, BAD, strict=True)):
        said = said_by(letter)
        assert (letter.key(), letter.value() or None) == (f"k{n}".encode(), value or None)
        assert said["trace"] == f"t{n}"
        assert said[HEADER + "topic"] == small.topics.clicks
        assert (said[HEADER + "partition"], said[HEADER + "offset"]) == ("1", str(2 * n))
        assert said[HEADER + "exception.class.name"] == f"innerloop.{reason}"
        assert says in said[HEADER + "exception.message"]
        assert said[HEADER + "connector.name"] == small.kafka.ingest_group
        assert said[HEADER + "stage"] == "VALUE_CONVERTER"


@pytest.mark.parametrize(
    ("value", "key", "header"),
    [(1_500_000, 10, 10), (890_000, 150_000, 10), (890_000, 10, 157_000), (10, 1_047_000, 10), (10, 10, 1_047_000)],
)
def test_a_bad_record_as_large_as_the_broker_takes_stops_nobody(
    small: Settings, value: int, key: int, header: int
) -> None:
    """Its dead letter has more headers than it had: what is too much of it is cut."""
    good = events_of(3, kinds=("click",))
    noise = random.Random(0).randbytes if value < 1_000_000 else bytes  # larger than the limit it gets there compressed
    producer = producer_at(small.kafka.bootstrap_servers)
    producer.produce(small.topics.clicks, noise(value), noise(key), partition=0, headers=[("h", noise(header))])
    for event in good:
        producer.produce(small.topics.clicks, json.dumps(event).encode(), event["user_id"], partition=0)
    assert producer.flush(SECONDS) == 0
    run(small)
    check(small, good)
    [letter] = read(small, small.topics.dead_letters, 1)
    assert said_by(letter)[HEADER + "offset"] == "0"


def test_the_breaker_stops_before_a_whole_topic_is_dead_lettered(small: Settings) -> None:
    events = events_of(20, kinds=("click",))
    send(small, events)
    run(small)
    producer = producer_at(small.kafka.bootstrap_servers)
    for _ in range(60):
        producer.produce(small.topics.clicks, b"a producer gone wrong", partition=0)
    producer.flush(SECONDS)
    before = committed(small)
    with Member(with_ingest(small, breaker_window=40, batch_size=200)) as member:
        error = member.has_left()
    assert isinstance(error, StopError)
    assert "are bad" in str(error)
    assert f"the first is {small.topics.clicks}[0] at offset" in str(error)
    assert "(undecodable: the record is not JSON" in str(error)
    assert "\n" not in str(error)
    assert committed(small) == ledger(small) == before
    assert read(small, small.topics.dead_letters, 1) == []
    # Corrected (here: believed), it goes on where it stopped.
    run(with_ingest(small, breaker_window=1_000))
    assert len(read(small, small.topics.dead_letters, 1)) == 60
    check(small, events)


def test_a_few_bad_records_tried_again_and_again_do_not_trip_the_breaker(small: Settings) -> None:
    """What counts is records, not attempts."""
    events = events_of(5, kinds=("click",))
    producer = producer_at(small.kafka.bootstrap_servers)
    for _ in range(8):
        producer.produce(small.topics.clicks, b"bad", partition=0)
    producer.flush(SECONDS)

    def fails_twice(member: Member) -> None:
        original, left = member.publisher.flush, iter(range(2))

        def flush(seconds: float) -> None:
            if seconds and next(left, None) is not None:
                raise RetryError("the broker is away, says the test")
            original(seconds)

        member.publisher.flush = flush  # type: ignore[method-assign]

    with Member(with_ingest(small, breaker_window=20), fails_twice) as member:
        member.has_handled(8)
        send(small, events)
        member.caught_up()
    check(small, events)


# --- delivered again


def test_reading_again_from_anywhere_changes_nothing_and_asks_again(small: Settings) -> None:
    events = events_of(300)
    send(small, events)
    run(small)
    check(small, events)
    sets, stand, first = stored(small), ledger(small), requests(small)
    rng = random.Random(5)
    for attempt in range(3):
        # From the beginning, then from anywhere; some partitions stay where they are.
        back = {place: rng.randrange(end + 1) * (attempt > 0) for place, end in stand.items()}
        reset(small, back)
        again = sum(stand[place] - start for place, start in back.items())
        users = _users_from(small, back)
        before = requests(small)
        with Member(small) as member:
            member.has_handled(again)
        assert member.handled == again
        assert stored(small) == sets
        assert ledger(small) == committed(small) == stand
        now = requests(small)
        assert {user for user in now if len(now[user]) > len(before[user])} == users
        assert all(now[user][-1].support_version == sets[1][user] for user in users)
    assert first.keys() == sets[1].keys()


def _users_from(settings: Settings, back: Mapping[tuple[str, int], int]) -> set[str]:
    messages = itertools.chain(*(read(settings, topic, settings.topics.partitions) for topic in settings.topics.events))
    later = [m for m in messages if (m.offset() or 0) >= back[m.topic() or "", m.partition() or 0]]
    return {(message.key() or b"").decode() for message in later}


def test_old_and_new_records_in_one_batch(small: Settings) -> None:
    """A batch that begins below the ledger and ends above it."""
    events = events_of(200)
    send(small, events[:120])
    run(small)
    reset(small, {place: offset // 2 for place, offset in ledger(small).items()})
    send(small, events[120:])
    run(with_ingest(small, batch_size=1_000, cached_users=2_000))
    check(small, events)
    assert committed(small) == ledger(small) == ends(small)


def test_an_empty_database_is_rebuilt_from_the_oldest_record(small: Settings) -> None:
    events = events_of(150)
    send(small, events)
    run(small)
    engine = connect(small.database)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE partition_ledger, support_sets, items, ads"))
    engine.dispose()
    assert run(small) == 150
    check(small, events)


def test_a_database_set_back_is_brought_forward(small: Settings) -> None:
    """Restored from an older copy: the ledger is behind what the broker has as done, and it is right."""
    events = events_of(200)
    send(small, events[:100])
    run(small)
    tables = ("partition_ledger", "support_sets", "items")
    engine = connect(small.database)
    with engine.begin() as connection:
        for table in tables:
            connection.execute(text(f"CREATE TABLE copy_of_{table} AS SELECT * FROM {table}"))
    send(small, events[100:])
    run(small)
    with engine.begin() as connection:
        for table in tables:
            connection.execute(text(f"DELETE FROM {table}"))
            connection.execute(text(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM copy_of_{table}"))
    engine.dispose()
    assert run(small) == 100
    check(small, events)


# --- what everybody does


def told(settings: Settings) -> list[tuple[int, str, int]]:
    """(time, item, type) of all activity that was written, sorted."""
    pieces = [bytes(row.packed) for row in query(settings, "SELECT packed FROM activity ORDER BY number")]
    items = {row.item_no: row.item_id for row in query(settings, "SELECT item_no, item_id FROM items")}
    found = np.frombuffer(b"".join(pieces), ACTIVITY)
    return sorted((int(each["time"]), items[int(each["item"])], int(each["type"])) for each in found)


def distinct(events: list[Sent]) -> list[tuple[int, str, int]]:
    by_id = {event["event_id"]: event for event in events}.values()
    return sorted((event["event_time"], event["item_id"], CODES[event["event_type"]][0]) for event in by_id)


def telling(settings: Settings, *, capacity: int = 1_000) -> Settings:
    """Activity is written at the first chance, however much there is, and no event falls out of its set before."""
    trends = TrendsSettings(every_seconds=0.05, events_per_second=1_000_000)  # by default a sample of more than 5,000
    return settings.model_copy(update={"trends": trends, "support": SupportSettings(capacity=capacity)})


def test_every_stored_event_is_told_once_and_no_duplicate(small: Settings) -> None:
    small, events = telling(small), events_of(300)
    send(small, events)
    send(small, events[:100])
    with Member(small) as member:
        member.caught_up()
        until(lambda: member.error is not None or len(told(small)) >= 300, "the last is told when nothing follows")
        send(small, events[50:150])
        member.caught_up()
        member.has_handled(500)
        time.sleep(0.3)
    assert told(small) == distinct(events)


def test_what_is_dated_ahead_does_not_rule_what_everybody_does(small: Settings) -> None:
    """It is stored as it says, and told as of now: its weight would double with every half-life until its time."""
    small, events = telling(small), events_of(50)
    ahead = int(time.time() * 1000) + 20 * 3_600_000
    events[7]["event_time"] = ahead
    send(small, events)
    with Member(small) as member:
        member.caught_up()
        until(lambda: member.error is not None or len(told(small)) == 50, "told")
    assert max(when for when, _, _ in told(small)) <= time.time() * 1000
    check(small, events)


def test_what_is_too_late_for_a_set_is_not_told(small: Settings) -> None:
    small, events = telling(small, capacity=CAPACITY), events_of(200, users=2)
    send(small, events)
    late = [{**event, "event_id": f"late{n}", "event_time": n + 1} for n, event in enumerate(events[:20])]
    with Member(small) as member:
        member.caught_up()
        send(small, late)
        member.caught_up()
        until(lambda: member.error is not None or not member.ingest._activity._pending, "not told")
    assert told(small)
    assert not {time for time, _, _ in told(small)} & {event["event_time"] for event in late}


@pytest.mark.parametrize("happened", [True, False])
def test_activity_of_a_transaction_that_failed_is_told_later_and_not_twice(
    small: Settings, monkeypatch: pytest.MonkeyPatch, *, happened: bool
) -> None:
    """A commit of which nobody knows may lose or repeat a batch's statistics; a rollback costs nothing."""
    small, events = telling(small), events_of(400)
    send(small, events)
    with monkeypatch.context() as patch:
        _transaction(3, RetryError, after=happened)(patch)
        with Member(small) as member:
            member.caught_up()
            until(lambda: member.error is not None or not member.ingest._activity._pending, "not told")
            time.sleep(0.3)
    run(small)
    check(small, events)
    found, expected = Counter(told(small)), Counter(distinct(events))
    if happened:
        assert found.total() <= expected.total() + 2 * BATCH
        assert (expected - found).total() <= BATCH
    else:
        assert found == expected


def test_items_are_interned_with_the_category_of_their_first_events(small: Settings) -> None:
    events = events_of(60)
    for event in events:
        if event["item_id"] != "i7":
            event["category"] = f"of {event['item_id']}"
    send(small, events)
    run(small)
    rows = query(small, "SELECT item_id, category FROM items")
    assert len(rows) == len({event["item_id"] for event in events})
    assert all(row.category == (None if row.item_id == "i7" else f"of {row.item_id}") for row in rows)


# --- crashes; those at every step of every batch are in tests/chaos


class Crash(BaseException):
    """Not an error that anybody handles: what is done is done, what is not is not."""


Prepare = Callable[[Member], object]


def _once(owner: Any, name: str, *, nth: int, after: bool = False, error: type[BaseException] = Crash) -> None:
    """The nth call of `owner.name` fails, before or after it has done its work; all others work."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) != nth:
            return original(*arguments, **named)
        if after:
            original(*arguments, **named)
        raise error("says the test")

    setattr(owner, name, call)


def _flush(member: Member, *, nth: int, after: bool, error: type[BaseException]) -> None:
    original, calls = member.publisher.flush, itertools.count(1)

    def flush(seconds: float) -> None:
        fails = seconds > 0 and next(calls) == nth  # one of 0 s only looks whether there is something left
        if not fails or after:
            original(seconds)
        if fails:
            raise error("says the test")

    member.publisher.flush = flush  # type: ignore[method-assign]


def _transaction(nth: int, error: type[BaseException], *, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """The nth batch's commit has happened, or has not, and nobody is told which."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        calls = itertools.count(1)

        @contextmanager
        def unsure(engine: Any) -> Iterator[Any]:
            fails = next(calls) == nth
            with transaction(engine) as connection:
                yield connection
                if fails and not after:
                    raise error("says the test")
            if fails:
                raise error("says the test")

        monkeypatch.setattr(ingest_module, "transaction", unsure)

    return patch


RETRIES: dict[str, Prepare] = {
    "the ledger": lambda m: _once(m.ledger, "advance", nth=3, error=RetryError),
    "some requests produced": lambda m: _once(m.publisher, "send", nth=60, error=RetryError),
    "the flush": lambda m: _flush(m, nth=3, after=False, error=RetryError),
    "the flush, in truth done": lambda m: _flush(m, nth=3, after=True, error=RetryError),
    "the claim": lambda m: _once(m.ingest, "assigned", nth=1, error=RetryError),
    "the claim, in truth done": lambda m: _once(m.ingest, "assigned", nth=1, after=True, error=RetryError),
}


@pytest.mark.parametrize("point", RETRIES)
def test_what_may_pass_is_tried_again_by_the_same_member(small: Settings, point: str) -> None:
    events = events_of(400)
    send(small, events)
    pauses, rebalances = metrics.PAUSES._value.get(), _rebalances()
    with Member(small, RETRIES[point]) as member:
        member.caught_up()
        member.has_handled(400)
        assert _rebalances()["assigned"] == rebalances["assigned"] + 1
    assert metrics.PAUSES._value.get() > pauses
    check(small, events)
    assert committed(small) == ledger(small) == ends(small)


def test_a_batch_that_is_tried_again_counts_once(small: Settings) -> None:
    """Its transaction fails, then its flush, then it is done."""
    kept = small.model_copy(update={"support": SupportSettings(capacity=CAPACITY, impressions=0)})
    events = events_of(40, kinds=("click",))
    producer = producer_at(small.kafka.bootstrap_servers)
    for number, event in enumerate(events):
        event["user_id"] = f"u{number}"
        seen = {**event, "event_id": f"seen{number}", "event_type": "impression", "ad_id": "a"}
        for value in (json.dumps(event).encode(), *([b"bad", json.dumps(seen).encode()] if number < 5 else [])):
            producer.produce(small.topics.clicks, value, event["user_id"], partition=0)
    assert producer.flush(SECONDS) == 0

    def fails(member: Member) -> None:
        _once(member.ledger, "advance", nth=1, error=RetryError)
        _flush(member, nth=1, after=False, error=RetryError)

    before = counted()
    with Member(kept, fails) as member:
        member.has_handled(50)
    change = counted_since(before)
    wanted = {
        "innerloop_batch_records_sum": 50,
        "innerloop_dead_letters_total reason=undecodable": 5,
        "innerloop_requests_total step=sent": 40,
        "innerloop_events_total outcome=stored": 40,
        "innerloop_events_total outcome=dead_letter": 5,
        "innerloop_events_total outcome=dropped": 5,
    }
    assert {name: change[name] for name in wanted} == wanted
    assert change["innerloop_pauses_total"] >= 2
    for step in ("poll", "decode", "merge", "database", "publish", "wait"):
        assert change[f"innerloop_step_seconds_count step={step}"] > 0, step


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize("error", [RetryError, Crash])
def test_a_commit_of_unknown_outcome_is_neither_lost_nor_done_twice(
    small: Settings, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], *, happened: bool
) -> None:
    events = events_of(400)
    send(small, events)
    with monkeypatch.context() as patch:
        _transaction(3, error, after=happened)(patch)
        with Member(small) as member:
            if error is Crash:
                member.has_left()
            else:
                member.caught_up()
    run(small)
    check(small, events)
    assert committed(small) == ledger(small) == ends(small)


def _rebalances() -> dict[str, float]:
    return {kind: metrics.REBALANCES.labels(kind)._value.get() for kind in ("assigned", "revoked", "lost")}


# --- more than one member


def test_a_superseded_member_writes_nothing_and_says_so(small: Settings) -> None:
    """It slept past its session: another has claimed its partitions, and it goes on as if nothing had been."""
    events = events_of(200)
    send(small, events[:100])
    with Member(small) as member:
        member.caught_up()
        sets = stored(small)
        Ledger(member.engine, topic_ids(small, small.topics.events)).claim(member.owned)
        send(small, events[100:])
        error = member.has_left()
    assert isinstance(error, StopError)
    assert error.exit_code == 4
    assert stored(small) == sets
    run(small)
    check(small, events)


def test_partitions_move_between_members_while_events_come(small: Settings) -> None:
    events = on_one_topic(events_of(1_500, users=60))[:900]
    waves = iter([events[n : n + 100] for n in range(0, 900, 100)])
    send(small, next(waves))
    with Member(small) as first:
        first.joined()
        send(small, next(waves))
        with Member(small) as second:
            send(small, next(waves))
            until(lambda: len(second.loop._owned) == 4, "the second gets its share")
            assert not set(first.owned) & set(second.owned)
            send(small, next(waves))
            first.caught_up()
        send(small, next(waves))
        first.joined()
        for wave in waves:
            send(small, wave)
        first.caught_up()
        assert second.error is None
    check(small, events)
    assert committed(small) == ledger(small) == ends(small)


def test_partitions_that_left_in_a_pause_are_read_when_they_come_back(small: Settings) -> None:
    events, away = on_one_topic(events_of(800))[:400], threading.Event()

    def refuses(member: Member) -> None:
        handle = member.ingest.handle

        def handle_unless_away(batch: Any) -> None:
            if away.is_set():
                raise RetryError("says the test")
            handle(batch)

        member.ingest.handle = handle_unless_away  # type: ignore[method-assign]

    send(small, events[:200])
    with Member(small, refuses) as first:
        first.joined()
        first.caught_up()
        away.set()
        pauses = metrics.PAUSES._value.get()
        send(small, events[200:300])
        until(lambda: metrics.PAUSES._value.get() > pauses, "not paused")
        with Member(small) as second:
            until(lambda: len(second.loop._owned) == 4, "the second gets its share")
            away.clear()
            first.caught_up()
        first.joined()
        send(small, events[300:])
        first.caught_up()
    check(small, events)


def test_users_on_partitions_of_two_members_lose_nothing(small: Settings) -> None:
    """Producers that partition in another way than each other: both members write the same users."""
    events = events_of(600, users=15)
    conflicts = metrics.CONFLICTS._value.get()
    with Member(small) as first, Member(small) as second:
        until(lambda: len(first.loop._owned) == len(second.loop._owned) == 4, "each has its share")
        for wave in range(0, 600, 100):
            for n, member in enumerate((first, second)):
                topic, partition = member.owned[wave // 100 % 4]
                send(small, events[wave + n : wave + 100 : 2], partition, topic)
            first.caught_up()
    check(small, events, ordered=False)
    assert metrics.CONFLICTS._value.get() > conflicts
    rows = query(small, "SELECT DISTINCT topic FROM partition_ledger WHERE next_offset > 0")
    assert {row.topic for row in rows} == set(small.topics.events)


@pytest.mark.usefixtures("kip_848")
def test_the_consumer_protocol_gives_a_member_the_same_numbers_of_both_topics(small: Settings) -> None:
    """KIP-848 with the range assignor: a user's clicks and purchases have one writer, so no version conflicts."""
    kafka = small.kafka.model_copy(update={"properties": {}, "group_protocol": "consumer"})
    settings = small.model_copy(update={"kafka": kafka})
    events = events_of(600)
    with Member(settings) as first, Member(settings) as second:
        until(lambda: len(first.loop._owned) == len(second.loop._owned) == 4, "each has its share")
        for member in (first, second):
            clicks, purchases = (
                {n for name, n in member.loop._owned if name == topic} for topic in settings.topics.events
            )
            assert clicks == purchases
        send(settings, events)
        first.caught_up()
    check(settings, events)


def test_a_writer_between_the_read_and_the_write_is_seen(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version guard: what another wrote meanwhile is in the set that is written at last."""
    events = events_of(30, users=1, kinds=("click",))
    send(small, events[:10])
    run(small)
    other = Member(small)  # never started: used by hand, as a second owner of the same user
    write, calls = support_sets.write, itertools.count()

    def meanwhile(*arguments: Any, **named: Any) -> None:
        if next(calls) == 0:
            event = Event(**events[-1])
            other.ingest._store([event], {}, [])
        write(*arguments, **named)

    monkeypatch.setattr(support_sets, "write", meanwhile)
    send(small, events[10:-1])
    run(small)
    assert next(calls) == 3, "the first, the other's, the first again"
    check(small, events)
    other.engine.dispose()


# --- the log has gone on without us


def test_retention_that_passed_the_next_record_stops_with_a_sentence(small: Settings) -> None:
    events = events_of(60, kinds=("click",))
    send(small, events[:20], 2)
    run(small)
    send(small, events[20:], 2)
    admin = clients.admin(small.kafka)
    [deleted] = admin.delete_records([TopicPartition(small.topics.clicks, 2, 45)]).values()
    deleted.result()
    before = stored(small)
    with Member(small) as member:
        error = member.has_left()
    assert isinstance(error, StopError)
    assert f"{small.topics.clicks}[2]" in str(error)
    assert "retention has passed it" in str(error)
    assert stored(small) == before
    assert committed(small)[small.topics.clicks, 2] == 20
    # A person decides: go on with what there is.
    reset(small, {(small.topics.clicks, 2): 45})
    engine = connect(small.database)
    with engine.begin() as connection:
        connection.execute(text("UPDATE partition_ledger SET next_offset = 45 WHERE next_offset = 20"))
    engine.dispose()
    run(small)
    check(small, events[:20] + events[45:])


def test_a_topic_deleted_and_made_again_is_read_from_its_beginning(small: Settings) -> None:
    events = events_of(90, kinds=("click",))
    send(small, events[:60], 0)
    run(small)
    admin = clients.admin(small.kafka)
    admin.delete_topics([small.topics.clicks])[small.topics.clicks].result()
    until(lambda: small.topics.clicks not in admin.list_topics(timeout=10).topics, "deleted")
    ensure_topics(small, {"clicks": catalogue()["clicks"]})
    send(small, events[60:], 0)
    with Member(small) as member:
        member.has_handled(30)
    check(small, events)


# --- the command


@contextmanager
def command(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`innerloop ingest` as a process of its own."""
    mine = {
        "KAFKA__BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
        "KAFKA__INGEST_GROUP": settings.kafka.ingest_group,
        "DATABASE__URL": settings.database.url.get_secret_value(),
        "TOPICS": settings.topics.model_dump_json(),
        "SUPPORT": settings.support.model_dump_json(),
        "INGEST": settings.ingest.model_dump_json(),
    }
    variables = outer_environment() | {f"INNERLOOP_{name}": value for name, value in mine.items()}
    program = [sys.executable, "-m", "innerloop.worker", "ingest"]
    process = subprocess.Popen(program, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_signal_finishes_the_batch_in_hand(small: Settings) -> None:
    events = events_of(300)
    send(small, events[:150])
    with command(small) as process:
        until(lambda: ledger(small) == ends(small) or process.poll() is not None, "stored")
        send(small, events[150:])
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said.decode()
    assert committed(small) == ledger(small), "what is stored is committed: the next one repeats nothing"
    run(small)
    check(small, events)


def test_what_is_missing_at_the_start_is_one_sentence_and_code_3(bare_settings: Settings) -> None:
    with command(bare_settings) as process:
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 3
    assert "run `innerloop migrate`" in said.decode()
    assert "Traceback" not in said.decode()


# --- outages


@pytest.fixture(scope="module")
def own() -> Iterator[Services]:
    """Servers that these tests may stop."""
    ours = Settings(kafka=KafkaSettings(), database=DatabaseSettings())
    with running_services(ours, announce=lambda _line: None) as running:
        yield running


@contextmanager
def traffic(settings: Settings, events: list[Sent]) -> Iterator[None]:
    """Sends events one after another until the end of the block, then the rest."""
    stop, place = threading.Event(), itertools.count()
    producer = producer_at(settings.kafka.bootstrap_servers)

    def work() -> None:
        for at in place:
            if at >= len(events):
                return
            event = events[at]
            topic = settings.topics.purchases if event["event_type"] == "purchase" else settings.topics.clicks
            producer.produce(topic, json.dumps(event).encode(), event["user_id"])
            producer.poll(0)
            stop.wait(0.002)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        assert producer.flush(SECONDS) == 0


def test_connections_that_break_at_any_moment_lose_nothing(small: Settings) -> None:
    """Postgres ends our session every few milliseconds: in the read, the COPY, the commit, between batches."""
    events = events_of(1_500)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'innerloop'"
    admin = connect(small.database).execution_options(isolation_level="AUTOCOMMIT")
    rng, halt = random.Random(3), threading.Event()

    def attack() -> None:
        with admin.connect() as connection:
            connection.execute(text("SET application_name = 'the attacker'"))
            while not halt.wait(rng.uniform(0.0, 0.03)):
                connection.execute(text(f"{end} AND datname = current_database()"))

    rebalances = _rebalances()
    with Member(with_ingest(small, batch_size=20, cached_users=100)) as member:
        member.joined()
        attacker = threading.Thread(target=attack)
        with traffic(small, events):
            attacker.start()
            time.sleep(2.5)
            halt.set()
            attacker.join()
        member.caught_up()
        assert _rebalances()["assigned"] == rebalances["assigned"] + 1
    check(small, events)
    admin.dispose()


@pytest.fixture
def fragile(settings: Settings, own: Services) -> Settings:
    """Topics on the servers that may be stopped, and their own database: empty tables for each test."""
    for server in own.started:
        server.start()  # in case a test that failed has left it stopped
    database = DatabaseSettings(url=own.database_url)
    engine = connect(database)
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE partition_ledger, support_sets, items, ads"))
    engine.dispose()
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": own.bootstrap_servers})
    return shrunk(settings.model_copy(update={"kafka": kafka, "database": database}))


def test_a_crash_of_postgres_is_waited_out_without_a_rebalance(fragile: Settings, own: Services) -> None:
    assert own.postgres
    events = events_of(1_500)
    rebalances = _rebalances()
    with Member(fragile) as member:
        member.joined()
        with traffic(fragile, events):
            until(lambda: member.handled > 100, "goes on")
            pauses = metrics.PAUSES._value.get()
            own.postgres.stop("immediate")
            until(lambda: metrics.PAUSES._value.get() > pauses + 1, "pauses")
            assert member.error is None
            own.postgres.start()
        member.caught_up()
        change = {kind: now - rebalances[kind] for kind, now in _rebalances().items()}
        assert change == {"assigned": 1, "revoked": 0, "lost": 0}
    check(fragile, events)
    assert committed(fragile) == ledger(fragile) == ends(fragile)


def test_partitions_that_come_while_postgres_is_away_are_claimed_when_it_is_back(
    fragile: Settings, own: Services
) -> None:
    assert own.postgres
    events = events_of(200)
    send(fragile, events)
    wanted = ends(fragile)
    with Member(fragile) as member:
        own.postgres.stop()
        member.joined()
        time.sleep(1.5)
        assert member.error is None, repr(member.error)
        assert member.handled == 0
        own.postgres.start()
        until(lambda: member.error is not None or ledger(fragile) == wanted, "claims and goes on")
    check(fragile, events)


def test_a_stop_while_postgres_is_away_is_quick(fragile: Settings, own: Services) -> None:
    assert own.postgres
    events = events_of(200)
    with Member(fragile) as member:
        send(fragile, events[:100])
        member.caught_up()
        own.postgres.stop()
        pauses = metrics.PAUSES._value.get()
        send(fragile, events[100:])
        until(lambda: metrics.PAUSES._value.get() > pauses, "pauses")
        began = time.monotonic()
    assert time.monotonic() - began < 8, "the pool kills after 10 s"
    own.postgres.start()
    run(fragile)
    check(fragile, events)


def test_a_crash_of_the_broker_is_waited_out(fragile: Settings, own: Services) -> None:
    assert own.kafka
    events = events_of(1_500)
    with Member(fragile) as member:
        member.joined()
        with traffic(fragile, events):
            until(lambda: member.handled > 100, "goes on")
            own.kafka.stop()
            time.sleep(1)
            assert member.error is None
            own.kafka.start()
        member.caught_up()
        assert member.error is None
        until(lambda: committed(fragile) == ends(fragile), "the offsets that outside tools see catch up as well")
    check(fragile, events)
