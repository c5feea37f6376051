"""How much each topic has taken."""

from collections.abc import Iterable
from typing import Any

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.topics import partition_counts

_ANSWER_SECONDS = 10.0
_UNTYPED: Any = OffsetSpec  # the stubs leave its constructors untyped


def end_offsets(settings: Settings, topics: Iterable[str]) -> dict[str, int]:
    """By topic, the sum over its partitions of the offset that the next record gets. Raises ServiceError."""
    return LogEnds(settings, topics).read()


class LogEnds:
    """Reads `end_offsets` again and again, over one connection."""

    def __init__(self, settings: Settings, topics: Iterable[str]) -> None:
        self._settings, self._topics = settings, list(topics)
        self._admin: AdminClient = clients.admin(settings.kafka)  # a client that is collected takes its answers along
        self._counts: dict[str, int] = {}

    def read(self) -> dict[str, int]:
        """Raises ServiceError when no broker answers or a topic does not exist."""
        self._counts = self._counts or partition_counts(self._settings, self._topics)
        latest = _UNTYPED.latest()
        wanted = {TopicPartition(topic, n): latest for topic, count in self._counts.items() for n in range(count)}
        ends = dict.fromkeys(self._counts, 0)
        try:
            for partition, future in self._admin.list_offsets(wanted, request_timeout=_ANSWER_SECONDS).items():
                ends[partition.topic] += future.result(_ANSWER_SECONDS + 1.0).offset
        except (KafkaException, TimeoutError) as error:
            # Perhaps the topics have changed, or the client has lost its brokers for good.
            self._counts, self._admin = {}, clients.admin(self._settings.kafka)
            raise ServiceError(f"Kafka does not tell the ends of its logs: {error}.") from None
        return ends
