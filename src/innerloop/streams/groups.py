"""Consumer groups, as the broker sees them."""

from confluent_kafka import KafkaException

from innerloop.config import KafkaSettings
from innerloop.streams import clients


def members_with_partitions(settings: KafkaSettings, group: str) -> int:
    """How many members of the group have partitions now; 0 while the group does not exist or cannot be asked."""
    admin = clients.admin(settings)
    try:
        described = admin.describe_consumer_groups([group], request_timeout=5.0)[group].result()
    except KafkaException:
        return 0
    return sum(1 for member in described.members if member.assignment and member.assignment.topic_partitions)
