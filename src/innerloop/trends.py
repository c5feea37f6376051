"""What everybody does just now: live popularity of items, and which items follow each other. Pure numpy, no I/O.

Both are sums over recent activity in which an event's weight halves every half-life. Weights grow forward in time
instead of old sums being shrunk (forward decay; Cormode et al. 2009), so taking in an event costs the same at any size
of the catalogue. Folding the same activity in any order gives the same sums, but for rounding and for which rare
neighbour keeps the last place of a full row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from innerloop.support import SupportSets

PREVIOUS = 3
"""How many of the user's items before an event go with it."""
SAME_VISIT_MS = 1_800_000
"""Items further apart than this don't belong together: half an hour, the usual end of a session."""
ACTIVITY = np.dtype(
    [("time", "<i8"), ("item", "<i4"), ("type", "<i4"), ("previous", "<i4", (PREVIOUS,)), ("pad", "<i4")]
)
"""One event: time (epoch ms), item number, event type code, the user's items just before, newest first, -1 for none."""

HALF_LIVES = (900.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0)
"""Of popularity, in seconds."""
PAIR_HALF_LIVES = (7_200.0, 604_800.0)
POPULAR = 40
NEIGHBOURS = 64
"""Places in an item's row of neighbours: who is beyond is forgotten, the least heavy first."""
EPSILON = 1e-6
"""What is added to a share before its logarithm is taken."""
_STEP_WEIGHT = 0.7
_AT_ONCE = 50_000  # events folded in together: bounds the memory that a warm-up takes
_NEVER = np.iinfo(np.int64).max
_RESCALE_AT = 40.0  # halvings: far below what float32 can hold

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Activity = NDArray[np.void]


def activity_of(sets: SupportSets, fresh: NDArray[np.bool_], now: int) -> Activity:
    """What the `fresh` [N] examples of some support sets tell the others.

    What is dated later than `now` (epoch ms) is told as of then: by forward decay it would outweigh all that happens
    until its time has come.
    """
    at = np.flatnonzero(fresh)
    begins = sets.starts[np.searchsorted(sets.starts, at, "right") - 1]
    told = np.zeros(len(at), ACTIVITY)
    for name in ("time", "item", "type"):
        told[name] = sets.examples[name][at]
    before = at[:, None] - 1 - np.arange(PREVIOUS)
    there = before >= begins[:, None]
    earlier = sets.examples[np.where(there, before, 0)]
    near = np.logical_and.accumulate(there & (told["time"][:, None] - earlier["time"] <= SAME_VISIT_MS), 1)
    told["previous"] = np.where(near, earlier["item"], -1)
    told["time"] = np.minimum(told["time"], now)
    return told


@dataclass
class _Clock:
    """Weights of events by forward decay. `zero` (ms) is where the weight is 1."""

    half_lives: NDArray[np.float64]  # [H] seconds
    zero: int

    def weights(self, times: Ints) -> NDArray[np.float64]:  # [N, H]
        return np.exp2((times[:, None] - self.zero) / (1000.0 * self.half_lives))

    def due(self, time: int) -> bool:
        return bool((time - self.zero) / (1000.0 * self.half_lives.min()) > _RESCALE_AT)

    def restart(self, time: int) -> NDArray[np.float64]:
        """Move `zero` to `time`; the factors [H] that sums so far must be multiplied with."""
        factors = np.exp2((self.zero - time) / (1000.0 * self.half_lives))
        self.zero = time
        return factors


