"""The loop from events to scores, on the oldest broker that is supported as on the newest: shops still have 3.x."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from test_erasure import World, _threads_stop, running, world  # noqa: F401 - fixtures among them
from test_ingest import (
    Member,
    check,
    committed,
    ends,
    events_of,
    ledger,
    on_one_topic,
    query,
    requests,
    send,
    shrunk,
    until,
)

from innerloop.client import ScoreReader
from innerloop.config import Settings
from innerloop.evaluation.judge.evidence import gathered, rules_of
from innerloop.evaluation.judge.verdict import judge
from innerloop.store import items
from innerloop.streams import clients, loop
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers import kafka_jars
from innerloop.worker.servers.kafka import KafkaServer

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


@pytest.mark.parametrize("version", [OLD, None], ids=str)
def test_events_become_scores_and_what_is_bad_a_dead_letter(
    world: World,  # noqa: F811
    version: str | None,
    request: pytest.FixtureRequest,
) -> None:
    """The whole way, as the judge sees it, and as a service reads it. None: the version that all tests run on."""
    settings = world.settings
    if version is not None:
        server: KafkaServer = request.getfixturevalue("old_broker")
        kafka = settings.kafka.model_copy(update={"bootstrap_servers": server.bootstrap_servers})
        settings = settings.model_copy(update={"kafka": kafka})
        ensure_topics(settings)
        world = replace(world, settings=settings)
    events = events_of(300)
    # Known from the start: a list made again of the same set has the items that came meanwhile, too.
    items.ItemNumbers(world.engine).intern(sorted({event["item_id"] for event in events}), {})
    send(settings, events[:200])
    send(settings, events[:50])
    producer = clients.producer(settings.kafka)
    producer.produce(settings.topics.clicks, b"{", "u0", headers=[("trace", b"1")])
    assert producer.flush(30) == 0
    with running(world, "ingest", "adapt") as threads:
        world.caught_up(*threads)
        send(settings, events[200:])
        world.caught_up(*threads)
    verdict = judge(gathered(settings, world.engine), rules_of(settings))
    assert verdict.findings == []
    assert (verdict.counts["records"], verdict.counts["dead_lettered"]) == (351, 1)
    assert verdict.counts["duplicate"] == 50
    users = world.sets().keys()
    with ScoreReader(settings) as reader:
        reader.wait_until_current(30)
        assert set(reader.users()) == users
        for user in users:
            record = reader.get(user)
            assert record is not None
            assert record.support_version == world.versions()[user]


def test_the_loop_runs_on_the_oldest_broker(old: Settings, old_broker: KafkaServer) -> None:
    """Sets, requests, duplicates, a rebalance by the cooperative assignor and the offsets."""
    events = events_of(600)
    events = [*events[:300], *on_one_topic(events[300:])]
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
    [why] = {line["why"] for line in lines if line["event"] == "not in its group"}
    assert "Kafka 4.0 or newer" in why


def test_a_version_is_chosen_by_its_first_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, chosen in (("3.9", OLD), (OLD, OLD), ("4", "4.3.0"), ("3", OLD), ("4.30", "4.30")):
        monkeypatch.setenv("INNERLOOP_KAFKA_VERSION", asked)
        assert kafka_jars.chosen_version() == chosen
