"""Partitions as the product names them, and as librdkafka does."""

from collections.abc import Iterable

from confluent_kafka import OFFSET_INVALID, TopicPartition

Partition = tuple[str, int]
"""A topic and the number of one of its partitions."""


def place(partition: Partition, offset: int = OFFSET_INVALID, epoch: int | None = None) -> TopicPartition:
    """An offset of a partition, and the epoch of the leader that took the record before it."""
    topic, number = partition
    if epoch is None:
        return TopicPartition(topic, number, offset)
    return TopicPartition(topic, number, offset, leader_epoch=epoch)


def places(partitions: Iterable[Partition]) -> list[TopicPartition]:
    """The partitions alone, without an offset."""
    return [place(each) for each in partitions]


def of_place(where: TopicPartition) -> Partition:
    """Which partition it is in: not by whose key, as `publisher.partition_of` tells."""
    return where.topic, where.partition


def name(partition: Partition) -> str:
    """As people read it, `events.click[3]`."""
    return f"{partition[0]}[{partition[1]}]"


def names(partitions: Iterable[Partition]) -> list[str]:
    """The name of each."""
    return [name(each) for each in partitions]
