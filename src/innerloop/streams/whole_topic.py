"""Reading a whole topic once, from its oldest record to its present end."""

import time
from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.streams import clients
from innerloop.streams.batch import Batch, Record
from innerloop.streams.partitions import Partition
from innerloop.streams.topics import partition_counts

_ANSWER_SECONDS = 10.0
_SILENT_SECONDS = 30.0
_AT_ONCE = 10_000


def whole_topic(settings: Settings, topic: str) -> Iterator[Record]:
    """Every record that the topic holds now, in offset order within each partition.

    The group is a name only: nothing is joined and nothing committed. Raises RetryError when the broker falls silent,
    ServiceError when the topic may not be read.
    """
    consumer = clients.consumer(settings.kafka, "innerloop-whole-topic", queued_min_messages=_AT_ONCE)
    try:
        ends = _open(consumer, topic, partition_counts(settings, [topic])[topic])
        yield from _until(consumer, ends)
    finally:
        consumer.close()


def committed_offsets(settings: Settings, group: str, topics: list[str]) -> dict[Partition, tuple[int, int]]:
    """By partition that has ever held a record: the group's committed offset, -1 for none, and the topic's end."""
    consumer = clients.consumer(settings.kafka, group)
    try:
        counts = partition_counts(settings, topics)
        wanted = [TopicPartition(topic, number) for topic in topics for number in range(counts[topic])]
        found = {}
        for place in consumer.committed(wanted, timeout=_ANSWER_SECONDS):
            _, end = consumer.get_watermark_offsets(place, timeout=_ANSWER_SECONDS)
            if end:
                found[place.topic, place.partition] = (max(place.offset, -1), end)
    except KafkaException as error:
        raise RetryError(f"The broker does not tell the committed offsets: {error.args[0].str()}") from error
    finally:
        consumer.close()
    return found


def _open(consumer: Consumer, topic: str, partitions: int) -> dict[int, int]:
    """Start reading; by partition that holds something the offset after its last record."""
    ends, starts = {}, []
    for number in range(partitions):
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=_ANSWER_SECONDS)
        except KafkaException as error:
            raise RetryError(f"Kafka does not say where {topic} ends: {error.args[0].str()}") from error
        if high > low:
            ends[number] = high
            starts.append(TopicPartition(topic, number, low))
    consumer.assign(starts)
    return ends


def _is_error(message: Message) -> bool:
    error = message.error()
    if error is not None and error.code() in clients.HOPELESS:
        raise ServiceError(clients.unreadable(message.topic() or "", error))
    return error is not None


def _until(consumer: Consumer, ends: dict[int, int]) -> Iterator[Record]:
    """Records up to `ends`: by position, since compaction leaves gaps."""
    heard = time.monotonic()
    while ends:
        messages = consumer.consume(_AT_ONCE, 0.5)
        if messages:
            heard = time.monotonic()
        elif time.monotonic() - heard > _SILENT_SECONDS:
            raise RetryError(f"The broker has sent nothing for {_SILENT_SECONDS:g} s; {len(ends)} partitions are left")
        batch = Batch([message for message in messages if not _is_error(message)])
        yield from (batch.record(position) for position in range(len(batch)))
        for place in consumer.position([TopicPartition(p.topic, p.partition) for p in consumer.assignment()]):
            if place.offset >= ends.get(place.partition, place.offset + 1):
                del ends[place.partition]
