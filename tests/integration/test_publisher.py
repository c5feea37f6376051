"""What a producer's one promise is worth where the broker is slow, or has no such topic."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.streams import clients
from innerloop.streams.offsets import end_offsets
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.worker.servers.kafka import KafkaServer


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
    ensure_topics(settings, {name: catalogue()[name] for name in ("requests", "dead_letters")})
    return settings


@contextmanager
def frozen(server: KafkaServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(0.2)  # until all of its threads have stopped
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def records(settings: Settings, topic: str) -> int:
    deadline = time.monotonic() + 30
    while True:
        try:
            return sum(end_offsets(settings, [topic]).values())
        except ServiceError:  # a broker that was frozen has to be let in again
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
    with frozen(kafka):
        publisher.send(topic, "u", b"{}")
        for said in (r"for 0\.2 s", r"for 0\.4", r"for 0\.8"):
            with pytest.raises(RetryError, match=f"1 records {said}"):
                publisher.flush(0.2)
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
