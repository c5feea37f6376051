"""How much each topic has taken."""

from collections.abc import Iterable

from confluent_kafka import TopicPartition
from confluent_kafka.admin import OffsetSpec

from innerloop.config import Settings
from innerloop.streams import clients
from innerloop.streams.topics import partition_counts


def end_offsets(settings: Settings, topics: Iterable[str]) -> dict[str, int]:
    """By topic, the sum over its partitions of the offset that the next record gets. Raises ServiceError."""
    counts = partition_counts(settings, topics)
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    wanted = {TopicPartition(topic, n): latest for topic, count in counts.items() for n in range(count)}
    ends = dict.fromkeys(counts, 0)
    admin = clients.admin(settings.kafka)  # held: a client that is collected takes its answers with it
    for partition, future in admin.list_offsets(wanted, request_timeout=10.0).items():
        ends[partition.topic] += future.result().offset
    return ends
