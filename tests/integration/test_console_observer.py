"""What the console reads, against a real broker and database, and what it does while they fail."""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from confluent_kafka import TopicPartition
from sqlalchemy import text

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.store import accounts
from innerloop.store.database import Database, connect
from innerloop.streams import clients
from innerloop.streams.dead_letter_queue import DeadLetterQueue
from innerloop.streams.dead_letters import DeadLetter
from innerloop.streams.offsets import LogEnds
from innerloop.streams.tail import Tail
from innerloop.streams.topics import ensure_topics
from innerloop.worker.console.observer import Observer
from innerloop.worker.console.quality import WindowReader
from innerloop.worker.console.serve import run_console
from innerloop.worker.console.sources import LiveSource
from innerloop.worker.console.stored import StoredSource

HOUR = 3_600_000


@pytest.fixture
def engine(settings: Settings) -> Iterator[Database]:
    ensure_topics(settings)
    made = connect(settings.database)
    yield made
    made.dispose()


@pytest.fixture
def observer(settings: Settings, engine: Database) -> Iterator[Observer]:
    """It has looked."""
    assert engine
    made = Observer(settings)
    assert not made.ready.good
    made.start()
    until(lambda: made.ready.good and made.stored.some_user is None and made.troubles == [])
    yield made
    made.stop()


