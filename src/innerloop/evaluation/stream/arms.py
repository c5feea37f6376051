"""What the stream protocol asks of an arm, and how it counts what the arm answers."""

from typing import Protocol

import numpy as np

from innerloop.evaluation.outcome import Floats, Ints


class StreamArm(Protocol):
    """A way to foresee the next event. It may read its log only at rows that it has been shown.

    It is shown every event once, in order, before it is asked about a later one.
    """

    @property
    def name(self) -> str: ...

    def observe(self, first: int, last: int) -> None:
        """Take in the events in rows first .. last - 1."""
        ...

    def candidates(self, rows: Ints, support: Ints) -> tuple[Ints, Floats]:
        """Items [Q, C] and scores [Q, C] for the moments just before `rows` [Q]; -1 where there are fewer than C.

        `support` [Q, S] are rows of what the task has done, newest first, -1 for nothing. Of `rows` only the user and
        the time may be looked at. An item is named once a row; the order within a row is free.
        """
        ...


def ranks(items: Ints, scores: Floats, target: Ints, seen: Ints | None = None) -> Ints:
    """Rank [Q] of item `target[q]` among items [Q, C], from 1; 0 when it isn't there. Ties are ranked pessimistically.

    `seen` [Q, H] are items that are removed first, padded with -1.
    """
    valid = items >= 0
    if seen is not None:
        valid &= ~_contained(items, seen)
    found = valid & (items == target[:, None])
    own = np.where(found, scores, -np.inf).max(1, keepdims=True, initial=-np.inf)
    rank = (valid & (scores >= own)).sum(1)
    return np.where(found.any(1), rank, 0)


def _contained(items: Ints, seen: Ints) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which of items [Q, C] are in the same row of seen [Q, H]."""
    span = max(int(items.max(initial=0)), int(seen.max(initial=0))) + 2
    row = np.arange(len(items))[:, None] * span
    return np.isin(items + 1 + row, np.where(seen >= 0, seen + 1 + row, -1))
