"""Kafka clients as this project configures them: one place for every property that a guarantee rests on."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from innerloop.config import KafkaSettings
from innerloop.errors import ServiceError, SettingsError
from innerloop.streams.refusals import REFUSALS, Refusals, sentence
from innerloop.streams.waiting import Repeats

Client = TypeVar("Client")
Value = str | int | float | bool
FORBIDDEN = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED})
"""Codes that say that a consumer lacks an ACL."""
MISSING = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001 - librdkafka's own name
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    }
)
"""Codes that say that a topic does not exist."""
HOPELESS = FORBIDDEN | MISSING
"""Codes with which a topic gives nothing to a consumer, however long it waits."""
_LOG = logging.getLogger("librdkafka")
_LOG.addFilter(Repeats())

# Owned by a guarantee: a pass-through that changed them would break it silently.
_RESERVED = {
    "bootstrap.servers": "set kafka.bootstrap_servers",
    "metadata.broker.list": "set kafka.bootstrap_servers",
    "group.instance.id": "set kafka.static_membership",
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
    "allow.auto.create.topics": "a topic is made by `innerloop topics`, as its catalogue says",
}

# librdkafka itself does not say which file it misses.
_FILES = {
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.crl.location",
    "ssl.keystore.location",
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

    Raises SettingsError when there is no broker address, a pass-through property is one a guarantee rests on, or one
    names a file that is not there.
    """
    if not settings.bootstrap_servers:
        raise SettingsError(
            "No Kafka broker is set: set INNERLOOP_KAFKA__BOOTSTRAP_SERVERS, or run `innerloop up` for one to try."
        )
    for name in settings.properties:
        if name in _RESERVED:
            raise SettingsError(f"kafka.properties may not set {name}: {_RESERVED[name]}.")
    passed = {name: value.get_secret_value() for name, value in settings.properties.items()}
    for name in _FILES & passed.keys():
        if passed[name] != "probe" and not Path(passed[name]).exists():
            raise SettingsError(f"kafka.properties has {name} {passed[name]}, which does not exist: correct it.")
    return {
        "bootstrap.servers": settings.bootstrap_servers,
        "client.id": "innerloop",
        "topic.metadata.refresh.interval.ms": 30_000,
        # Else a producer's or an admin client's mere question about a topic makes it, where the broker lets it.
        "allow.auto.create.topics": False,
        # After a long outage the next attempt comes within this: the default of 10 s would add to the outage.
        "reconnect.backoff.max.ms": 1_000,
        "error_cb": Refusals(settings),
        **{name.replace("_", "."): value for name, value in own.items()},
        **passed,
    }


def _made(kind: type[Client], config: Mapping[str, Any]) -> Client:
    try:
        return kind(dict(config), logger=_LOG)  # type: ignore[call-arg]
    except KafkaException as error:
        raise SettingsError(f"Kafka settings are refused: {error.args[0].str().rstrip('.')}.") from None
    except TypeError as error:  # a property that only a program can set, such as stats_cb
        raise SettingsError(f"Kafka settings are refused: {error}.") from None


def is_fatal(error: KafkaError) -> bool:
    """Whether a client that has told this can do nothing any more; `error.fatal()` does not know it of a message."""
    return error.fatal() or error.code() == KafkaError._FATAL  # noqa: SLF001 - librdkafka's own name


def unreadable(topic: str, error: KafkaError) -> str:
    """What is said when reading a topic ends in one of `HOPELESS`."""
    return (
        f"Topic {topic} cannot be read ({error.str().rstrip('.')}): see that it exists and that this user has the ACLs"
        " that deploy/OPERATIONS.md lists."
    )


def consumer(
    settings: KafkaSettings,
    group: str,
    on_commit: Callable[[KafkaError | None, list[TopicPartition]], None] | None = None,
    **own: Value,
) -> Consumer:
    """A consumer that starts at the oldest record and never commits by itself; a poll tells `on_commit` how one went.

    Its memory is bounded by `queued.max.messages.kbytes` and one answer to a fetch, whatever the lag.
    """
    ours: dict[str, Value] = {
        "group_id": group,
        "enable_auto_commit": False,
        "enable_auto_offset_store": False,
        "auto_offset_reset": "earliest",
        # A batch may take this long before the group gives up on us.
        "max_poll_interval_ms": 300_000,
        # Deep enough to keep a batch ready, bounded so that lag costs disk at the broker and not memory here.
        "queued_max_messages_kbytes": 65_536,
        # Of each partition. What is fetched of all of them stands in one queue: a flood of one of them stands with so
        # many records before everybody else's, and with an answer to a fetch, whose bytes are counted compressed.
        "queued_min_messages": 20_000,
        "fetch_message_max_bytes": 262_144,
        "fetch_wait_max_ms": 100,
        # How long a full queue waits before it asks again: librdkafka's second would let the queue run empty.
        "fetch_queue_backoff_ms": 5,
        "fetch_error_backoff_ms": 100,
    }
    config = properties(settings, **{**ours, **_GROUP[settings.group_protocol], **own})
    if on_commit is not None:
        config["on_commit"] = on_commit
    return _made(Consumer, config)


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
    """Raise ServiceError unless a broker answers within `seconds`; at once when it answers with a refusal."""
    refusals: list[KafkaError] = []
    # It says nothing by itself: the sentence has the reason.
    client = _made(AdminClient, {**properties(settings), "error_cb": refusals.append, "log_level": 0})
    deadline, patience = time.monotonic() + seconds, 0.5
    while (failure := _asked(client, min(patience, deadline - time.monotonic()))) is not None:
        patience *= 2
        for refusal in refusals:
            if refusal.code() in REFUSALS:
                raise ServiceError(sentence(settings, refusal))
        if time.monotonic() > deadline - 0.01:
            raise ServiceError(
                f"No Kafka broker answers at {settings.bootstrap_servers} ({_why(refusals, failure)}): "
                "start it, or correct INNERLOOP_KAFKA__BOOTSTRAP_SERVERS."
            )


def _why(heard: Sequence[KafkaError], failure: KafkaError) -> str:
    """Of what a client has heard of its connections the first, without address and state; else the failure itself."""
    codes = (KafkaError._RESOLVE, KafkaError._TRANSPORT)  # noqa: SLF001 - librdkafka's own names
    for error in heard:
        if error.code() in codes:
            return error.str().partition("/bootstrap: ")[2].partition(" (after ")[0] or error.str()
    return failure.str()


def _asked(client: AdminClient, seconds: float) -> KafkaError | None:
    """Ask for the metadata; None when it came."""
    try:
        client.list_topics(timeout=max(seconds, 0.1))
    except KafkaException as error:
        client.poll(0)  # delivers what it has heard of meanwhile
        failure: KafkaError = error.args[0]
        return failure
    return None
