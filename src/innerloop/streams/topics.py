"""The topics: making those that are missing, and what is said when one is missing or unlike its catalogue entry."""

import logging
import time
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import cache
from typing import Any, Literal

import msgspec
from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType, TopicDescription

from innerloop import schemas
from innerloop.config import Settings, TopicSettings
from innerloop.errors import ServiceError
from innerloop.streams import clients

NO_TOPIC_ID = "AAAAAAAAAAAAAAAAAAAAAA"
"""What a broker older than Kafka 2.8, which gives topics no ids, is taken to say: sixteen zero bytes."""

_LOG = logging.getLogger(__name__)
_ANSWER_SECONDS = 10.0
_READY_SECONDS = 15.0
_REASON_SECONDS = 3.0


class Topic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `schemas/topics.toml`, which says what the fields mean."""

    name: str
    schema: str
    key: str
    partitions: Literal["topics.partitions"] | int
    written_by: list[str]
    read_by: list[str]
    config: dict[str, str | int | float]

    @property
    def compacted(self) -> bool:
        return "compact" in str(self.config["cleanup.policy"])

    def partition_count(self, settings: TopicSettings) -> int:
        return self.partitions if isinstance(self.partitions, int) else settings.partitions


@cache
def catalogue() -> Mapping[str, Topic]:
    """Every topic by the name of its setting in `topics.*`."""
    return msgspec.convert(tomllib.loads(schemas.read("topics.toml")), dict[str, Topic])


def ensure_topics(settings: Settings, topics: Mapping[str, Topic] | None = None) -> list[str]:
    """Make the topics that are missing, and return their names; those that exist stay as they are.

    What differs from the catalogue in those is logged, a warning each. Raises ServiceError when the broker does not
    answer or refuses a topic.
    """
    topics = catalogue() if topics is None else topics
    admin = clients.admin(settings.kafka)
    names = {_name(settings, field): topic for field, topic in topics.items()}
    existing = _described(admin, names, settings)
    for sentence in _differences(admin, settings, names, existing):
        _LOG.warning(sentence)
    missing = {name: topic for name, topic in names.items() if name not in existing}
    made = _make(admin, settings, missing)
    _await_leaders(admin, settings, missing)
    return made


def topic_differences(settings: Settings) -> list[str]:
    """What is unlike the catalogue in the topics that exist, a sentence each; raises ServiceError without a broker."""
    admin = clients.admin(settings.kafka)
    names = {_name(settings, field): topic for field, topic in catalogue().items()}
    return _differences(admin, settings, names, _described(admin, names, settings))


def require_topics(settings: Settings, names: Iterable[str]) -> None:
    """Raise ServiceError unless every one of these topics exists."""
    partition_counts(settings, names)


def existing(settings: Settings, names: Iterable[str]) -> list[str]:
    """Those of the topics that exist; raises ServiceError when no broker answers or it does not tell of one."""
    return list(_described(clients.admin(settings.kafka), list(names), settings))


def partition_counts(settings: Settings, names: Iterable[str]) -> dict[str, int]:
    """How many partitions each topic has; raises ServiceError when one does not exist or no broker answers."""
    return {name: len(topic.partitions) for name, topic in _required(settings, names).items()}


def topic_ids(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """The id that the broker gave each topic when it was made, `NO_TOPIC_ID` where it gives none.

    A topic that was deleted and made again has another: then stored offsets are of another log. Raises ServiceError
    when one does not exist or no broker answers.
    """
    return {name: str(topic.topic_id) for name, topic in _required(settings, names).items()}


def _name(settings: Settings, field: str) -> str:
    name: str = getattr(settings.topics, field)
    return name


def _required(settings: Settings, names: Iterable[str]) -> dict[str, TopicDescription]:
    wanted = list(dict.fromkeys(names))
    found = _described(clients.admin(settings.kafka), wanted, settings)
    missing = [name for name in wanted if name not in found]
    if missing:
        what = f"Topics {', '.join(missing)} do" if len(missing) > 1 else f"Topic {missing[0]} does"
        raise ServiceError(f"{what} not exist: run `innerloop topics`.")
    return found


def _described(admin: AdminClient, names: Iterable[str], settings: Settings) -> dict[str, TopicDescription]:
    """Those of the topics that exist. Describing, unlike asking for metadata, never makes a topic."""
    found: dict[str, TopicDescription] = {}
    wanted = list(names)
    if not wanted:
        return found
    for name, future in admin.describe_topics(TopicCollection(wanted), request_timeout=_ANSWER_SECONDS).items():
        try:
            found[name] = _result(future, settings)
        except KafkaException as error:
            if _code(error) != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise ServiceError(f"Kafka does not describe topic {name}: {error.args[0].str()}.") from None
    return found


def _differences(
    admin: AdminClient, settings: Settings, names: Mapping[str, Topic], existing: Mapping[str, TopicDescription]
) -> list[str]:
    sentences = []
    policies = _cleanup_policies(admin, settings, [name for name in existing if names[name].compacted])
    for name, description in existing.items():
        there, wanted = len(description.partitions), names[name].partition_count(settings.topics)
        if there != wanted:
            than = "more" if there > wanted else "fewer"
            sentences.append(f"Topic {name} has {there} partitions, {than} than the {wanted} set; it stays so.")
        if name in policies and "compact" not in policies[name]:
            sentences.append(
                f"Topic {name} has cleanup.policy={policies[name]}: keys without new records lose the last one, "
                "and removed ones stay; set it to compact."
            )
    return sentences


def _cleanup_policies(admin: AdminClient, settings: Settings, names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    answers = admin.describe_configs(resources, request_timeout=_ANSWER_SECONDS)
    policies = {}
    for resource, future in answers.items():
        try:
            policies[resource.name] = str(_result(future, settings)["cleanup.policy"].value)
        except KafkaException as error:  # not allowed to read configurations: nothing to compare
            _LOG.debug("cannot read the configuration of %s: %s", resource.name, error)
    return policies


def _make(admin: AdminClient, settings: Settings, missing: Mapping[str, Topic]) -> list[str]:
    if not missing:
        return []
    wanted = [
        NewTopic(
            name,
            num_partitions=topic.partition_count(settings.topics),
            replication_factor=settings.topics.replication_factor,
            config={key: str(value) for key, value in topic.config.items()},
        )
        for name, topic in missing.items()
    ]
    made = []
    for name, future in admin.create_topics(wanted, request_timeout=_ANSWER_SECONDS).items():
        try:
            _result(future, settings)
            made.append(name)
        except KafkaException as error:
            if _code(error) != KafkaError.TOPIC_ALREADY_EXISTS:  # else somebody else was quicker
                raise ServiceError(f"Kafka refuses to make topic {name}: {error.args[0].str()}.") from None
    return made


def _await_leaders(admin: AdminClient, settings: Settings, names: Iterable[str]) -> None:
    """A topic just made is not at once known to every broker: a client that came too early would see none."""
    wanted = set(names)
    deadline = time.monotonic() + _READY_SECONDS
    while wanted:
        described = _described(admin, wanted, settings)
        wanted -= {name for name, topic in described.items() if _is_led(admin, topic)}
        if wanted and time.monotonic() > deadline:
            raise ServiceError(
                f"Topics {', '.join(sorted(wanted))} have no leader after {_READY_SECONDS:.0f} s: look at the brokers."
            )
        if wanted:
            time.sleep(0.05)


def _is_led(admin: AdminClient, topic: TopicDescription) -> bool:
    """Every partition's leader answers: one that is only named may still refuse.

    A producer that comes before loses what it is told has arrived: the first batch is refused, the second is let in, as
    an empty log takes any sequence number for the first, and the first, sent again, counts as known (KAFKA-15591).
    """
    if not all(each.leader for each in topic.partitions):
        return False
    latest: Any = OffsetSpec  # the stubs leave its constructors untyped
    asked = {TopicPartition(topic.name, each.id): latest.latest() for each in topic.partitions}
    answers = admin.list_offsets(asked, request_timeout=_ANSWER_SECONDS).values()
    return all(future.exception(timeout=_ANSWER_SECONDS + 5.0) is None for future in answers)


def _result(future: "Future[Any]", settings: Settings) -> Any:
    """The answer; raises ServiceError without a broker and KafkaException with the broker's own refusal."""
    try:
        return future.result(timeout=_ANSWER_SECONDS + 5.0)
    except TimeoutError:
        raise no_answer(settings, "no answer in time") from None
    except KafkaException as error:
        if _code(error) in AWAY:
            raise no_answer(settings, error.args[0].str()) from None
        raise


AWAY = frozenset({KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE})  # noqa: SLF001 - librdkafka's own names
"""Codes that say that no broker answers."""


def no_answer(settings: Settings, why: str) -> ServiceError:
    """What to raise when no broker answers; raises itself where the broker says that it refuses us."""
    clients.require_broker(settings.kafka, _REASON_SECONDS)
    return ServiceError(
        f"No Kafka broker answers at {settings.kafka.bootstrap_servers} ({why.rstrip('.')}): "
        "start it, or correct INNERLOOP_KAFKA__BOOTSTRAP_SERVERS."
    )


def _code(error: KafkaException) -> int:
    code: int = error.args[0].code()
    return code
