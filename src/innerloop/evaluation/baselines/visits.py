"""Visits: the runs of one user's events that belong together."""

import numpy as np

from innerloop.evaluation.outcome import Bools, Ints
from innerloop.learning.stream_log import StreamLog

SAME_VISIT_MS = 1_800_000
"""Without session ids a visit ends when nothing happens for this long: half an hour, as web analytics has it."""


class Visits:
    """Which visit each row of a log belongs to. A row's visit depends on the user's events up to that row alone.

    `of` [N] numbers the visit of each row, users together and in order of time; `start` [V] is the place of a visit's
    first event in the log's `by_user`; `is_new` [N] says whether the row's item is in the visit for the first time.
    """

    def __init__(self, log: StreamLog) -> None:
        self._log = log
        users, times, sessions = (column[log.by_user] for column in (log.users, log.times, log.sessions))
        begins = np.ones(len(log), np.bool_)
        begins[1:] = (
            (users[1:] != users[:-1])
            | (sessions[1:] != sessions[:-1])
            | ((sessions[1:] < 0) & (np.diff(times) > SAME_VISIT_MS))
        )
        self.start: Ints = np.flatnonzero(begins)
        self.of: Ints = (np.cumsum(begins) - 1)[log.place]
        self.is_new: Bools = _first_of_pair(self.of, log.items, log.place)

    def previous(self, rows: Ints, steps: int) -> Ints:
        """The rows [Q, steps] before each of `rows` [Q] in its visit, newest first, -1 where there is none."""
        at = self._log.place[rows][:, None] - 1 - np.arange(steps)
        there = at >= self.start[self.of[rows]][:, None]
        return np.where(there, self._log.by_user[np.where(there, at, 0)], -1)

    def newest(self, support: Ints, steps: int) -> Ints:
        """Of `support` [Q, S] (rows, newest first, -1 for none) the first `steps`, without those of older visits."""
        last = support[:, :steps]
        same = (last >= 0) & (self.of[last] == self.of[support[:, :1]])
        return np.where(same, last, -1)


def _first_of_pair(visits: Ints, items: Ints, place: Ints) -> Bools:
    order = np.lexsort((place, items, visits))
    visits, items = visits[order], items[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = (visits[1:] != visits[:-1]) | (items[1:] != items[:-1])
    result = np.empty_like(first)
    result[order] = first
    return result
