"""What must be true after a run, from the produced records alone: a single-threaded fold in plain Python.

Written against the wire contract (`schemas/event.v1.json`, `schemas/README.md`) and not against the code that it
judges: dicts, sorted lists and the standard library's JSON.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import xxhash

from innerloop.streams.batch import Record

Example = tuple[int, int, str, int, float]
"""Event time (epoch ms), signed 64-bit hash of the event id, item, type code, weight: sorted as they are stored."""
Place = tuple[str, int, int]
"""(topic, partition, offset)"""
Headers = tuple[tuple[str, bytes | None], ...]

_CODES = {"click": 1, "cart": 2, "favorite": 3, "purchase": 4}
_REQUIRED = ("event_id", "user_id", "item_id")
_IDENTIFIERS = ("category", "ad_id")
_NUMBERS = ("price", "quantity", "value")
_MOST_BYTES = 256
_EARLIER = 4


@dataclass(frozen=True)
class Rules:
    """What the settings say: how many events a set holds, what each kind weighs, and which records are refused."""

    capacity: int
    weights: Mapping[str, float]
    latest_ms: int
    max_bytes: int


class Poison(Exception):  # noqa: N818 - a record's fate, not a failure
    """The record is none that can be stored; the message is the reason that its dead letter must give."""


@dataclass(frozen=True)
class Letter:
    """What a dead letter must repeat of its record."""

    reason: str
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass
class Task:
    """The newest distinct events of one user, and the ids of all of them."""

    ids: set[int] = field(default_factory=set)
    events: dict[int, Example] = field(default_factory=dict)


class Oracle:
    """Folds records in whatever order they come; `expected` is then what Postgres must hold."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._tasks: dict[str, Task] = {}
        self.poison: dict[Place, Letter] = {}
        self.ends: dict[tuple[str, int], int] = {}
        """By topic and partition, the offset after the last record."""
        self.records = self.duplicates = 0

    def see(self, record: Record) -> None:
        """Take one produced record in."""
        self.records += 1
        place = record.topic, record.partition
        self.ends[place] = max(self.ends.get(place, 0), record.offset + 1)
        try:
            user, example = read_event(record.value, self._rules)
        except Poison as reason:
            self.poison[*place, record.offset] = Letter(str(reason), record.key, record.value, tuple(record.headers))
            return
        task = self._tasks.setdefault(user, Task())
        if example[1] in task.ids:
            self.duplicates += 1
            return
        task.ids.add(example[1])
        task.events[example[1]] = example
        if len(task.events) > _EARLIER * self._rules.capacity:
            task.events = {each[1]: each for each in self._newest(task)}

    @property
    def users(self) -> list[str]:
        return list(self._tasks)

    def expected(self, user: str) -> list[Example]:
        """The user's newest events by time and then hash, oldest first."""
        return self._newest(self._tasks[user])

    def fates(self) -> Counter[str]:
        """How many of the records must leave nothing: duplicates, and those that were too late or are pushed out."""
        distinct = sum(len(task.ids) for task in self._tasks.values())
        stored = sum(len(self._newest(task)) for task in self._tasks.values())
        return Counter(duplicate=self.duplicates, too_late=distinct - stored)

    def _newest(self, task: Task) -> list[Example]:
        return sorted(task.events.values())[-self._rules.capacity :]


def read_event(value: bytes | None, rules: Rules) -> tuple[str, Example]:
    """The user and the example that a record's value says; raises Poison."""
    if not value:
        raise Poison("undecodable")
    if len(value) > rules.max_bytes:
        raise Poison("too_large")
    try:
        event = json.loads(value.decode(), parse_constant=_refused)
    except (ValueError, RecursionError):
        raise Poison("undecodable") from None
    if not (isinstance(event, dict) and _identified(event) and event.get("event_type") in _CODES):
        raise Poison("invalid_field")
    time = _time_ms(event.get("event_time"))
    if time is None or not 0 <= time <= rules.latest_ms:
        raise Poison("invalid_field")
    kind = event["event_type"]
    return event["user_id"], (time, _hash(event["event_id"]), event["item_id"], _CODES[kind], rules.weights[kind])


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _identified(event: dict[str, Any]) -> bool:
    optional = all(event.get(name) is None or _is_identifier(event[name]) for name in _IDENTIFIERS)
    session, currency = event.get("session_id"), event.get("currency")
    texts = (session is None or (_is_text(session))) and (currency is None or isinstance(currency, str))
    numbers = all(event.get(name) is None or _is_number(event[name]) for name in _NUMBERS)
    return optional and texts and numbers and all(_is_identifier(event.get(name)) for name in _REQUIRED)


def _is_identifier(value: object) -> bool:
    return _is_text(value) and value != ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and len(value.encode(errors="replace")) <= _MOST_BYTES


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _time_ms(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        return None
    try:
        told = datetime.fromisoformat(value)
    except ValueError:
        return None
    if told.tzinfo is None:
        return None
    since = told - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000 + since.microseconds // 1_000


def partition_of(key: bytes, partitions: int) -> int:
    """Where Kafka's default partitioner puts a key: murmur2, as in `org.apache.kafka.common.utils.Utils`."""
    factor, mask = 0x5BD1E995, 0xFFFFFFFF
    found = 0x9747B28C ^ len(key)
    whole = len(key) & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * factor & mask
        found = (found * factor & mask) ^ ((word ^ word >> 24) * factor & mask)
    if whole < len(key):
        found = (found ^ int.from_bytes(key[whole:], "little")) * factor & mask
    found = (found ^ found >> 13) * factor & mask
    return ((found ^ found >> 15) & 0x7FFFFFFF) % partitions


def _hash(event_id: str) -> int:
    hashed = int(xxhash.xxh3_64_intdigest(event_id.encode()))
    return hashed - 2**64 if hashed >= 2**63 else hashed
