"""Consumer groups, as the broker sees them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from innerloop.config import KafkaSettings
from innerloop.streams import clients
from innerloop.streams.partitions import Partition, of_place

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Group:
    """Whether the broker knows the group, and which member has each partition now, as its client id and host."""

    exists: bool
    owners: Mapping[Partition, str]


def members_with_partitions(settings: KafkaSettings, group: str) -> int:
    """How many members of the group have partitions now; 0 while the group does not exist or cannot be asked."""
    found = _described(clients.admin(settings), group)
    return 0 if found is None else sum(1 for member in found.members if _partitions(member))


def described(admin: AdminClient, group: str) -> Group | None:
    """The group now; None while it cannot be asked."""
    found = _described(admin, group)
    if found is None:
        return None
    owners = {
        of_place(each): f"{member.client_id} {member.host}" for member in found.members for each in _partitions(member)
    }
    return Group(found.state != ConsumerGroupState.DEAD, owners)


def _partitions(member: Any) -> list[Any]:
    return list(member.assignment.topic_partitions) if member.assignment else []


def _described(admin: AdminClient, group: str) -> Any:
    try:
        return admin.describe_consumer_groups([group], request_timeout=_ANSWER_SECONDS)[group].result()
    except KafkaException as error:
        return _NOBODY if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND else None


@dataclass(frozen=True)
class _Described:
    """What a broker before 4.0 says of a group that does not exist; a newer one refuses to say anything."""

    state: ConsumerGroupState
    members: tuple[Any, ...] = ()


_NOBODY = _Described(ConsumerGroupState.DEAD)
