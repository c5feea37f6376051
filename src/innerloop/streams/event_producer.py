"""Sending events as a shop would: keyed by user, each kind on its topic, as fast as the broker takes them."""

from confluent_kafka import KafkaError, KafkaException, Message

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.events import IMPRESSION
from innerloop.streams import clients

_POLL_EVERY = 1_000


class EventProducer:
    """Sends encoded events; nothing is dropped: what a full queue does not take is tried until it does.

    `sent` counts what was handed to Kafka, `failed` what Kafka gave back; `finish` waits and tells.
    """

    def __init__(self, settings: Settings) -> None:
        self._producer = clients.producer(settings.kafka, self._failed, linger_ms=2)
        topics = settings.topics
        self._clicks = topics.clicks
        self._own_topics = {"purchase": topics.purchases, IMPRESSION: topics.impressions}
        self.sent = 0
        self.failed = 0
        self._why = ""

    def send(self, user_id: str, event_type: str, payload: bytes, timestamp_ms: int = 0) -> None:
        """Hand one event to Kafka; `timestamp_ms` (epoch) is the record's time, 0 the time of sending."""
        topic = self._own_topics.get(event_type, self._clicks)
        while True:
            try:
                self._producer.produce(topic, payload, user_id, timestamp=timestamp_ms)
            except BufferError:
                self._producer.poll(0.01)
            except KafkaException as error:  # refused before it was queued: too large, topic not known
                self._failed(error.args[0])
                break
            else:
                break
        self.sent += 1
        if self.sent % _POLL_EVERY == 0:
            self._producer.poll(0)

    def finish(self, seconds: float = 60.0) -> None:
        """Wait until everything sent is at the broker; raises ServiceError when some of it is not."""
        left = self._producer.flush(seconds)
        if left:
            raise ServiceError(f"{left} of {self.sent} events are not at the broker after {seconds:.0f} s.")
        if self.failed:
            raise ServiceError(f"{self.failed} of {self.sent} events were not delivered, the first: {self._why}.")

    def _failed(self, error: KafkaError | None, _message: Message | None = None) -> None:
        if error is None:
            return
        self._why = self._why or error.str().rstrip(".")
        self.failed += 1
