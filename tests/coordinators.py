"""Waiting for a broker that has just started."""

import time

from confluent_kafka import KafkaException, TopicPartition

from innerloop.config import Settings
from innerloop.streams import clients


def await_coordinators(settings: Settings, seconds: float = 60.0) -> None:
    """While a new broker's coordinators load, librdkafka's admin client crashes over a group's offsets (its #5040)."""
    deadline = time.monotonic() + seconds
    for group in (settings.kafka.ingest_group, settings.kafka.adapt_group, settings.kafka.quality_group):
        with clients.consumer(settings.kafka, group) as consumer:
            while True:
                try:
                    consumer.committed([TopicPartition(settings.topics.clicks, 0)], 10.0)
                    break
                except KafkaException:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