def until(look: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def send(settings: Settings, topic: str, *values: bytes) -> None:
    producer = clients.producer(settings.kafka)
    for value in values:
        producer.produce(topic, value, "somebody")
    assert producer.flush(10) == 0


def lag(observer: Observer, group: str) -> int:
    return next(each.offsets for each in observer.live.groups if each.group == group)


def looks_on(observer: Observer) -> None:
    """It looks well again, and again."""
    for _ in range(2):
        seen = observer.live.at
        until(lambda seen=seen: observer.live.at > seen)  # type: ignore[misc]
    assert not observer.live.troubles
    assert observer.alive.good


def test_a_table_that_is_gone_is_told_and_nothing_else_stands_still(
    settings: Settings, engine: Database, observer: Observer
) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE releases RENAME TO elsewhere"))
    until(lambda: any("releases cannot be read (ProgrammingError)" in each for each in observer.troubles))
    send(settings, settings.topics.clicks, b"1", b"2", b"3")
    until(lambda: lag(observer, settings.kafka.ingest_group) == 3)
    looks_on(observer)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO releases"))
    until(lambda: observer.troubles == [])


def test_a_table_that_is_locked_holds_up_neither_lag_nor_gauges(
    settings: Settings, engine: Database, observer: Observer
) -> None:
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        connection.execute(text("LOCK TABLE support_sets IN ACCESS EXCLUSIVE MODE"))
        until(lambda: any("statement timeout" in each for each in observer.troubles))
        send(settings, settings.topics.clicks, b"1", b"2")
        until(lambda: lag(observer, settings.kafka.ingest_group) == 2)
        looks_on(observer)
        shown = next(iter(metrics.LAG_OFFSETS.collect())).samples
        assert sum(each.value for each in shown if each.labels["group"] == settings.kafka.ingest_group) == 2
    until(lambda: observer.troubles == [])


def test_a_look_that_fails_is_survived_and_told(observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: object) -> None:
        raise ZeroDivisionError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(LiveSource, "look", broken)
        until(lambda: any("cannot look (ZeroDivisionError" in each for each in observer.troubles))
        assert observer.alive.good
    until(lambda: observer.troubles == [])
    looks_on(observer)


def test_it_is_alive_by_its_looks(settings: Settings, engine: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine
    go_on = threading.Event()
    look = LiveSource.look
    monkeypatch.setattr(LiveSource, "look", lambda self: (go_on.wait(60), look(self))[1])
    stuck = Observer(
        settings.model_copy(update={"http": settings.http.model_copy(update={"stuck_after_seconds": 1.0})})
    )
    stuck.start()
    assert not stuck.ready.good
    until(lambda: not stuck.alive.good)
    assert "has not turned" in stuck.ready.why
    go_on.set()
    until(lambda: stuck.ready.good)
    assert next(iter(metrics.CONSOLE_LOOKED.collect())).samples[0].value == pytest.approx(stuck.live.at, abs=60)
    stuck.stop()


def test_after_a_failed_read_the_rate_is_a_mean_and_no_spike(
    settings: Settings, engine: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_self: object) -> None:
        raise ServiceError("Kafka does not tell the ends of its logs.")

    assert engine
    source, topic, began = LiveSource(settings), settings.topics.clicks, time.monotonic()
    assert math.isnan(source.look().flows[topic].per_second)
    send(settings, topic, *[b"1"] * 100)
    with monkeypatch.context() as patched:
        patched.setattr(LogEnds, "read", fails)
        failed = source.look()
        assert failed.troubles == ("Kafka does not tell the ends of its logs.",)
        assert failed.flows[topic].total == 0
        assert math.isnan(failed.flows[topic].per_second)
        time.sleep(1.0)
    found = source.look().flows[topic]
    assert found.total == 100
    assert 100 / (time.monotonic() - began + 1) < found.per_second <= 100
    source.close()


def test_dead_letters_that_could_not_be_read_are_read_again(
    settings: Settings, engine: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ServiceError("It cannot be read.")

    assert engine
    letter = msgspec.json.encode({"no": "letter"})
    source = StoredSource(settings)
    assert source.look().troubles == ()
    send(settings, settings.topics.dead_letters, letter)
    with monkeypatch.context() as patched:
        patched.setattr(DeadLetterQueue, "__init__", fails)
        assert source.look().troubles == ("It cannot be read.",)
    read: list[str] = []

    def counts(queue: DeadLetterQueue) -> Iterator[DeadLetter]:
        read.append(queue.topic)
        return iter(())

    monkeypatch.setattr(DeadLetterQueue, "letters", counts)
    assert source.look().troubles == ()
    assert read == [settings.topics.dead_letters]
    source.look()
    assert len(read) == 1  # nothing new
    source.close()


def test_many_users_are_estimated_and_it_says_so(settings: Settings, engine: Database) -> None:
    with engine.begin() as connection:
        rows = "SELECT 'u' || n, '{}', '{}', '{}', '{}', '{}', 1 FROM generate_series(1, 500) AS n"
        connection.execute(text(f"INSERT INTO support_sets {rows}"))
        assert accounts.users_about(connection, exact_up_to=1_000) == (500, True)
        assert accounts.users_about(connection, exact_up_to=499) == (500, False)  # never analysed: above 499
        connection.execute(text("ANALYZE support_sets"))
        assert accounts.users_about(connection, exact_up_to=499) == (500, False)
    source = StoredSource(settings)
    seen = source.look()
    assert (seen.users, seen.exact) == (500, True)
    assert (seen.some_user or "").startswith("u")
    source.close()


def window(start: int, clicks: int) -> QualityWindow:
    return QualityWindow(start, start + 60_000, start + 90_000, clicks, 0, 0, [], [], [])


def test_a_window_counts_once_as_it_was_told_last_and_for_an_hour(settings: Settings, engine: Database) -> None:
    assert engine
    topic, first = settings.topics.quality_windows, 1_750_000_000_000
    reader = WindowReader(settings)
    told = [window(first, 1), window(first + 60_000, 2), window(first, 3)]
    send(settings, topic, b"no window", *map(msgspec.json.encode, told))
    until(lambda: [each.clicks for each in reader.read()] == [3, 2])
    send(settings, topic, msgspec.json.encode(window(first + HOUR, 4)))
    until(lambda: [each.clicks for each in reader.read()] == [2, 4])
    reader.close()


def test_windows_that_could_not_be_read_are_read_from_where_they_are(
    settings: Settings, engine: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ServiceError("It cannot be read.")

    assert engine
    reader = WindowReader(settings)
    send(settings, settings.topics.quality_windows, msgspec.json.encode(window(1_750_000_000_000, 1)))
    until(lambda: [each.clicks for each in reader.read()] == [1])
    with monkeypatch.context() as patched:
        patched.setattr(Tail, "new", fails)
        with pytest.raises(ServiceError, match="cannot be read"):
            reader.read()
    send(settings, settings.topics.quality_windows, msgspec.json.encode(window(1_750_000_060_000, 2)))
    until(lambda: [each.clicks for each in reader.read()] == [1, 2])
    reader.close()


def test_quality_s_group_is_there_once_it_has_run(settings: Settings, engine: Database) -> None:
    assert engine
    source = StoredSource(settings)
    assert source.look().quality is None
    send(settings, settings.topics.clicks, b"1", b"2")
    with clients.consumer(settings.kafka, settings.kafka.quality_group) as consumer:
        consumer.subscribe([settings.topics.clicks])
        until(lambda: consumer.poll(0.2))
        (mine,) = (each for each in consumer.position(consumer.assignment()) if each.offset > 0)
        consumer.commit(offsets=[TopicPartition(mine.topic, mine.partition, 1)], asynchronous=False)
        seen = source.look()
        assert seen.quality is not None
        assert seen.quality.offsets == 1
        assert {each.lag.topic for each in seen.quality.partitions if each.owner} == {settings.topics.clicks}
    source.close()


def test_where_the_page_cannot_be_served_it_says_so_before_anything_runs(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = settings.console.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(SettingsError, match=r"cannot be listened on .*in use.*: stop what does, or give another"):
            run_console(settings.model_copy(update={"console": where}))
