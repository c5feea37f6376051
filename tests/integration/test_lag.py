import json
import time

import pytest
from confluent_kafka import TopicPartition

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.lag import LagReader, PartitionLag, group_lag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.lag import show_lag


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
        write(made, topic, 2, [90, 60, 30])
        for committed, offsets, seconds in ((0, 3, 90), (1, 2, 60), (2, 1, 30), (3, 0, 0), (0, 3, 90)):
            commit(made, group, topic, {2: committed})
            lag = by_partition(reader.read(group, [topic]))[topic, 2]
            assert (lag.offsets, lag.committed) == (offsets, committed)
            assert lag.seconds == pytest.approx(seconds, abs=10 if seconds else 0)
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


def test_marks_of_transactions_are_no_age(made: Settings) -> None:
    topic = made.topics.requests
    producer = clients.producer(made.kafka, transactional_id=f"{topic}.test")
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic, b"{}", partition=0, timestamp=int((time.time() - 80) * 1000))
    producer.commit_transaction(30)
    commit(made, made.kafka.adapt_group, topic, {0: 1})
    lag = by_partition(group_lag(made, made.kafka.adapt_group, [topic]))[topic, 0]
    assert lag.end == 2
    assert lag.seconds == pytest.approx(0, abs=2)


def test_a_second_look_is_cheap(made: Settings) -> None:
    group, topic = made.kafka.ingest_group, made.topics.clicks
    for partition in range(4):
        write(made, topic, partition, [60])
    with LagReader(made) as reader:
        reader.read(group, made.topics.events)
        began = time.monotonic()
        for _ in range(10):
            reader.read(group, made.topics.events)
        assert (time.monotonic() - began) / 10 < 0.1


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


def test_a_missing_topic_is_a_sentence(settings: Settings) -> None:
    with pytest.raises(ServiceError, match=r"do not exist: run `innerloop topics`\."):
        group_lag(settings, "any", settings.topics.events)
