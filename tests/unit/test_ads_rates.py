import numpy as np
import pytest
from scipy.special import betaln

from innerloop.learning.ads.rates import _GRID, ContentPrior, _log_likelihood, fit_strength, shrunk


def test_a_new_ad_has_its_prior_and_an_old_one_its_own_rate() -> None:
    rates = shrunk(np.array([0.0, 500.0]), np.array([0.0, 1000.0]), 0.1, 10.0)
    assert rates[0] == pytest.approx(0.1)
    assert rates[1] == pytest.approx(0.5, abs=0.01)


def test_the_likelihood_is_the_beta_binomials() -> None:
    s, n, r, k = np.array([0.0, 3.0]), np.array([4.0, 7.0]), np.array([0.2, 0.4]), 6.0
    expected = (betaln(s + k * r, n - s + k * (1 - r)) - betaln(k * r, k * (1 - r))).sum()
    assert _log_likelihood(s, n, r, k) == pytest.approx(expected)


@pytest.mark.parametrize("strength", [3.0, 30.0, 300.0])
def test_the_strength_that_made_the_rates_is_found_again(strength: float) -> None:
    rng = np.random.default_rng(0)
    rates = rng.beta(0.2 * strength, 0.8 * strength, 3_000)
    trials = np.full(3_000, 60.0)
    found = fit_strength(rng.binomial(60, rates).astype(float), trials, 0.2)
    assert strength / 1.6 < found < strength * 1.6


def test_items_that_do_not_differ_get_their_categorys_rate() -> None:
    rng = np.random.default_rng(1)
    categories = np.repeat(np.arange(20), 50)
    trials = np.full(1_000, 40.0)
    successes = rng.binomial(40, np.where(categories < 10, 0.05, 0.4)).astype(float)
    prior = ContentPrior.fit(categories, successes, trials)
    assert prior.item_strength > 200
    assert prior.category_strength < 20
    new = prior.item_rates(np.zeros(1), np.zeros(1), np.array([0.4]))
    assert new.tolist() == [0.4]


def test_nothing_seen_leaves_the_prior_alone() -> None:
    assert fit_strength(np.zeros(3), np.zeros(3), 0.1) == _GRID[-1]
    assert ContentPrior.fit(np.zeros(0, np.int64), np.zeros(0), np.zeros(0)).item_strength == _GRID[-1]
