"""Waiting until a run has settled: every group has committed to its end, and nothing moves any more."""

import time
from typing import Any

from innerloop.config import Settings
from innerloop.errors import InnerloopError
from innerloop.streams.whole_topic import committed_offsets

_TIMES = 10


def settle(settings: Settings, seconds: float, *, watched: bool = True, pause: float = 0.5) -> list[str]:
    """Wait for as long as it moves; a sentence when for `seconds` nothing has, or after ten times as many.

    `watched`: the scores have been looked through, too.
    """
    topics, kafka = settings.topics, settings.kafka
    groups = {
        kafka.ingest_group: list(topics.ingested),
        kafka.adapt_group: [topics.requests],
    }
    if watched:
        groups[kafka.adapt_group + "-watch"] = [topics.recommendations, topics.ads]
    before: dict[str, Any] = {}
    moved, until = time.monotonic(), time.monotonic() + _TIMES * seconds
    while time.monotonic() < min(moved + seconds, until):
        now = _looked_at(settings, groups)
        if now and now == before and not _behind(now):
            return []
        if now and now != before:
            before, moved = now, time.monotonic()
        time.sleep(pause)
    return [f"Not settled: {'; '.join(_behind(before)) or 'it still moves'}."]


def _looked_at(settings: Settings, groups: dict[str, list[str]]) -> dict[str, Any]:
    try:
        return {group: committed_offsets(settings, group, names) for group, names in groups.items()}
    except InnerloopError:
        return {}


def _behind(places: dict[str, Any]) -> list[str]:
    return [
        f"{group} stands at {offset} of {end} of {topic}[{partition}]"
        for group, each in places.items()
        for (topic, partition), (offset, end) in each.items()
        if offset != end
    ]
