"""Clients that have lost every broker for good: that it is noticed, and what is done about it.

librdkafka loses its brokers in a race of milliseconds with a broker that stops (see `streams.lost_brokers`): one test
provokes it on a broker of its own. What follows is tested by taking a client for lost that is not, which asks more of
the code: the old client is still at work.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from structlog.testing import capture_logs
from test_client import scores
from test_ingest import Member, check, events_of, send, shrunk, until

from innerloop.client import ScoreReader
from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.streams import clients, lag, lost_brokers, publisher
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import LagReader
from innerloop.streams.lost_brokers import Client, has_lost_brokers
from innerloop.streams.publisher import Publisher
from innerloop.streams.tail import Tail
from innerloop.streams.topics import ensure_topics
from innerloop.streams.watch import OutputWatch, Stranger, owner_headers
from innerloop.worker.servers.kafka import KafkaServer

PROVOKED_SECONDS, PRODUCERS = 200, 12


@contextmanager
def asking(those: list[Producer], topic: str) -> Iterator[None]:
    """Ask for the cluster all the time, so that the broker's last answers are among them."""
    done = threading.Event()

    def ask(producer: Producer) -> None:
        while not done.is_set():
            try:
                producer.list_topics(topic, timeout=0.3)
            except KafkaException:
                time.sleep(0.01)

    threads = [threading.Thread(target=ask, args=(each,), daemon=True) for each in those]
    for thread in threads:
        thread.start()
    try:
        yield
        time.sleep(0.2)
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def own(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, KafkaServer]]:
    """A broker of its own that makes every topic it is asked for, and has none yet."""
    kafka = KafkaServer(
        tmp_path_factory.mktemp("own") / "kafka",
        announce=lambda _line: None,
        properties={"auto.create.topics.enable": "true"},
    )
    kafka.start()
    its = settings.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers})
    try:
        yield settings.model_copy(update={"kafka": its}), kafka
    finally:
        kafka.stop()


@pytest.mark.timeout(300)
def test_a_lost_client_is_told_from_one_that_waits(own: tuple[Settings, KafkaServer]) -> None:
    settings, kafka = own
    ensure_topics(settings)
    lost = _provoked(settings, kafka)
    waiting = clients.producer(settings.kafka)

    def is_lost(client: Client) -> bool:
        return has_lost_brokers(client, settings.kafka, settings.topics.clicks)

    assert not is_lost(waiting)
    assert all(map(is_lost, lost))
    kafka.stop()
    assert not any(map(is_lost, (*lost, waiting)))
    kafka.start()
    assert not is_lost(waiting)
    for each in lost:
        each.produce(settings.topics.clicks, b"kept")
        assert each.flush(3) == 1


def _provoked(settings: Settings, kafka: KafkaServer) -> list[Producer]:
    """Producers that have lost the broker, out of a dozen that asked it while it stopped, again and again."""
    topic = settings.topics.clicks
    until = time.monotonic() + PROVOKED_SECONDS  # who is asked in the right millisecond is rare on a busy machine
    while time.monotonic() < until:
        producers = [clients.producer(settings.kafka) for _ in range(PRODUCERS)]
        for each in producers:
            each.produce(topic, b"x")
            assert each.flush(20) == 0
        with asking(producers, topic):
            time.sleep(0.5)
            kafka.stop()
        kafka.start()
        lost = [each for each in producers if has_lost_brokers(each, settings.kafka, topic)]
        if lost:
            return lost
    pytest.fail(f"no producer was lost in {PROVOKED_SECONDS} s: does librdkafka mend itself now?")


def of_each_kind(settings: Settings) -> list[Client]:
    return [
        clients.producer(settings.kafka),
        clients.consumer(settings.kafka, "group"),
        clients.admin(settings.kafka),
    ]


def test_a_topic_that_is_asked_for_is_not_made(own: tuple[Settings, KafkaServer]) -> None:
    settings, _ = own
    for each in of_each_kind(settings):
        assert not has_lost_brokers(each, settings.kafka, "missing")
    # Without the setting of ours the same question makes it.
    careless = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    assert not has_lost_brokers(careless, settings.kafka, "made")
    until(lambda: "made" in topics_of(settings), "the broker makes no topics")
    assert "missing" not in topics_of(settings)


