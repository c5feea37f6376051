"""Making lists of candidates: items [Q, C] with scores [Q, C] for Q moments, padded with item -1."""

import numpy as np

from innerloop.evaluation.outcome import Bools, Floats, Ints

WIDTH = 256
"""Candidates that an arm names: enough for a hit within 20 after a user's own items are removed."""
_CELLS = 2**22  # of the table that sums are made in: 32 MB


def first_of_each(items: Ints) -> Bools:
    """Which of items [Q, C] are the first of their value in their row; an item -1 never is."""
    order = np.argsort(items, axis=1, kind="stable")
    ranked = np.take_along_axis(items, order, 1)
    first = np.ones(items.shape, np.bool_)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    result = np.empty_like(first)
    np.put_along_axis(result, order, first, 1)
    return result & (items >= 0)


def largest(scores: Floats, count: int) -> Ints:
    """Where the `count` largest (or all, if fewer) of scores [N] are, in no order."""
    if len(scores) <= count:
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[-count:]


def ragged(starts: Ints, lengths: Ints) -> Ints:
    """The numbers starts[i] .. starts[i] + lengths[i] - 1 of all i, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


class ScoreSums:
    """Adds up scores of (moment, item) pairs without a sort: the time is linear in the number of pairs.

    The table it needs is kept from call to call, and holds as many moments at once as fit.
    """

    def __init__(self, items: int) -> None:
        self._items = items
        self._moments = max(1, _CELLS // items)
        self._sums = np.zeros(self._moments * items)
        self._last = np.zeros(self._moments * items, np.int64)

    def lists(self, moments: Ints, items: Ints, scores: Floats, count: int, bonus: Floats | None = None) -> "Lists":
        """The WIDTH best items of each of `count` moments by the sum of scores [E] over pairs (moments [E], items [E]).

        `bonus` [items] is added once to the sum of each item named.
        """
        parts = []
        for begin in range(0, count, self._moments):
            end = min(count, begin + self._moments)
            part = (moments >= begin) & (moments < end) if count > self._moments else slice(None)
            moment, item, total = self._summed(moments[part] - begin, items[part], scores[part])
            if bonus is not None:
                total = total + bonus[item]
            parts.append(best_of_each(moment, item, total, end - begin))
        return stacked(parts)

    def _summed(self, moments: Ints, items: Ints, scores: Floats) -> tuple[Ints, Ints, Floats]:
        key = moments * self._items + items
        np.add.at(self._sums, key, scores)
        self._last[key] = np.arange(len(key))
        kept = self._last[key] == np.arange(len(key))
        distinct = key[kept]
        total = self._sums[distinct]
        self._sums[distinct] = 0.0
        return moments[kept], items[kept], total


Lists = tuple[Ints, Floats]


def best_of_each(moments: Ints, items: Ints, scores: Floats, count: int, width: int = WIDTH) -> Lists:
    """Lists [count, C <= width] of the entries (moments [E], items [E], scores [E]), no item twice in a moment."""
    order = np.argsort(moments.astype(np.uint16), kind="stable") if count <= 2**16 else np.argsort(moments)
    moments = moments[order]
    sizes = np.bincount(moments, minlength=count)
    place = np.arange(len(moments)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    widest = int(sizes.max(initial=0))
    all_items = np.full((count, widest), -1)
    all_scores = np.full((count, widest), -np.inf)
    all_items[moments, place] = items[order]
    all_scores[moments, place] = scores[order]
    if widest <= width:
        return all_items, all_scores
    kept = np.argpartition(all_scores, widest - width, axis=1)[:, -width:]
    return np.take_along_axis(all_items, kept, 1), np.take_along_axis(all_scores, kept, 1)


def stacked(parts: list[Lists]) -> Lists:
    """Lists of one block after the other, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    widest = max(items.shape[1] for items, _ in parts)
    pads = [((0, 0), (0, widest - items.shape[1])) for items, _ in parts]
    items = [np.pad(part, pad, constant_values=-1) for (part, _), pad in zip(parts, pads, strict=True)]
    scores = [np.pad(part, pad, constant_values=-np.inf) for (_, part), pad in zip(parts, pads, strict=True)]
    return np.concatenate(items), np.concatenate(scores)
