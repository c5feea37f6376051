"""A Kafka client that has lost every broker for good, and only a new one in its place finds the cluster again.

A broker at the end of an orderly shutdown answers for some milliseconds that its cluster has no brokers. librdkafka
2.10 to 2.16 then forgets the brokers it knows; and where the connection ends before that answer is worked on, it also
forgets that it was about to go back to `bootstrap.servers` (confluentinc/librdkafka#5301). From then on it asks nobody,
whatever comes back, and says nothing: a consumer looks like one of a quiet topic. No setting helps:
`metadata.recovery.rebootstrap.trigger.ms` mends only the first half of it.
"""

import time

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from innerloop.config import KafkaSettings
from innerloop.streams import clients

Client = Producer | Consumer | AdminClient
WHY = "it had lost every broker of a cluster that is there"
"""What is told of a client that another takes the place of."""
_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS, _ANSWER_SECONDS = 0.5, 1.0
_CONNECT_SECONDS = 2.5
"""As long as any client that knows a broker needs: between two attempts lies `reconnect.backoff.max.ms`, a second."""


def has_lost_brokers(client: Client, settings: KafkaSettings, topic: str) -> bool:
    """Whether the cluster answers a new client and `client` knows no broker of it.

    Such a client has no connection, so nothing that it sent can arrive any more. Takes a round trip where all is well,
    1.5 s while the cluster is away. Asking also helps a client that is merely not connected: it connects.

    What is asked for is `topic`, which need not exist and is not made by that: of all topics the answer may be large,
    and every client of a quiet cluster asks. Name one that the client may describe, else the broker's log tells of it.
    """
    if _has_broker(client, topic, _LOOK_SECONDS):
        return False
    try:
        clients.admin(settings).list_topics(topic, timeout=_ANSWER_SECONDS)
    except KafkaException:
        return False
    return not _has_broker(client, topic, _CONNECT_SECONDS)


def _has_broker(client: Client, topic: str, seconds: float) -> bool:
    """Whether it comes to have one within that time; whether that one answers is another matter."""
    try:
        client.list_topics(topic, timeout=seconds)
    except KafkaException as error:
        code: int = error.args[0].code()
        return code != KafkaError._TRANSPORT  # noqa: SLF001 - librdkafka's own name
    return True


class BrokerCheck:
    """Asks for a client that only listens to `topic`, when it has heard nothing for five seconds."""

    def __init__(self, settings: KafkaSettings, topic: str) -> None:
        self._settings, self._topic = settings, topic
        self._since = time.monotonic()

    def heard(self) -> None:
        """Something came: it is not lost."""
        self._since = time.monotonic()

    def lost(self, client: Client) -> bool:
        """Whether it has lost its brokers; asks at most every five seconds."""
        if time.monotonic() - self._since < _PATIENCE_SECONDS:
            return False
        lost = has_lost_brokers(client, self._settings, self._topic)
        self._since = time.monotonic()
        return lost