def topics_of(settings: Settings) -> set[str]:
    return set(clients.admin(settings.kafka).list_topics(timeout=10).topics)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The topics that new clients ask for, None for all."""
    those: list[str | None] = []

    def noting(kind: Any) -> Any:
        def list_topics(self: Any, topic: str | None = None, timeout: float = -1.0) -> Any:
            those.append(topic)
            return kind.list_topics(self, topic, timeout=timeout)

        return type(kind.__name__, (kind,), {"list_topics": list_topics})

    for kind in (Producer, Consumer, AdminClient):
        monkeypatch.setattr(clients, kind.__name__, noting(kind))
    return those


def test_one_topic_is_asked_for(settings: Settings, asked: list[str | None]) -> None:
    for each in of_each_kind(settings):
        assert not has_lost_brokers(each, settings.kafka, settings.topics.clicks)
    assert asked == [settings.topics.clicks] * 3


def test_a_new_client_is_asked_for_one_topic(settings: Settings, asked: list[str | None]) -> None:
    away = settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    assert not has_lost_brokers(clients.consumer(away, "group"), away, settings.topics.clicks)
    assert asked == [settings.topics.clicks] * 2


# --- what is done about it


@pytest.fixture
def small(settings: Settings) -> Settings:
    ensure_topics(settings)
    return shrunk(settings)


@pytest.fixture
def taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Clients put in here are taken for lost."""
    those: list[object] = []

    def lost(client: Client, _settings: object, _topic: str) -> bool:
        return any(client is each for each in those)

    for module in (lost_brokers, publisher, lag):
        monkeypatch.setattr(module, "has_lost_brokers", lost)
    monkeypatch.setattr(lost_brokers, "_PATIENCE_SECONDS", 0.5)
    return those


def passes(what: Callable[[], object]) -> bool:
    try:
        what()
    except (RetryError, ServiceError):
        return False
    return True


def test_what_a_lost_producer_held_is_sent_again(small: Settings, taken_for_lost: list[object]) -> None:
    sender = Publisher(small.kafka, linger_ms=60_000)  # so that nothing has left when it is asked for
    lost = sender._producer
    taken_for_lost.append(lost)
    sender.send(small.topics.requests, "u", b"first")
    with pytest.raises(RetryError, match="has not taken 1 record"):
        sender.flush(0)
    assert sender._producer is not lost
    sender.flush(0)
    sender.send(small.topics.requests, "u", b"again")
    sender.flush(10)
    tail = Tail(small, small.topics.requests)
    values: list[bytes | None] = []

    def arrived() -> bool:
        values.extend(record.value for record in tail.new(100, 0.2))
        return b"again" in values

    until(arrived, "nothing arrived")
    tail.close()


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_with_another_consumer_goes_on(
    small: Settings, taken_for_lost: list[object], protocol: str, request: pytest.FixtureRequest
) -> None:
    if protocol == "consumer":
        request.getfixturevalue("kip_848")
    own = {} if protocol == "consumer" else small.kafka.properties
    kafka = small.kafka.model_copy(update={"group_protocol": protocol, "properties": own})
    settings, events = small.model_copy(update={"kafka": kafka}), events_of(600)
    with capture_logs() as logs, Member(settings) as member:
        member.joined()
        send(settings, events[:300])
        member.caught_up()
        lost = member.loop._consumer
        taken_for_lost.append(lost)
        until(lambda: member.loop._consumer is not lost, "it stays with a lost consumer")
        member.joined()
        send(settings, events[300:])
        member.caught_up()
        assert members_with_partitions(settings.kafka, settings.kafka.ingest_group) == 1
    assert [each["event"] for each in logs].count("consumer made anew") == 1
    check(settings, events)


