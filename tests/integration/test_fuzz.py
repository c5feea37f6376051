"""A hundred thousand records of every kind of wrong, through the decoder and through ingest: each is accounted for.

Another seed: FUZZ_SEED=7 .venv/bin/pytest tests/integration/test_fuzz.py. A test that fails prints its own.
"""

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest
import xxhash
from confluent_kafka import TopicPartition
from sqlalchemy import text

from innerloop import metrics
from innerloop.config import IngestSettings, Settings
from innerloop.erasure import decode_erasure
from innerloop.errors import DeadLetterError, Reason
from innerloop.events import MAX_IDENTIFIER_BYTES, Event, decode, decode_many
from innerloop.store.database import connect
from innerloop.streams import clients
from innerloop.streams.publisher import Headers
from innerloop.streams.topics import ensure_topics
from innerloop.streams.whole_topic import committed_offsets, whole_topic
from innerloop.worker import processes

SEED = int(os.environ.get("FUZZ_SEED", "20261124"))
RECORDS = 100_000
ERASURES = 5_000
MAX_BYTES = 20_000
NOW = int(time.time() * 1000)
OUTCOMES = ("stored", "duplicate", "too_late", "dead_letter", "suppressed", "replayed")

# What a value may be replaced by, as JSON text.
VALUES = [
    *("null", "true", "[]", "{}", '""', "0", "-0", "-1", "1.0", "1e3", "1e400", "-1e400", "NaN", "Infinity", "01"),
    *("9007199254740992", "9007199254740993", "18446744073709551616", "1" * 400, "0." + "9" * 400, '"\\u0000"'),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"a\\u0000b"', f'"{"x" * 256}"', f'"{"é" * 129}"'),
    *(f'"{"x" * 257}"', '"\\x41"', '"\t"', '"%s"', '"\'; DROP TABLE items; --"', '"{}"', '"\\\\N"', '"click"'),
    *('"1970-01-01T00:00:00Z"', '"0001-01-01T00:00:00+14:00"', '"9999-12-31T23:59:59.999999-14:00"'),
    *('"2025-02-30T00:00:00Z"', '"2025-06-15T15:06:60Z"', '"2025-06-15T15:06:40"', '"2025-06-15"', '"now"'),
    *(f'"{json.dumps({"a": 1})[1:-1]}"', "[" * 3_000 + "]" * 3_000, '{"a":' * 3_000 + "1" + "}" * 3_000),
]
FIELDS = ("event_id", "event_type", "user_id", "item_id", "event_time", "category", "ad_id", "price", "currency", "x")


class Mutator:
    """Records of a seed: some right, most of them wrong in one way or several."""

    def __init__(self, seed: int, *, erasures: bool = False) -> None:
        self._erasures = erasures
        self._rng = random.Random(seed)
        self._last: list[bytes] = [b"{}"]
        self._kinds: list[Callable[[], bytes | None]] = [
            self._right,
            self._right,
            self._replaced,
            self._flipped,
            self._cut,
            self._spliced,
            self._noise,
            self._respelled,
            self._odd,
        ]

    def records(self, count: int) -> Iterator[bytes | None]:
        for _ in range(count):
            record = self._rng.choice(self._kinds)()
            if record is not None and len(record) < 2_000:
                self._last = [*self._last[-50:], record]
            yield record

    def keys(self) -> Iterator[str | bytes | None]:
        while True:
            number = self._rng.randrange(100)
            yield self._rng.choice(
                [str(number), f"用户{number}", None, b"", self._rng.randbytes(self._rng.randrange(99))]
            )

    def headers(self) -> Iterator[Headers | None]:
        """Mostly none; else some whose names may be repeated, or those that dead letters have."""
        names = ("trace", "traceparent", "", "ü", "__connect.errors.topic", "innerloop.original.bytes")
        while True:
            count = self._rng.randrange(6) if self._rng.random() < 0.3 else 0
            values = [self._rng.choice([None, b"", b"0", self._rng.randbytes(20)]) for _ in range(count)]
            yield [(self._rng.choice(names), value) for value in values] or None

    def _fields(self) -> dict[str, str]:
        number = self._rng.randrange(30_000)  # some come twice
        return {
            "event_id": json.dumps(f"e{number}"),
            "event_type": json.dumps(["click", "cart", "favorite", "purchase"][number % 4]),
            "user_id": json.dumps(["u", "用户", "\U0001f600", " "][number % 4] + str(number % 100)),
            "item_id": json.dumps(f"i{number % 500}"),
            "event_time": str(NOW - number * 1_000),
            **({"requested_at": str(NOW - number * 1_000)} if self._erasures else {}),
        }

    @staticmethod
    def _object(fields: dict[str, str]) -> bytes:
        body = ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items())
        return f"{{{body}}}".encode(errors="surrogatepass")

    def _right(self) -> bytes:
        return self._object(self._fields())

    def _replaced(self) -> bytes:
        fields = self._fields()
        for _ in range(self._rng.choice([1, 1, 2])):
            fields[self._rng.choice(FIELDS)] = self._rng.choice(VALUES)
        if self._rng.random() < 0.2:
            del fields[self._rng.choice(list(fields))]
        return self._object(fields)

    def _flipped(self) -> bytes:
        record = bytearray(self._right())
        for _ in range(self._rng.randrange(1, 4)):
            record[self._rng.randrange(len(record))] = self._rng.randrange(256)
        return bytes(record)

    def _cut(self) -> bytes:
        record = self._right()
        return record[: self._rng.randrange(len(record))]

    def _spliced(self) -> bytes:
        first, second = self._rng.choice(self._last), self._rng.choice(self._last)
        return first[: self._rng.randrange(len(first) + 1)] + second[self._rng.randrange(len(second) + 1) :]

    def _noise(self) -> bytes:
        return self._rng.randbytes(self._rng.randrange(200))

    def _respelled(self) -> bytes:
        """The same in another encoding, with white space, repeated keys or a byte order mark."""
        record = self._right()
        return self._rng.choice(
            [
                record.decode().encode("utf-16"),
                b"\xef\xbb\xbf" + record,
                b" \n\t" + record + b"\r\n",
                record + record,
                record[:-1] + b"," + record[1:],
                b"[" + record + b"]",
                record.replace(b":", b" : "),
                record.replace(b'"', b"'"),
            ]
        )

    def _odd(self) -> bytes | None:
        return self._rng.choice(
            [None, b"", b"null", b"0", b'""', b"\0", b"[" * 5_000, b"x" * (MAX_BYTES + 1), b"{" * 9]
        )


