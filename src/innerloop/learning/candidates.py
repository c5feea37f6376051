"""Which items could be a task's next, and what is known of each: the first stage of a list, before it is ranked.

Candidates come from five sources, each bounded: the task's own items, what others met near its newest items, what is
popular just now, what is popular in the categories of its newest items, and what the head likes best. Of each
candidate the same features are told, whichever source it came from.

Everything is told as of the task's newest event, never as of the clock on the wall: the same state gives the same list.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from innerloop.events import CODES
from innerloop.support import SupportSets, ranges
from innerloop.trends import EPSILON, HALF_LIVES, CoVisits, Trends

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NEAR = 5
"""Newest items whose neighbours are candidates."""
CATEGORIES, POPULAR_IN_CATEGORY, LIKED = 3, 30, 50
"""Newest items whose categories give candidates, how many each gives, and how many the head does."""
_LAST = 0.6  # weight of the item one step further back

FEATURES: tuple[str, ...] = (
    *(f"log_share_{int(h)}s" for h in HALF_LIVES),
    "log_age",
    "log_after_short",
    "log_before_short",
    "log_after_long",
    "log_before_long",
    "log_after_last",
    "own_recency",
    "own_log_step",
    "own_count",
    "own_weight",
    "own_kept",
    "own_bought",
    "own_log_age",
    "category_share",
    "category_is_last",
    "head",
    "head_lift",
    "log_size",
    "log_gap",
    # Those of a release with a sequence model, and 0 without: a ranker of fewer features reads those before them.
    "sequence",
    "followers",
    "followers_share",
    "foreseen_only",
)
_FORESEEN_ONLY = FEATURES.index("foreseen_only")
PLAIN = FEATURES.index("sequence")
"""How many features there are without a sequence model."""


@dataclass(frozen=True)
class Candidates:
    """M candidates of T tasks: task t has `places[starts[t]:starts[t + 1]]`."""

    starts: Ints  # [T + 1]
    places: Ints  # [M]
    features: Floats  # [M, F], as in FEATURES

    @property
    def sizes(self) -> Ints:  # [T]
        return self.starts[1:] - self.starts[:-1]

    def rows(self) -> Ints:  # [M], the task of each
        return np.repeat(np.arange(len(self.starts) - 1), self.sizes)

    def columns(self) -> Ints:  # [M], which of its task's
        return np.arange(len(self.places)) - np.repeat(self.starts[:-1], self.sizes)


@dataclass(frozen=True)
class Recent:
    """The newest examples of T tasks, newest first: places [T, S] (-1 for none), kinds, weights, times (epoch ms)."""

    places: Ints
    kinds: Ints
    weights: Floats
    times: Ints

    @classmethod
    def of(cls, sets: SupportSets, places: Ints) -> "Recent":
        """Of support sets whose examples are of items at `places` [N]."""
        sizes = sets.sizes
        width = max(1, int(sizes.max(initial=0)))
        task = np.repeat(np.arange(len(sizes)), sizes)
        column = np.repeat(sizes, sizes) - 1 - ranges(np.zeros(len(sizes), np.int64), sizes)
        shape = (len(sizes), width)
        recent = cls(
            np.full(shape, -1), np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        )
        recent.places[task, column] = places
        recent.kinds[task, column] = sets.examples["type"]
        recent.weights[task, column] = sets.examples["weight"]
        recent.times[task, column] = sets.examples["time"]
        return recent


def first_of(places: Ints, counts: Ints) -> Ints:
    """The first `counts` [T] of places [T, K], -1 behind them: what a task gets is not a matter of who is beside it."""
    return np.where(np.arange(places.shape[1]) < counts[:, None], places, -1)


class Categories:
    """The category of each place, and which places each has. -1 is unknown."""

    def __init__(self, of_place: Ints) -> None:
        self.of_place = of_place

    @cached_property
    def _sorted(self) -> tuple[Ints, Ints]:
        order = np.argsort(self.of_place, kind="stable")
        return order, self.of_place[order]

    def members(self, category: int) -> Ints:
        """The places of a category."""
        order, ordered = self._sorted
        first, last = np.searchsorted(ordered, [category, category + 1])
        return order[first:last]

    def of(self, places: Ints) -> Ints:
        """Categories of places [..]; -1 for -1 and for what isn't known."""
        known = (places >= 0) & (places < len(self.of_place))
        return (
            np.where(known, self.of_place[np.where(known, places, 0)], -1)
            if len(self.of_place)
            else np.full_like(places, -1)
        )


