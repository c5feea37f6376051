"""The dead letters: listed, shown, sent back as they came, and never lost when their topic is away."""

import ctypes
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from offsets import committed
from sqlalchemy import text
from typer.testing import CliRunner, Result

from innerloop import metrics
from innerloop.config import IngestSettings, KafkaSettings, Settings
from innerloop.errors import DeadLetterError, Reason, RetryError
from innerloop.store.database import connect
from innerloop.store.ledger import Ledger
from innerloop.streams import clients
from innerloop.streams.batch import Record
from innerloop.streams.dead_letter_queue import DeadLetterQueue, Replayer
from innerloop.streams.dead_letters import send_dead_letter
from innerloop.streams.offsets import end_offsets
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.worker import dlq, processes
from innerloop.worker.cli import app
from innerloop.worker.dead_letters import readable

SECONDS = 30.0
NOW = int(time.time() * 1000)
Pairs = tuple[tuple[str, bytes | None], ...]
OURS = "__connect.errors."


@lru_cache
def publisher_at(bootstrap_servers: str) -> Publisher:
    """One for all tests: an idempotent producer takes up to a second until it may send."""
    return Publisher(KafkaSettings(bootstrap_servers=bootstrap_servers), message_max_bytes=10_000_000)


@dataclass
class World:
    settings: Settings

    def __post_init__(self) -> None:
        self.publisher = publisher_at(self.settings.kafka.bootstrap_servers)

    @property
    def clicks(self) -> str:
        return self.settings.topics.clicks

    def refuse(self, *records: Record, reason: Reason = Reason.UNDECODABLE) -> None:
        """Dead-letter records as ingest does."""
        for record in records:
            error = DeadLetterError(reason, f"says the test of {record.offset}")
            send_dead_letter(self.publisher, self.settings.topics.dead_letters, record, error, group="g")
        self.publisher.flush(SECONDS)

    def send(self, value: bytes | None, *, partition: int = 0, key: bytes | None = None, headers: Any = None) -> None:
        self.publisher.send(self.clicks, key, value, partition=partition, headers=headers)
        self.publisher.flush(SECONDS)

    def log(self, topic: str, partitions: int = 4) -> list[Message]:
        """Everything on a topic that is still there."""
        messages: list[Message] = []
        with clients.consumer(self.settings.kafka, "test") as consumer:
            bounds = [consumer.get_watermark_offsets(TopicPartition(topic, n), 10) for n in range(partitions)]
            consumer.assign([TopicPartition(topic, n, low) for n, (low, _) in enumerate(bounds)])
            deadline = time.monotonic() + SECONDS
            while len(messages) < sum(high - low for low, high in bounds):
                assert time.monotonic() < deadline
                messages += consumer.consume(10_000, 0.1)
        return messages

    def letters(self) -> list[Message]:
        return self.log(self.settings.topics.dead_letters, 1)

    def replay(self, *, dry_run: bool = False, **asked: Any) -> Any:
        wanted = dlq_wanted(**asked)
        return Replayer(self.settings, dry_run=dry_run).run(wanted)

    def stored(self) -> int:
        """Events in all support sets."""
        engine = connect(self.settings.database)
        with engine.connect() as connection:
            found = connection.execute(text("SELECT coalesce(sum(cardinality(items)), 0) FROM support_sets"))
            count = int(found.scalar_one())
        engine.dispose()
        return count


def dlq_wanted(reason: str | None = None, since: str | None = None, until: str | None = None) -> Any:
    from innerloop.worker.dead_letters import wanted  # noqa: PLC0415

    return wanted(reason, since, until)


