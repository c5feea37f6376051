"""Produces records, and knows whether they have arrived."""

import time
from collections.abc import Callable
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, murmur2

from innerloop.config import KafkaSettings
from innerloop.errors import RetryError, StopError
from innerloop.streams import clients
from innerloop.streams.lost_brokers import WHY, has_lost_brokers

_LOG = structlog.get_logger(__name__)
Headers = list[tuple[str, str | bytes | None]]
_ROOM_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_ANSWER_SECONDS = 5.0
_DISAGREES = "it and the broker do not agree any more on what has arrived"
_MOST_SECONDS = 20.0


def partition_of(key: str, partitions: int) -> int:
    """Where a producer puts a record with this key."""
    return murmur2(key.encode(), partitions)


class Publisher:
    """A producer with one promise: after `flush` returns, every record since the last flush is replicated.

    When it raises RetryError some may be and some may not; the caller sends all of them again, and readers cope with
    repeats because requests, scores and dead letters are idempotent.
    """

    def __init__(self, settings: KafkaSettings, **own: clients.Value) -> None:
        self._settings, self._own = settings, own
        self._failure: str | None = None
        self._sent_to = ""
        """The topic of the newest record."""
        self._took = 0.0
        """Seconds that the last flush waited."""
        self._producer: Any = clients.producer(settings, self._failed, **own)

    def _failed(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failure = f"{message.topic()} did not take a record: {error.str()}"

    def send(
        self,
        topic: str,
        key: str | bytes | None,
        value: bytes | None,
        *,
        headers: Headers | None = None,
        partition: int = -1,
    ) -> None:
        """Queue one record; `partition` -1 lets the key decide.

        Waits for room when the queue is full, and raises RetryError when there is none for 5 s, or no such topic.
        """
        until, self._sent_to = None, topic
        while True:
            try:
                self._producer.produce(topic, value, key, partition=partition, headers=headers)
            except BufferError:
                now = time.monotonic()
                until = until or now + _ROOM_SECONDS
                self._call(lambda: self._producer.poll(_LOOK_SECONDS))  # says nothing of records that have arrived
                if self._failure is not None:
                    self.flush(0)
                if now > until:
                    self._renew_if_lost()
                    raise RetryError(
                        f"There is no room for records: the broker has taken none for {_ROOM_SECONDS:g} s"
                    ) from None
            except KafkaException as error:
                self._raise_if_passing(topic, error.args[0])
                raise StopError(f"A record for {topic} cannot be sent: {error.args[0].str()}.") from error
            else:
                return

    def _call(self, serve: Callable[[], int]) -> int:
        """Let librdkafka tell its news. Raises RetryError with another producer where this one has given up for good.

        A fatal error is raised by whatever asks for news; where `_failed` is told of a record first, it fails with that
        error pending, and what is raised is a SystemError for it.
        """
        try:
            return serve()
        except (KafkaException, SystemError) as error:
            cause = error if isinstance(error, KafkaException) else error.__cause__
            if isinstance(cause, KafkaException):
                self._raise_if_passing(self._sent_to, cause.args[0])
            raise

    def _raise_if_passing(self, topic: str, error: KafkaError) -> None:
        """Raise RetryError where what is refused now may be taken later."""
        if clients.is_fatal(error):
            self._renew(_DISAGREES)
        elif error.code() not in clients.MISSING:  # a topic was there at the start, and may be made again
            return
        raise RetryError(f"{topic} did not take a record: {error.str()}") from None

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises RetryError."""
        try:
            return len(self._producer.list_topics(topic, timeout=_ANSWER_SECONDS).topics[topic].partitions)
        except KafkaException as error:
            raise RetryError(f"The broker does not tell the partitions of {topic}: {error.args[0].str()}") from error

    def flush(self, seconds: float) -> None:
        """Wait until everything sent has arrived. Raises RetryError when it has not within `seconds`.

        Whoever is told so sends all of it again. A broker that only is slow would never be done with that, so it gets
        twice as long as it took the last time, 20 s at most; 0 seconds stay 0.
        """
        began = time.monotonic()
        patience = seconds and max(seconds, min(2 * self._took, _MOST_SECONDS))
        waiting = self._call(lambda: self._producer.flush(patience))
        if seconds:
            self._took = time.monotonic() - began
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RetryError(failure)
        if waiting:
            self._renew_if_lost()
            raise RetryError(f"The broker has not taken {waiting} records for {patience:.3g} s")

    def _renew_if_lost(self) -> None:
        """What a lost producer holds goes with it: whoever is told of a RetryError sends it again."""
        if has_lost_brokers(self._producer, self._settings, self._sent_to):
            self._renew(WHY)

    def _renew(self, why: str) -> None:
        self._producer = clients.producer(self._settings, self._failed, **self._own)
        self._failure = None
        _LOG.warning("producer made anew", why=why)