@pytest.fixture(autouse=True)
def _seed() -> None:
    print(f"FUZZ_SEED={SEED} repeats this")  # noqa: T201 - shown where a test fails


def test_any_record_is_an_event_that_can_be_stored_or_refused_with_a_reason() -> None:
    records = list(Mutator(SEED).records(RECORDS))
    latest = NOW + 86_400_000
    alone: list[Event | None] = []
    refused: Counter[str] = Counter()
    said: set[str] = set()
    for record in records:
        try:
            alone.append(decode(record, latest_ms=latest, max_bytes=MAX_BYTES))
        except DeadLetterError as error:
            alone.append(None)
            refused[error.reason] += 1
            said.add(str(error))
    assert all(sentence.encode() for sentence in said), "each goes into a header"
    assert min(refused[reason] for reason in Reason) > 500
    events = [event for event in alone if event is not None]
    assert len(events) > RECORDS / 10
    for event in events:
        assert isinstance(event.event_time, int)
        assert 0 <= event.event_time <= latest
        for name in (event.user_id, event.event_id, event.item_id, event.category, event.ad_id):
            if name is not None:
                assert 0 < len(name.encode()) <= MAX_IDENTIFIER_BYTES
                assert "\0" not in name
    together, positions, bad = decode_many(records, latest_ms=latest, max_bytes=MAX_BYTES)
    assert together == events
    assert positions == [at for at, event in enumerate(alone) if event is not None]
    assert Counter(error.reason for _, error in bad) == refused


