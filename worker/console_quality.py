"""The windows that `innerloop quality` has closed, as they come."""

from collections.abc import Iterator

import msgspec
from confluent_kafka import TopicPartition

from innerloop.config import Settings
from innerloop.evaluation.quality_record import QualityWindow
from innerloop.streams import clients
from innerloop.streams.topics import partition_counts

KEPT = 200
"""Windows: more than an hour of them, a minute each."""
_ANSWER_SECONDS = 5.0


class WindowReader:
    """Reads the newest windows there are, and then each new one. Raises ServiceError without the topic."""

    def __init__(self, settings: Settings) -> None:
        topic = settings.topics.quality_windows
        counts = partition_counts(settings, [topic])
        self._consumer = clients.consumer(settings.kafka, "innerloop-console")  # a name: it neither joins nor commits
        places = []
        for number in range(counts[topic]):
            low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, number), _ANSWER_SECONDS)
            places.append(TopicPartition(topic, number, max(low, high - KEPT)))
        self._consumer.assign(places)
        self._decode = msgspec.json.Decoder(QualityWindow).decode

    def close(self) -> None:
        self._consumer.close()

    def new(self) -> Iterator[QualityWindow]:
        """Those that came since the last call; records of others are left out."""
        for message in self._consumer.consume(KEPT, 0.0):
            if message.error() is None:
                try:
                    yield self._decode(message.value() or b"")
                except msgspec.MsgspecError:
                    continue


def hit_rates(window: QualityWindow, k: int) -> dict[str, float]:
    """By arm with clicks, the share of them that was among the first `k`."""
    return {arm.arm: at.hit_rate for arm in window.arms if arm.clicks for at in arm.at if at.k == k}
