"""Rates of things seen seldom: a prior by content, shrunk by counts.

A new ad has no history, but its category has. With s conversions of n clicks and a prior rate r (the category's, itself
shrunk to everybody's) the posterior mean of a Beta(k r, k (1 - r)) prior is (s + k r) / (n + k): the prior for n = 0,
the ad's own rate for large n. How many clicks k the prior is worth is found from the data, by maximising the
beta-binomial likelihood (empirical Bayes; Casella 1985).
"""

from dataclasses import dataclass
from math import lgamma

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_GRID = np.geomspace(1.0, 10_000.0, 33)
_LEAST = 1e-6
_log_gamma = np.vectorize(lgamma, otypes=[np.float64])


def shrunk(successes: Floats, trials: Floats, prior: Floats | float, strength: float) -> Floats:
    """The posterior mean rates [N] of `successes` in `trials`, both [N], under a prior worth `strength` trials."""
    return np.asarray((successes + strength * prior) / (trials + strength), np.float64)


def fit_strength(successes: Floats, trials: Floats, prior: Floats | float) -> float:
    """How many trials the prior is worth: the likeliest from 1 to 10,000; the largest when nothing differs."""
    some = trials > 0
    if not some.any():
        return float(_GRID[-1])
    s, n = successes[some], trials[some]
    r = np.clip(np.broadcast_to(np.asarray(prior, np.float64), trials.shape)[some], _LEAST, 1 - _LEAST)
    return float(_GRID[int(np.argmax([_log_likelihood(s, n, r, k) for k in _GRID]))])


def _log_likelihood(s: Floats, n: Floats, r: Floats, k: float) -> float:
    """Sum of log B(s + kr, n - s + k(1 - r)) - log B(kr, k(1 - r)), without the binomial coefficients."""
    posterior = _log_gamma(s + k * r) + _log_gamma(n - s + k * (1 - r)) - _log_gamma(n + k)
    prior = _log_gamma(k * r) + _log_gamma(k * (1 - r)) - lgamma(k)
    return float((posterior - prior).sum())


@dataclass(frozen=True)
class ContentPrior:
    """How many trials everybody's rate is worth to a category, and a category's rate to an item."""

    category_strength: float
    item_strength: float

    @classmethod
    def fit(cls, categories: Ints, successes: Floats, trials: Floats) -> "ContentPrior":
        """Learn both from items' counts, all [N]; `categories` are numbers from 0."""
        overall = (successes.sum() + 1.0) / (trials.sum() + 2.0)
        count = int(categories.max(initial=0)) + 1
        s = np.bincount(categories, successes, count).astype(np.float64)
        n = np.bincount(categories, trials, count).astype(np.float64)
        category_strength = fit_strength(s, n, overall)
        prior = shrunk(s, n, overall, category_strength)[categories]
        return cls(category_strength, fit_strength(successes, trials, prior))

    def category_rates(self, successes: Floats, trials: Floats, overall: Floats | float) -> Floats:
        return shrunk(successes, trials, overall, self.category_strength)

    def item_rates(self, successes: Floats, trials: Floats, category_rates: Floats) -> Floats:
        """Rates of items [N] whose categories have `category_rates` [N]; the category's for an item without trials."""
        return shrunk(successes, trials, category_rates, self.item_strength)
