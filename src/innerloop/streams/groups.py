"""Consumer groups, as the broker sees them."""

from typing import Any

from confluent_kafka import KafkaException

from innerloop.config import KafkaSettings
from innerloop.streams import clients
from innerloop.streams.batch import Partition

_ANSWER_SECONDS = 5.0


def members_with_partitions(settings: KafkaSettings, group: str) -> int:
    """How many members of the group have partitions now; 0 while the group does not exist or cannot be asked."""
    return sum(1 for member in _members(settings, group) if member.assignment and member.assignment.topic_partitions)


def owners(settings: KafkaSettings, group: str) -> dict[Partition, str]:
    """Which member has each partition now, as its client id and host; empty while the group cannot be asked."""
    return {
        (each.topic, each.partition): f"{member.client_id} {member.host}"
        for member in _members(settings, group)
        if member.assignment
        for each in member.assignment.topic_partitions
    }


def _members(settings: KafkaSettings, group: str) -> list[Any]:
    try:
        admin = clients.admin(settings)
        return list(admin.describe_consumer_groups([group], request_timeout=_ANSWER_SECONDS)[group].result().members)
    except KafkaException:
        return []