class Popularity:
    """Decayed counts of events by item, for several half-lives at once, and when each item was first seen."""

    def __init__(self, zero: int) -> None:
        self._clock = _Clock(np.array(HALF_LIVES), zero)
        self._counts = np.zeros((len(HALF_LIVES), 1024))  # by half-life: `most` walks along the items
        self._totals = np.zeros(len(HALF_LIVES))
        self.most: Ints = np.empty(0, np.int64)
        """The items that are among the `POPULAR` most popular by any of the half-lives."""
        self.first_seen = np.full(1024, _NEVER)  # [N] epoch ms
        self._asked = 0
        self._logs: Floats | None = None
        """Of all items, once more have been asked for since the last `observe` than there are."""

    def observe(self, items: Ints, times: Ints) -> None:
        """Count events of `items` [N] at `times` [N] (epoch ms)."""
        self._asked, self._logs = 0, None
        self._fit(int(items.max(initial=0)))
        if self._clock.due(newest := int(times.max())):
            factors = self._clock.restart(newest)
            self._counts *= factors[:, None]
            self._totals *= factors
        weights = self._clock.weights(times)
        for half_life in range(len(HALF_LIVES)):
            np.add.at(self._counts[half_life], items, weights[:, half_life])
        self._totals += weights.sum(0)
        np.minimum.at(self.first_seen, items, times)
        # What wasn't met can't rise: decay keeps the order of all others.
        self.most = self._most(np.union1d(self.most, items))

    def shares(self, items: Ints) -> Floats:
        """The share of all events that are of `items` [..], by half-life, [.., H]."""
        known = (items >= 0) & (items < len(self.first_seen))
        counts = np.moveaxis(self._counts[:, np.where(known, items, 0)], 0, -1) * known[..., None]
        shares: Floats = (counts / np.maximum(self._totals, 1e-30)).astype(np.float32)
        return shares

    def log_shares(self, items: Ints, count: int) -> Floats:
        """Logarithms of the shares of `items` [M] among `count`, by half-life, [H, M]."""
        self._asked += len(items)
        if self._logs is None or self._logs.shape[1] < count:
            if self._asked <= count:
                return _logarithms(self.shares(items))
            # One half-life after the other in memory: `take` would copy the whole table each time to have it so.
            self._logs = np.ascontiguousarray(_logarithms(self.shares(np.arange(count))))
        return self._logs.take(items, axis=1)

    def ages(self, items: Ints, now: Ints) -> Floats:
        """Seconds since `items` [..] were first seen, at `now` [..] (epoch ms), at least 0; inf if they never were."""
        known = (items >= 0) & (items < len(self.first_seen))
        first = np.where(known, self.first_seen[np.where(known, items, 0)], _NEVER)
        ages: Floats = np.where(first == _NEVER, np.inf, np.maximum(now - first, 0) / 1000.0).astype(np.float32)
        return ages

    def _most(self, items: Ints) -> Ints:
        """Those of `items` that are among the `POPULAR` most popular of them by any of the half-lives."""
        if len(items) <= POPULAR:
            return items
        best = np.argpartition(self._counts[:, items], -POPULAR, axis=1)[:, -POPULAR:]
        return items[np.unique(best)]

    def _fit(self, item: int) -> None:
        extra = max(item + 1, 2 * len(self.first_seen)) - len(self.first_seen)
        if item >= len(self.first_seen):
            self._counts = np.pad(self._counts, ((0, 0), (0, extra)))
            self.first_seen = np.pad(self.first_seen, (0, extra), constant_values=_NEVER)


def _logarithms(shares: Floats) -> Floats:  # [M, H] to [H, M]
    found: Floats = np.log(shares.T + np.float32(EPSILON))
    return found


