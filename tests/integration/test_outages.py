"""What goes away, for how long and how: workers behind their real loop, on servers that these tests stop."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import psutil
import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from shell import outer_environment
from structlog.testing import capture_logs
from test_adapt import World
from test_ingest import (
    Member,
    check,
    committed,
    ends,
    events_of,
    ledger,
    producer_at,
    query,
    requests,
    reset,
    run,
    send,
    shrunk,
    stored,
    until,
    with_ingest,
)

from innerloop.config import DatabaseSettings, KafkaSettings, Settings
from innerloop.errors import FencedError, RetryError, StopError
from innerloop.store.database import connect
from innerloop.store.ledger import Ledger
from innerloop.store.migrate import migrate
from innerloop.streams import clients, waiting
from innerloop.streams.offsets import end_offsets
from innerloop.streams.partitions import Partition
from innerloop.streams.topics import ensure_topics, topic_ids
from innerloop.worker.servers.kafka import KafkaServer
from innerloop.worker.servers.services import Services, running_services

AWAY_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "14"))
"""How long an outage lasts here; OUTAGE_SECONDS=600 takes the ten minutes of the promise."""
long = pytest.mark.timeout(AWAY_SECONDS + 240)
RETURN_SECONDS = 5.0
SESSION_SECONDS = 3.0
# Shorter than the outages, and longer than a busy machine stands still.
PATIENT = {"session_timeout_ms": "10000", "heartbeat_interval_ms": "300", "max_poll_interval_ms": "11000"}
AS_MEMBER = ("--member", "cpu", "--threads", "1")
STOP_SECONDS = 9.5
"""A pool kills after 10. A flush under way takes up to 5, the last commit and closing 1.5 each."""


@pytest.fixture
def small(settings: Settings) -> Settings:
    return with_topics(settings)


def with_topics(settings: Settings) -> Settings:
    """Small batches and sets; all topics that the command asks for."""
    ensure_topics(settings)
    return shrunk(settings)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Servers that these tests may stop. The broker's sessions of the new protocol are as short as a test's."""
    session = str(int(1000 * SESSION_SECONDS))
    kafka = KafkaServer(
        tmp_path_factory.mktemp("own") / "kafka",
        announce=lambda _line: None,
        properties={"group.consumer.min.session.timeout.ms": session, "group.consumer.session.timeout.ms": session},
    )
    kafka.start()
    try:
        ours = Settings(kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers), database=DatabaseSettings())
        with running_services(ours, announce=lambda _line: None) as running:
            yield replace(running, kafka=kafka)
    finally:
        kafka.stop()


@pytest.fixture
def fragile(settings: Settings, own: Services) -> Settings:
    for server in own.started:
        server.start()  # in case a test that failed has left it stopped
    database = DatabaseSettings(url=own.database_url)
    engine = connect(database)
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE partition_ledger, support_sets, items, ads, releases")
    engine.dispose()
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": own.bootstrap_servers})
    return with_topics(settings.model_copy(update={"kafka": kafka, "database": database}))


def with_properties(settings: Settings, **properties: str) -> Settings:
    dotted = {name.replace("_", "."): value for name, value in properties.items()}
    kafka = KafkaSettings.model_validate({**settings.kafka.model_dump(), "properties": dotted})
    return settings.model_copy(update={"kafka": kafka})


