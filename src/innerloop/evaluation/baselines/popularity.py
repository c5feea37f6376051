"""What is popular: over all time, in the last hour, in the category that the user looks at."""

from collections.abc import Sequence

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import WIDTH, Lists, ScoreSums, largest
from innerloop.evaluation.baselines.pair_counts import PairCounts
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.stream_log import StreamLog

HOUR_MS = 3_600_000


class Counts:
    """Events by item so far, and the items that have most."""

    def __init__(self, log: StreamLog, kinds: Sequence[int] | None = None) -> None:
        self._log = log
        self._kinds = kinds
        self.counts: Floats = np.zeros(len(log.item_ids))
        self._top: Ints = np.empty(0, np.int64)

    def observe(self, first: int, last: int) -> None:
        """Count rows first .. last - 1, those of the wanted kinds."""
        items = self._wanted(first, last)
        np.add.at(self.counts, items, 1.0)
        # Counts only grow: nothing but what was at the top or has just been counted can be there now.
        pool = np.unique(np.concatenate((self._top, items)))
        self._top = pool[largest(self.counts[pool], WIDTH)]

    def top(self) -> tuple[Ints, Floats]:
        """The WIDTH items with most events and how many, in no order; only such with any."""
        return self._top, self.counts[self._top]

    def _wanted(self, first: int, last: int) -> Ints:
        items = self._log.items[first:last]
        return items if self._kinds is None else items[np.isin(self._log.kinds[first:last], self._kinds)]


class RecentCounts(Counts):
    """Events by item within a window of time that ends now."""

    def __init__(self, log: StreamLog, window_ms: int = HOUR_MS, kinds: Sequence[int] | None = None) -> None:
        super().__init__(log, kinds)
        self._window_ms = window_ms
        self._oldest = self._newest = 0

    def observe(self, first: int, last: int) -> None:
        np.add.at(self.counts, self._wanted(first, last), 1.0)
        self._newest = last

    def forget(self, now: int) -> None:
        """Uncount what is older than the window at `now` (epoch ms), which never goes back."""
        shown = self._log.times[self._oldest : self._newest]
        oldest = self._oldest + int(np.searchsorted(shown, now - self._window_ms, "left"))
        np.subtract.at(self.counts, self._wanted(self._oldest, oldest), 1.0)
        self._oldest = oldest

    def top(self) -> tuple[Ints, Floats]:
        there = np.flatnonzero(self.counts)
        there = there[largest(self.counts[there], WIDTH)]
        return there, self.counts[there]


class Popularity:
    """Everybody gets the items with most events so far."""

    name = "popularity"

    def __init__(self, log: StreamLog, kinds: Sequence[int] | None = None) -> None:
        self._counts = Counts(log, kinds)

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        del support
        return for_everybody(self._counts.top(), len(rows))


class PopularityLastHour:
    """Everybody gets the items with most events in the hour before."""

    name = "popularity-1h"

    def __init__(self, log: StreamLog, kinds: Sequence[int] | None = None) -> None:
        self._log = log
        self._counts = RecentCounts(log, kinds=kinds)

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        del support
        self._counts.forget(int(self._log.times[rows].min()))
        return for_everybody(self._counts.top(), len(rows))


class PopularityInCategory:
    """The items with most events in the category of the user's last event, then those with most events at all."""

    name = "popularity-in-category"

    def __init__(self, log: StreamLog, kinds: Sequence[int] | None = None) -> None:
        self._log = log
        self._kinds = kinds
        self._counts = Counts(log, kinds)
        categories = int(log.categories.max(initial=-1)) + 1
        self._by_category = PairCounts(categories, len(log.item_ids))
        self._sums = ScoreSums(len(log.item_ids))

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)
        categories, items = self._log.categories[first:last], self._log.items[first:last]
        counted = categories >= 0
        if self._kinds is not None:
            counted &= np.isin(self._log.kinds[first:last], self._kinds)
        self._by_category.add(categories[counted], items[counted], np.ones(int(counted.sum())))

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        last = support[:, 0]
        category = np.where(last >= 0, self._log.categories[last], -1)
        known = np.flatnonzero(category >= 0)
        which, items, counts = self._by_category.of(category[known])
        everywhere, _ = self._counts.top()
        moments = np.concatenate((known[which], np.repeat(np.arange(len(rows)), len(everywhere))))
        named = np.concatenate((items, np.tile(everywhere, len(rows))))
        scores = np.concatenate((counts, np.zeros(len(rows) * len(everywhere))))
        return self._sums.lists(moments, named, scores, len(rows), bonus=below_one(self._counts.counts))


def for_everybody(top: tuple[Ints, Floats], moments: int) -> Lists:
    """The same list for all moments."""
    items, scores = top
    return np.tile(items, (moments, 1)), np.tile(scores, (moments, 1))


def where_known(known: Bools, lists: Lists, top: tuple[Ints, Floats]) -> Lists:
    """The next of `lists` for each moment that `known` [Q] marks, and for the others what is at the top."""
    items, scores = for_everybody(top, len(known))
    width = max(items.shape[1], lists[0].shape[1])
    items = np.pad(items, ((0, 0), (0, width - items.shape[1])), constant_values=-1)
    scores = np.pad(scores, ((0, 0), (0, width - scores.shape[1])))
    items[known], scores[known] = -1, 0.0
    items[known, : lists[0].shape[1]], scores[known, : lists[1].shape[1]] = lists
    return items, scores


def below_one(counts: Floats) -> Floats:
    """Counts scaled to [0, 1): what fills a list up must not overtake what is whole numbers apart."""
    return counts / (1.0 + float(counts.max(initial=0.0)))
