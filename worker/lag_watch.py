"""Looks at both groups' lag again and again, and judges each partition by what it did meanwhile."""

import time
from collections import deque
from collections.abc import Sequence

import msgspec

from innerloop.config import Settings
from innerloop.streams.groups import owners
from innerloop.streams.lag import LagReader, PartitionLag
from innerloop.streams.lag_window import WORST_LAST, Look, Status, catch_up_seconds, judge

WINDOW_LOOKS = 10


class JudgedLag(msgspec.Struct, frozen=True):
    """A partition's lag, who has it (None: nobody), and what the lag means (see `streams.lag_window`)."""

    lag: PartitionLag
    owner: str | None
    status: Status
    catch_up_seconds: float


class GroupLag(msgspec.Struct, frozen=True):
    """A group's partitions; its status is the worst of theirs."""

    group: str
    partitions: list[JudgedLag]
    status: Status
    offsets: int
    seconds: float
    catch_up_seconds: float


class LagWatch:
    """Keeps the last looks at every partition of ingest's and adapt's groups."""

    def __init__(self, settings: Settings, reader: LagReader) -> None:
        self._settings, self._reader = settings, reader
        self._windows: dict[tuple[str, str, int], deque[Look]] = {}

    def look(self) -> list[GroupLag]:
        """Look once more. Raises ServiceError when no broker answers or a topic does not exist."""
        kafka, topics = self._settings.kafka, self._settings.topics
        return [
            self._look(kafka.ingest_group, topics.ingested),
            self._look(kafka.adapt_group, [topics.requests]),
        ]

    def _look(self, group: str, topics: Sequence[str]) -> GroupLag:
        found, has = self._reader.read(group, topics), owners(self._settings.kafka, group)
        now = time.monotonic()
        judged = []
        for each in found:
            window = self._window(each)
            window.append(Look(now, each.end - each.offsets, each.offsets))
            owner = has.get((each.topic, each.partition))
            judgement = judge(window, owned=owner is not None)
            judged.append(JudgedLag(each, owner, judgement.status, judgement.catch_up_seconds))
        return GroupLag(
            group=group,
            partitions=judged,
            status=max((each.status for each in judged), key=WORST_LAST.index),
            offsets=sum(each.offsets for each in found),
            seconds=max(each.seconds or 0.0 for each in found),
            catch_up_seconds=catch_up_seconds([self._window(each) for each in found]),
        )

    def _window(self, lag: PartitionLag) -> deque[Look]:
        return self._windows.setdefault((lag.group, lag.topic, lag.partition), deque(maxlen=WINDOW_LOOKS))
