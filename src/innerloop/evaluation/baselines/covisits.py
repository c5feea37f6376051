"""What other users visited next to the user's last items, and what everybody visits just now."""

from collections.abc import Iterator

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import Lists, ScoreSums
from innerloop.evaluation.baselines.pair_counts import PairCounts
from innerloop.evaluation.baselines.popularity import RecentCounts
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.stream_log import StreamLog

_APART = 5  # steps between two items of a visit that still go together
_LAST = 3  # of the user's items that are looked up
_STEP_WEIGHT = 0.7
_AT_ONCE = 200_000  # events taken in, for the memory that their pairs need
_COVISITS, _POPULARITY = 3.0, 0.5


class Covisits:
    """Co-visits of the visit's last items, as shares of all co-visits of each, and the last hour's events."""

    name = "covisits-1h"

    def __init__(self, log: StreamLog, visits: Visits) -> None:
        self._log = log
        self._visits = visits
        self._pairs = PairCounts(len(log.item_ids), len(log.item_ids))
        self._hour = RecentCounts(log)
        self._sums = ScoreSums(len(log.item_ids))

    def observe(self, first: int, last: int) -> None:
        self._hour.observe(first, last)
        for new, old, _ in pairs_of(self._log, self._visits, first, last, apart=_APART):
            self._pairs.add(np.concatenate((new, old)), np.concatenate((old, new)), np.ones(2 * len(new)))

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        self._hour.forget(int(self._log.times[rows].min()))
        last = self._visits.newest(support, _LAST)
        moment, step = np.nonzero(last >= 0)
        items = self._log.items[last[moment, step]]
        found, neighbours, counts = self._pairs.of(items)
        share = counts / self._pairs.totals[items[found]]
        return with_popular(
            self._sums,
            (moment[found], neighbours, _COVISITS * _STEP_WEIGHT ** step[found] * share),
            self._hour,
            len(rows),
        )


def pairs_of(log: StreamLog, visits: Visits, first: int, last: int, *, apart: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Items [E] in rows first .. last - 1, other items [E] up to `apart` steps before in the visit, the steps [E]."""
    for begin in range(first, last, _AT_ONCE):
        rows = np.arange(begin, min(last, begin + _AT_ONCE))
        before = visits.previous(rows, apart)
        at, back = np.nonzero(before >= 0)
        new, old = log.items[rows[at]], log.items[before[at, back]]
        other = new != old
        yield new[other], old[other], back[other] + 1


def with_popular(sums: ScoreSums, entries: tuple[Ints, Ints, Floats], hour: RecentCounts, count: int) -> Lists:
    """Lists of `entries` (moments, items, scores), each item's score raised by its share of the last hour's highest."""
    popular, _ = hour.top()
    moments, items, scores = entries
    return sums.lists(
        np.concatenate((moments, np.repeat(np.arange(count), len(popular)))),
        np.concatenate((items, np.tile(popular, count))),
        np.concatenate((scores, np.zeros(count * len(popular)))),
        count,
        bonus=_POPULARITY * hour.counts / max(1.0, hour.counts.max()),
    )
