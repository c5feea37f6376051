"""What shops do today about ratings: means, biases, item-kNN and a plain factor model with fold-in.

Each predicts the ratings to foresee of E episodes, of whose support the first `shots` [E] examples are known. Where
only order counts (`popularity`), higher is better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from scipy.sparse import csr_matrix

from innerloop.evaluation.cold_start.decision import Prediction
from innerloop.evaluation.cold_start.episodes import Episodes
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.rating_model import Ratings

_NEIGHBOUR_SHRINKAGE = 100.0  # Koren 2010, section 4.1
_MOST_NEIGHBOURS = 8_000  # items: the similarities are a square table
_ROUNDS, _ALS_ROUNDS = 10, 12
_FACTORS = 16

_Setting = TypeVar("_Setting")


class RatingArm(Protocol):
    """Something that foresees ratings."""

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        """What is asked, [E, Q]."""
        ...


def known_support(episodes: Episodes, shots: Ints) -> Bools:
    """Which of the support's places [E, L - Q] are among the first `shots` and filled."""
    places = np.arange(episodes.items.shape[1] - episodes.queries)
    return places < np.minimum(shots, episodes.support)[:, None]


def _split(episodes: Episodes) -> tuple[Ints, Ints, Floats]:
    q = episodes.queries
    return episodes.items[:, :q], episodes.items[:, q:], episodes.values[:, q:]


@dataclass(frozen=True)
class Biases:
    """mean + b_i + c_u by ridge regression; `user_ridge` inf leaves out the user, `items` zero leave out the items."""

    mean: float
    items: Floats
    known: Bools
    user_ridge: float

    @classmethod
    def learn(cls, ratings: Ratings, count: int, *, item_ridge: float, user_ridge: float) -> "Biases":
        mean = float(ratings.values.mean())
        off = ratings.values - mean
        items, users = np.zeros(count), np.zeros(int(ratings.users.max()) + 1)
        times = np.bincount(ratings.items, minlength=count)
        rated = np.bincount(ratings.users)
        for _ in range(_ROUNDS if np.isfinite(user_ridge) else 1):
            items = np.bincount(ratings.items, off - users[ratings.users], count) / (times + item_ridge)
            users = np.bincount(ratings.users, off - items[ratings.items]) / (rated + user_ridge)
        return cls(mean, items, times > 0, user_ridge)

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        asked, support, values = _split(episodes)
        mask = known_support(episodes, shots)
        left = np.where(mask, values - self.mean - self.items[support], 0.0).sum(1)
        user = left / (mask.sum(1) + self.user_ridge)
        return _predicted(self.mean + self.items[asked] + user[:, None], mask, self.known[asked])


def _predicted(mean: Floats, mask: Bools, known: Bools) -> Prediction:
    """A mean is worth the more the more examples there were; these methods say no more about it."""
    spread = np.broadcast_to(1.0 / np.sqrt(1.0 + mask.sum(1))[:, None], mean.shape)
    return Prediction(mean, spread, (~known).astype(np.int64))


@dataclass(frozen=True)
class ItemNeighbours:
    """Biases and, of the residuals of the user's examples, the mean weighted by similarity (Koren 2010).

    Similarity is Pearson's over common users, shrunk by their number; negative ones are left out.
    """

    biases: Biases
    similarity: Floats
    ridge: float

    @classmethod
    def similarities(cls, ratings: Ratings, biases: Biases) -> Floats:
        """[M, M] float32, from what the biases leave of the training ratings."""
        count = len(biases.items)
        left = ratings.values - biases.mean - biases.items[ratings.items]
        own = np.bincount(ratings.users, left) / (np.bincount(ratings.users) + biases.user_ridge)
        at = (ratings.users, ratings.items)
        shape = (int(ratings.users.max()) + 1, count)
        off = csr_matrix(((left - own[ratings.users]).astype(np.float32), at), shape)
        ones = csr_matrix((np.ones(len(left), np.float32), at), shape)
        squares = off.multiply(off).tocsr()
        common = (ones.T @ ones).toarray()
        norms = (squares.T @ ones).toarray()
        similarity = (off.T @ off).toarray() / np.sqrt(np.maximum(norms * norms.T, 1e-6))
        return np.asarray(np.maximum(similarity, 0.0) * common / (common + _NEIGHBOUR_SHRINKAGE))

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        asked, support, values = _split(episodes)
        base = self.biases.predict(episodes, shots).mean
        mask = known_support(episodes, shots)
        left = np.where(mask, values - self.biases.mean - self.biases.items[support], 0.0)
        left -= np.where(mask, (left.sum(1) / (mask.sum(1) + self.biases.user_ridge))[:, None], 0.0)
        weights = self.similarity[asked[:, :, None], support[:, None, :]] * mask[:, None, :]
        near = np.einsum("eqs,es->eq", weights, left) / (weights.sum(2) + self.ridge)
        return _predicted(base + near, mask, self.biases.known[asked])


