"""Scorers of a whole catalogue from an ordered history, each learned in closed form from other users' histories.

`learn` sees training sequences, `scores` maps any B histories to [B, N] float32, higher is better. None of them knows
who the user is: a history is all they look at.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.linalg
import scipy.sparse
import threadpoolctl
from numpy.typing import NDArray

from innerloop.evaluation.outcome import Ints
from innerloop.evaluation.sequence.sequences import Sequences

Scores = NDArray[np.float32]
_NEIGHBOURS = 500  # of a session in V-SkNN
_LARGEST_INVERSE = 24_000  # items; a dense matrix of so many takes 2.3 GB


class Scorer(Protocol):
    """What gives every item of the catalogue a score after each of B histories."""

    def scores(self, histories: Sequences) -> Scores: ...


@dataclass(frozen=True)
class Popularity:
    """How often each item occurs in training, whatever the history."""

    counts: Ints

    @classmethod
    def learn(cls, train: Sequences) -> "Popularity":
        return cls(train.counts)

    def scores(self, histories: Sequences) -> Scores:
        return np.repeat(np.log1p(self.counts, dtype=np.float32)[None], len(histories), 0)


@dataclass(frozen=True)
class Recents:
    """The history's own items, newest first, everything else behind."""

    def scores(self, histories: Sequences) -> Scores:
        own = histories.matrix(0.9)
        return np.asarray(own.todense(), dtype=np.float32)


@dataclass(frozen=True)
class TransitionSettings:
    """Pairs of a user's items up to `window` steps apart weigh `decay` per step, `backward` as much in the wrong order.

    A pair's weight is divided by its items' counts to the powers `from_power` and `to_power`; of the history asked
    with, an item counts `forget` for each later one.
    """

    decay: float = 0.7
    backward: float = 0.5
    forget: float = 0.7
    from_power: float = 0.4
    to_power: float = 0.2
    window: int = 20


@dataclass(frozen=True)
class Transitions:
    """Item-kNN with sequential rules (Ludewig and Jannach 2018): what followed the history's items, and how closely."""

    weights: scipy.sparse.csr_matrix  # [N, N] float32
    settings: TransitionSettings

    @classmethod
    def learn(cls, train: Sequences, settings: TransitionSettings) -> "Transitions":
        pairs = _pairs(train, settings)
        counts = np.maximum(train.counts, 1).astype(np.float32)
        left = scipy.sparse.diags_array(counts**-settings.from_power)
        right = scipy.sparse.diags_array(counts**-settings.to_power)
        return cls(scipy.sparse.csr_matrix(left @ pairs @ right), settings)

    def scores(self, histories: Sequences) -> Scores:
        product = histories.matrix(self.settings.forget) @ self.weights
        return np.asarray(product.todense(), dtype=np.float32)


def _pairs(train: Sequences, settings: TransitionSettings) -> scipy.sparse.csr_matrix:
    """Sum over all pairs of a user's items, at most `window` steps apart, of decay^(steps - 1), both directions."""
    users, shape = train.users, (train.catalogue, train.catalogue)
    total = scipy.sparse.csr_matrix(shape, dtype=np.float32)
    for step in range(1, min(settings.window, len(users) - 1) + 1):
        at = np.flatnonzero(users[:-step] == users[step:])
        earlier, later = train.items[at].astype(np.int32), train.items[at + step].astype(np.int32)
        weight = np.full(len(at), settings.decay ** (step - 1), np.float32)
        forth = scipy.sparse.csr_matrix((weight, (earlier, later)), shape)
        total = total + forth + np.float32(settings.backward) * forth.T.tocsr()
    return scipy.sparse.csr_matrix(total)


@dataclass(frozen=True)
class Ease:
    """The linear item-to-item model EASE (Steck 2019), B = I - P / diag(P) with P = inverse(X'X + regularisation I)."""

    weights: Scores  # [N, N]
    forget: float

    @classmethod
    def learn(cls, train: Sequences, *, regularisation: float, forget: float) -> "Ease | None":
        """None for a catalogue whose dense inverse would be too large."""
        if train.catalogue > _LARGEST_INVERSE:
            return None
        owned = train.matrix()
        gram = np.asfortranarray((owned.T @ owned).toarray().astype(np.float32))
        gram[np.diag_indices_from(gram)] += np.float32(regularisation)
        lower, _ = scipy.linalg.lapack.spotrf(gram, lower=1, overwrite_a=1)
        inverse, _ = scipy.linalg.lapack.spotri(lower, lower=1, overwrite_c=1)
        diagonal = np.diag(inverse).copy()
        weights = np.tril(inverse, -1)
        weights = weights + weights.T
        weights /= -diagonal
        return cls(weights, forget)

    def scores(self, histories: Sequences) -> Scores:
        return np.asarray(histories.matrix(self.forget) @ self.weights, dtype=np.float32)


@dataclass(frozen=True)
class IalsSettings:
    """What `implicit` calls so."""

    regularization: float = 0.05
    alpha: float = 40.0


class Ials:
    """Implicit alternating least squares (Hu, Koren, Volinsky 2008) of the library `implicit`, histories folded in."""

    def __init__(
        self,
        train: Sequences,
        *,
        dimension: int,
        seed: int,
        settings: IalsSettings | None = None,
        iterations: int = 15,
    ) -> None:
        from implicit.cpu.als import AlternatingLeastSquares  # noqa: PLC0415 - loads slowly and only this arm needs it

        chosen = settings or IalsSettings()
        with threadpoolctl.threadpool_limits(1, "blas"):  # the library asks for it
            self._model = AlternatingLeastSquares(
                factors=dimension,
                regularization=chosen.regularization,
                alpha=chosen.alpha,
                iterations=iterations,
                random_state=seed,
                num_threads=1,
            )
            self._model.fit(train.matrix(), show_progress=False)

    def scores(self, histories: Sequences) -> Scores:
        users = self._model.recalculate_user(np.arange(len(histories)), histories.matrix())  # [B, d]
        return np.asarray(users @ self._model.item_factors.T, dtype=np.float32)


@dataclass(frozen=True)
class VSknn:
    """Vector session kNN (Ludewig and Jannach 2018): items of the nearest histories, newer matches counting more."""

    owned: scipy.sparse.csr_matrix  # [users, N]

    @classmethod
    def learn(cls, train: Sequences) -> "VSknn":
        owned = train.matrix()
        owners = np.bincount(owned.indices, minlength=owned.shape[1])  # less than `counts`, where items come again
        rare = np.log(len(train) / np.maximum(owners, 1)).astype(np.float32)
        lengths = np.maximum(train.lengths, 1).astype(np.float32)
        owned = scipy.sparse.diags_array(lengths**-0.5) @ owned @ scipy.sparse.diags_array(rare)
        return cls(scipy.sparse.csr_matrix(owned))

    def scores(self, histories: Sequences) -> Scores:
        similar = scipy.sparse.csr_matrix(histories.matrix(0.8) @ self.owned.T)  # [B, users]
        nearest = _largest(similar, _NEIGHBOURS)
        return np.asarray((nearest @ self.owned).todense(), dtype=np.float32)


def _largest(matrix: scipy.sparse.csr_matrix, count: int) -> scipy.sparse.csr_matrix:
    """Each row's `count` largest entries."""
    for first, last in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        row = matrix.data[first:last]
        if len(row) > count:
            row[np.argpartition(row, len(row) - count)[: len(row) - count]] = 0.0
    matrix.eliminate_zeros()
    return matrix
