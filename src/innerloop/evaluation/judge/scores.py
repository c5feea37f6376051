"""The judge of a score topic: what it says of every key, record by record, read with a plain consumer.

Compaction keeps the last record of a key and readers keep the highest, so in the end both must be the user's final
state. In between a record may be older than one before it in a single case: two workers wrote them, of which one had
lost the partition and slept. The epochs in the headers tell: records of one key and one epoch never go back.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from innerloop.evaluation.judge.oracle import partition_of
from innerloop.streams.batch import Record
from innerloop.streams.watch import OWNER_HEADER

Order = tuple[int, int]
"""(model_version, support_version)"""

_KEPT = 6
_decode = msgspec.json.Decoder().decode
_SCORE_TOLERANCE = 1e-4


@dataclass
class _Key:
    """What is known of one key so far; `epochs` are those under which the highest order was written.

    Records are kept as they came: decoded they would take five times the memory, and more time than decoding again.
    """

    highest: Order = (-1, -1)
    epochs: set[int | None] = field(default_factory=set)
    highest_offset: int = -1
    last: bytes = b""
    last_offset: int = -1
    contents: deque[tuple[tuple[int, ...], bytes]] = field(default_factory=lambda: deque(maxlen=_KEPT))


@dataclass(frozen=True)
class Final:
    """What the final record of a user must say."""

    support_version: int
    support_size: int
    event_time: int


class ScoreJudge:
    """Judges one topic of `model` ("recommendations" or "ads")."""

    def __init__(
        self,
        model: str,
        epochs: Mapping[int, int],
        partitions: int,
        *,
        erased: Collection[str] = (),
        gone: Collection[str] = (),
    ) -> None:
        """`erased` are those who may have tombstones, `gone` those of them of whom nothing else may stay."""
        self._model, self._epochs, self._partitions = model, epochs, partitions
        self._erased, self._gone = erased, gone
        self._keys: dict[str, _Key] = {}
        self.records = self.older = self.repeats = 0

    def see(self, record: Record) -> Iterator[str]:
        """Take the next record of the topic in; yields findings."""
        self.records += 1
        user = _user(record)
        if record.key is None or (record.value is None and user not in self._erased):
            yield f"{_where(record)}: a score record without key or value, and user {user} was not erased."
            return
        key = self._keys.get(user) or self._keys.setdefault(user, _Key())
        if record.value is None:
            key.last, key.last_offset = b"", record.offset
            return
        said, epoch = _decode(record.value), _epoch(record)
        if record.partition != (own := partition_of(record.key, self._partitions)):
            yield f"{_where(record)}: user {user} belongs on partition {own}."
        if said["user_id"] != user or said["model"] != self._model:
            whose = f"{said['user_id']} and model {said['model']}"
            yield f"{_where(record)}: the record under the key {user} is of {whose}."
        if epoch is None or epoch > self._epochs.get(record.partition, 0):
            yield f"{_where(record)}: user {user}'s record was written under epoch {epoch}, which nobody has had."
        order = said["model_version"], said["support_version"]
        if user not in self._gone and (finding := self._order(record, key, order, epoch)):
            yield finding
        if finding := self._content(record, key, said):
            yield finding
        key.last, key.last_offset = record.value, record.offset

    def _order(self, record: Record, key: _Key, order: Order, epoch: int | None) -> str | None:
        if order < key.highest:
            self.older += 1
            if epoch not in key.epochs:
                return None
            return (
                f"{_where(record)}: user {_user(record)}'s version goes back from {key.highest}"
                f" (offset {key.highest_offset}) to {order}, both written under epoch {epoch}."
            )
        if order > key.highest:
            key.epochs = set()
        key.highest, key.highest_offset = order, record.offset
        key.epochs.add(epoch)
        return None

    def _content(self, record: Record, key: _Key, said: dict[str, Any]) -> str | None:
        mark = content_key(said)
        before = next((content for known, content in reversed(key.contents) if known == mark), None)
        if before is None:
            key.contents.append((mark, record.value or b""))
            return None
        self.repeats += 1
        if same_content(_decode(before), said):
            return None
        return f"{_where(record)}: user {_user(record)} has two different {self._model} of the same versions {mark}."

    def final(self, wanted: Mapping[str, Final]) -> Iterator[str]:
        """Compare the end of the topic with what it must be; yields findings."""
        for user, final in wanted.items():
            yield from self._final(user, final)
        for user in sorted(self._keys.keys() - wanted.keys() - set(self._gone)):
            yield f"User {user} has {self._model} and no events."
        for user in sorted(self._gone):
            if user not in self._keys:
                yield f"User {user} was erased and has no tombstone among the {self._model}."
            elif self._keys[user].last:
                offset = self._keys[user].last_offset
                yield f"User {user} was erased, and the last of the {self._model} (offset {offset}) is a list."

    def _final(self, user: str, final: Final) -> Iterator[str]:
        key = self._keys.get(user)
        if key is None:
            yield f"User {user} has events and no {self._model}; its support set is at {final.support_version}."
            return
        said, version = self.last(user), key.highest[1]
        last = f"User {user}'s last record of {self._model} (offset {key.last_offset})"
        if version != final.support_version:
            yield (
                f"User {user}'s highest {self._model} (offset {key.highest_offset}) names support version"
                f" {version}, and the set is at {final.support_version}."
            )
        if not said:
            yield f"{last} is a tombstone, and its support set is at {final.support_version}."
        elif (said["model_version"], said["support_version"]) != key.highest:
            yield (
                f"{last} names support version {said['support_version']}, older than {version} at offset"
                f" {key.highest_offset}."
            )
        elif (said["support_size"], said["event_time"]) != (final.support_size, final.event_time):
            yield (
                f"{last} is of {said['support_size']} events up to {said['event_time']}, and the set has"
                f" {final.support_size} up to {final.event_time}."
            )

    def last(self, user: str) -> dict[str, Any]:
        """The user's last record; empty where there is none."""
        last = self._keys[user].last if user in self._keys else b""
        said: dict[str, Any] = _decode(last) if last else {}
        return said