@pytest.fixture
def world(settings: Settings) -> World:
    kafka = KafkaSettings(**{**dict(settings.kafka), "properties": {"heartbeat.interval.ms": "200"}})
    ingest = IngestSettings(batch_size=1_000, cached_users=2_000, max_record_bytes=10_000)
    settings = settings.model_copy(update={"kafka": kafka, "ingest": ingest})
    ensure_topics(settings)
    return World(settings)


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`innerloop dlq ...` with the settings of this test."""
    monkeypatch.setattr(dlq, "_settings", lambda: world.settings)
    return lambda *words: CliRunner().invoke(app, ["dlq", *words], env={"COLUMNS": "200"})


def record(
    topic: str, value: bytes | None, *, key: bytes | None = b"k", at: tuple[int, int] = (0, 0), headers: Pairs = ()
) -> Record:
    return Record(topic, *at, NOW, key, value, headers)


def click(n: int) -> bytes:
    event = {"event_id": f"e{n}", "event_type": "click", "user_id": f"u{n % 5}", "item_id": "i", "event_time": NOW + n}
    return json.dumps(event).encode()


class Thread(threading.Thread):
    """`innerloop ingest`, in a thread."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.settings, self.asked = settings, threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            processes.run_ingest(self.settings)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


@pytest.fixture(autouse=True)
def _threads_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Callable[[], bool]:
        member = threading.current_thread()
        assert isinstance(member, Thread)
        return member.asked.is_set

    monkeypatch.setattr(processes, "stop_on_signals", asked)


@contextmanager
def ingesting(settings: Settings) -> Iterator[Thread]:
    thread = Thread(settings)
    thread.start()
    try:
        yield thread
    finally:
        thread.asked.set()
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert thread.error is None, repr(thread.error)


def until(look: Callable[[], object], what: str, thread: Thread | None = None, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert thread is None or thread.error is None, repr(thread and thread.error)
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


# --- sending back

OWN: Pairs = (("trace", b"t"), ("trace", b"again"), ("nothing", None), ("empty", b""), (OURS + "stage", b"another's"))
AS_THEY_CAME: list[tuple[bytes | None, bytes | None, Pairs]] = [
    (b"not JSON \xff\x00", b"key \xff", ()),
    (b"{}", None, OWN),
    (None, b"k", ()),
    (b"", b"", ()),
    (None, None, OWN),
    (b"x", b"k", tuple((OURS + name, b"1") for name in ("topic", "partition", "offset"))),
    (b"y", b"k", (("innerloop.original.bytes", b"900000"),)),
    (b"z", b"k", (("innerloop.original.headers.bytes", b"3"),)),
]


def test_a_replay_sends_bytes_key_and_headers_as_they_came_to_where_they_came_from(world: World) -> None:
    world.refuse(
        *(
            record(world.clicks, value, key=key, headers=headers, at=(n % 4, n))
            for n, (value, key, headers) in enumerate(AS_THEY_CAME)
        )
    )
    assert world.replay(dry_run=True).sent == {world.clicks: len(AS_THEY_CAME)}
    assert world.log(world.clicks) == []
    assert world.replay().sent == {world.clicks: len(AS_THEY_CAME)}
    found = sorted(world.log(world.clicks), key=lambda m: (m.offset() or 0, m.partition() or 0))
    assert len(found) == len(AS_THEY_CAME)
    for n, (message, (value, key, headers)) in enumerate(zip(found, AS_THEY_CAME, strict=True)):
        assert message.partition() == n % 4
        assert (message.value(), message.key()) == (value, key)
        assert tuple(message.headers() or ()) == headers


def test_what_was_replayed_is_not_replayed_again_and_the_list_says_so(
    world: World, command: Callable[..., Result]
) -> None:
    world.refuse(*(record(world.clicks, b"?", at=(0, n)) for n in range(5)))
    world.refuse(record(world.settings.topics.purchases, b"?"), reason=Reason.INVALID_FIELD)
    assert command("replay", "--reason", "undecodable").stdout == (f"Replayed 5 dead letters: 5 to {world.clicks}.\n")
    assert command("replay", "--reason", "undecodable").stdout == (
        "Replayed 0 dead letters.\n5 had been replayed before.\n"
    )
    groups = json.loads(command("list", "--json").stdout)
    assert [(each["reason"], each["topic"], each["letters"], each["replayed"]) for each in groups] == [
        ("undecodable", world.clicks, 5, 5),
        ("invalid_field", world.settings.topics.purchases, 1, 0),
    ]
    assert groups[0]["example"] == "says the test of 0"
    assert abs(groups[0]["first"] - time.time() * 1000) < 60_000
    assert len(world.log(world.clicks)) == 5
    world.refuse(record(world.clicks, b"?", at=(0, 9)))
    assert world.replay().sent.total() == 2


def test_a_replay_takes_what_is_asked_for_by_reason_and_time(world: World) -> None:
    world.refuse(record(world.clicks, b"early"))
    time.sleep(0.02)
    middle = time.time()
    time.sleep(0.02)
    moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(middle))}.{int(middle % 1 * 1e6):06}"
    world.refuse(record(world.clicks, b"late"))
    world.refuse(record(world.clicks, b"other"), reason=Reason.TOO_LARGE)
    for asked, count in (
        ({"until": moment}, 1),
        ({"since": moment}, 2),
        ({"since": moment + "+00:00", "reason": "too_large"}, 1),
        ({"since": moment, "until": moment}, 0),
        ({}, 3),
    ):
        assert world.replay(dry_run=True, **asked).sent.total() == count, asked
    world.replay(until=moment)
    assert [message.value() for message in world.log(world.clicks)] == [b"early"]


