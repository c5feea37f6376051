"""Item neighbours by sequential rules (SR; Ludewig and Jannach 2018, section 2.2)."""

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import Lists, ScoreSums
from innerloop.evaluation.baselines.covisits import pairs_of
from innerloop.evaluation.baselines.pair_counts import PairCounts
from innerloop.evaluation.baselines.popularity import Counts, below_one
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.outcome import Ints
from innerloop.learning.stream_log import StreamLog

_APART = 10  # steps in a visit that a rule may span, as published
_WHOLE = 2520.0  # least common multiple of 1 .. 10: sums of rules become whole numbers, which popularity can't overtake


class SequentialRules:
    """What came after the user's last item in visits so far, a rule of n steps weighing 1 / n; then what is popular."""

    name = "item-knn"

    def __init__(self, log: StreamLog, visits: Visits) -> None:
        self._log = log
        self._visits = visits
        self._rules = PairCounts(len(log.item_ids), len(log.item_ids))
        self._counts = Counts(log)
        self._sums = ScoreSums(len(log.item_ids))

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)
        for new, old, steps in pairs_of(self._log, self._visits, first, last, apart=_APART):
            self._rules.add(old, new, 1.0 / steps)

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        known = np.flatnonzero(support[:, 0] >= 0)
        which, items, weights = self._rules.of(self._log.items[support[known, 0]])
        popular, _ = self._counts.top()
        return self._sums.lists(
            np.concatenate((known[which], np.repeat(np.arange(len(rows)), len(popular)))),
            np.concatenate((items, np.tile(popular, len(rows)))),
            np.concatenate((weights * _WHOLE, np.zeros(len(rows) * len(popular)))),
            len(rows),
            bonus=below_one(self._counts.counts),
        )
