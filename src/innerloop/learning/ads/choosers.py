"""A ranker of lists: shared weights over everything known of a candidate, and a user's own over the most telling of it.

A user's own weights act on [the shared score, a few of the features]: their prior mean is (1, 0, .. 0), which is the
shared ranking, and the first says how much this user's choices follow it. How much users may differ is what foretold
the last lists of the training part best; nothing, if that was best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from innerloop.learning.ads.choice import Floats, Ints, Lists, fit_shared, log_likelihood, maximum_a_posteriori

Features = NDArray[np.float32]

_OWN_LISTS = 20
_HELD_OUT, _MOST_JUDGED = 0.3, 1_000
VARIANCES = (1e-9, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""How much users may differ: what is tried."""
_NEWTON = 4


@dataclass(frozen=True)
class Seen:
    """One list a user chose from: features [P, F] of its candidates, which was chosen, when (epoch ms)."""

    features: Features
    chosen: int
    time: int


def padded(seen: Sequence[Seen]) -> Lists:
    """The lists [N, P, F], padded to the longest."""
    width = max((len(one.features) for one in seen), default=1)
    size = seen[0].features.shape[1] if seen else 0
    features, mask = np.zeros((len(seen), width, size), np.float32), np.zeros((len(seen), width), bool)
    for at, one in enumerate(seen):
        features[at, : len(one.features)], mask[at, : len(one.features)] = one.features, True
    return Lists(features, mask, np.array([one.chosen for one in seen], np.int64))


@dataclass(frozen=True)
class Chooser:
    """`shared` [F] with its precisions [F], the columns [K] a user has own weights for, and how much users differ."""

    shared: Floats
    precision: Floats
    columns: Ints
    variance: float

    @classmethod
    def fit(
        cls, seen: Sequence[Seen], users: Sequence[int], groups: Ints, columns: Ints, start: "Chooser | None" = None
    ) -> "Chooser":
        """Learn from lists in order of time and whose they are; `groups` [F] share a precision.

        `start` was fitted to fewer lists; how much users differ is taken from there. Raises ValueError without a list.
        """
        if not seen:
            raise ValueError("There is no list to learn from.")
        if start is not None:
            shared, precision = fit_shared(padded(seen), groups, start=(start.shared, start.precision))
            return cls(shared, precision, columns, start.variance)
        variance = _choose_variance(seen, users, groups, columns) if len(columns) else VARIANCES[0]
        return cls(*fit_shared(padded(seen), groups), columns, variance)

    @property
    def mean(self) -> Floats:
        """The own weights [1 + K] of a user of whom nothing is known."""
        return np.concatenate([[1.0], np.zeros(len(self.columns))])

    def score(self, features: Features) -> Floats:
        """Scores [P] by the shared weights."""
        return np.asarray(features @ self.shared, np.float64)

    def own(self, seen: Seen) -> Seen:
        """The same list in the features [P, 1 + K] that a user's own weights act on."""
        return Seen(self._own_features(seen.features), seen.chosen, seen.time)

    def adapt(self, seen: Sequence[Seen]) -> Floats:
        """A user's own weights [1 + K] after these lists (as of `own`); the prior mean, bit for bit, after none."""
        if not seen:
            return self.mean
        precision = np.full(len(self.mean), 1.0 / self.variance)
        return maximum_a_posteriori(padded(seen), self.mean, precision, steps=_NEWTON)[0]

    def score_for(self, features: Features, weights: Floats) -> Floats:
        """Scores [P] by a user's own weights."""
        return np.asarray(self._own_features(features) @ weights, np.float64)

    def _own_features(self, features: Features) -> Features:
        return np.concatenate([self.score(features)[:, None], features[:, self.columns]], 1).astype(np.float32)


def _choose_variance(seen: Sequence[Seen], users: Sequence[int], groups: Ints, columns: Ints) -> float:
    """What foretells the last lists best, by the likelihood of their choices, from what was learned of the first."""
    cut = max(1, int((1 - _HELD_OUT) * len(seen)))
    shared, precision = fit_shared(padded(seen[:cut]), groups)
    heads = [Chooser(shared, precision, columns, variance) for variance in VARIANCES]
    total, judged = np.zeros(len(heads)), 0
    earlier: dict[int, list[Seen]] = {}
    for at, (user, one) in enumerate(zip(users, seen, strict=True)):
        own = heads[0].own(one)
        before = earlier.setdefault(user, [])
        if at >= cut and before and judged < _MOST_JUDGED:
            judged += 1
            asked = padded([own])
            total += [log_likelihood(asked, head.adapt(before[-_OWN_LISTS:])) for head in heads]
        before.append(own)
    return VARIANCES[int(np.argmax(total))]
