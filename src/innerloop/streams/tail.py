"""The newest records of a small topic, or all that a compacted one holds, and then each new one as it comes."""

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.batch import Record, record_of
from innerloop.streams.lost_brokers import BrokerCheck
from innerloop.streams.topics import partition_counts

_ANSWER_SECONDS = 5.0


class Tail:
    """Reads a topic from at most `last` records of each partition on, without `last` from its oldest record.

    Raises ServiceError without topic, broker or the right to read.
    """

    def __init__(self, settings: Settings, topic: str, *, last: int | None = None) -> None:
        count, self._topic = partition_counts(settings, [topic])[topic], topic
        self._consumer = clients.consumer(
            settings.kafka,
            "innerloop-tail",  # a name: it neither joins nor commits
            queued_max_messages_kbytes=8_192,
            enable_partition_eof=True,
        )
        self._brokers = BrokerCheck(settings.kafka, topic)
        self._behind = set(range(count))
        try:
            self._consumer.assign([self._place(number, last) for number in range(count)])
        except BaseException:
            self._consumer.close()
            raise

    def _place(self, number: int, last: int | None) -> TopicPartition:
        place = TopicPartition(self._topic, number)
        try:
            low, high = self._consumer.get_watermark_offsets(place, _ANSWER_SECONDS)
        except KafkaException as error:
            raise ServiceError(f"Kafka does not say where {self._topic} ends: {error.args[0].str()}.") from None
        return TopicPartition(self._topic, number, low if last is None else max(low, high - last))

    @property
    def current(self) -> bool:
        """Whether `new` has been at the end of every partition: where that is, offsets don't tell after compaction."""
        return not self._behind

    def new(self, most: int, seconds: float = 0.0) -> list[Record]:
        """At most so many records of those that came since the last call, in order within each partition.

        Waits up to `seconds` for that many. Raises ServiceError when the topic can no longer be read: open another.
        """
        records = []
        messages = self._consumer.consume(most, seconds)
        if messages:
            self._brokers.heard()
        elif self._brokers.lost(self._consumer):
            raise ServiceError(f"The reader of {self._topic} has lost its brokers.")
        for message in messages:
            error = message.error()
            if error is None:
                records.append(record_of(message))
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own name
                self._behind.discard(message.partition() or 0)
            elif error.code() in clients.HOPELESS:
                raise ServiceError(clients.unreadable(self._topic, error))
        return records

    def close(self) -> None:
        self._consumer.close()