def content_key(said: Mapping[str, Any]) -> tuple[int, ...]:
    """The versions that decide what a record lists. A head alone knows nothing of the trends; a ranker does."""
    versions = (said["model_version"], said["support_version"])
    return (*versions, said["trends_version"]) if "ranker" in said["method"] else versions


def same_content(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records list the same with the same scores.

    How many users are solved together moves the last digits of a float32, so scores are equal within 1e-4, and of two
    entries whose scores are that close either may come first.
    """
    for name in ("support_size", "event_time", "method"):
        if one[name] != other[name]:
            return False
    return _entries(one) == _entries(other) or same_list(listed(one), listed(other))


def listed(said: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The entries of a record with their scores."""
    return [(entry.get("ad_id", entry["item_id"]), entry["score"]) for entry in _entries(said)]


def _entries(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = said["items"] if said["model"] == "recommendations" else said["ads"]
    return found


def same_list(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> bool:
    """Whether two lists are the same; see `same_content`."""
    if one == other:
        return True
    if len(one) != len(other):
        return False
    scores, others = dict(one), dict(other)
    lowest = one[-1][1] + _SCORE_TOLERANCE
    known = all(abs(scores.get(name, lowest) - score) <= 2 * _SCORE_TOLERANCE for name, score in other)
    ranked = all(abs(mine[1] - theirs[1]) <= _SCORE_TOLERANCE for mine, theirs in zip(one, other, strict=True))
    return ranked and known and all(name in others or score <= lowest for name, score in one)


def _where(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"


def _user(record: Record) -> str:
    return (record.key or b"").decode(errors="replace")


def _epoch(record: Record) -> int | None:
    value = dict(record.headers).get(OWNER_HEADER)
    return int(value) if value is not None and value.isdigit() else None