@dataclass(frozen=True)
class BiasedFactors:
    """mean + b_i + c_u + v_i . w_u by alternating ridge regressions (Koren, Bell, Volinsky 2009).

    A new user's (c, w) is one more of those regressions, on the examples there are.
    """

    mean: float
    items: Floats
    known: Bools
    ridge: float

    @classmethod
    def learn(cls, ratings: Ratings, count: int, *, ridge: float, seed: int) -> "BiasedFactors":
        mean = float(ratings.values.mean())
        at, shape = (ratings.users, ratings.items), (int(ratings.users.max()) + 1, count)
        values = csr_matrix((ratings.values - mean, at), shape)
        ones = csr_matrix((np.ones(len(ratings.values)), at), shape)
        items = np.random.default_rng(seed).normal(0.0, 0.1, (count, _FACTORS + 1))
        items[:, 0] = 0.0
        for _ in range(_ALS_ROUNDS):
            users = _solve_rows(values, ones, items, ridge)
            items = _solve_rows(values.T.tocsr(), ones.T.tocsr(), users, ridge)
        return cls(mean, items, np.asarray(ones.sum(0)).ravel() > 0, ridge)

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        asked, support, values = _split(episodes)
        mask = known_support(episodes, shots)
        design = self.items.copy()
        design[:, 0] = 1.0
        bias = self.mean + self.items[:, 0]
        x = design[support] * mask[:, :, None]
        gram = x.transpose(0, 2, 1) @ x + self.ridge * np.eye(design.shape[1])
        pull = np.einsum("esd,es->ed", x, values - bias[support])
        user = np.linalg.solve(gram, pull[:, :, None])[:, :, 0]
        return _predicted(bias[asked] + np.einsum("eqd,ed->eq", design[asked], user), mask, self.known[asked])


def _solve_rows(values: csr_matrix, ones: csr_matrix, columns: Floats, ridge: float) -> Floats:
    x = columns.copy()
    x[:, 0] = 1.0
    width = x.shape[1]
    gram = (ones @ (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)).reshape(-1, width, width)
    pull = values @ x - ones @ (x * columns[:, :1])
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(width), pull[:, :, None])[:, :, 0])


@dataclass(frozen=True)
class Popularity:
    """How many training ratings an item has: an order, no rating."""

    counts: Floats

    @classmethod
    def learn(cls, ratings: Ratings, count: int) -> "Popularity":
        return cls(np.bincount(ratings.items, minlength=count).astype(float))

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        del shots
        scores = self.counts[episodes.items[:, : episodes.queries]]
        return Prediction(scores, np.zeros_like(scores), np.zeros(scores.shape, np.int64))


CATEGORY_COLUMNS = ("category", "category_id", "genre", "genres")


@dataclass(frozen=True)
class PopularityInCategory:
    """Popularity, times how much of what the user's examples are an item is: an order, no rating.

    `categories` [M, C] says which categories each item is of. Without examples the order is that of popularity.
    """

    counts: Floats
    categories: csr_matrix

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        asked, support, _ = _split(episodes)
        row, place = np.nonzero(known_support(episodes, shots))
        known = csr_matrix((np.ones(len(row)), (row, support[row, place])), (len(asked), len(self.counts)))
        profile = (known @ self.categories).toarray()  # [E, C]
        profile /= np.maximum(profile.sum(1, keepdims=True), 1.0)
        shared = np.stack([self.categories[items] @ mine for items, mine in zip(asked, profile, strict=True)])
        scores = self.counts[asked] * (shared + _OTHERWISE)
        return Prediction(scores, np.zeros_like(scores), np.zeros(scores.shape, np.int64))


_OTHERWISE = 1e-6  # of its popularity, what an item of none of these categories is worth
_INF = float("inf")
_SETTINGS: dict[str, list[tuple[float, float]]] = {  # ridge of the items, ridge of the users
    "global-mean": [(_INF, _INF)],
    "item-mean": [(1.0, _INF), (3.0, _INF), (10.0, _INF)],
    "user-mean": [(_INF, 1.0), (_INF, 3.0), (_INF, 10.0)],
    "item-user-bias": [(i, u) for i in (2.0, 8.0) for u in (2.0, 4.0, 8.0)],
}
_NEIGHBOUR_RIDGES, _FACTOR_RIDGES = (0.1, 0.3, 1.0, 3.0), (3.0, 6.0, 12.0)


def learn_candidates(
    ratings: Ratings, count: int, seed: int, chosen: Mapping[str, int] | None = None
) -> dict[str, list[RatingArm]]:
    """Every baseline with each of its settings; with `chosen` only that one of each. `count` is the number of items."""
    found: dict[str, list[RatingArm]] = {}

    def these(name: str, settings: Sequence[_Setting]) -> Sequence[_Setting]:
        return settings if chosen is None else [settings[chosen[name]]]

    for name, settings in _SETTINGS.items():
        found[name] = [Biases.learn(ratings, count, item_ridge=i, user_ridge=u) for i, u in these(name, settings)]
    if count <= _MOST_NEIGHBOURS:
        base = Biases.learn(ratings, count, item_ridge=2.0, user_ridge=4.0)
        similarity = ItemNeighbours.similarities(ratings, base)
        ridges = these("item-knn", _NEIGHBOUR_RIDGES)
        found["item-knn"] = [ItemNeighbours(base, similarity, ridge) for ridge in ridges]
    ridges = these("biased-mf", _FACTOR_RIDGES)
    found["biased-mf"] = [BiasedFactors.learn(ratings, count, ridge=ridge, seed=seed) for ridge in ridges]
    return found
