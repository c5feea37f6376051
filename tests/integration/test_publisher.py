"""What a producer's one promise is worth where the broker is slow, or has no such topic."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from structlog.testing import capture_logs

from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.streams import clients
from innerloop.streams.offsets import end_offsets
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.worker.servers.kafka import KafkaServer

T = TypeVar("T")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A broker that may be frozen."""
    server = KafkaServer(tmp_path_factory.mktemp("own") / "kafka", announce=lambda _line: None)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def own(settings: Settings, kafka: KafkaServer) -> Settings:
    at = settings.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers})
    settings = settings.model_copy(update={"kafka": at})
    topics = {name: catalogue()[name] for name in ("requests", "dead_letters")}
    once_let_in(lambda: ensure_topics(settings, topics))
    return settings


@contextmanager
def frozen(server: KafkaServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(0.2)  # until all of its threads have stopped
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def once_let_in(ask: Callable[[], T]) -> T:
    """What it answers; a broker that was frozen knows no controller before it is let in again, nor who asks it then."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask()
        except ServiceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def records(settings: Settings, topic: str) -> int:
    return once_let_in(lambda: sum(end_offsets(settings, [topic]).values()))


def sent_in_the_end(publisher: Publisher, topic: str) -> None:
    """As the loop does it: all of it again, until it has arrived."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        try:
            publisher.flush(0)
            publisher.send(topic, "u", b"{}")
            publisher.flush(5)
        except RetryError:
            time.sleep(0.1)
        else:
            return


def test_a_broker_that_is_slow_gets_more_time_each_time(own: Settings, kafka: KafkaServer) -> None:
    """With the same time each time, all would be sent again and again for as long as it is slow."""
    publisher, topic = Publisher(own.kafka), own.topics.requests
    for _ in range(2):  # the first takes long, as all first ones do
        publisher.send(topic, "u", b"{}")
        publisher.flush(30)
    publisher.flush(0.2)  # nothing waits: whatever the one before took, this took no time
    with frozen(kafka):
        publisher.send(topic, "u", b"{}")
        patience = [_patience(publisher, 0.2) for _ in range(3)]
        assert patience[0] == 0.2
        assert all(later >= 1.99 * earlier for earlier, later in itertools.pairwise(patience)), "of what it took"
        with pytest.raises(RetryError, match="for 0 s"):
            publisher.flush(0)
    publisher.flush(30)
    publisher.flush(0.2)
    with frozen(kafka):
        publisher.send(topic, "u", b"{}")
        with pytest.raises(RetryError, match=r"for 0\.2 s"):
            publisher.flush(0.2)
    publisher.flush(30)
    assert records(own, topic) == 4


def _patience(publisher: Publisher, seconds: float) -> float:
    """How long it says it has waited."""
    with pytest.raises(RetryError, match="has not taken 1 records for ") as error:
        publisher.flush(seconds)
    return float(str(error.value).split(" records for ")[1].split(" s")[0])


def test_a_log_that_lost_its_end_takes_records_again(own: Settings, kafka: KafkaServer) -> None:
    """An idempotent producer gives up for good where the broker does not know what it has confirmed."""
    publisher, topic = Publisher(own.kafka), own.topics.dead_letters
    for _ in range(10):
        publisher.send(topic, "u", b"{}")
        publisher.flush(30)
    os.kill(kafka.pid, signal.SIGKILL)
    kafka.stop()
    [log] = (kafka.folder / "data" / f"{topic}-0").glob("*.log")
    log.write_bytes(log.read_bytes()[: 12 + int.from_bytes(log.read_bytes()[8:12], "big")])  # one record batch
    kafka.start()
    with capture_logs() as lines:
        sent_in_the_end(publisher, topic)
    assert records(own, topic) >= 2
    assert "producer made anew" in {line["event"] for line in lines}


def refused(publisher: Publisher, topic: str) -> str:
    """What `send` says when it takes no record."""
    try:
        publisher.send(topic, "u", b"2")
    except RetryError as error:
        return str(error)
    return ""


def test_a_topic_that_was_deleted_is_waited_for(own: Settings) -> None:
    """Also when librdkafka knows that it is gone, half a minute later by default, and takes no record for it."""
    publisher, topic = Publisher(own.kafka, topic_metadata_propagation_max_ms=500), own.topics.dead_letters
    publisher.send(topic, "u", b"1")
    publisher.flush(30)
    admin = clients.admin(own.kafka)
    admin.delete_topics([topic])[topic].result()
    refused_at_once, deadline = 0, time.monotonic() + 30
    while refused_at_once < 3:
        assert time.monotonic() < deadline
        if refusal := refused(publisher, topic):
            assert f"{topic} did not take a record" in refusal
            refused_at_once += 1
        else:
            with pytest.raises(RetryError):
                publisher.flush(0.5)
    ensure_topics(own, {"dead_letters": catalogue()["dead_letters"]})
    sent_in_the_end(publisher, topic)
    assert records(own, topic) >= 1
