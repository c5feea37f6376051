import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from confluent_kafka import Producer, TopicPartition
from prometheus_client import REGISTRY

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.scores import AdaptationRequest
from innerloop.streams import clients, groups
from innerloop.streams.lag import LagReader, PartitionLag, group_lag
from innerloop.streams.topics import ensure_topics
from innerloop.worker import lag_watch
from innerloop.worker.gauges import LagGauges
from innerloop.worker.lag import show_lag
from innerloop.worker.lag_watch import LagWatch


def write(settings: Settings, topic: str, partition: int, ages: list[float]) -> None:
    """Records written `ages` seconds ago."""
    producer = clients.producer(settings.kafka)
    for age in ages:
        producer.produce(topic, b"{}", partition=partition, timestamp=int((time.time() - age) * 1000))
        producer.flush(10)


def commit(settings: Settings, group: str, topic: str, offsets: dict[int, int]) -> None:
    with clients.consumer(settings.kafka, group) as consumer:
        parts = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
        consumer.commit(offsets=parts, asynchronous=False)


def by_partition(lags: list[PartitionLag]) -> dict[tuple[str, int], PartitionLag]:
    return {(each.topic, each.partition): each for each in lags}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An age that cannot be read in time is unknown, which is right and not what is tested here."""
    monkeypatch.setattr("innerloop.streams.lag._READ_SECONDS", 15.0)


@pytest.fixture
def made(settings: Settings) -> Settings:
    ensure_topics(settings)
    return settings


def test_offsets_and_seconds_of_every_partition(made: Settings) -> None:
    group, clicks, purchases = made.kafka.ingest_group, *made.topics.events
    write(made, clicks, 0, [500, 400, 300])
    write(made, clicks, 1, [200, 100])
    write(made, purchases, 3, [50])
    commit(made, group, clicks, {0: 1, 1: 2})
    lags = by_partition(group_lag(made, group, made.topics.events))
    assert len(lags) == 8
    assert {each: lag.offsets for each, lag in lags.items() if lag.offsets} == {(clicks, 0): 2, (purchases, 3): 1}
    assert lags[clicks, 0].committed == 1
    assert lags[clicks, 0].end == 3
    assert lags[clicks, 0].seconds == pytest.approx(400, abs=10)
    assert lags[clicks, 1] == PartitionLag(group, clicks, 1, committed=2, end=2, offsets=0, seconds=0.0)
    assert lags[purchases, 3].committed is None
    assert lags[purchases, 3].seconds == pytest.approx(50, abs=10)


def test_a_reader_follows_commits_and_new_records(made: Settings) -> None:
    group, topic = made.kafka.adapt_group, made.topics.requests
    with LagReader(made) as reader:
        assert sum(each.offsets for each in reader.read(group, [topic])) == 0
        began = time.monotonic()
        write(made, topic, 2, [90, 60, 30])
        for committed, offsets, seconds in ((0, 3, 90), (1, 2, 60), (2, 1, 30), (3, 0, 0), (0, 3, 90)):
            commit(made, group, topic, {2: committed})
            lag = by_partition(reader.read(group, [topic]))[topic, 2]
            assert (lag.offsets, lag.committed) == (offsets, committed)
            most = seconds + time.monotonic() - began + 1 if seconds else 0
            assert lag.seconds is not None
            assert max(0, seconds - 1) <= lag.seconds <= most
        write(made, topic, 2, [0])
        assert by_partition(reader.read(group, [topic]))[topic, 2].offsets == 4


def test_what_the_broker_has_deleted_is_no_lag(made: Settings) -> None:
    group, topic = made.kafka.adapt_group, made.topics.requests
    write(made, topic, 0, [90, 60, 30])
    commit(made, group, topic, {0: 1})
    admin = clients.admin(made.kafka)
    [deleted] = admin.delete_records([TopicPartition(topic, 0, 2)]).values()
    deleted.result()
    lag = by_partition(group_lag(made, group, [topic]))[topic, 0]
    assert (lag.committed, lag.offsets) == (1, 1)
    assert lag.seconds == pytest.approx(30, abs=10)


def test_a_commit_beyond_the_end_is_no_negative_lag(made: Settings) -> None:
    commit(made, made.kafka.adapt_group, made.topics.requests, {0: 99})
    lag = by_partition(group_lag(made, made.kafka.adapt_group, [made.topics.requests]))[made.topics.requests, 0]
    assert (lag.offsets, lag.seconds) == (0, 0.0)


@contextmanager
def transaction(settings: Settings, topic: str) -> Iterator[Producer]:
    """What is written inside is followed by a mark, and is to be read when the block has ended."""
    producer = clients.producer(settings.kafka, transactional_id=f"{topic}.test")
    producer.init_transactions(30)
    producer.begin_transaction()
    yield producer
    producer.commit_transaction(30)


def marked(settings: Settings) -> None:
    """A record that is done with, and the mark behind it."""
    group, topic = settings.kafka.adapt_group, settings.topics.requests
    with transaction(settings, topic) as producer:
        producer.produce(topic, b"{}", partition=0, timestamp=int((time.time() - 80) * 1000))
    commit(settings, group, topic, {0: 1})


def test_behind_a_mark_of_a_transaction_nothing_waits_however_long_one_looks(made: Settings) -> None:
    group, topic = made.kafka.adapt_group, made.topics.requests
    marked(made)
    with LagReader(made) as reader:
        for _ in range(3):
            lag = by_partition(reader.read(group, [topic]))[topic, 0]
            assert (lag.offsets, lag.end) == (1, 2), "as Kafka's own tools count"
            assert lag.seconds == 0.0, "only what waits has an age"
            time.sleep(0.3)
        write(made, topic, 0, [40])
        lag = by_partition(reader.read(group, [topic]))[topic, 0]
        assert lag.offsets == 2
        assert lag.seconds == pytest.approx(40, abs=10)


def test_a_mark_of_a_transaction_neither_stalls_nor_stops_a_partition(made: Settings) -> None:
    marked(made)
    with LagReader(made) as reader:
        watch = LagWatch(made, reader)
        for _ in range(3):
            _, adapt = watch.look()
            assert (adapt.status, adapt.seconds, adapt.catch_up_seconds) == ("ok", 0.0, 0.0)
            time.sleep(0.2)
        write(made, made.topics.requests, 0, [40])
        _, adapt = watch.look()
        assert adapt.partitions[0].lag.offsets == 2


def test_in_a_transaction_that_is_open_it_is_not_known_what_waits(made: Settings) -> None:
    group, topic = made.kafka.adapt_group, made.topics.requests
    with LagReader(made) as reader:
        with transaction(made, topic) as producer:
            producer.produce(topic, b"{}", partition=0, timestamp=int((time.time() - 80) * 1000))
            producer.flush(10)
            lag = by_partition(reader.read(group, [topic]))[topic, 0]
            assert (lag.offsets, lag.seconds) == (1, None)
        lag = by_partition(reader.read(group, [topic]))[topic, 0]
        assert lag.seconds == pytest.approx(80, abs=10)


def test_a_record_that_waits_has_an_age_whatever_its_clock_says(made: Settings) -> None:
    group, topic = made.kafka.ingest_group, made.topics.clicks
    write(made, topic, 0, [-3_600])
    lag = by_partition(group_lag(made, group, [topic]))[topic, 0]
    assert lag.seconds is not None
    assert 0.0 < lag.seconds < 1.0


def test_a_record_without_a_time_is_of_unknown_age(made: Settings) -> None:
    group, topic = made.kafka.ingest_group, made.topics.clicks
    producer = clients.producer(made.kafka)
    producer.produce(topic, b"{}", partition=0, timestamp=-1)
    producer.flush(10)
    lag = by_partition(group_lag(made, group, [topic]))[topic, 0]
    assert (lag.offsets, lag.seconds) == (1, None)
    with LagReader(made) as reader:
        ingest, _ = LagWatch(made, reader).look()
    assert ingest.offsets == 1
    assert math.isnan(ingest.seconds), "unknown, which is not 0"


def test_adapt_s_lag_in_seconds_is_the_age_of_the_oldest_event_not_yet_scored(made: Settings) -> None:
    """Its request is younger: it has waited for ingest before. What the gauge shows is that."""
    group, topic = made.kafka.adapt_group, made.topics.requests
    began, now = time.monotonic(), int(time.time() * 1000)
    producer = clients.producer(made.kafka)
    for appended_at in (now - 300_000, now - 200_000, 0):
        request = AdaptationRequest("u", 1, now, now, appended_at)
        producer.produce(topic, msgspec.json.encode(request), partition=1, timestamp=now - 20_000)
        producer.flush(10)
    gauges = LagGauges(group, [topic], owned=None)
    where = {"group": group, "topic": topic, "partition": "1"}
    with LagReader(made) as reader:
        for committed, offsets, seconds in ((0, 3, 300), (1, 2, 200), (2, 1, 20), (3, 0, 0)):
            commit(made, group, topic, {1: committed})
            gauges.look(reader)
            assert REGISTRY.get_sample_value("innerloop_lag_offsets", where) == offsets
            found, most = REGISTRY.get_sample_value("innerloop_lag_seconds", where), time.monotonic() - began + 1
            assert found is not None
            assert max(0, seconds - 1) <= found <= (seconds + most if seconds else 0)


@pytest.mark.usefixtures("kip_848")
def test_lag_of_a_group_of_the_consumer_protocol_while_it_works_and_when_it_has_left(made: Settings) -> None:
    settings = made.model_copy(update={"kafka": made.kafka.model_copy(update={"group_protocol": "consumer"})})
    group, topic = settings.kafka.ingest_group, settings.topics.clicks
    write(settings, topic, 0, [90, 60, 30])
    with LagReader(settings) as reader:
        with clients.consumer(settings.kafka, group) as member:
            member.subscribe([topic])
            until = time.monotonic() + 60
            while (message := member.poll(1.0)) is None:
                assert time.monotonic() < until
            member.commit(message=message, asynchronous=False)
            lag = by_partition(reader.read(group, [topic]))[topic, 0]
            assert (lag.committed, lag.offsets) == (1, 2)
            assert lag.seconds == pytest.approx(60, abs=20)
            assert len(member.assignment()) == 4, "who looks takes nothing away"
        lag = by_partition(reader.read(group, [topic]))[topic, 0]
        assert (lag.committed, lag.offsets) == (1, 2)


def test_a_second_look_is_cheap(made: Settings) -> None:
    group, topic = made.kafka.ingest_group, made.topics.clicks
    for partition in range(4):
        write(made, topic, partition, [60])
    with LagReader(made) as reader:
        reader.read(group, made.topics.events)
        began = time.monotonic()
        for _ in range(10):
            reader.read(group, made.topics.events)
        assert (time.monotonic() - began) / 10 < 0.5


def test_lag_is_shown_as_a_table_and_as_json(
    made: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    write(made, made.topics.clicks, 0, [30] * 3)
    assert show_lag(made) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("seconds", "none yet", made.topics.clicks))
    assert show_lag(made, as_json=True) == 0
    lags = json.loads(capsys.readouterr().out)
    assert len(lags) == made.topics.partitions * (len(made.topics.ingested) + 1)
    assert sum(each["offsets"] for each in lags) == 3
    assert {each["group"] for each in lags} == {made.kafka.ingest_group, made.kafka.adapt_group}
    assert {each["status"] for each in lags if each["offsets"]} == {"stopped"}, "nobody runs"
    assert {each["status"] for each in lags if not each["offsets"]} == {"ok"}
    assert all(each["catch_up_seconds"] is None for each in lags if each["offsets"]), "never"


def test_quality_s_group_is_listed_where_it_exists(made: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    group = made.kafka.quality_group
    write(made, made.topics.clicks, 0, [70] * 2)

    def listed() -> list[dict[str, object]]:
        assert show_lag(made, as_json=True) == 0
        return [each for each in json.loads(capsys.readouterr().out) if each["group"] == group]

    assert not listed()
    commit(made, group, made.topics.clicks, {0: 1})
    found = {(each["topic"], each["partition"]): each for each in listed()}
    topics = made.topics
    assert {topic for topic, _ in found} == {*topics.events, topics.recommendations, topics.ads}
    assert found[topics.clicks, 0]["offsets"] == 1


def test_a_group_that_cannot_be_asked_is_not_nobody_s(made: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    group, topic = made.kafka.adapt_group, made.topics.requests
    unreachable = made.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    with monkeypatch.context() as patch:
        patch.setattr(groups, "_ANSWER_SECONDS", 1.0)
        assert groups.described(clients.admin(unreachable), group) is None
    assert groups.described(clients.admin(made.kafka), "never there") == groups.Group(exists=False, owners={})
    write(made, topic, 0, [30])
    with LagReader(made) as reader:
        watch = LagWatch(made, reader)
        with monkeypatch.context() as patch:
            patch.setattr(lag_watch, "described", lambda *_: None)
            watch.look()
            _, adapt = watch.look()
            assert adapt.partitions[0].owner == "unknown"
            assert adapt.status == "stalled"
        _, adapt = watch.look()
        assert (adapt.partitions[0].owner, adapt.status) == (None, "stopped")
        with monkeypatch.context() as patch:
            patch.setattr(lag_watch, "described", lambda *_: None)
            _, adapt = watch.look()
            assert (adapt.partitions[0].owner, adapt.status) == (None, "stopped"), "as when it was last asked"


def test_a_missing_topic_is_a_sentence(settings: Settings) -> None:
    with pytest.raises(ServiceError, match=r"do not exist: run `innerloop topics`\."):
        group_lag(settings, "any", settings.topics.events)