def test_a_replay_ends_at_what_there_was_when_it_began(world: World) -> None:
    """What it sends may be refused again: it must not chase its own tail."""
    world.refuse(*(record(world.clicks, b"?", at=(0, n)) for n in range(3)))
    replayer = Replayer(world.settings)

    def refused_again(_letter: object) -> bool:
        world.refuse(record(world.clicks, b"again"))
        return True

    assert replayer.run(refused_again).sent.total() == 3
    assert [message.value() for message in world.log(world.clicks)] == [b"?"] * 3


def test_a_crash_between_sending_and_marking_sends_twice_and_ingest_stores_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.refuse(*(record(world.clicks, click(n), at=(0, n)) for n in range(5)))

    class Crash(BaseException):
        pass

    flush, calls = Publisher.flush, iter(range(100))

    def crash(self: Publisher, seconds: float) -> None:
        flush(self, seconds)
        if next(calls) == 0:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "flush", crash)
        with pytest.raises(Crash):
            world.replay()
    assert world.replay().sent.total() == 5
    assert world.replay().sent.total() == 0
    assert len(world.log(world.clicks)) == 10
    with ingesting(world.settings) as thread:
        until(lambda: world.stored() == 5, "stored", thread)
        time.sleep(0.3)
    assert world.stored() == 5


def test_more_than_one_marker_holds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("innerloop.streams.dead_letter_queue._LETTERS_AT_ONCE", 4)
    world.refuse(*(record(world.clicks, b"?", at=(0, n)) for n in range(11)))
    assert world.replay().sent.total() == 11
    assert len(world.letters()) == 11 + 3
    assert world.replay().earlier == 11


def test_records_that_others_wrote_to_the_topic_harm_nothing(world: World, command: Callable[..., Result]) -> None:
    strange: list[tuple[bytes | None, bytes | None, list[tuple[str, str | bytes | None]]]] = [
        (None, None, []),
        (b"k", b"v", [(OURS + "topic", b"t")]),
        (None, b"[[", [("innerloop.replayed", b"")]),
        (None, b'{"0": [0, 1, 2]}', [("innerloop.replayed", b""), ("and", b"more")]),
        (b"k", b'{"0": [5]}', [("innerloop.replayed", b"")]),
    ]
    for key, value, headers in strange:
        world.publisher.send(world.settings.topics.dead_letters, key, value, headers=headers)
    world.refuse(record(world.clicks, b"?"), record("orders of somebody else", b"?"))
    assert json.loads(command("list", "--json").stdout)[0]["letters"] == 1
    replayed = command("replay")
    assert replayed.exit_code == 1
    assert "Replayed 1 dead letters" in replayed.stdout
    assert "1 came from orders of somebody else, which ingest doesn't read: they stay." in replayed.stdout


# --- what was cut


def big(n: int) -> bytes:
    return random.Random(n).randbytes(850_000)


