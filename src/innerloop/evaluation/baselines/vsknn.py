"""Vector session neighbours (V-SkNN; Ludewig and Jannach 2018, section 2.3), kept up to date event by event."""

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import (
    Lists,
    ScoreSums,
    best_of_each,
    first_of_each,
    ragged,
)
from innerloop.evaluation.baselines.popularity import Counts, below_one
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.stream_log import StreamLog

_LAST = 10  # of the visit's items that count: the weight falls linearly by a tenth a step
_SAMPLE = 500  # newest visits with any of these items
_NEIGHBOURS = 100  # most similar of them
_LENGTH = 32  # newest items of a neighbour that count
_LEAST = 1e-3  # times popularity: less than any difference between two scores, which are made of tenths of tenths


class SessionNeighbours:
    """Items of past visits that are like the user's last one, then what is popular.

    A visit's similarity is the sum of the weights of the items it shares, 1 for the user's last, 0.9 for the one
    before and so on; an item's score is the sum over the neighbours that have it of similarity times the weight of the
    neighbour's newest shared item.
    """

    name = "vsknn"

    def __init__(self, log: StreamLog, visits: Visits) -> None:
        self._log = log
        self._visits = visits
        new = np.flatnonzero(visits.is_new)
        self._by_item = new[np.argsort(log.items[new], kind="stable")]  # rows item by item, in order of time
        self._item_start = np.searchsorted(log.items[self._by_item], np.arange(len(log.item_ids)))
        self._item_shown = np.zeros(len(log.item_ids), np.int64)
        self._visit_shown = np.zeros(len(visits.start), np.int64)
        self._counts = Counts(log)
        self._sums = ScoreSums(len(log.item_ids))

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)
        np.add.at(self._item_shown, self._log.items[first:last][self._visits.is_new[first:last]], 1)
        np.add.at(self._visit_shown, self._visits.of[first:last], 1)

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        count = len(rows)
        moment, item, similarity = self._votes(support)
        popular, _ = self._counts.top()
        return self._sums.lists(
            np.concatenate((moment, np.repeat(np.arange(count), len(popular)))),
            np.concatenate((item, np.tile(popular, count))),
            np.concatenate((similarity, np.zeros(count * len(popular)))),
            count,
            bonus=_LEAST * below_one(self._counts.counts),
        )

    def scores_of(self, rows: Ints, support: Ints, items: Ints) -> Floats:
        """Scores [Q, P] of `items` [Q, P], -1 for none; what is in no neighbour has its popularity's."""
        del rows
        moment, item, similarity = self._votes(support)
        width = len(self._log.item_ids) + 1  # the last for item -1
        pairs, inverse = np.unique(moment * width + item, return_inverse=True)
        sums = np.append(np.bincount(inverse, similarity, len(pairs)), 0.0)
        asked = np.arange(len(items))[:, None] * width + np.where(items >= 0, items, width - 1)
        at = np.searchsorted(pairs, asked)
        there = np.append(pairs, -1)[at] == asked
        popular = np.append(_LEAST * below_one(self._counts.counts), 0.0)
        found: Floats = np.where(there, sums[at], 0.0) + popular[items]
        return found

    def _votes(self, support: Ints) -> tuple[Ints, Ints, Floats]:
        """Items of each moment's neighbours: (moment [E], item [E], similarity [E])."""
        moment, visit, similarity = self._neighbours(support)
        length = np.minimum(self._visit_shown[visit], _LENGTH)
        row = self._log.by_user[ragged(self._visits.start[visit] + self._visit_shown[visit] - length, length)]
        once = self._visits.is_new[row]
        return np.repeat(moment, length)[once], self._log.items[row[once]], np.repeat(similarity, length)[once]

    def _neighbours(self, support: Ints) -> tuple[Ints, Ints, Floats]:
        """Neighbours of each moment: (moment [E], visit [E], similarity times weight of the newest shared item [E])."""
        moment, row, weight = self._sharing(support)
        key = moment * len(self._visits.start) + self._visits.of[row]
        order = np.argsort(key, kind="stable")  # within a visit the newest shared item stays first
        key = key[order]
        begins = np.flatnonzero(np.concatenate((np.ones(min(1, len(key)), np.bool_), key[1:] != key[:-1])))
        if not len(begins):
            return moment, row, weight
        moment, visit = np.divmod(key[begins], len(self._visits.start))
        similarity = np.add.reduceat(weight[order], begins)
        newest = np.maximum.reduceat(row[order], begins)
        sample = _kept(moment, np.arange(len(begins)), newest.astype(np.float64), len(support), _SAMPLE)
        by_recency = similarity + newest / (1e4 * len(self._log))  # of equally similar ones the newest
        kept = _kept(moment[sample], sample, by_recency[sample], len(support), _NEIGHBOURS)
        return moment[kept], visit[kept], (similarity * weight[order][begins])[kept]

    def _sharing(self, support: Ints) -> tuple[Ints, Ints, Floats]:
        """Rows with an item of the user's visit, one of each other visit: (moment [E], row [E], weight [E])."""
        last = self._visits.newest(support, _LAST)
        own = np.where(last >= 0, self._log.items[last], -1)
        moment, step = np.nonzero(first_of_each(own))
        item = own[moment, step]
        length = np.minimum(self._item_shown[item], _SAMPLE)
        row = self._by_item[ragged(self._item_start[item] + self._item_shown[item] - length, length)]
        moment, step = np.repeat(moment, length), np.repeat(step, length)
        other = self._visits.of[row] != self._visits.of[support[moment, 0]]
        return moment[other], row[other], 1.0 - step[other] / _LAST


def _kept(moments: Ints, entries: Ints, scores: Floats, count: int, width: int) -> Ints:
    """The `width` entries of each moment with the highest scores."""
    kept, _ = best_of_each(moments, entries, scores, count, width)
    return kept[kept >= 0]