@dataclass(frozen=True)
class Pool:
    """What is the same for all tasks of a moment: what everybody does, and the items there are."""

    trends: Trends
    categories: Categories
    popular: Ints  # [P]


def gather(  # noqa: PLR0917 - everything that candidates come from
    recent: Recent, now: Ints, pool: Pool, liked: Ints, count: int, foreseen: Ints | None = None
) -> Candidates:
    """Candidates of T tasks at `now` [T] (epoch ms) among `count` places.

    `liked` [T, K] are those the head likes best, `foreseen` [T, L] those of a sequence model, some perhaps twice. The
    features that they have to fill in (`head`, `head_lift`, `sequence`, `followers`, `followers_share`) are left at 0.
    """
    near, shares = pool.trends.co_visits.of(recent.places[:, :NEAR])  # [T, L, K] and, of those that are there, [N, 4]
    tasks = len(now)
    sources: list[NDArray[np.integer]] = [
        recent.places,
        near.reshape(tasks, math.prod(near.shape[1:])),
        np.broadcast_to(pool.popular, (tasks, len(pool.popular))),
        _in_category(recent, pool),
        liked,
    ]
    if foreseen is not None:
        sources.append(foreseen)
    keys, inverse = np.unique(np.concatenate([_keys(source, count) for source in sources]), return_inverse=True)
    task, places = keys // count, keys % count
    own = inverse[: int((recent.places >= 0).sum())]
    met = inverse[len(own) : len(own) + int((near >= 0).sum())]
    columns = [
        *pool.trends.popularity.log_shares(places, count),
        np.log1p(np.minimum(pool.trends.popularity.ages(places, now[task]), 3e7) / 60.0),
        *_near_features(near, shares, met, len(keys)),
        *_own_features(recent, now, own, len(keys)),
        *_category_features(recent, pool.categories, task, places),
        np.zeros(len(keys)),
        np.zeros(len(keys)),
        np.log1p((recent.places >= 0).sum(1))[task],
        _gap(recent)[task],
    ]
    # One column after the other lies in memory: rows of them would be written a number at a time, all over the table.
    features = np.zeros((len(FEATURES), len(keys)), np.float32)
    for number, column in enumerate(columns):
        features[number] = column
    if foreseen is not None:
        features[_FORESEEN_ONLY] = 1.0
        features[_FORESEEN_ONLY, inverse[: len(inverse) - int((foreseen >= 0).sum())]] = 0.0
    starts = np.searchsorted(task, np.arange(tasks + 1))
    return Candidates(starts, places, features.T)


def _gap(recent: Recent) -> NDArray[np.float64]:
    """Log of the minutes between each task's two newest examples [T], 0 where there are fewer."""
    second = min(1, recent.places.shape[1] - 1)
    between = np.maximum(recent.times[:, 0] - recent.times[:, second], 0) / 60_000.0
    gap: NDArray[np.float64] = np.log1p(between) * (recent.places[:, second] >= 0)
    return gap


def _keys(places: NDArray[np.integer], count: int) -> Ints:
    """Task * count + place of the places [T, K] that aren't -1, row by row."""
    keys = places + np.arange(len(places))[:, None] * count
    return keys[places >= 0]


