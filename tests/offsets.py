"""Where topics end and where groups stand, for tests to ask."""

import time
from collections.abc import Sequence

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from innerloop.config import KafkaSettings
from innerloop.streams import clients

_SECONDS = 30.0
_STARTING = {KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS}


def log_ends(kafka: KafkaSettings, topics: Sequence[str], partitions: int) -> dict[tuple[str, int], int]:
    """Of the partitions that have ever had a record."""
    with clients.consumer(kafka, "reader") as consumer:
        places = [TopicPartition(topic, number) for topic in topics for number in range(partitions)]
        found = {(p.topic, p.partition): consumer.get_watermark_offsets(p, 10)[1] for p in places}
    return {place: end for place, end in found.items() if end}


def committed(kafka: KafkaSettings, group: str, topics: Sequence[str], partitions: int) -> dict[tuple[str, int], int]:
    """Of the partitions of which the group has done a record; asking makes nobody its member.

    A group whose coordinator is only just starting is asked about again.
    """
    places = [TopicPartition(topic, number) for topic in topics for number in range(partitions)]
    until = time.monotonic() + _SECONDS
    with clients.consumer(kafka, group) as consumer:
        while True:
            try:
                found = consumer.committed(places, timeout=10)
            except KafkaException as error:
                if error.args[0].code() not in _STARTING or time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return {(p.topic, p.partition): p.offset for p in found if p.offset > 0}
