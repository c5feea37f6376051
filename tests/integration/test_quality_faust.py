"""What Faust does with a record whose handling fails or takes long: why nothing but quality may run on it.

A test here that fails on a newer Faust brings good news.
"""

import asyncio
import tempfile
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import faust
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewTopic
from faust.types import StreamT

from innerloop.config import KafkaSettings
from innerloop.streams import clients
from innerloop.worker.servers.services import Services

Agent = Callable[[StreamT[bytes]], Coroutine[Any, Any, None]]


class Topic:
    """A topic with one partition, and an app that reads it from its beginning."""

    def __init__(self, services: Services) -> None:
        self.kafka = KafkaSettings(bootstrap_servers=services.bootstrap_servers)
        self.name = f"faust.{uuid.uuid4().hex[:8]}"
        admin = clients.admin(self.kafka)
        admin.create_topics([NewTopic(self.name, 1, 1)])[self.name].result(10)

    def write(self, values: int) -> None:
        producer = clients.producer(self.kafka)
        for number in range(values):
            producer.produce(self.name, str(number))
        assert producer.flush(10) == 0

    def read(self, body: Agent, enough: Callable[[], bool], *, concurrency: int = 1, commit_first: int = 0) -> None:
        """Run an agent until it is enough and what was acknowledged is committed."""

        async def run() -> None:
            app = self._app()
            app.agent(app.topic(self.name, value_serializer="raw"), concurrency=concurrency)(body)
            await app.start()
            try:
                async with asyncio.timeout(30):
                    while not enough():  # noqa: ASYNC110 - the bodies append to lists
                        await asyncio.sleep(0.05)
                await app.consumer.commit()
            finally:
                app.consumer.stop_flow()
                await app.stop()

        if commit_first:
            self.commit(commit_first)
        asyncio.run(run())

    def _app(self) -> faust.App:
        return faust.App(
            self.name,
            broker=f"kafka://{self.kafka.bootstrap_servers}",
            store="memory://",
            datadir=Path(tempfile.gettempdir()) / self.name,
            consumer_auto_offset_reset="earliest",
            broker_commit_interval=3_600.0,
            topic_disable_leader=True,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            web_enabled=False,
        )

    def commit(self, offset: int) -> None:
        with clients.consumer(self.kafka, self.name) as consumer:
            consumer.commit(offsets=[TopicPartition(self.name, 0, offset)], asynchronous=False)

    def committed(self) -> int:
        with clients.consumer(self.kafka, self.name) as consumer:
            return consumer.committed([TopicPartition(self.name, 0)], timeout=10)[0].offset


@pytest.mark.filterwarnings("default")
def test_take_acknowledges_a_batch_whose_body_raised(services: Services) -> None:
    topic, handled, failed = Topic(services), list[bytes](), list[bytes]()
    topic.write(10)

    async def body(stream: StreamT[bytes]) -> None:
        async for values in stream.take(5, within=60.0):
            if not failed:
                failed.extend(values)
                raise ValueError("the batch's effect did not happen")
            handled.extend(values)

    topic.read(body, lambda: len(handled) >= 5)
    assert failed == [b"0", b"1", b"2", b"3", b"4"]
    assert handled == [b"5", b"6", b"7", b"8", b"9"], "what failed is not given again"
    assert topic.committed() == 10, "and a restart would not give it again either"


@pytest.mark.filterwarnings("default")
def test_an_offset_is_committed_past_an_event_in_flight(services: Services) -> None:
    topic, done, began = Topic(services), list[bytes](), list[bytes]()
    topic.write(6)

    async def body(stream: StreamT[bytes]) -> None:
        async for value in stream:
            began.append(value)
            if value == b"1":
                await asyncio.sleep(3_600)
            done.append(value)

    # The one in flight is the first after what is committed: for Faust a gap of one there is a compacted record's.
    topic.read(body, lambda: len(done) >= 2, concurrency=2, commit_first=1)
    assert b"1" in began
    assert b"1" not in done
    assert topic.committed() > 1, "a restart begins behind the record that was never finished"
