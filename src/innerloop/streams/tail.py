"""The newest records of a small topic, and then each new one as it comes."""

from confluent_kafka import KafkaException, TopicPartition

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.topics import partition_counts

_ANSWER_SECONDS = 5.0


class Tail:
    """Reads a topic from at most `last` records of each partition on. Raises ServiceError without topic or broker."""

    def __init__(self, settings: Settings, topic: str, *, last: int) -> None:
        count, self._last = partition_counts(settings, [topic])[topic], last
        self._consumer = clients.consumer(settings.kafka, "innerloop-tail")  # a name: it neither joins nor commits
        places = []
        for number in range(count):
            try:
                low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, number), _ANSWER_SECONDS)
            except KafkaException as error:
                raise ServiceError(f"Kafka does not say where {topic} ends: {error.args[0].str()}.") from None
            places.append(TopicPartition(topic, number, max(low, high - last)))
        self._consumer.assign(places)

    def new(self) -> list[bytes]:
        """The values that came since the last call, in order within each partition; tombstones are left out."""
        messages = self._consumer.consume(self._last, 0.0)
        return [value for message in messages if message.error() is None and (value := message.value()) is not None]

    def close(self) -> None:
        self._consumer.close()