def test_a_cut_record_is_replayed_from_where_it_came_from_while_it_is_there(
    world: World, command: Callable[..., Result]
) -> None:
    """Its dead letter has its beginning only."""
    key, headers = random.Random(1).randbytes(60_000), [("h", random.Random(2).randbytes(60_000))]
    world.send(big(0), partition=1)
    world.send(b"long key", partition=1, key=key)
    world.send(b"long headers", partition=1, headers=headers)
    for n, (value, its_key, own) in enumerate([(big(0), None, ()), (b"long key", key, ()), (b"", b"", headers)]):
        world.refuse(record(world.clicks, value, key=its_key, at=(1, n), headers=tuple(own)))
    assert len(world.letters()[0].value() or b"") < 850_000
    world.refuse(record(world.clicks, big(1), at=(1, 0)))  # the place holds another: the topic was made again
    shown = command("show")
    assert shown.stdout.count("(cut; the whole is where it came from)") == 4
    world.refuse(record(world.clicks, b"short"))
    said = command("replay")
    assert said.exit_code == 1
    assert f"Replayed 4 dead letters: 4 to {world.clicks}." in said.stdout
    assert "1 can't be replayed" in said.stdout
    assert f"{world.clicks}[1] at offset 0" in said.stdout
    again = [
        message for message in world.log(world.clicks) if (message.offset() or 0) >= 3 * (message.partition() == 1)
    ]
    assert sorted(len(message.value() or b"") for message in again) == [5, 8, 12, 850_000]
    assert {message.key() for message in again} >= {key}
    assert any(message.headers() == headers for message in again)

    admin = clients.admin(world.settings.kafka)
    world.refuse(record(world.clicks, big(0), at=(1, 0)))
    [deleted] = admin.delete_records([TopicPartition(world.clicks, 1, 3)]).values()
    deleted.result()
    assert "2 can't be replayed" in command("replay").stdout


def test_headers_without_end_are_cut_also_where_they_hold_nothing(world: World) -> None:
    """A broker counts what frames a header, too: all of it together must stay below what it takes."""
    for headers in ((("", b""),) * 120_000, (("é" * 100, b""),) * 4_000):
        world.refuse(record(world.clicks, b"x" * 790_000, key=b"k" * 49_000, headers=headers, at=(1, 0)))
    letters = list(DeadLetterQueue(world.settings).letters())
    assert [letter.cut for letter in letters] == [True, True]


@pytest.mark.parametrize(
    ("name", "digits"), [("partition", 10), ("offset", 19), ("partition", 5_000), ("offset", 5_000)]
)
def test_what_no_offset_can_be_is_no_letter(world: World, name: str, digits: int) -> None:
    """Nor does a number that is too long for Python end the command."""
    world.refuse(record(world.clicks, b"?", at=(1, 0)))
    [letter] = world.letters()
    pairs: list[tuple[str, bytes | None]] = letter.headers() or []  # type: ignore[assignment]
    nonsense: Any = [(key, b"9" * digits if key == OURS + name else value) for key, value in pairs]
    topic = world.settings.topics.dead_letters
    world.publisher.send(topic, None, b"?", headers=nonsense)
    cut: Any = [("innerloop.original.headers.bytes", b"9" * digits), *pairs]
    world.publisher.send(topic, None, b"?", headers=cut)
    world.publisher.flush(SECONDS)
    letters = DeadLetterQueue(world.settings).letters()
    assert [(each.cut, each.record.offset, each.record.partition) for each in letters] == [
        (False, 0, 1),
        (digits < 20, 0, 1),
    ]


def test_headers_that_cannot_be_read_cost_their_record_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no UTF-8, as any client but Python's can send it; its batch is done twice."""
    calls = itertools.count()
    advance = Ledger.advance

    def unreliable(*arguments: Any) -> None:
        if next(calls) == 0:
            raise RetryError("the database is away, says the test")
        advance(*arguments)

    monkeypatch.setattr(Ledger, "advance", unreliable)
    produce_with_header(world, b"no event", b"\xff\xfe")
    produce_with_header(world, click(0), b"\xff\xfe")
    with ingesting(world.settings) as thread:
        until(lambda: world.stored() == 1 and _committed(world) == 2, "goes on", thread)
    [letter] = DeadLetterQueue(world.settings).letters()
    assert letter.record.value == b"no event"
    assert letter.cut
    assert letter.record.headers == (("innerloop.original.headers.unreadable", b""),)


