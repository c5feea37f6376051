"""Matrix factorisation of implicit feedback (iALS; Hu, Koren and Volinsky 2008), refitted four times a day."""

import numpy as np
import scipy.sparse
import threadpoolctl
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray

from innerloop.evaluation.baselines.candidate_lists import WIDTH, Lists, largest
from innerloop.evaluation.baselines.popularity import Counts, for_everybody, where_known
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.stream_log import StreamLog

Factors = NDArray[np.float32]

_FACTORS = 64
_REGULARIZATION = 0.01
_ALPHA = 40.0  # as published: confidence of an event, where an item without any has 1
_ROUNDS, _MORE_ROUNDS = 15, 2  # of the first fit, and of each that goes on from the one before
_REFIT_MS = 21_600_000
_NEWEST = 1_000_000  # events that are fitted
_ITEMS = 16_384  # with most events, that are named


class ImplicitFactors:
    """Item factors of what was seen up to the last fit; the user's are solved for from the support when asked."""

    name = "ials"

    def __init__(self, log: StreamLog, *, seed: int = 0) -> None:
        self._log = log
        self._counts = Counts(log)
        self._shown = 0
        self._fitted_at: int | None = None
        with threadpoolctl.threadpool_limits(1, "blas"):  # the library asks for it
            self._model = AlternatingLeastSquares(
                _FACTORS, _REGULARIZATION, alpha=_ALPHA, iterations=_ROUNDS, random_state=seed
            )
        self._fitted: Bools = np.zeros(1, np.bool_)

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)
        self._shown = last

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        items = self._known(rows, support)
        some: Bools = np.any(items >= 0, axis=1)
        if not some.any():
            return for_everybody(self._counts.top(), len(rows))
        return self._lists(items, some)

    def scores_of(self, rows: Ints, support: Ints, items: Ints) -> Floats:
        """Scores [Q, P] of `items` [Q, P], -1 for none; 0 for what is without factors, or for everything if all is."""
        own, found = self._known(rows, support), np.zeros(items.shape)
        some: Bools = np.any(own >= 0, axis=1)
        if some.any():
            factors = self._model.item_factors[np.maximum(items[some], 0)]
            scores = np.einsum("qd,qpd->qp", self._users(own[some]), factors)
            found[some] = np.where(self._fitted[items[some]], scores, 0.0)
        return found

    def _known(self, rows: Ints, support: Ints) -> Ints:
        """The own items [Q, S] that have factors, -1 for the others; fitted again first when that is due."""
        now = int(self._log.times[rows].min())
        items = np.where(support >= 0, self._log.items[support], -1)
        if not self._shown:
            return np.full(items.shape, -1)
        if self._fitted_at is None or now - self._fitted_at >= _REFIT_MS:
            self._fit()
            self._fitted_at = now
        return np.where(self._fitted[items], items, -1)

    def _lists(self, own: Ints, some: Bools) -> Lists:
        """By the factors where there are `some` own items with factors, else what is popular."""
        scores = (self._users(own[some]) @ self._item_factors.T).astype(np.float64)
        width = min(WIDTH, scores.shape[1])
        best = np.argpartition(scores, -width, axis=1)[:, -width:]
        return where_known(some, (self._named[best], np.take_along_axis(scores, best, 1)), self._counts.top())

    def _users(self, own: Ints) -> Factors:
        """Users' factors [Q, F] from their items [Q, S], -1 for none: one half-step of the alternation."""
        moment, at = np.nonzero(own >= 0)
        counts = _counts(moment, own[moment, at], (len(own), len(self._log.item_ids)))
        users: Factors = self._model.recalculate_user(np.arange(len(own)), counts)
        return users

    def _fit(self) -> None:
        part = slice(max(0, self._shown - _NEWEST), self._shown)
        users, items = self._log.users[part], self._log.items[part]
        shape = (len(self._log.user_ids), len(self._log.item_ids))
        if self._fitted_at is not None:
            self._model.iterations = _MORE_ROUNDS
        with threadpoolctl.threadpool_limits(1, "blas"):
            self._model.fit(_counts(users, items, shape), show_progress=False)
        events = np.bincount(items, minlength=shape[1]).astype(np.float64)
        self._fitted = np.append(events > 0, np.False_)  # the last for item -1
        self._named = np.flatnonzero(events)
        self._named = self._named[largest(events[self._named], _ITEMS)]
        self._item_factors = self._model.item_factors[self._named]


def _counts(users: Ints, items: Ints, shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape=shape)
