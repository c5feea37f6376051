"""Looks at the groups' lag again and again, and judges each partition by what it did meanwhile."""

import math
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from innerloop.config import Settings
from innerloop.streams.groups import Group, described
from innerloop.streams.lag import LagReader, PartitionLag
from innerloop.streams.lag_window import WORST_LAST, Look, Status, catch_up_seconds, judge

WINDOW_LOOKS = 10
_UNKNOWN = "unknown"


class JudgedLag(msgspec.Struct, frozen=True):
    """A partition's lag, who has it (None: nobody), and what the lag means (see `streams.lag_window`)."""

    lag: PartitionLag
    owner: str | None
    status: Status
    catch_up_seconds: float


class GroupLag(msgspec.Struct, frozen=True):
    """A group's partitions; its status is the worst of theirs.

    `offsets` are those of partitions where a record waits; `seconds` is the oldest age that is known, NaN where records
    wait and no age is known.
    """

    group: str
    partitions: list[JudgedLag]
    status: Status
    offsets: int
    seconds: float
    catch_up_seconds: float


class LagWatch:
    """Keeps the last looks at every partition of ingest's and adapt's groups, and of quality's if asked for."""

    def __init__(self, settings: Settings, reader: LagReader, *, quality: bool = False) -> None:
        """With `quality` its group is looked at, too, where it exists: nobody has to run it."""
        self._settings, self._reader, self._quality = settings, reader, quality
        self._windows: dict[tuple[str, str, int], deque[Look]] = {}
        self._groups: dict[str, Group] = {}

    def look(self) -> list[GroupLag]:
        """Look once more. Raises ServiceError when no broker answers or a topic does not exist."""
        kafka, topics = self._settings.kafka, self._settings.topics
        found = [
            self._look(kafka.ingest_group, topics.ingested),
            self._look(kafka.adapt_group, [topics.requests]),
        ]
        if self._quality and (group := self._described(kafka.quality_group)) is not None and group.exists:
            found.append(self._look(kafka.quality_group, [*topics.events, topics.recommendations, topics.ads]))
        return found

    def _described(self, group: str) -> Group | None:
        """Who has what; as before while the group cannot be asked, None if it never could."""
        found = described(self._reader.admin, group)
        if found is not None:
            self._groups[group] = found
        return self._groups.get(group)

    def _look(self, group: str, topics: Sequence[str]) -> GroupLag:
        found, known = self._reader.read(group, topics), self._described(group)
        now = time.monotonic()
        judged = []
        for each in found:
            window = self._window(each)
            window.append(Look(now, each.end - each.offsets, _waiting(each)))
            owner = _UNKNOWN if known is None else known.owners.get((each.topic, each.partition))
            judgement = judge(window, owned=owner is not None)
            judged.append(JudgedLag(each, owner, judgement.status, judgement.catch_up_seconds))
        return GroupLag(
            group=group,
            partitions=judged,
            status=max((each.status for each in judged), key=WORST_LAST.index),
            offsets=sum(map(_waiting, found)),
            seconds=_oldest(found),
            catch_up_seconds=catch_up_seconds([self._window(each) for each in found]),
        )

    def _window(self, lag: PartitionLag) -> deque[Look]:
        return self._windows.setdefault((lag.group, lag.topic, lag.partition), deque(maxlen=WINDOW_LOOKS))


def _waiting(lag: PartitionLag) -> int:
    """Its offsets if a record is among them: marks of transactions alone are no lag."""
    return 0 if lag.seconds == 0.0 else lag.offsets


def _oldest(lags: Sequence[PartitionLag]) -> float:
    ages = [each.seconds for each in lags if _waiting(each)]
    known = [age for age in ages if age is not None]
    if known:
        return max(known)
    return math.nan if ages else 0.0