def produce_with_header(world: World, value: bytes, name: bytes) -> None:
    """By librdkafka itself: confluent-kafka takes names that are text alone."""
    [path] = Path(confluent_kafka.__file__).parent.parent.glob("confluent_kafka.libs/librdkafka*")
    library, said = ctypes.CDLL(str(path)), ctypes.create_string_buffer(512)
    library.rd_kafka_conf_new.restype = library.rd_kafka_new.restype = ctypes.c_void_p
    conf = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(conf, b"bootstrap.servers", world.settings.kafka.bootstrap_servers.encode(), said, 512)
    producer = ctypes.c_void_p(library.rd_kafka_new(0, conf, said, 512))
    assert producer, said.value
    topic, partition, content, header, end = 1, 3, 4, 9, 0  # RD_KAFKA_VTYPE_*
    number, text, size = ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t
    refused = library.rd_kafka_producev(
        producer,
        *(number(topic), text(world.clicks.encode()), number(partition), ctypes.c_int32(0)),
        *(number(content), text(value), size(len(value))),
        *(number(header), text(name), text(b"v"), ctypes.c_ssize_t(1), number(end)),
    )
    assert refused == 0
    assert library.rd_kafka_flush(producer, int(1000 * SECONDS)) == 0
    library.rd_kafka_destroy(producer)


# --- what is shown


def test_nothing_of_a_payload_reaches_the_terminal_as_it_is(world: World, command: Callable[..., Result]) -> None:
    nasty = b"\x1b[31m\x07\xff\n[bold]caf\xc3\xa9[/bold]\x9b\r" + b"x" * 3_000
    headers: Pairs = (("\x1b[2J", b"\x1b"), ("none", None))
    world.refuse(record(world.clicks, nasty, key=b"\x1b]0;owned\x07", headers=headers, at=(2, 7)))
    shown, listed = command("show"), command("list")
    for said in (shown.stdout, listed.stdout):
        assert not [each for each in said if not each.isprintable() and each != "\n"]
    assert f"{world.clicks}[2] at offset 7" in shown.stdout
    assert "\\x1b[31m" in shown.stdout
    assert "[bold]café[/bold]" in shown.stdout
    assert "header none: none" in shown.stdout
    assert len(shown.stdout) < 2_000
    assert "undecodable" in listed.stdout


@pytest.mark.parametrize("content", [b"\x1b[31m", b"\xc2\x9b", "\u202e\u2028".encode(), b"\xff\xfe", b"a\\b"])
def test_readable_text_says_what_it_is(content: bytes) -> None:
    shown = readable(content)
    assert all(each.isprintable() for each in shown)
    assert shown


def test_show_gives_the_newest_that_are_asked_for(world: World, command: Callable[..., Result]) -> None:
    world.refuse(*(record(world.clicks, b"?", at=(0, n)) for n in range(30)))
    assert command("show", "--limit", "2").stdout.count("reason: undecodable") == 2
    assert "at offset 29" in command("show", "--limit", "1").stdout
    assert command("show").stdout.count("reason:") == 20
    assert "no such dead letters" in command("show", "--reason", "too_large").stdout
    world.replay()
    assert "replayed since" in command("show").stdout


def test_an_empty_topic_has_no_dead_letters(command: Callable[..., Result]) -> None:
    assert command("list").stdout == "There are no dead letters.\n"
    assert command("list", "--json").stdout == "[]\n"
    assert command("replay").stdout == "Replayed 0 dead letters.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "--reason", "ugly"], "is none of too_large, undecodable, invalid_field"),
        (["replay", "--since", "yesterday"], "--since yesterday is no time"),
        (["replay", "--until", "1700000000"], "--until 1700000000 is no time"),
    ],
)
def test_a_wrong_option_is_one_sentence(command: Callable[..., Result], words: Sequence[str], says: str) -> None:
    assert says in str(command(*words).exception)