def test_a_member_of_a_quiet_topic_keeps_its_consumer_and_asks_for_one_of_its_topics(
    small: Settings, monkeypatch: pytest.MonkeyPatch, asked: list[str | None]
) -> None:
    monkeypatch.setattr(lost_brokers, "_PATIENCE_SECONDS", 0.1)
    with Member(small) as member:
        member.joined()
        consumer = member.loop._consumer
        time.sleep(2)
        assert member.loop._consumer is consumer
        until(lambda: bool(asked), "it does not ask")
        assert set(asked) == {small.topics.events[0]}


def test_a_watch_whose_next_consumer_is_lost_before_it_watches_takes_a_third(
    small: Settings, taken_for_lost: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = list(range(small.topics.partitions))
    watch = OutputWatch(small.kafka, group="watch", topics=[small.topics.recommendations])
    until(lambda: passes(lambda: watch.start(numbers)), "it cannot be watched")  # a young broker has no coordinator yet
    taken_for_lost.append(watch._consumer)
    start = OutputWatch.start

    def fails_once(self: OutputWatch, partitions: list[int]) -> None:
        if self._consumer not in taken_for_lost and len(taken_for_lost) == 1:
            taken_for_lost.append(self._consumer)
        if self._consumer in taken_for_lost:
            raise RetryError("no broker")
        start(self, partitions)

    monkeypatch.setattr(OutputWatch, "start", fails_once)

    def watched() -> list[int]:
        passes(lambda: watch.strangers({}))
        return sorted(place.partition for place in watch._consumer.assignment())

    until(lambda: watched() == numbers and watch._consumer not in taken_for_lost, "it stays with a lost one")
    assert len(taken_for_lost) == 2
    watch.close()


def test_a_watch_with_another_consumer_sees_the_next_stranger(small: Settings, taken_for_lost: list[object]) -> None:
    topics, numbers = [small.topics.recommendations, small.topics.ads], list(range(small.topics.partitions))
    watch = OutputWatch(small.kafka, group="watch", topics=topics)
    until(lambda: passes(lambda: watch.start(numbers)), "it cannot be watched")  # a young broker has no coordinator yet
    lost = watch._consumer
    taken_for_lost.append(lost)
    epochs, found = dict.fromkeys(numbers, 2), dict[str, Stranger]()
    until(lambda: not watch.strangers(epochs) and watch._consumer is not lost, "it stays with a lost consumer")
    sender = Publisher(small.kafka)
    sender.send(topics[0], "u", b"{}", headers=owner_headers(1))
    sender.flush(10)
    until(lambda: found.update(watch.strangers(epochs)) or bool(found), "the stranger is not seen")
    assert found.keys() == {"u"}
    watch.close()


def test_lag_is_told_by_other_clients(small: Settings, taken_for_lost: list[object]) -> None:
    send(small, events_of(10))
    with LagReader(small) as reader:
        before = reader.read("group", small.topics.events)
        taken_for_lost += [reader.admin, reader._consumer, *reader._of_groups.values()]
        reader._renew_what_is_lost()
        assert reader.admin is not taken_for_lost[0]
        assert reader._consumer is not taken_for_lost[1]
        after = reader.read("group", small.topics.events)
    assert [each.offsets for each in after] == [each.offsets for each in before]
    assert all(each.seconds is not None for each in after)


@pytest.mark.parametrize("group", [None, "shop"])
def test_a_reader_of_scores_goes_on(small: Settings, taken_for_lost: list[object], group: str | None) -> None:
    sender, topic = Publisher(small.kafka), small.topics.recommendations
    sender.send(topic, "u", msgspec.json.encode(scores("u", 1)))
    sender.flush(10)
    with ScoreReader(small, "recommendations", group=group) as reader:
        until(lambda: reader.refresh(0.2) > 0, "the first list is not seen")
        lost = reader._consumer
        taken_for_lost.append(lost)
        until(lambda: reader.refresh(0.2) == 0 and reader._consumer is not lost, "it stays with a lost consumer")
        sender.send(topic, "u", msgspec.json.encode(scores("u", 2)))
        sender.flush(10)
        until(lambda: reader.refresh(0.2) >= 0 and newest_version(reader) == 2, "the next list is not seen")


def newest_version(reader: ScoreReader) -> int:
    record = reader.get("u")
    return record.support_version if record else 0
