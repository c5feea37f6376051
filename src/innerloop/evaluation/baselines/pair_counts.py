"""Weights of (row, column) pairs that grow by batches: which items go with which, or which belong to a category."""

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import ragged
from innerloop.evaluation.outcome import Floats, Ints


class PairCounts:
    """Sums by pair, in sorted runs whose sizes at least double (a log-structured merge, O'Neil et al. 1996).

    Adding E pairs in all costs O(E log E), and a row is found by bisection in each of the few runs.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._columns = columns
        self._runs: list[tuple[Ints, Floats]] = []
        self.totals: Floats = np.zeros(rows)  # sum of each row

    def add(self, rows: Ints, columns: Ints, weights: Floats) -> None:
        """Add weights [E] to the pairs (rows [E], columns [E]), which may repeat."""
        if not len(rows):
            return
        np.add.at(self.totals, rows, weights)
        self._runs.append(_merged(rows * self._columns + columns, weights))
        while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) > len(self._runs[-2][0]):
            (keys, sums), (more_keys, more_sums) = self._runs[-2:]
            self._runs[-2:] = [_merged(np.concatenate((keys, more_keys)), np.concatenate((sums, more_sums)))]

    def of(self, rows: Ints) -> tuple[Ints, Ints, Floats]:
        """The pairs of `rows` [M]: (index into rows [E], column [E], weight [E]); a pair's weight may be in parts."""
        found = []
        for keys, sums in self._runs:
            begin = np.searchsorted(keys, rows * self._columns)
            length = np.searchsorted(keys, (rows + 1) * self._columns) - begin
            at = ragged(begin, length)
            found.append((np.repeat(np.arange(len(rows)), length), keys[at], sums[at]))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        which, keys, sums = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return which, keys % self._columns, sums


def _merged(keys: Ints, weights: Floats) -> tuple[Ints, Floats]:
    """Distinct keys in order, with the sums of their weights. Merging two sorted runs takes linear time."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[begins], np.add.reduceat(weights[order], begins)