# --- the whole way


def test_what_is_refused_is_stored_once_its_cause_is_cured(world: World, command: Callable[..., Result]) -> None:
    """An event that is larger than the settings allow, among others; then the setting is corrected."""
    large = json.dumps({**json.loads(click(3)), "note": "x" * 20_000}).encode()
    for n in range(3):
        world.send(click(n), key=b"u")
    world.send(large, key=b"u3")
    with ingesting(world.settings) as thread:
        until(lambda: len(world.letters()) == 1 and world.stored() == 3, "stored and refused", thread)
    assert command("replay").exit_code == 0
    ingest = world.settings.ingest.model_copy(update={"max_record_bytes": 100_000})
    with ingesting(world.settings.model_copy(update={"ingest": ingest})) as thread:
        until(lambda: world.stored() == 4, "stored", thread)
    assert len(DeadLetterQueue(world.settings).replayed) == 1


@pytest.mark.parametrize("how", ["deleted", "too small"])
def test_while_the_dead_letter_topic_is_away_the_partition_pauses_and_nothing_is_lost(
    world: World, how: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    topic, admin = world.settings.topics.dead_letters, clients.admin(world.settings.kafka)
    with ingesting(world.settings) as thread:
        world.send(click(0))
        until(lambda: world.stored() == 1, "stored", thread)
        if how == "deleted":
            admin.delete_topics([topic])[topic].result()
        else:
            _configure(world, "max.message.bytes", "100")
        pauses = metrics.PAUSES._value.get()
        world.send(b"bad" * 100)
        for n in range(1, 4):
            world.send(click(n))
        until(lambda: metrics.PAUSES._value.get() > pauses + 1, "pauses", thread)
        assert _committed(world) < 5
        if how == "deleted":
            ensure_topics(world.settings, {"dead_letters": catalogue()["dead_letters"]})
        else:
            _configure(world, "max.message.bytes", "1000000")
        # A producer that knows the topic is gone asks every 30 s whether it still is.
        until(lambda: world.stored() == 4 and _committed(world) == 5, "goes on", thread, 90)
    said = capsys.readouterr().out + caplog.text
    assert f"{topic} did not take a record" in said or "has not taken" in said
    assert "Traceback" not in said
    values = [letter.value() for letter in world.letters()]
    assert values
    assert set(values) == {b"bad" * 100}, "perhaps more than once, never none"


def test_while_dead_letters_are_refused_nobody_is_asked_again_and_again(world: World) -> None:
    """A refusal comes at once, and the batch is done again twice a second, with all its users."""
    _configure(world, "max.message.bytes", "100")
    before = end_offsets(world.settings, [world.settings.topics.requests])
    world.send(b"bad" * 100)  # both are there before the worker is, so that one batch holds them
    world.send(click(0))
    pauses = metrics.PAUSES._value.get()
    patient = world.settings.ingest.model_copy(update={"poll_seconds": 0.5})
    with ingesting(world.settings.model_copy(update={"ingest": patient})) as thread:
        until(lambda: metrics.PAUSES._value.get() > pauses + 3, "pauses", thread)
        until(lambda: world.stored() == 1, "stored", thread)
        assert end_offsets(world.settings, [world.settings.topics.requests]) == before
        _configure(world, "max.message.bytes", "1000000")
        until(lambda: _committed(world) == 2, "goes on", thread)
    after = end_offsets(world.settings, [world.settings.topics.requests])
    assert sum(after.values()) == sum(before.values()) + 1


def _configure(world: World, name: str, value: str) -> None:
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, world.settings.topics.dead_letters, incremental_configs=[entry])
    admin = clients.admin(world.settings.kafka)
    admin.incremental_alter_configs([resource])[resource].result()


def _committed(world: World) -> int:
    kafka = world.settings.kafka
    return committed(kafka, kafka.ingest_group, [world.clicks], 1).get((world.clicks, 0), 0)