def _in_category(recent: Recent, pool: Pool) -> Ints:
    """The most popular places of the categories of each task's newest items, [T, CATEGORIES * POPULAR_IN_CATEGORY]."""
    wanted = pool.categories.of(recent.places[:, :CATEGORIES])
    found = np.full((*wanted.shape, POPULAR_IN_CATEGORY), -1)
    for category in np.unique(wanted[wanted >= 0]).tolist():
        members = pool.categories.members(category)
        counts = pool.trends.popularity.shares(members)[:, -1]
        if len(members) > POPULAR_IN_CATEGORY:
            members = members[np.argpartition(counts, -POPULAR_IN_CATEGORY)[-POPULAR_IN_CATEGORY:]]
        found[wanted == category, : len(members)] = members
    return found.reshape(len(wanted), math.prod(found.shape[1:]))


def _near_features(near: NDArray[np.int32], shares: Floats, met: Ints, size: int) -> list[NDArray[np.float64]]:
    """Logarithms of how often others met the candidate near the task's newest items, and after the newest alone.

    `shares` [N, 4] are of the `near` [T, L, K] that are there, which are candidates number `met` [N] of `size`.
    """
    back = np.nonzero(near >= 0)[1]
    # Of NEAR, not of how many the longest task here has: a task's list is its own, whoever is asked for with it.
    steps = _LAST ** np.arange(NEAR)
    weights = (steps / steps.sum())[back]
    sums = [np.bincount(met, weights * shares[:, kind], size) for kind in range(CoVisits.WEIGHTS)]
    sums.append(np.bincount(met, (back == 0) * shares[:, 2], size))
    return [_scattered(met, np.log(of[met] + EPSILON), size, math.log(EPSILON)) for of in sums]


def _own_features(recent: Recent, now: Ints, own: Ints, size: int) -> list[NDArray[np.float64]]:
    """What the task did with the candidate; its examples [T, S] that are there are candidates `own` [N] of `size`."""
    there = recent.places >= 0
    step = np.nonzero(there)[1]
    recency, kept, bought, age = np.zeros((4, size))
    np.maximum.at(recency, own, 1.0 / (1.0 + step))
    np.maximum.at(kept, own, np.isin(recent.kinds, (CODES["cart"], CODES["favorite"]))[there].astype(float))
    np.maximum.at(bought, own, (recent.kinds == CODES["purchase"])[there].astype(float))
    minutes = np.maximum(now[:, None] - recent.times, 0)[there] / 60_000.0
    age[own[::-1]] = np.log1p(minutes)[::-1]  # the newest example of an item is written last
    counts = _scattered(own, np.log1p(np.bincount(own, minlength=size)[own]), size)
    said = _scattered(own, np.log1p(np.bincount(own, recent.weights[there], size)[own]), size)
    last = _scattered(own, -np.log(recency[own]), size)
    return [recency, last, counts, said, kept, bought, age]


def _scattered(at: Ints, values: NDArray[np.float64], size: int, elsewhere: float = 0.0) -> NDArray[np.float64]:
    """An array [size] of `elsewhere`, but for `values` [N] at `at` [N]: few candidates have most features."""
    found = np.full(size, elsewhere)
    found[at] = values
    return found


def _category_features(recent: Recent, categories: Categories, task: Ints, places: Ints) -> list[NDArray[np.float64]]:
    """The share of the task's examples, newer ones counting more, of the candidate's category; is it the newest's."""
    mine = categories.of(recent.places)  # [T, S]
    weights = np.where(mine >= 0, 0.9 ** np.arange(mine.shape[1]), 0.0)
    span = int(max(mine.max(initial=0), categories.of_place.max(initial=0))) + 2
    keys, inverse = np.unique(mine + 1 + np.arange(len(mine))[:, None] * span, return_inverse=True)
    sums = np.bincount(inverse.reshape(-1), weights.reshape(-1))
    theirs = categories.of(places)
    wanted = theirs + 1 + task * span
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    share = np.where((keys[at] == wanted) & (theirs >= 0), sums[at], 0.0) / np.maximum(weights.sum(1), 1e-9)[task]
    return [share, ((theirs == mine[task, 0]) & (theirs >= 0)).astype(float)]