class Worker:
    """`innerloop ingest`, or another command, as a process of its own, and what it says."""

    def __init__(self, settings: Settings, log: Path, *options: str, command: str = "ingest") -> None:
        revealed = {name: value.get_secret_value() for name, value in settings.kafka.properties.items()}
        mine = {
            "KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": revealed}),
            "DATABASE__URL": settings.database.url.get_secret_value(),
            "TOPICS": settings.topics.model_dump_json(),
            "SUPPORT": settings.support.model_dump_json(),
            "INGEST": settings.ingest.model_dump_json(),
            "ADAPT": settings.adapt.model_dump_json(),
        }
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "innerloop.worker", command, *options],
                env=outer_environment() | {f"INNERLOOP_{name}": value for name, value in mine.items()},
                stdout=file,
                stderr=file,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        return self._log.read_text()

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        lines = [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def waits_for(self, condition: Callable[[], bool], what: str) -> None:
        until(lambda: self.process.poll() is not None or condition(), what)
        assert self.process.poll() is None, self.text

    @property
    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


# --- the database


@long
def test_a_long_outage_of_postgres_costs_no_rebalance_no_memory_and_few_lines(
    fragile: Settings, own: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is longer than a session and than the longest pause between two polls; a backlog piles up meanwhile."""
    assert own.postgres
    limit = 4_096
    settings = with_properties(
        with_ingest(fragile, batch_size=500, cached_users=2_000),
        **PATIENT,
        queued_max_messages_kbytes=str(limit),
    )
    events = events_of(1_000, users=40)
    send(settings, events)
    with Worker(settings, tmp_path / "log") as worker:
        worker.waits_for(lambda: ledger(settings) == ends(settings), "goes on")
        before, stood, left = worker.memory, ledger(settings), time.monotonic()
        own.postgres.stop("immediate")
        _flood(settings, 30_000, kilobytes=2)
        time.sleep(AWAY_SECONDS)
        after = worker.memory
        own.postgres.start()
        back = time.monotonic()
        worker.waits_for(lambda: ledger(settings) != stood, "goes on")
        on_again = time.monotonic()
        worker.waits_for(lambda: _caught_up(settings), "catches up")
        assert after - before < (3 * limit << 10) + (16 << 20), "the queue and a batch of it, not the 60 MB that wait"
        assert on_again - back < RETURN_SECONDS
        _told_of_one_wait(worker, monkeypatch, AWAY_SECONDS, on_again - left)


@long
def test_a_long_outage_of_postgres_costs_adapt_no_rebalance_and_no_memory(
    fragile: Settings, own: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in its idle turn, and then with requests in hand."""
    assert own.postgres
    settings = with_properties(fragile, **PATIENT)
    with (
        _adapting(settings, tmp_path) as world,
        Worker(settings, tmp_path / "log", *AS_MEMBER, command="adapt") as worker,
    ):
        world.give_many([f"u{n}" for n in range(40)])
        world.ask(*world.given)
        worker.waits_for(lambda: world.last_is_newest(settings.topics.recommendations), "goes on")
        world.give_many(list(world.given))
        before, left = worker.memory, time.monotonic()
        own.postgres.stop("immediate")
        for _ in range(50):
            world.ask(*world.given)
        time.sleep(AWAY_SECONDS)
        after = worker.memory
        own.postgres.start()
        back = time.monotonic()
        worker.waits_for(lambda: (1, 2) in world.last(settings.topics.recommendations).values(), "goes on")
        on_again = time.monotonic()
        worker.waits_for(lambda: world.last_is_newest(settings.topics.recommendations), "catches up")
        assert after - before < 32 << 20
        assert on_again - back < RETURN_SECONDS
        _told_of_one_wait(worker, monkeypatch, AWAY_SECONDS, on_again - left)


@contextmanager
def _adapting(settings: Settings, folder: Path) -> Iterator[World]:
    """What adapt needs, and a view of what it does."""
    engine = connect(settings.database)
    world = World(settings, engine, folder)
    world.register(1)
    yield world
    engine.dispose()


def _told_of_one_wait(worker: Worker, monkeypatch: pytest.MonkeyPatch, least: float, most: float) -> None:
    """No rebalance; the lines of one wait that took between so many seconds."""
    assert [len(worker.said(each)) for each in ("assigned", "revoked", "lost")] == [1, 0, 0]
    said = worker.said("paused")
    assert len(lines_of_a_wait(monkeypatch, 0.9 * least)) <= len(said) <= len(lines_of_a_wait(monkeypatch, most)), said
    assert len(worker.said("paused: over")) == 1


def _flood(settings: Settings, count: int, *, kilobytes: int, users: int = 40) -> None:
    """Events of one second, each padded: a field that nobody knows is ignored."""
    producer, padding = producer_at(settings.kafka.bootstrap_servers), "x" * 1024 * kilobytes
    [like] = events_of(1, kinds=("click",))
    for n in range(count):
        event = {**like, "event_id": f"flood{n}", "user_id": f"u{n % users}", "note": padding}
        while True:
            try:
                producer.produce(settings.topics.clicks, json.dumps(event).encode(), event["user_id"])
            except BufferError:
                producer.poll(0.1)
            else:
                break
    assert producer.flush(60) == 0


# --- the broker


def test_a_short_outage_of_the_broker_costs_no_rebalance(
    fragile: Settings, own: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own.kafka
    events = events_of(400)
    send(fragile, events[:200])
    settings = with_properties(fragile, session_timeout_ms="30000", heartbeat_interval_ms="300")
    with Worker(settings, tmp_path / "log") as worker:
        worker.waits_for(lambda: _caught_up(fragile), "goes on")
        stood, left = ledger(fragile), time.monotonic()
        own.kafka.stop()
        time.sleep(3.0)
        own.kafka.start()
        back = time.monotonic()
        send(fragile, events[200:])
        worker.waits_for(lambda: ledger(fragile) != stood, "goes on")
        assert time.monotonic() - back < RETURN_SECONDS
        worker.waits_for(lambda: _caught_up(fragile), "catches up")
        assert [len(worker.said(each)) for each in ("assigned", "revoked", "lost")] == [1, 0, 0]
        most = 1 + len(lines_of_a_wait(monkeypatch, time.monotonic() - left))
        assert worker.text.count("FAIL ") <= most, "librdkafka's own lines, dozens a second, are let through as ours"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(STOP_SECONDS) == 0
    check(fragile, events)


@long
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_an_outage_of_the_broker_longer_than_the_session_is_waited_out(
    fragile: Settings, own: Services, tmp_path: Path, protocol: str, request: pytest.FixtureRequest
) -> None:
    """Classic: given up, and joined anew when the broker has forgotten the old member. Consumer: not even noticed."""
    if protocol == "consumer":
        request.getfixturevalue("kip_848")
    assert own.kafka
    session = {"session_timeout_ms": str(int(1000 * SESSION_SECONDS)), "heartbeat_interval_ms": "300"}
    settings = with_properties(fragile, **(session if protocol == "classic" else {}))
    kafka = settings.kafka.model_copy(update={"group_protocol": protocol})
    settings = settings.model_copy(update={"kafka": kafka})
    events = events_of(400)
    send(fragile, events[:200])
    with Worker(settings, tmp_path / "log") as worker:
        worker.waits_for(lambda: _caught_up(fragile), "goes on")
        before, stood = worker.memory, ledger(fragile)
        own.kafka.stop()
        time.sleep(max(AWAY_SECONDS, 2 * SESSION_SECONDS))
        after = worker.memory
        own.kafka.start()
        back = time.monotonic()
        send(fragile, events[200:])
        worker.waits_for(lambda: ledger(fragile) != stood, "goes on")
        assert time.monotonic() - back < RETURN_SECONDS + (SESSION_SECONDS if protocol == "classic" else 0)
        worker.waits_for(lambda: _caught_up(fragile), "catches up")
        assert after - before < 16 << 20
        assert len(worker.said("lost")) == (protocol == "classic")
        assert [len(worker.said(each)) for each in ("assigned", "revoked")] == [1 + (protocol == "classic"), 0]
    check(fragile, events)


@pytest.mark.parametrize("pending", [False, True])
def test_a_stop_while_the_broker_is_away_is_quick(fragile: Settings, own: Services, *, pending: bool) -> None:
    """Also with a commit under way, for which librdkafka would wait ten seconds."""
    assert own.kafka
    kafka = own.kafka
    events = events_of(50, kinds=("click",))

    def breaks(member: Member) -> None:
        original = member.ingest.handle

        def handle(batch: Any) -> None:
            original(batch)
            kafka.kill()

        member.ingest.handle = handle  # type: ignore[method-assign]

    if not pending:
        send(fragile, events)
    with Member(fragile, breaks if pending else None) as member:
        member.joined()
        if pending:
            send(fragile, events, 0)  # one partition, one batch: else a second one would wait for the broker in vain
        member.has_handled(len(events) if not pending else 1)
        kafka.kill()
        time.sleep(0.5)
        began = time.monotonic()
    assert time.monotonic() - began < STOP_SECONDS
    kafka.start()
    until(lambda: _answers(fragile), "the broker leads its partitions again")
    run(fragile)
    check(fragile, events)


def _caught_up(settings: Settings) -> bool:
    """A broker that is just back may not answer for every group yet."""
    try:
        return committed(settings) == ends(settings)
    except KafkaException:
        return False


def _answers(settings: Settings) -> bool:
    try:
        return bool(ends(settings))
    except KafkaException:
        return False


# --- offsets


class _Spoiling:
    """A consumer whose first commit has more metadata than a broker takes."""

    def __init__(self, consumer: Any) -> None:
        self._consumer, self._calls = consumer, itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
        if next(self._calls) == 0:
            offsets = [TopicPartition(each.topic, each.partition, each.offset, "x" * 10_000) for each in offsets]
        self._consumer.commit(offsets=offsets, asynchronous=asynchronous)


def test_a_commit_that_the_broker_refuses_is_made_again_without_further_traffic(small: Settings) -> None:
    """Else the lag would stay visible to every tool outside until the next batch."""

    def spoils(member: Member) -> None:
        member.loop._consumer = _Spoiling(member.loop._consumer)  # type: ignore[assignment]

    events = events_of(40)
    send(small, events)
    with Member(with_ingest(small, batch_size=100, cached_users=200), spoils) as member:
        member.caught_up()
        until(lambda: member.error is not None or committed(small) == ends(small), "committed")
        assert member.error is None, repr(member.error)
    check(small, events)


class _Stubborn:
    """A consumer that at first does not pause, and then refuses to seek."""

    def __init__(self, consumer: Any) -> None:
        self._consumer, self.pauses, self.refused = consumer, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.pauses += 1
        if self.pauses > 1:
            self._consumer.pause(partitions)

    def seek(self, place: TopicPartition) -> None:
        if self.refused < 3:
            self.refused += 1
            raise KafkaException(KafkaError(KafkaError._STATE))
        self._consumer.seek(place)


def test_what_comes_in_a_pause_and_cannot_be_sought_is_read_again(small: Settings) -> None:
    events = events_of(400)
    send(small, events)
    stubborn: list[_Stubborn] = []

    def prepared(member: Member) -> None:
        stubborn.append(_Stubborn(member.loop._consumer))
        member.loop._consumer = stubborn[0]  # type: ignore[assignment]
        original, calls = member.ledger.advance, itertools.count()

        def advance(*arguments: Any) -> None:
            if next(calls) == 1:
                raise RetryError("the database is away, says the test")
            original(*arguments)

        member.ledger.advance = advance  # type: ignore[method-assign, assignment]

    with Member(small, prepared) as member:
        member.caught_up()
    assert stubborn[0].refused > 0
    check(small, events)


# --- gaps


def _with_a_gap(settings: Settings, first: int = 45) -> list[dict[str, Any]]:
    """20 of 60 events handled, and those before `first` deleted: 25 that nobody has seen."""
    events = events_of(60, kinds=("click",))
    send(settings, events[:20], 2)
    run(settings)
    send(settings, events[20:], 2)
    admin = clients.admin(settings.kafka)
    [deleted] = admin.delete_records([TopicPartition(settings.topics.clicks, 2, first)]).values()
    deleted.result()
    return events


def _forget_the_group(settings: Settings) -> None:
    """As the broker does with a group that nobody was in for offsets.retention.minutes."""
    admin = clients.admin(settings.kafka)  # a client that is collected takes its answers along
    [deleted] = admin.delete_consumer_groups([settings.kafka.ingest_group]).values()
    deleted.result()


def _gaps(settings: Settings) -> list[tuple[int, int]]:
    return [(gap.from_offset, gap.to_offset) for gap in query(settings, "SELECT * FROM partition_gaps")]


def test_a_gap_is_passed_only_when_told_and_is_recorded(small: Settings, tmp_path: Path) -> None:
    events = _with_a_gap(small)
    with Worker(small, tmp_path / "stops") as worker:
        assert worker.process.wait(30) == 1
        assert "--accept-gap" in worker.text
        assert "Traceback" not in worker.text
    assert query(small, "SELECT * FROM partition_gaps") == []
    with Worker(small, tmp_path / "goes on", "--accept-gap") as worker:
        worker.waits_for(lambda: committed(small) == ends(small), "goes on behind the gap")
        [line] = worker.said("gap accepted")
        assert (line["from_offset"], line["to_offset"]) == (20, 45)
    [gap] = query(small, "SELECT * FROM partition_gaps")
    assert (gap.topic, gap.partition, gap.from_offset, gap.to_offset) == (small.topics.clicks, 2, 20, 45)
    assert ledger(small) == ends(small)
    check(small, events[:20] + events[45:])


def test_a_group_that_the_broker_forgot_passes_no_gap_in_silence(small: Settings) -> None:
    """The ledger alone knows then what is missing."""
    events = _with_a_gap(small)
    _forget_the_group(small)
    with Member(small) as member:
        error = member.has_left()
    assert isinstance(error, StopError)
    assert "offset 20" in str(error)
    assert "--accept-gap" in str(error)
    with Member(small, _accepting) as member:
        member.caught_up()
    assert _gaps(small) == [(20, 45)]
    check(small, events[:20] + events[45:])


@pytest.mark.parametrize("back", [None, 5])
def test_what_retention_took_of_what_is_stored_is_no_gap(small: Settings, back: int | None) -> None:
    """The broker's offset lies before the log, or is forgotten; the ledger stands inside the log."""
    events = _with_a_gap(small, 15)
    if back is None:
        _forget_the_group(small)
    else:
        reset(small, {(small.topics.clicks, 2): back})
    with Member(small) as member:
        member.caught_up()
        member.has_handled(45)
        assert member.handled == 45, "also what is stored and still there: its requests may not have been sent"
    assert _gaps(small) == []
    check(small, events)


def test_a_gap_begins_where_the_ledger_stands(small: Settings) -> None:
    events = _with_a_gap(small)
    reset(small, {(small.topics.clicks, 2): 5})
    with Member(small, _accepting) as member:
        member.caught_up()
    assert _gaps(small) == [(20, 45)]
    check(small, events[:20] + events[45:])


def _accepting(member: Member) -> None:
    member.loop._gaps._accept = True


def test_a_gap_that_was_passed_is_committed_though_the_next_one_ends_the_worker(small: Settings) -> None:
    """Else the flag would be used up: the next start would be at the gap again, and stop."""
    _with_a_gap(small)

    def then_one_that_no_gap_explains(member: Member) -> None:
        _accepting(member)
        gaps = member.loop._gaps
        found = gaps.found

        def found_and_another(partition: Partition, offset: int | None, why: str) -> None:
            found(partition, offset, why)
            gaps._wanted[small.topics.clicks, 1] = 10_000

        gaps.found = found_and_another  # type: ignore[method-assign]

    with Member(small, then_one_that_no_gap_explains) as member:
        error = member.has_left()
    assert isinstance(error, StopError)
    assert "which no gap explains" in str(error)
    assert _gaps(small) == [(20, 45)]
    assert committed(small)[small.topics.clicks, 2] == 45


def test_a_gap_met_again_after_a_crash_is_recorded_once(small: Settings) -> None:
    """The record is written before the offset moves."""
    events = _with_a_gap(small)
    with Member(small, _accepting) as member:
        member.caught_up()
    reset(small, {(small.topics.clicks, 2): 20})  # as though the commit had been lost
    with Member(small, _accepting) as member:
        until(lambda: member.error is not None or committed(small) == ends(small), "goes on")
    assert _gaps(small) == [(20, 45)]
    check(small, events[:20] + events[45:])


def test_a_gap_waits_for_a_database_that_is_away(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    events = _with_a_gap(small)

    def away_at_first(member: Member) -> None:
        _accepting(member)
        original, calls = member.ledger.gap, itertools.count()

        def gap(*arguments: Any) -> None:
            if next(calls) == 0:
                raise RetryError("the database is away, says the test")
            original(*arguments)

        monkeypatch.setattr(member.ledger, "gap", gap)

    with Member(small, away_at_first) as member:
        member.caught_up()
    check(small, events[:20] + events[45:])


@pytest.mark.parametrize("committed_at", [30, 20, 10])
def test_a_log_that_ends_before_our_place_is_no_gap(small: Settings, committed_at: int) -> None:
    """An unclean election, or a restored broker: nothing between the log's start and its end is ours to skip.

    Nor would what comes there next be new to the ledger, wherever the broker has the group.
    """
    events = events_of(20, kinds=("click",))
    send(small, events, 2)
    run(small)
    reset(small, {(small.topics.clicks, 2): committed_at})
    engine = connect(small.database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE partition_ledger SET next_offset = 30 WHERE next_offset = 20")
    engine.dispose()
    with Member(small, _accepting) as member:
        error = member.has_left()
    assert isinstance(error, StopError)
    assert "ends at offset 20" in str(error)
    assert query(small, "SELECT * FROM partition_gaps") == []


@pytest.mark.parametrize("kept", [20, 0])
def test_a_log_that_loses_its_end_under_a_worker_is_no_gap(fragile: Settings, own: Services, kept: int) -> None:
    """Whatever comes in its place: the ledger would take it for what it knows."""
    assert own.kafka
    events = events_of(60, kinds=("click",))
    for event in events:
        send(fragile, [event], 2)  # one to a record batch of the log
    with Member(fragile, _accepting) as member:
        member.has_handled(60)
        until(lambda: committed(fragile) == ends(fragile), "not committed")
        os.kill(own.kafka.pid, signal.SIGKILL)
        own.kafka.stop()
        _shorten(own.kafka.folder / "data" / f"{fragile.topics.clicks}-2", kept)
        own.kafka.start()
        error = member.has_left()
    assert isinstance(error, StopError)
    assert f"{fragile.topics.clicks}[2] " in str(error)
    assert "has lost records that were handled here" in str(error)
    assert query(fragile, "SELECT * FROM partition_gaps") == []

    producer_at.cache_clear()  # its sequence numbers are of the log as it was
    more = events_of(200, kinds=("click",))[60:]
    send(fragile, more, 2)  # beyond where it stood
    with Member(fragile, _accepting) as member:
        error = member.has_left()
    assert "has lost records that were handled here" in str(error)
    [told] = re.findall(r"broker end offset is (-?\d+)", str(error))
    assert max(0, int(told)) == kept

    engine = connect(fragile.database)
    with engine.begin() as connection:  # as deploy/OPERATIONS.md has it
        connection.exec_driver_sql(f"UPDATE partition_ledger SET next_offset = {kept} WHERE next_offset > {kept}")
    engine.dispose()
    run(fragile)
    check(fragile, events + more)


def _shorten(folder: Path, kept: int) -> None:
    """Cut a partition's log behind so many record batches, as an unclean election would."""
    [log] = folder.glob("*.log")
    content, at = log.read_bytes(), 0
    for _ in range(kept):
        at += 12 + int.from_bytes(content[at + 8 : at + 12], "big")  # base offset and length come first
    assert 0 <= at < len(content)
    log.write_bytes(content[:at])


def test_an_owner_that_was_superseded_records_no_gap(small: Settings) -> None:
    place = (small.topics.clicks, 1)
    engine = connect(small.database)
    first, second = (Ledger(engine, topic_ids(small, small.topics.events)) for _ in range(2))
    first.claim([place])
    second.claim([place])
    with pytest.raises(FencedError):
        first.gap(place, 3, 9)
    assert query(small, "SELECT * FROM partition_gaps") == []
    engine.dispose()


# --- load


def test_a_deep_lag_takes_bounded_memory_and_fewer_requests(small: Settings, tmp_path: Path) -> None:
    """A quarter of the lag in, memory is where it stays: what waits, waits at the broker."""
    settings = with_properties(
        with_ingest(small, batch_size=20_000, cached_users=40_000), queued_max_messages_kbytes="2048"
    )
    topic = settings.topics.requests
    with Worker(settings, tmp_path / "log") as worker:
        for n in range(20):  # as it goes without lag
            send(settings, events_of(5, users=500, seed=n))
            worker.waits_for(lambda: ledger(settings) == ends(settings), "goes on")
        live = 100 / end_offsets(settings, [topic])[topic]
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(STOP_SECONDS) == 0
    before, done = end_offsets(settings, [topic])[topic], sum(ledger(settings).values())
    _flood(settings, 200_000, kilobytes=0, users=2_000)
    with Worker(settings, tmp_path / "lag") as worker:
        worker.waits_for(lambda: sum(ledger(settings).values()) > done + 50_000, "a quarter")
        early = worker.memory
        worker.waits_for(lambda: ledger(settings) == ends(settings), "catches up")
        assert worker.memory - early < 32 << 20
        worker.waits_for(lambda: committed(settings) == ends(settings), "commits")
    behind = 200_000 / (end_offsets(settings, [topic])[topic] - before)
    assert live < 2, "events per request"
    assert behind > 2 * live


def test_a_bot_costs_one_request_a_batch_and_nobody_waits_for_its_end(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched ahead stands in one queue: a flood must not fill it before everybody else's records."""
    settings, flood = with_ingest(small, batch_size=1_000, cached_users=2_000), 60_000
    others = [{**event, "user_id": f"other{n}"} for n, event in enumerate(events_of(200, kinds=("click",)))]
    # Identifiers as shops make them: an answer to a fetch is as large as its bytes are, compressed.
    send(settings, [{**others[0], "event_id": str(uuid.uuid4()), "user_id": "bot"} for _ in range(flood)], 0)
    its, batches, worked_off, left = (settings.topics.clicks, 0), list[int](), 0, len(others)
    with Member(settings) as member:
        handle = member.ingest.handle

        def counted(batch: Any) -> None:
            nonlocal worked_off, left
            handle(batch)
            if not batches:
                time.sleep(1.0)  # as much is fetched as ever will be
                for number in range(1, 4):
                    send(settings, others[number - 1 :: 3], number)
                time.sleep(1.0)  # and those behind it
            batches.append(len(batch))
            left -= sum(partition != its for partition in batch.partitions)
            worked_off = batch.next_offsets.get(its, worked_off) if left else worked_off

        monkeypatch.setattr(member.ingest, "handle", counted)
        until(lambda: member.error is not None or left == 0, "others are handled")
        member.caught_up()
        asked = requests(settings)
        assert {len(each) for user, each in asked.items() if user != "bot"} == {1}
        assert len(asked["bot"]) <= len(batches)
    assert worked_off < flood - 10_000, "others are handled long before the flood is"
    assert len(stored(settings)[0]["bot"]) == settings.support.capacity


# --- what is logged


def lines_of_a_wait(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[MutableMapping[str, Any]]:
    """What is logged of a wait of so many seconds, tried twice a second."""
    now = 1_000.0
    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now))
        wait = waiting.Waiting("paused")
        for _ in range(int(2 * seconds)):
            wait.goes_on("the database is away")
            now += 0.5
    return lines


def test_lines_about_a_wait_come_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [line["for_seconds"] for line in lines_of_a_wait(monkeypatch, 3600)]
    assert told[:5] == [0, 5, 15, 35, 75]
    assert max(later - earlier for earlier, later in itertools.pairwise(told)) == 300


def test_the_end_of_a_wait_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1_000.0, 1_007.5))
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(now)))
    wait = waiting.Waiting("paused")
    with capture_logs() as lines:
        wait.goes_on("the database is away")
        wait.ends()
        wait.ends()
    assert [line["after_seconds"] for line in lines if line["event"] == "paused: over"] == [7.5]