class CoVisits:
    """For each item the items most often met near it in a visit, and how often, by direction and half-life.

    The weights of a pair are, in this order: after (short half-life), before (short), after (long), before (long).
    """

    WEIGHTS = 2 * len(PAIR_HALF_LIVES)

    def __init__(self, zero: int) -> None:
        self._clock = _Clock(np.array(PAIR_HALF_LIVES), zero)
        self._row_of = np.full(1024, -1, np.int64)
        self._rows = 0
        self._neighbours = np.full((256, NEIGHBOURS), -1, np.int32)
        self._sums = np.zeros((256, NEIGHBOURS, self.WEIGHTS), np.float32)

    def observe(self, items: Ints, previous: Ints, times: Ints) -> None:
        """Count, for `items` [N] at `times` [N], the pairs with each of `previous` [N, P], -1 for none."""
        if self._clock.due(newest := int(times.max())):
            self._sums *= np.tile(self._clock.restart(newest), (2, 1)).T.reshape(-1).astype(np.float32)
        n, step = np.nonzero((previous >= 0) & (previous != items[:, None]))
        if not len(n):
            return
        weights = self._clock.weights(times[n]) * (_STEP_WEIGHT**step)[:, None]  # [P, halves]
        there, here = previous[n, step], items[n]
        nothing = np.zeros_like(weights)
        forward = np.stack([weights, nothing], 2).reshape(len(n), -1)
        backward = np.stack([nothing, weights], 2).reshape(len(n), -1)
        self._add(np.concatenate([there, here]), np.concatenate([here, there]), np.concatenate([forward, backward]))

    def of(self, items: Ints) -> tuple[NDArray[np.int32], Floats]:
        """Neighbours [.., K] of `items` [..], -1 for none, and the weights of those that there are, row by row, [N, 4].

        A weight is told as its share of all weights of its item's row.
        """
        known = (items >= 0) & (items < len(self._row_of))
        rows = np.where(known, self._row_of[np.where(known, items, 0)], -1)
        found = np.where((rows >= 0)[..., None], self._neighbours[rows], -1)
        item, column = np.nonzero(found.reshape(-1, NEIGHBOURS) >= 0)
        sums: Floats = self._sums[rows.reshape(-1)[item], column]
        begins = np.flatnonzero(np.diff(item, prepend=-1))
        totals = np.maximum(np.add.reduceat(sums, begins) if len(begins) else sums, np.float32(1e-30))
        return found, sums / np.repeat(totals, np.diff(begins, append=len(item)), 0)

    def _add(self, left: Ints, right: Ints, weights: NDArray[np.float64]) -> None:
        """Add `weights` [P, 4] to the pairs left -> right, each pair once."""
        span = int(right.max()) + 1
        keys, inverse = np.unique(left * span + right, return_inverse=True)
        summed = np.stack([np.bincount(inverse, column) for column in weights.T], 1).astype(np.float32)
        left, right = keys // span, keys % span
        rows = self._rows_for(left)
        match = self._neighbours[rows] == right[:, None]  # [P, K]
        there = match.any(1)
        self._sums[rows[there], match[there].argmax(1)] += summed[there]
        self._admit(rows[~there], right[~there], summed[~there])

    def _admit(self, rows: Ints, neighbours: Ints, sums: Floats) -> None:
        """Give new neighbours the places of less heavy ones, judged by the long half-life; `rows` are sorted.

        The heaviest newcomer of a row gets a place in any case, or a full row would stay as it is for good. The others
        have to be heavier than what they replace: many rare ones at once mustn't drive out those that are met often.
        """
        if not len(rows):
            return
        weight = sums[:, 2:].sum(1)
        order = np.lexsort((-weight, rows))
        rows, neighbours, sums, weight = rows[order], neighbours[order], sums[order], weight[order]
        begins = np.concatenate(([True], rows[1:] != rows[:-1]))
        starts = np.flatnonzero(begins)
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
        held = self._sums[rows[begins]][..., 2:].sum(-1)  # [R, K]
        of_row, column = np.cumsum(begins) - 1, np.minimum(nth, NEIGHBOURS - 1)
        place = np.argsort(held, 1, kind="stable")[of_row, column]
        let_in = (nth == 0) | ((nth < NEIGHBOURS) & (weight > held[of_row, place]))
        where = rows[let_in], place[let_in]
        self._neighbours[where] = neighbours[let_in]
        self._sums[where] = sums[let_in]

    def _rows_for(self, items: Ints) -> Ints:
        """Rows of sorted `items`, made where there is none."""
        highest = int(items.max())
        if highest >= len(self._row_of):
            grown = np.full(max(highest + 1, 2 * len(self._row_of)), -1, np.int64)
            grown[: len(self._row_of)] = self._row_of
            self._row_of = grown
        new = np.unique(items[self._row_of[items] < 0])
        if self._rows + len(new) > len(self._neighbours):
            size = max(self._rows + len(new), 2 * len(self._neighbours))
            self._neighbours = np.concatenate(
                [self._neighbours, np.full((size - len(self._neighbours), NEIGHBOURS), -1, np.int32)]
            )
            extra = np.zeros((size - len(self._sums), NEIGHBOURS, self.WEIGHTS), np.float32)
            self._sums = np.concatenate([self._sums, extra])
        self._row_of[new] = self._rows + np.arange(len(new))
        self._rows += len(new)
        return self._row_of[items]


class Trends:
    """Popularity and co-visits of one stream of activity."""

    def __init__(self, zero: int = 0) -> None:
        self.popularity, self.co_visits = Popularity(zero), CoVisits(zero)
        self.newest = 0
        """Time of the newest event folded in, epoch ms."""

    def observe(self, activity: Activity) -> None:
        """Fold in events, `ACTIVITY` [N]."""
        for first in range(0, len(activity), _AT_ONCE):
            some = activity[first : first + _AT_ONCE]
            items, times = some["item"].astype(np.int64), some["time"]
            self.popularity.observe(items, times)
            self.co_visits.observe(items, some["previous"].astype(np.int64), times)
            self.newest = max(self.newest, int(times.max()))