@pytest.mark.timeout(400)
def test_every_record_that_is_produced_is_stored_repeated_too_late_or_dead_lettered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And then erasures of every kind of wrong: whom one names that can be read is gone."""
    window = 10 * RECORDS  # the breaker's business is another
    ingest = IngestSettings(
        batch_size=20_000, cached_users=40_000, max_record_bytes=MAX_BYTES, breaker_window=window, poll_seconds=0.5
    )
    monkeypatch.setattr("innerloop.ingest._FLUSH_SECONDS", 60.0)  # thousands of letters at once are one batch's
    settings = settings.model_copy(update={"ingest": ingest})
    topics = settings.topics
    ensure_topics(settings)
    mutator, eraser = Mutator(SEED + 1), Mutator(SEED + 2, erasures=True)
    records, erasures = list(mutator.records(RECORDS)), list(eraser.records(ERASURES))
    _produce(settings, topics.clicks, records, mutator)
    before, halt = _outcomes(), threading.Event()
    monkeypatch.setattr(processes, "stop_on_signals", lambda: halt.is_set)
    thread = threading.Thread(target=processes.run_ingest, args=(settings,), daemon=True)
    thread.start()
    _wait(thread, lambda: (_outcomes() - before).total() >= RECORDS and _committed(settings, topics.clicks))
    found, sent = _outcomes() - before, _sent(records)
    _check_sets(_in_the_database(settings), sent, settings.support.capacity)
    _produce(settings, topics.erasures, erasures, eraser)
    _wait(thread, lambda: _committed(settings, topics.erasures))
    halt.set()
    thread.join(60)
    assert not thread.is_alive()
    assert found.total() == RECORDS, found
    assert found["suppressed"] == found["replayed"] == 0
    assert min(found["stored"], found["duplicate"], found["dead_letter"]) > 1_000
    assert found["too_late"] > 0
    erased, refused = _erased(erasures)
    assert min(len(erased), refused) > 50
    assert _in_the_database(settings).keys() == sent.keys() - erased
    assert _end(settings, topics.dead_letters) == found["dead_letter"] + refused
    _check_letters(settings)
    assert "Traceback" not in "".join(capfd.readouterr())


def _produce(settings: Settings, topic: str, records: Sequence[bytes | None], mutator: Mutator) -> None:
    producer = clients.producer(settings.kafka, linger_ms=20)
    for n, (record, key, headers) in enumerate(zip(records, mutator.keys(), mutator.headers(), strict=False)):
        producer.produce(topic, record, key, headers=headers)
        if n % 10_000 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0


def _wait(thread: threading.Thread, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not done():
        assert thread.is_alive()
        assert time.monotonic() < deadline, _outcomes()
        time.sleep(0.2)


def _committed(settings: Settings, topic: str) -> bool:
    places = committed_offsets(settings, settings.kafka.ingest_group, [topic])
    return all(offset == end for offset, end in places.values())


def _check_sets(stored: dict[str, set[tuple[int, int]]], sent: dict[str, set[tuple[int, int]]], capacity: int) -> None:
    assert stored.keys() == sent.keys()
    for user, examples in stored.items():
        assert examples <= sent[user], "an event that nobody sent"
        assert len(examples) == min(capacity, len({hashed for hashed, _ in sent[user]}))


def _erased(records: Sequence[bytes | None]) -> tuple[set[str], int]:
    """The users whom these erasures name, and how many of them can't be read."""
    users, refused = set(), 0
    for record in records:
        try:
            users.add(decode_erasure(record, latest_ms=int(time.time() * 1000) + 86_400_000).user_id)
        except DeadLetterError:
            refused += 1
    return users, refused


def _check_letters(settings: Settings) -> None:
    """Each repeats the key, value and headers of the record that it names last."""
    wanted = {
        (record.topic, str(record.partition), str(record.offset)): record
        for topic in (settings.topics.clicks, settings.topics.erasures)
        for record in whole_topic(settings, topic)
    }
    for letter in whole_topic(settings, settings.topics.dead_letters):
        said = {name: (value or b"").decode() for name, value in letter.headers[-7:]}
        prefix = "__connect.errors."
        record = wanted.pop((said[f"{prefix}topic"], said[f"{prefix}partition"], said[f"{prefix}offset"]))
        assert (letter.key, letter.value, letter.headers[:-7]) == (record.key, record.value, record.headers)


def _outcomes() -> Counter[str]:
    return Counter({name: int(metrics.EVENTS.labels(name)._value.get()) for name in OUTCOMES})


def _end(settings: Settings, topic: str) -> int:
    with clients.consumer(settings.kafka, "test") as consumer:
        return consumer.get_watermark_offsets(TopicPartition(topic, 0), 10)[1]


def _in_the_database(settings: Settings) -> dict[str, set[tuple[int, int]]]:
    """(hash of the id, time) of each user's events."""
    engine = connect(settings.database)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT user_id, event_hashes, event_times FROM support_sets"))
        found = {row.user_id: set(zip(row.event_hashes, row.event_times, strict=True)) for row in rows}
    engine.dispose()
    return found


def _sent(records: list[bytes | None]) -> dict[str, set[tuple[int, int]]]:
    """The same of every event among the records. An id may have come with several times: any of them may be stored."""
    found: dict[str, set[tuple[int, int]]] = {}
    for record in records:
        with suppress(DeadLetterError):
            event = decode(record, latest_ms=int(time.time() * 1000) + 86_400_000, max_bytes=MAX_BYTES)
            hashed = xxhash.xxh3_64_intdigest(event.event_id.encode())
            signed = hashed - 2**64 if hashed >= 2**63 else hashed
            found.setdefault(event.user_id, set()).add((signed, event.time_ms))
    return found
