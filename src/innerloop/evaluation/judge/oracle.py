"""What must be true after a run, from the produced records alone: a single-threaded fold in plain Python.

Written against the wire contract (`schemas/event.v1.json`, `schemas/README.md`) and not against the code that it
judges: dicts, sorted lists and the standard library's JSON.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import xxhash

from innerloop.streams.batch import Record

Example = tuple[int, int, str, int, float]
"""Event time (epoch ms), signed 64-bit hash of the event id, item, type code, weight: sorted as they are stored."""
Place = tuple[str, int, int]
"""(topic, partition, offset)"""
Headers = tuple[tuple[str, bytes | None], ...]

_IMPRESSION = 5
_CODES = {"click": 1, "cart": 2, "favorite": 3, "purchase": 4, "impression": _IMPRESSION}
_MOST_ERASED_CHARACTERS, _LATEST_EVER = 256, 2**53
_REQUIRED = ("event_id", "user_id", "item_id")
_MOST_BYTES = 256
_EARLIER = 4


@dataclass(frozen=True)
class Rules:
    """What the settings say: how many events a set holds, what each kind weighs, and which records are refused.

    Impressions weigh nothing, and a user's are kept apart: the newest `impressions` of them.
    """

    capacity: int
    weights: Mapping[str, float]
    latest_ms: int
    max_bytes: int
    impressions: int = 32


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
        self._shown: dict[str, Task] = {}
        self.asked: dict[str, int] = {}
        """Whom erasures name, and up to when (epoch ms) the latest of them says that all must go."""
        self._until: dict[str, int] = {}
        self._erasures = 0
        self.poison: dict[Place, Letter] = {}
        self.ends: dict[tuple[str, int], int] = {}
        """By topic and partition, the offset after the last record."""
        self.records = self.duplicates = 0

    def see(self, record: Record) -> None:
        """Take one produced record in."""
        self._count(record)
        try:
            user, example = read_event(record.value, self._rules)
        except Poison as reason:
            self._refuse(record, reason)
            return
        shown = example[3] == _IMPRESSION
        tasks = self._shown if shown else self._tasks
        task = tasks.get(user) or tasks.setdefault(user, Task())
        if example[1] in task.ids:
            self.duplicates += 1
            return
        task.ids.add(example[1])
        task.events[example[1]] = example
        if len(task.events) > _EARLIER * (capacity := self._capacity(shown=shown)):
            task.events = {each[1]: each for each in _newest(task, capacity)}

    def see_erasure(self, record: Record) -> None:
        """Take one record of the erasure topic in, after all events."""
        self._count(record)
        try:
            user, until = read_erasure(record.value, self._rules)
        except Poison as reason:
            self._refuse(record, reason)
            return
        self._erasures += 1
        self.asked[user] = max(until, self.asked.get(user, 0))

    def carry_out(self, receipts: Mapping[str, int]) -> Iterator[str]:
        """Drop the past of everybody asked for, when all records are in; yields findings about the receipts.

        `receipts` says of each user up to when (epoch ms) the past is erased: what was asked for, or the newest event
        that was stored by then, of which a clock may be ahead. What is later stays, in whatever order it all was read.
        """
        for user, asked in self.asked.items():
            until = self._until[user] = receipts.get(user, asked)
            if user not in receipts:
                yield f"User {user} was erased, and there is no receipt of it."
            elif not asked <= until <= max(asked, self._newest_time(user)):
                yield f"User {user} was to be erased up to {asked}, and the receipt says {until}."

    @property
    def gone(self) -> set[str]:
        """Those erased who did nothing later."""
        return {user for user in self.asked if user not in self._tasks or not self.expected(user)}

    def users(self, *, shown: bool = False) -> list[str]:
        """Those who must have a set, of what they did or of what they were shown."""
        tasks = self._shown if shown else self._tasks
        return [user for user in tasks if user not in self.asked or self.expected(user, shown=shown)]

    def expected(self, user: str, *, shown: bool = False) -> list[Example]:
        """The user's newest events by time and then hash, oldest first."""
        newest = _newest((self._shown if shown else self._tasks)[user], self._capacity(shown=shown))
        until = self._until.get(user, -1)
        return [each for each in newest if each[0] > until]

    def fates(self) -> Counter[str]:
        """How many of the records must leave nothing: duplicates, erasures, what was erased, and what was too late.

        Late are also those that were stored and have been pushed out since; of who was erased they count as erased.
        """
        counts = Counter(duplicate=self.duplicates, erasures=self._erasures)
        for shown, tasks in ((False, self._tasks), (True, self._shown)):
            for user, task in tasks.items():
                if user in self.asked:
                    counts["erased"] += len(task.ids) - len(self.expected(user, shown=shown))
                else:
                    counts["too_late"] += len(task.ids) - min(len(task.events), self._capacity(shown=shown))
        return counts

    def _newest_time(self, user: str) -> int:
        tasks = [tasks[user] for tasks in (self._tasks, self._shown) if user in tasks]
        return max((each[0] for task in tasks for each in task.events.values()), default=-1)

    def _capacity(self, *, shown: bool) -> int:
        return self._rules.impressions if shown else self._rules.capacity

    def _count(self, record: Record) -> None:
        self.records += 1
        place = record.topic, record.partition
        self.ends[place] = max(self.ends.get(place, 0), record.offset + 1)

    def _refuse(self, record: Record, reason: Poison) -> None:
        place = record.topic, record.partition, record.offset
        self.poison[place] = Letter(str(reason), record.key, record.value, tuple(record.headers))


