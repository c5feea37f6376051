import base64
import logging
import socket
import time

import pytest
from confluent_kafka.admin import NewTopic

from innerloop.config import KafkaSettings, Settings, TopicSettings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.topics import (
    NO_TOPIC_ID,
    catalogue,
    ensure_topics,
    partition_counts,
    require_topics,
    topic_differences,
    topic_ids,
)


def make(settings: Settings, name: str, partitions: int, **config: str) -> None:
    topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=config)
    admin = clients.admin(settings.kafka)  # a client that goes out of scope takes its requests along
    admin.create_topics([topic])[name].result()
    deadline = time.monotonic() + 10
    while name not in admin.list_topics(timeout=5).topics:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def absent_broker(settings: Settings) -> Settings:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return settings.model_copy(update={"kafka": KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}")})


def test_missing_topics_are_made_as_the_catalogue_says_and_only_once(settings: Settings) -> None:
    names = [getattr(settings.topics, field) for field in catalogue()]
    assert sorted(ensure_topics(settings)) == sorted(names)
    assert ensure_topics(settings) == []
    assert topic_differences(settings) == []
    counts = partition_counts(settings, names)
    assert counts == {getattr(settings.topics, f): t.partition_count(settings.topics) for f, t in catalogue().items()}


def test_an_existing_topic_stays_and_its_differences_are_told(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    make(settings, settings.topics.clicks, 1)
    make(settings, settings.topics.purchases, 9)
    make(settings, settings.topics.ads, 4, **{"cleanup.policy": "delete"})
    with caplog.at_level(logging.WARNING, "innerloop.streams.topics"):
        made = ensure_topics(settings)
    assert len(made) == len(catalogue()) - 3
    assert partition_counts(settings, settings.topics.events) == {
        settings.topics.clicks: 1,
        settings.topics.purchases: 9,
    }
    told = "\n".join(caplog.messages)
    assert f"{settings.topics.clicks} has 1 partitions, fewer than the 4" in told
    assert f"{settings.topics.purchases} has 9 partitions, more than the 4" in told
    assert f"{settings.topics.ads} has cleanup.policy=delete" in told
    assert len(caplog.messages) == 3


def test_a_refused_topic_is_a_sentence(settings: Settings) -> None:
    too_many = TopicSettings(**{**settings.topics.model_dump(), "replication_factor": 3})
    with pytest.raises(ServiceError, match=r"refuses to make topic .*replication factor"):
        ensure_topics(settings.model_copy(update={"topics": too_many}))


def test_missing_topics_are_named_and_not_made_by_asking(settings: Settings) -> None:
    make(settings, settings.topics.clicks, 1)
    with pytest.raises(ServiceError) as raised:
        require_topics(settings, [settings.topics.clicks, settings.topics.ads, settings.topics.requests])
    expected = f"Topics {settings.topics.ads}, {settings.topics.requests} do not exist: run `innerloop topics`."
    assert str(raised.value) == expected
    with pytest.raises(ServiceError, match=f"Topic {settings.topics.ads} does not exist"):
        require_topics(settings, [settings.topics.ads])
    assert settings.topics.ads not in clients.admin(settings.kafka).list_topics(timeout=5).topics
    require_topics(settings, [settings.topics.clicks])
    require_topics(settings, [])


def test_a_topic_made_again_has_another_id(settings: Settings) -> None:
    ensure_topics(settings)
    name = settings.topics.clicks
    first = topic_ids(settings, [name, settings.topics.purchases])
    assert len(set(first.values())) == 2
    assert NO_TOPIC_ID not in first.values()
    assert all(len(base64.urlsafe_b64decode(each + "==")) == 16 for each in first.values())
    admin = clients.admin(settings.kafka)
    admin.delete_topics([name])[name].result()
    while name in admin.list_topics(timeout=5).topics:
        time.sleep(0.01)
    ensure_topics(settings)
    assert topic_ids(settings, [name])[name] != first[name]


def test_no_broker_is_a_sentence_with_its_address(settings: Settings) -> None:
    away = absent_broker(settings)
    with pytest.raises(ServiceError, match=f"No Kafka broker answers at {away.kafka.bootstrap_servers}"):
        require_topics(away, ["any"])
