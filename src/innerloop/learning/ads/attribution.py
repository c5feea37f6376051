"""Which click a purchase belongs to, when that is known, and counts of what was known at a time.

A click converts when the same task (user) buys the same item after it, within the attribution window; the earliest such
purchase says when. Every click before a purchase that is within the window counts (multi-touch). Nothing is known
before it has happened: a purchase relabels its clicks at its own time, and a click without one is taken for a negative
after a wait (delayed feedback; Chapelle 2014), until a purchase says otherwise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max
"""A time (epoch ms) that does not come."""
HOUR, DAY = 3_600_000, 86_400_000


@dataclass(frozen=True)
class Attribution:
    """For each of N events: `times` of it (epoch ms), whether it is a click, and when it converted or NEVER."""

    times: Ints
    clicks: Bools
    converted_at: Ints

    def known(self, now: int | Ints, *, wait: int = HOUR) -> tuple[Bools, Bools]:
        """The labels as of strictly before `now` (epoch ms, one or [N]), and for which events there is one."""
        positive = self.clicks & (self.converted_at < now)
        return positive, positive | (self.clicks & (self.times + wait < now))

    def known_at(self, *, wait: int = HOUR) -> Ints:
        """When each click gets its first label: converted, or waited for; NEVER for what is no click."""
        return np.where(self.clicks, np.minimum(self.converted_at, self.times + wait), NEVER)


def attribute(
    tasks: Ints, items: Ints, times: Ints, clicks: Bools, purchases: Bools, *, window: int = DAY
) -> Attribution:
    """Attribute purchases to clicks; all arguments are [N], in any order, times in epoch ms, the window in ms.

    A purchase at the very time of a click does not belong to it; one exactly `window` later does.
    Raises ValueError when the window is not positive.
    """
    if window <= 0:
        raise ValueError(f"The attribution window is {window} ms: it must be positive.")
    converted = np.full(len(times), NEVER, np.int64)
    if purchases.any() and clicks.any():
        keys, ranks = _pairs(tasks, items), np.unique(times, return_inverse=True)[1]
        width = int(ranks.max()) + 1  # dense ranks of times: no overflow, whatever the epoch
        bought = np.flatnonzero(purchases)
        bought = bought[np.argsort(keys[bought] * width + ranks[bought], kind="stable")]
        which = np.flatnonzero(clicks)
        places = np.searchsorted(keys[bought] * width + ranks[bought], keys[which] * width + ranks[which], "right")
        following = bought[np.minimum(places, len(bought) - 1)]
        within = (places < len(bought)) & (keys[following] == keys[which])
        within &= times[following] - times[which] <= window
        converted[which[within]] = times[following[within]]
    return Attribution(times, clicks, converted)


def counted_before(keys: Ints, times: Ints, asked: Ints, now: Ints) -> Ints:
    """How many of the events (`keys` [N], `times` [N]) have key asked[m] and a time strictly before now[m], [M]."""
    if not len(keys):
        return np.zeros(len(asked), np.int64)
    numbers = np.unique(np.concatenate([keys, asked]), return_inverse=True)[1]
    ranks = np.unique(np.concatenate([times, now]), return_inverse=True)[1]
    width = int(ranks.max()) + 1
    composite = numbers * width + ranks
    stored = np.sort(composite[: len(keys)])
    first = np.searchsorted(stored, numbers[len(keys) :] * width, "left")
    return np.searchsorted(stored, composite[len(keys) :], "left") - first


def _pairs(first: Ints, second: Ints) -> Ints:
    """One number for each distinct pair."""
    one, other = (np.unique(values, return_inverse=True)[1] for values in (first, second))
    return np.asarray(one * (int(other.max(initial=0)) + 1) + other, np.int64)