def _newest(task: Task, capacity: int) -> list[Example]:
    return sorted(task.events.values())[-capacity:]


def read_event(value: bytes | None, rules: Rules) -> tuple[str, Example]:
    """The user and the example that a record's value says; raises Poison."""
    if value and len(value) > rules.max_bytes:
        raise Poison("too_large")
    event = _json(value)
    if not (isinstance(event, dict) and _identified(event) and event.get("event_type") in _CODES):
        raise Poison("invalid_field")
    time = _time_ms(event.get("event_time"))
    if time is None or not 0 <= time <= rules.latest_ms:
        raise Poison("invalid_field")
    kind = event["event_type"]
    weight = 0.0 if _CODES[kind] == _IMPRESSION else rules.weights[kind]
    return event["user_id"], (time, _hash(event["event_id"]), event["item_id"], _CODES[kind], weight)


def read_erasure(value: bytes | None, rules: Rules) -> tuple[str, int]:
    """The user, and up to when (epoch ms) an erasure's value says that all must go; raises Poison."""
    erasure = _json(value)
    user = erasure.get("user_id") if isinstance(erasure, dict) else None
    if not isinstance(user, str) or not 0 < len(user) <= _MOST_ERASED_CHARACTERS or "\0" in user:
        raise Poison("invalid_field")
    until = erasure.get("requested_at")
    if not isinstance(until, int) or isinstance(until, bool) or not 0 <= until <= min(rules.latest_ms, _LATEST_EVER):
        raise Poison("invalid_field")
    return user, until


def _json(value: bytes | None) -> Any:
    if not value:
        raise Poison("undecodable")
    try:
        return _decode(value.decode())
    except (ValueError, RecursionError):
        raise Poison("undecodable") from None


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refused).decode


def _identified(event: dict[str, Any]) -> bool:
    for name in _REQUIRED:
        if not _is_identifier(event.get(name)):
            return False
    return all(event[name] is None or _OPTIONAL[name](event[name]) for name in event.keys() & _OPTIONAL.keys())


def _is_identifier(value: object) -> bool:
    return _is_text(value) and value != ""


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    return 4 * len(value) <= _MOST_BYTES or len(value.encode(errors="replace")) <= _MOST_BYTES


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


_OPTIONAL: dict[str, Callable[[object], bool]] = {
    "category": _is_identifier,
    "ad_id": _is_identifier,
    "session_id": _is_text,
    "currency": _is_string,
    "price": _is_number,
    "quantity": _is_number,
    "value": _is_number,
}


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


@cache
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
