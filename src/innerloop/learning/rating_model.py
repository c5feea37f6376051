"""Ratings by a factor model that knows content: what an adapting head needs of a rating it has not seen.

    rating(u, i) = mean + b_i + c_u + v_i . w_u + noise        (b_i, v_i) ~ N(A' a_i, S),  (c_u, w_u) ~ N(B' f_u, T)

The regression-based latent factor model of Agarwal and Chen 2009: an item's bias and vector (and a user's) are drawn
around a linear function of its content, so that one without ratings has a vector too, and a variance that says how
little is known of it. Learned by variational Bayes (Lim and Teh 2007, full covariances): q is a Gaussian for every user
and every item; S, T, the noise and a ridge for each group of content features are set by EM, so that nothing is left to
choose but the number of factors.

Given the items, one user's (c, w) is Bayesian linear regression on the features (1, v_i): what the heads do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from innerloop.learning.content import Content

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_ITERATIONS = 25
_START_USERS, _START_ITEMS = 0.1, 0.3  # standard deviation of the vectors that EM starts from
_START_RIDGE, _CONSTANT_RIDGE = 10.0, 1e-2


@dataclass(frozen=True)
class Ratings:
    """N ratings: numbers of users and items, [N] each, and their values [N]."""

    users: Ints
    items: Ints
    values: Floats

    def where(self, chosen: Bools) -> "Ratings":
        return Ratings(self.users[chosen], self.items[chosen], self.values[chosen])

    def over(self, unit: float) -> "Ratings":
        """The same ratings divided by `unit`."""
        return Ratings(self.users, self.items, self.values / unit)


@dataclass
class Factors:
    """Bias and vector of each of N users or items: q = N(mean [N, D], covariance [N, D, D]), column 0 the bias.

    The prior of row n is N(`prior`[n], `spread`), `prior` = content @ weights.
    """

    mean: Floats
    covariance: Floats
    prior: Floats
    spread: Floats
    content: Content
    counts: Ints
    ridge: Floats
    leverage: Floats = field(default_factory=lambda: np.empty(0))

    @classmethod
    def start(cls, content: Content, counts: Ints, width: int, scale: float, rng: np.random.Generator) -> "Factors":
        count = len(counts)
        mean = rng.normal(0.0, scale, (count, width))
        mean[:, 0] = 0.0
        covariance = np.tile(np.eye(width) * scale**2, (count, 1, 1))
        ridge = np.full(len(content.names), _START_RIDGE)
        ridge[0] = _CONSTANT_RIDGE
        return cls(mean, covariance, np.zeros((count, width)), np.eye(width) * scale, content, counts, ridge)

    @property
    def known(self) -> Bools:
        """Which rows have ratings, [N]."""
        return self.counts > 0

    def design(self) -> tuple[Floats, Floats]:
        """What the other side sees of a row, x = (1, v): its mean [N, D] and E[x x'] [N, D, D]."""
        x = self.mean.copy()
        x[:, 0] = 1.0
        second = x[:, :, None] * x[:, None, :]
        second[:, 1:, 1:] += self.covariance[:, 1:, 1:]
        return x, second

    def learn_prior(self) -> None:
        """M step: ridge regression of the vectors on content, its ridges by group, and what content leaves open."""
        some = self.content.features[self.known]
        width = self.mean.shape[1]
        ridge = self.ridge[self.content.groups]
        inverse = np.linalg.inv((some.T @ some).toarray() + np.diag(ridge))  # [F, F]
        weights = inverse @ (some.T @ self.mean[self.known])  # [F, D]
        size = np.einsum("fd,de,fe->f", weights, np.linalg.inv(self.spread), weights) / width + inverse.diagonal()
        for group in range(1, len(self.ridge)):
            mine = self.content.groups == group
            self.ridge[group] = mine.sum() / size[mine].sum()
        features = self.content.features
        self.prior = np.asarray(features @ weights)
        self.leverage = np.asarray(features.multiply(features @ inverse).sum(1)).ravel()
        off = self.mean[self.known] - self.prior[self.known]
        total = self.covariance[self.known].sum(0) + off.T @ off + self.spread * self.leverage[self.known].sum()
        self.spread = total / self.known.sum()

    def with_new(self, power: float) -> "Factors":
        """Rows without ratings drawn around their prior, moved to where those are that count as counts ^ power.

        What is asked about is chosen by users: a new item that gets rated is more like the items that are rated often
        than like the others, by more than its content says. Power 0 moves little or nothing.
        """
        counts = self.counts[self.known] ** power
        weight = counts / counts.sum()
        off = self.mean[self.known] - self.prior[self.known]
        shift = weight @ off
        off = off - shift
        spread = np.einsum("n,nde->de", weight, self.covariance[self.known]) + (off * weight[:, None]).T @ off
        mean, covariance = self.mean.copy(), self.covariance.copy()
        mean[~self.known] = self.prior[~self.known] + shift
        covariance[~self.known] = spread * (1.0 + self.leverage[~self.known])[:, None, None]
        return replace(self, mean=mean, covariance=covariance)


@dataclass(frozen=True)
class RatingModel:
    """What was learned; `noise` is a variance."""

    mean: float
    noise: float
    users: Factors
    items: Factors

    def with_new_items(self, power: float) -> "RatingModel":
        """See `Factors.with_new`."""
        return replace(self, items=self.items.with_new(power))


def learn_ratings(
    ratings: Ratings,
    users: Content,
    items: Content,
    *,
    factors: int,
    seed: int,
    iterations: int = _ITERATIONS,
    tell: Callable[[float], None] = lambda _: None,
) -> RatingModel:
    """Learn from `ratings` (at least one); users and items without any get what their content says.

    What EM starts from is right for ratings whose standard deviation is about 1: divide others by theirs.
    `tell` hears the share that is done, 0 to 1. The same seed gives the same model.
    """
    rng = np.random.default_rng(seed)
    count = (users.features.shape[0], items.features.shape[0])
    mean, noise = float(ratings.values.mean()), float(ratings.values.var()) or 1.0
    times = [np.bincount(at, minlength=n) for at, n in zip((ratings.users, ratings.items), count, strict=True)]
    our_users = Factors.start(users, times[0], factors + 1, _START_USERS, rng)
    our_items = Factors.start(items, times[1], factors + 1, _START_ITEMS, rng)
    by_user, by_item = _Table.of(ratings, mean, count)
    for iteration in range(iterations):
        noise = _update(our_users, our_items, by_user, noise)
        our_users.learn_prior()
        noise = _update(our_items, our_users, by_item, noise)
        our_items.learn_prior()
        tell((iteration + 1) / iterations)
    _update(our_users, our_items, by_user, noise)
    return RatingModel(mean, noise, our_users, our_items.with_new(0.0))


@dataclass(frozen=True)
class _Table:
    """Ratings less their mean, and ones where there is one, both [rows, columns]; `squares` is their sum of squares."""

    values: csr_matrix
    ones: csr_matrix
    squares: float

    @classmethod
    def of(cls, ratings: Ratings, mean: float, count: tuple[int, int]) -> tuple["_Table", "_Table"]:
        at, off = (ratings.users, ratings.items), ratings.values - mean
        values, ones = csr_matrix((off, at), count), csr_matrix((np.ones(len(off)), at), count)
        squares = float(off @ off)
        return cls(values, ones, squares), cls(values.T.tocsr(), ones.T.tocsr(), squares)


def _update(rows: Factors, columns: Factors, table: _Table, noise: float) -> float:
    """E step for all rows given q of the columns; returns the noise that both then explain best (an M step)."""
    x, second = columns.design()
    width = x.shape[1]
    bias = columns.mean[:, 0]
    moved = x * bias[:, None]  # E[x b]
    moved[:, 1:] += columns.covariance[:, 1:, 0]
    gram = (table.ones @ second.reshape(len(x), -1)).reshape(-1, width, width)
    pull = table.values @ x - table.ones @ moved  # E[x (rating - b)], summed
    precision = np.linalg.inv(rows.spread)
    rows.covariance = np.linalg.inv(precision + gram / noise)
    rows.mean = np.einsum("nde,ne->nd", rows.covariance, pull / noise + rows.prior @ precision)
    # E of the squared error, summed: (rating - b)^2 - 2 (c, w) . pull + (c, w)' gram (c, w)
    ours = rows.covariance + rows.mean[:, :, None] * rows.mean[:, None, :]
    counts = np.asarray(table.ones.sum(0)).ravel()
    sums = np.asarray(table.values.sum(0)).ravel()
    own = table.squares - 2 * sums @ bias + counts @ (bias**2 + columns.covariance[:, 0, 0])
    return float(own - 2 * (rows.mean * pull).sum() + (gram * ours).sum()) / float(counts.sum())
