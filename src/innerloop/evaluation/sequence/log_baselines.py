"""Baselines of `stream` that need more of an event than its place: its time, its category, its kind.

They count the training part, every item but each user's last, and of it only what is strictly earlier than the judged
item, to the millisecond: the training part by itself goes on until every other user's end. In a file without a clock
nothing is earlier or later, and they count all of it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl

from innerloop.config import SupportSettings
from innerloop.evaluation.baselines.candidate_lists import Lists
from innerloop.evaluation.baselines.popularity import PopularityInCategory, RecentCounts, for_everybody
from innerloop.evaluation.baselines.recents import ASIDE, CartedRecents
from innerloop.evaluation.outcome import Ints
from innerloop.evaluation.sequence.sequences import SequenceFile, Sequences
from innerloop.evaluation.stream.arms import ranks
from innerloop.events import CODES
from innerloop.learning.stream_log import StreamLog, stream_of

LAST_HOUR, IN_CATEGORY, CARTED = "popularity-1h", "popularity-in-category", CartedRecents.name
NO_CLOCK, NO_OWN_ITEMS = "the file has positions and no times", "what a user has had is left out of every list"
_AT_ONCE = 400  # moments, for the memory that their lists need


def reasons_against(file: SequenceFile, *, own_items: bool) -> dict[str, str]:
    """Why each of these baselines is not in the table; those that aren't named here are."""
    found = {}
    if not file.clock:
        found[LAST_HOUR] = NO_CLOCK
    if file.events["category"].is_null().all():
        found[IN_CATEGORY] = "the file names no categories"
    if not own_items:
        found[CARTED] = NO_OWN_ITEMS
    elif not file.events["event_type"].is_in([name for name, code in CODES.items() if code in ASIDE]).any():
        found[CARTED] = "the file has no carts and no favorites"
    return found


def list_ranks(file: SequenceFile, users: Ints, *, own_items: bool) -> dict[str, Ints]:
    """The rank of each user's last item by each of the baselines that apply; the catalogue's size if not on the list.

    Without `own_items` what a user has had is left out of the lists.
    """
    training, left_out = _Training.of(file), reasons_against(file, own_items=own_items)
    arms = {name: make(training.log) for name, make in _MAKERS.items() if name not in left_out}
    targets = training.numbers[file.sequences.take(users).last()]
    found = {name: np.full(len(users), file.sequences.catalogue) for name in arms}
    times, shown = file.ends[users] if file.clock else np.ones(len(users), np.int64), 0
    for upto, some in training.moments(times):
        support, own = training.support(users[some]), None if own_items else training.own(users[some])
        for name, arm in arms.items():
            arm.observe(shown, upto)
            items, scores = arm.candidates(times[some], support)
            place = ranks(items, scores, np.where(targets[some] >= 0, targets[some], -2), own)
            found[name][some] = np.where(place > 0, place, file.sequences.catalogue)
        shown = upto
    return found


class _Arm(Protocol):
    """Names items for moments at one time [Q], of whose users the rows [Q, S] of the log are known, newest first."""

    def observe(self, first: int, last: int, /) -> None: ...

    def candidates(self, times: Ints, support: Ints, /) -> Lists: ...


class _LastHour:
    """The items with most events in the hour before, asked at times that are no row's of the log."""

    def __init__(self, log: StreamLog) -> None:
        self._counts = RecentCounts(log)

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)

    def candidates(self, times: Ints, support: Ints) -> Lists:
        del support
        self._counts.forget(int(times.min()))
        return for_everybody(self._counts.top(), len(times))


# Of the moments the two of `stream` look only at how many they are.
_MAKERS: Mapping[str, Callable[[StreamLog], _Arm]] = {
    LAST_HOUR: _LastHour,
    IN_CATEGORY: PopularityInCategory,
    CARTED: CartedRecents,
}


@dataclass(frozen=True)
class _Training:
    """The training part as a log, and where it has what the sequences number otherwise."""

    before: Sequences
    log: StreamLog
    rows: Ints  # of the log, one for each item of `before`
    numbers: Ints  # [catalogue], the log's number of each item, -1 for none

    @classmethod
    def of(cls, file: SequenceFile) -> "_Training":
        before = file.sequences.without_last(1)
        table = file.events.filter(file.sequences.recency > 0).with_columns(
            user_id=pl.Series(before.users).cast(pl.String),
            item_id=pl.Series(before.items).cast(pl.String),
            # A log is shuffled where times are equal: by a session of its own each event is found again.
            session_id=pl.int_range(pl.len()),
        )
        log = stream_of(table)
        numbers = np.full(before.catalogue, -1)
        numbers[np.array([int(item) for item in log.item_ids])] = np.arange(len(log.item_ids))
        return cls(before, log, np.argsort(log.sessions), numbers)

    def moments(self, times: Ints) -> Iterator[tuple[int, Ints]]:
        """Before which row of the log moments at `times` [Q] are, and which of them, one time after the other."""
        for upto, some in self.log.blocks(times, 0.0):
            for part in np.split(some, range(_AT_ONCE, len(some), _AT_ONCE)):
                yield upto, part

    def support(self, users: Ints) -> Ints:
        """The rows of the log with each user's newest items, [Q, S], newest first, -1 for none."""
        at = self.before.starts[users + 1][:, None] - 1 - np.arange(SupportSettings().capacity)
        there = at >= self.before.starts[users][:, None]
        return np.where(there, self.rows[np.where(there, at, 0)], -1)

    def own(self, users: Ints) -> Ints:
        """The log's numbers of all that each user has had, [Q, H], -1 for none."""
        some = self.before.take(users)
        own = np.full((len(some), int(some.lengths.max(initial=1))), -1)
        own[some.users, some.recency] = self.numbers[some.items]
        return own
