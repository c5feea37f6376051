"""Answers of the broker to commits, in an order that cannot be had of it at will."""

from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from innerloop.config import Settings
from innerloop.streams import clients
from innerloop.streams.commits import Commits
from innerloop.streams.topics import ensure_topics

REFUSED = KafkaError(KafkaError.REBALANCE_IN_PROGRESS)


class Group:
    """What one partition's offset is committed by, and is at the broker."""

    def __init__(self, consumer: Consumer, topic: str) -> None:
        self.consumer, self.partition, self.commits = consumer, (topic, 0), Commits()

    def commit(self, offset: int) -> None:
        self.commits.passed(self.partition, offset)
        self.commits.last(self.consumer)  # without waiting, as the loop does all the time

    def refuse(self, offset: int) -> None:
        """Tell of a refusal, and go on as the loop does."""
        self.commits.answered(REFUSED, [TopicPartition(*self.partition, offset)])
        self.commits.commit(self.consumer, wait=True)

    def set_back(self, offset: int) -> None:
        """As if the broker had taken no more."""
        self.consumer.commit(offsets=[TopicPartition(*self.partition, offset)], asynchronous=False)

    @property
    def committed(self) -> int:
        [place] = self.consumer.committed([TopicPartition(*self.partition)], timeout=10)
        return int(place.offset)


@pytest.fixture
def group(settings: Settings) -> Iterator[Group]:
    ensure_topics(settings)
    consumer = clients.consumer(settings.kafka, "a group")
    yield Group(consumer, settings.topics.clicks)
    consumer.close()


def test_a_refusal_that_comes_late_does_not_set_the_group_back(group: Group) -> None:
    """In a rebalance: a first commit is under way when a second is asked for, and only the first is refused."""
    group.commit(10)
    group.commit(20)
    group.refuse(10)
    assert group.committed == 20


def test_what_the_broker_refused_last_is_asked_for_again(group: Group) -> None:
    group.commit(10)
    group.commit(20)
    group.set_back(10)
    group.refuse(20)
    assert group.committed == 20


def test_what_was_another_s_meanwhile_is_not_ours_to_commit(group: Group) -> None:
    group.commit(20)
    group.set_back(10)
    group.commits.leaves([group.partition])
    group.refuse(20)
    assert group.committed == 10
