"""The loop's main test on the oldest broker that is supported: shops still have 3.x."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from test_ingest import (
    Member,
    check,
    committed,
    ends,
    events_of,
    ledger,
    query,
    requests,
    send,
    shrunk,
    until,
)

from innerloop.config import Settings
from innerloop.streams import loop
from innerloop.worker import kafka_jars
from innerloop.worker.kafka_server import KafkaServer

OLD = "3.9.1"


@pytest.fixture(scope="module")
def old_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    server = KafkaServer(Path(tmp_path_factory.mktemp("old")) / "kafka", version=OLD, announce=lambda _line: None)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def old(settings: Settings, old_broker: KafkaServer) -> Settings:
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": old_broker.bootstrap_servers})
    return shrunk(settings.model_copy(update={"kafka": kafka}))


def test_the_loop_runs_on_the_oldest_broker(old: Settings, old_broker: KafkaServer) -> None:
    """Sets, requests, duplicates, a dead letter, a rebalance by the cooperative assignor and the offsets."""
    events = events_of(600)
    send(old, events[:300])
    send(old, events[:100])
    with Member(old) as first:
        first.caught_up()
        with Member(old) as second:
            until(lambda: len(first.owned) == len(second.owned) == 4, "each has its share")
            send(old, events[300:])
            first.caught_up()
        first.joined()
        until(lambda: first.error is not None or committed(old) == ends(old), "committed")
    check(old, events)
    assert committed(old) == ledger(old) == ends(old)
    assert requests(old)
    assert query(old, "SELECT count(*) FROM partition_ledger")[0][0] == 8
    assert OLD in (old_broker.folder / "kafka.log").read_text()


def test_the_consumer_protocol_on_a_broker_without_it_is_told(old: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """librdkafka itself says nothing, and would try for ever."""
    monkeypatch.setattr(loop, "_JOIN_SECONDS", 1.0)
    kafka = old.kafka.model_copy(update={"properties": {}, "group_protocol": "consumer"})
    with capture_logs() as lines, Member(old.model_copy(update={"kafka": kafka})):
        until(lambda: any(line["event"] == "not in its group" for line in lines), "told")
    [line] = [line for line in lines if line["event"] == "not in its group"]
    assert "Kafka 4.0 or newer" in line["why"]


def test_a_version_is_chosen_by_its_first_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, chosen in (("3.9", OLD), (OLD, OLD), ("4", "4.3.0"), ("3", OLD), ("4.30", "4.30")):
        monkeypatch.setenv("INNERLOOP_KAFKA_VERSION", asked)
        assert kafka_jars.chosen_version() == chosen
