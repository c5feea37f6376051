"""A stream of past events as columns of numbers, in order of time, and what each user had done before any event."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from innerloop.events import CODES
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY, PREVIOUS, SAME_VISIT_MS, Activity

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_OTHER = max(CODES.values()) + 1
_NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class StreamLog:
    """N events sorted by time, those of one millisecond shuffled. Users, items, sessions and categories are 0..count-1.

    `kinds` [N] are `events.CODES`. `sessions` and `categories` [N] are -1 where the data has none. `by_user` [N] lists
    the rows user by user in order of time, and `place` [N] says where each row stands in it.
    """

    users: Ints
    items: Ints
    kinds: Ints
    times: Ints
    sessions: Ints
    categories: Ints
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    category_names: Sequence[str]
    by_user: Ints
    place: Ints
    first: Ints  # [N] place of the first event of the row's user
    earlier: Ints  # [N] place behind the last event of the row's user that is strictly earlier than the row

    def __len__(self) -> int:
        return len(self.users)

    def before(self, rows: Ints, capacity: int, *, delay_ms: int = 0) -> tuple[Ints, Bools]:
        """Rows [Q, S] of the user's events strictly before each of `rows` [Q], newest first, and which exist.

        With a delay, only what is older than the row by more than that.
        """
        end = self.earlier[rows]
        if delay_ms:
            wanted = self.times[rows] - self.times[0] - delay_ms
            end = np.searchsorted(self._when, self.users[rows] * self._span + np.maximum(wanted, -1), "left")
            end = np.clip(end, self.first[rows], self.earlier[rows])
        at = end[:, None] - 1 - np.arange(capacity)
        there = at >= self.first[rows][:, None]
        return np.where(there, self.by_user[np.where(there, at, 0)], -1), there

    @cached_property
    def _when(self) -> Ints:
        """One rising number [N] per place of `by_user`: user first, then time."""
        when: Ints = self.times[self.by_user] - self.times[0] + self.users[self.by_user] * self._span
        return when

    @property
    def _span(self) -> int:
        return int(self.times[-1] - self.times[0]) + 2

    def support_sizes(self, rows: Ints) -> Ints:
        """How many events each row's user had strictly before it, [Q]."""
        return self.earlier[rows] - self.first[rows]

    def seen_before(self, rows: Ints) -> Bools:
        """Whether the user had an event with the row's item strictly before it, [Q]."""
        pair = self.users * len(self.item_ids) + self.items
        order = np.lexsort((self.times, pair))
        sorted_pair, sorted_time = pair[order], self.times[order]
        begins = np.concatenate(([True], sorted_pair[1:] != sorted_pair[:-1]))
        oldest = np.empty(len(self), np.int64)
        oldest[order] = sorted_time[np.maximum.accumulate(np.where(begins, np.arange(len(self)), 0))]
        return oldest[rows] < self.times[rows]

    def blocks(self, times: Ints, seconds: float) -> Iterator[tuple[int, Ints]]:
        """Cut moments at `times` [Q] (epoch ms) into blocks: what comes before each block, and its moments, in order.

        Before a block are the rows below the first number; the moments are positions in `times`.
        """
        if not len(times):
            return
        span = max(1, int(seconds * 1000))
        order = np.argsort(times, kind="stable")
        number = (times[order] - self.times[0]) // span
        for part in np.split(order, np.flatnonzero(np.diff(number)) + 1):
            begin = self.times[0] + (times[part[0]] - self.times[0]) // span * span
            yield int(np.searchsorted(self.times, begin, "left")), part

    def answered(self, rows: Ints) -> Ints:
        """When the service answers for the moments just before `rows`: at the user's event before, [Q] epoch ms."""
        before = self.by_user[np.maximum(self.earlier[rows] - 1, 0)]
        return np.where(self.earlier[rows] > self.first[rows], self.times[before], self.times[rows])

    def lists(self, rows: Ints, seconds: float) -> Iterator[tuple[int, Ints]]:
        """Blocks of the lists made for `rows` [Q], cut so that no list's block knows of the item to foresee too early.

        As `blocks` of `answered`. A scorer is told of the items in a block's support sets before it makes the block's
        lists. Where a user tries item after item, an item that nobody had met when one list was made is an example in
        the next: in one block the first list could hold it, so a block ends before such an item's first event.
        """
        answered = self.answered(rows)
        appears = self._appears[self.items[rows]]
        known = (appears <= answered) & (self.support_sizes(rows) > 0)  # the first of a user is answered at its time
        appears = np.where(known, _NEVER, appears)
        for upto, some in self.blocks(answered, seconds):
            first, end = 0, _NEVER
            for place, (made, new) in enumerate(zip(answered[some].tolist(), appears[some].tolist(), strict=True)):
                if made >= end:
                    yield upto, some[first:place]
                    first, end = place, _NEVER
                end = min(end, new)
            yield upto, some[first:]

    @cached_property
    def _appears(self) -> Ints:
        """When each item's first event is, [items] epoch ms."""
        found = np.full(len(self.item_ids), _NEVER)
        np.minimum.at(found, self.items, self.times)
        return found

    def within_visit(self, rows: Ints) -> Bools:
        """Whether the user's event before is at most `SAME_VISIT_MS` older, [Q]."""
        return (self.earlier[rows] > self.first[rows]) & (self.times[rows] - self.answered(rows) <= SAME_VISIT_MS)

    def activity(self, first: int, last: int) -> Activity:
        """What ingest tells of the events in rows first .. last - 1, with the log's item numbers."""
        rows = np.arange(first, last)
        before, there = self.before(rows, PREVIOUS)
        times = self.times[rows]
        near = np.logical_and.accumulate(there & (times[:, None] - self.times[before] <= SAME_VISIT_MS), 1)
        told = np.zeros(len(rows), ACTIVITY)
        told["time"], told["item"], told["type"] = times, self.items[rows], self.kinds[rows]
        told["previous"] = np.where(near, self.items[before], -1)
        return told

    def sets(self, support: Ints, weights: NDArray[np.float32]) -> SupportSets:
        """The support sets of rows [Q, S], newest first, -1 for none, with weights [kinds] by event type code."""
        there = support[:, ::-1] >= 0
        rows = support[:, ::-1][there]
        examples = np.zeros(len(rows), EXAMPLE)
        examples["time"], examples["item"], examples["type"] = self.times[rows], self.items[rows], self.kinds[rows]
        examples["weight"], examples["hash"] = weights[self.kinds[rows]], rows
        return SupportSets(np.concatenate(([0], np.cumsum(there.sum(1)))), examples)


