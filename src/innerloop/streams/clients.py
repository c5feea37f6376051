"""Kafka clients as this project configures them: one place for every property that a guarantee rests on."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from innerloop.config import KafkaSettings
from innerloop.errors import ServiceError, SettingsError

Client = TypeVar("Client")
Value = str | int | float | bool
_LOG = logging.getLogger("librdkafka")

# Owned by a guarantee: a pass-through that changed them would break it silently.
_RESERVED = {
    "bootstrap.servers": "set kafka.bootstrap_servers",
    "metadata.broker.list": "set kafka.bootstrap_servers",
    "group.id": "set kafka.ingest_group and kafka.adapt_group",
    "enable.auto.commit": "offsets are committed after the database",
    "enable.auto.offset.store": "offsets are committed after the database",
    "auto.offset.reset": "what retention has passed must not be skipped in silence",
    "partition.assignment.strategy": "partitions that do not move must not pause",
    "enable.idempotence": "a retried request must not overtake a newer one",
    "acks": "a flush that is not replicated is no flush",
    "request.required.acks": "a flush that is not replicated is no flush",
    "partitioner": "a user's records must share a partition",
    "transactional.id": "transactions are not used",
}


# How partitions come to members. In both, those that stay are never paused.
_GROUP: dict[str, dict[str, Value]] = {
    "classic": {
        "partition_assignment_strategy": "cooperative-sticky",
        # A crash is noticed within 10 s. A heartbeat also brings the news of a rebalance: its interval is for how long
        # the partitions that move stand still.
        "session_timeout_ms": 10_000,
        "heartbeat_interval_ms": 500,
    },
    "consumer": {"group_protocol": "consumer", "group_remote_assignor": "range"},
}


def properties(settings: KafkaSettings, **own: Value) -> dict[str, Any]:
    """The librdkafka properties of one client: ours, then what the deployment passes through.

    Raises SettingsError when there is no broker address or a pass-through property is one a guarantee rests on.
    """
    if not settings.bootstrap_servers:
        raise SettingsError(
            "No Kafka broker is set: set INNERLOOP_KAFKA__BOOTSTRAP_SERVERS, or run `innerloop up` for one to try."
        )
    for name in settings.properties:
        if name in _RESERVED:
            raise SettingsError(f"kafka.properties may not set {name}: {_RESERVED[name]}.")
    passed = {name: value.get_secret_value() for name, value in settings.properties.items()}
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": "innerloop",
        "topic.metadata.refresh.interval.ms": 30_000,
        **{name.replace("_", "."): value for name, value in own.items()},
        **passed,
    }


def _made(kind: type[Client], config: Mapping[str, Any]) -> Client:
    try:
        return kind(dict(config), logger=_LOG)  # type: ignore[call-arg]
    except KafkaException as error:
        raise SettingsError(f"Kafka settings are refused: {error.args[0].str()}.") from None


def consumer(settings: KafkaSettings, group: str, **own: Value) -> Consumer:
    """A consumer that starts at the oldest record and never commits by itself."""
    ours: dict[str, Value] = {
        "group_id": group,
        "enable_auto_commit": False,
        "enable_auto_offset_store": False,
        "auto_offset_reset": "earliest",
        # A batch may take this long before the group gives up on us.
        "max_poll_interval_ms": 300_000,
        # Deep enough to keep a batch ready, bounded so that lag costs disk at the broker and not memory here.
        "queued_max_messages_kbytes": 65_536,
        "queued_min_messages": 100_000,
        "fetch_wait_max_ms": 100,
        # How long a full queue waits before it asks again: librdkafka's second would let the queue run empty.
        "fetch_queue_backoff_ms": 5,
        "fetch_error_backoff_ms": 100,
    }
    return _made(Consumer, properties(settings, **{**ours, **_GROUP[settings.group_protocol], **own}))


def producer(
    settings: KafkaSettings, on_failure: Callable[[KafkaError | None, Message], None] | None = None, **own: Value
) -> Producer:
    """A producer whose flush means: replicated, once, in order. `on_failure` is told of what did not arrive."""
    ours: dict[str, Value] = {
        "enable_idempotence": True,
        "acks": "all",
        "compression_type": "lz4",
        "linger_ms": 1,
        "queue_buffering_max_messages": 1_000_000,
        "queue_buffering_max_kbytes": 262_144,
        # Java's partitioner, so that a user is on the same partition whoever produced the record.
        "partitioner": "murmur2_random",
    }
    config = properties(settings, **{**ours, **own})
    if on_failure is not None:
        # Only failures are reported: a callback for each success would cost more than the record.
        config |= {"on_delivery": on_failure, "delivery.report.only.error": True}
    return _made(Producer, config)


def admin(settings: KafkaSettings) -> AdminClient:
    """A client for topics, offsets and groups."""
    return _made(AdminClient, properties(settings))


def require_broker(settings: KafkaSettings, seconds: float = 10.0) -> None:
    """Raise ServiceError unless a broker answers within `seconds`."""
    try:
        admin(settings).list_topics(timeout=seconds)
    except KafkaException as error:
        raise ServiceError(
            f"No Kafka broker answers at {settings.bootstrap_servers} ({error.args[0].str()}): "
            "start it, or correct INNERLOOP_KAFKA__BOOTSTRAP_SERVERS."
        ) from None
