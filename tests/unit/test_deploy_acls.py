"""The script of OPERATIONS.md that gives Kafka's ACLs, against the catalogue of topics.

tests/integration/test_security.py runs the loop with what the script gives.
"""

from confluent_kafka.admin import AclBinding, AclOperation, ResourcePatternType, ResourceType
from secured import ADMINISTRATOR, SHOP, USER, allowed, documented_rules

from innerloop.config import Settings
from innerloop.streams.topics import catalogue

PROGRAMS = {"ingest", "adapt", "train", "quality", "innerloop erase"}
"""Who of `schemas/topics.toml` runs as USER."""
PREFIX = "innerloop-"


def needed() -> list[AclBinding]:
    topics, user = catalogue().values(), f"User:{USER}"
    administer = (AclOperation.CREATE, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS)
    prefixed = ResourcePatternType.PREFIXED
    return [
        *(allowed(f"User:{ADMINISTRATOR}", operation, topic.name) for topic in topics for operation in administer),
        # Adapt watches what it wrote, and people read dead letters, scores and windows with the same user's commands.
        *(allowed(user, AclOperation.READ, topic.name) for topic in topics),
        *(allowed(user, AclOperation.WRITE, topic.name) for topic in topics if PROGRAMS & {*topic.written_by}),
        *(
            allowed(f"User:{SHOP}", AclOperation.WRITE, topic.name)
            for topic in topics
            if "the shop" in topic.written_by
        ),
        allowed(user, AclOperation.READ, PREFIX, prefixed, ResourceType.GROUP),
        # Faust makes the topics that `innerloop quality` has for itself.
        *(
            allowed(user, operation, Settings().kafka.quality_group, prefixed)
            for operation in (AclOperation.CREATE, AclOperation.READ, AclOperation.WRITE)
        ),
    ]


def test_the_script_gives_what_is_needed_and_nothing_else() -> None:
    given = documented_rules()
    assert {str(rule) for rule in given} == {str(rule) for rule in needed()}
    assert len(given) == len({str(rule) for rule in given})


def test_every_group_of_the_defaults_has_the_prefix() -> None:
    kafka = Settings().kafka
    assert all(group.startswith(PREFIX) for group in (kafka.ingest_group, kafka.adapt_group, kafka.quality_group))
