"""Waiting for tombstones on the score topics."""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from confluent_kafka import Consumer, KafkaException, TopicPartition, murmur2

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.topics import partition_counts

_ANSWER_SECONDS = 10.0


class TombstoneWatch:
    """Sees the tombstones of some users that are written after this was made. Raises ServiceError without a broker."""

    def __init__(self, settings: Settings, users: Iterable[str]) -> None:
        self._topics = (settings.topics.recommendations, settings.topics.ads)
        counts = partition_counts(settings, self._topics)
        self._missing = {(topic, user.encode()) for user in users for topic in self._topics}
        wanted = {(topic, murmur2(user, counts[topic])) for topic, user in self._missing}
        self._consumer: Consumer = clients.consumer(settings.kafka, "innerloop-erase")  # neither joins nor commits
        try:
            self._consumer.assign([self._end(topic, number) for topic, number in sorted(wanted)])
        except KafkaException as error:
            self._consumer.close()
            raise ServiceError(f"The score topics cannot be read: {error.args[0].str().rstrip('.')}.") from None

    def _end(self, topic: str, number: int) -> TopicPartition:
        place = TopicPartition(topic, number)
        return TopicPartition(topic, number, self._consumer.get_watermark_offsets(place, _ANSWER_SECONDS)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def missing(self, seconds: float) -> Sequence[str]:
        """Wait for all tombstones, at most so long; the topics that lack some."""
        deadline = time.monotonic() + seconds
        while self._missing and (left := deadline - time.monotonic()) > 0:
            message = self._consumer.poll(left)
            if message is not None and message.error() is None and message.value() is None:
                key = message.key()
                self._missing.discard((message.topic() or "", key if isinstance(key, bytes) else b""))
        return sorted({topic for topic, _ in self._missing})