def kind_weights(weights: Mapping[str, float]) -> NDArray[np.float32]:
    """The weight of each event type code; a type that `weights` doesn't name has weight 1."""
    return np.array([0.0, *(weights.get(name, 1.0) for name in CODES), 1.0], np.float32)


def in_time(times: Ints, seed: int) -> Ints:
    """Rows in order of their times [N], those of one time at random.

    The same for the same seed, and what comes later has no say in it.
    """
    return np.lexsort((np.random.default_rng(seed).random(len(times)), times))


def stream_of(table: pl.DataFrame, *, seed: int = 0) -> StreamLog:
    """Number an event table's (see event_table.py) users, items, sessions and categories. It must have a row."""
    times = table["event_time"].to_numpy()
    order = in_time(times, seed)
    user_ids, users = _numbered(table["user_id"])
    item_ids, items = _numbered(table["item_id"])
    kinds = np.array([CODES.get(kind, _OTHER) for kind in table["event_type"].to_list()], np.int64)
    users, times = users[order], times[order].astype(np.int64)
    by_user = np.lexsort((times, users))
    place = np.empty(len(users), np.int64)
    place[by_user] = np.arange(len(users))
    starts = np.searchsorted(users[by_user], np.arange(len(user_ids)))
    return StreamLog(
        users=users,
        items=items[order],
        kinds=kinds[order],
        times=times,
        sessions=_optional(table, "session_id")[order],
        categories=_optional(table, "category")[order],
        user_ids=user_ids,
        item_ids=item_ids,
        category_names=_names(table, "category"),
        by_user=by_user,
        place=place,
        first=starts[users],
        earlier=_earlier(users, times, by_user, place),
    )


def _earlier(users: Ints, times: Ints, by_user: Ints, place: Ints) -> Ints:
    """Events of one user in one millisecond all see what was before the first of them."""
    u, t = users[by_user], times[by_user]
    begins = np.concatenate(([True], (u[1:] != u[:-1]) | (t[1:] != t[:-1])))
    group_start = np.maximum.accumulate(np.where(begins, np.arange(len(u)), 0))
    return group_start[place]


def _numbered(column: pl.Series) -> tuple[list[str], Ints]:
    codes = column.cast(pl.String).rank("dense").cast(pl.Int64) - 1
    names = column.cast(pl.String).unique().sort().to_list()
    return names, codes.to_numpy()


def _names(table: pl.DataFrame, name: str) -> list[str]:
    return table[name].drop_nulls().unique().sort().to_list() if name in table.columns else []


def _optional(table: pl.DataFrame, name: str) -> Ints:
    if name not in table.columns:
        return np.full(table.height, -1, np.int64)
    return (table[name].rank("dense").cast(pl.Int64) - 1).fill_null(-1).to_numpy()
