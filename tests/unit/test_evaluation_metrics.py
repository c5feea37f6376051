"""Metrics against scikit-learn, and hand-made cases for ties."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from innerloop.evaluation.metrics import (
    auc,
    calibration_error,
    hit_rate,
    log_loss,
    ndcg,
    ndcg_of_one,
    ndcg_of_rows,
    pessimistic_ranks,
    predicted_over_observed,
    reciprocal_rank,
)

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("cutoff", [1, 3, 5, 10, 50])
def test_ndcg_is_that_of_scikit_learn_without_ties(cutoff: int) -> None:
    predicted = RNG.permuted(np.tile(np.arange(10.0), (40, 1)), axis=1)
    gains = RNG.integers(0, 6, (40, 10)).astype(float)
    expected = [ndcg_score(g[None], p[None], k=cutoff) for p, g in zip(predicted, gains, strict=True)]
    assert_allclose(ndcg_of_rows(predicted, gains, cutoff), expected)
    assert_allclose([ndcg(p, g, cutoff) for p, g in zip(predicted, gains, strict=True)], expected)


def test_ndcg_puts_the_least_gain_first_among_equal_predictions() -> None:
    assert ndcg(np.zeros(3), np.array([3.0, 1.0, 2.0]), 1) == pytest.approx(1 / 3)
    assert ndcg(np.array([1.0, 1.0, 0.0]), np.array([5.0, 4.0, 0.0]), 1) == pytest.approx(0.8)


def test_ndcg_without_any_gain_is_zero_and_of_a_perfect_order_one() -> None:
    assert ndcg(np.arange(3.0), np.zeros(3), 2) == 0.0
    assert ndcg(np.arange(3.0), np.arange(3.0), 2) == pytest.approx(1.0)


def test_a_rank_is_behind_everything_with_an_equal_score() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-np.inf, 0.0, 1.0]])
    assert pessimistic_ranks(scores, np.array([0, 0, 1, 0])).tolist() == [2, 1, 3, 3]


def test_hits_reciprocal_ranks_and_gains_end_at_the_cutoff() -> None:
    ranks = np.array([0, 1, 2, 10, 11])
    assert hit_rate(ranks, 10).tolist() == [0, 1, 1, 1, 0]
    assert_allclose(reciprocal_rank(ranks, 10), [0, 1, 0.5, 0.1, 0])
    assert_allclose(ndcg_of_one(ranks, 10), [0, 1, 1 / np.log2(3), 1 / np.log2(11), 0])


def test_the_gain_of_one_relevant_item_is_the_general_formula() -> None:
    scores = RNG.permuted(np.tile(np.arange(7.0), (20, 1)), axis=1)
    target = RNG.integers(0, 7, 20)
    gains = np.eye(7)[target]
    assert_allclose(ndcg_of_one(pessimistic_ranks(scores, target), 4), ndcg_of_rows(scores, gains, 4))


def test_auc_and_log_loss_are_those_of_scikit_learn_with_ties_and_weights() -> None:
    labels = RNG.integers(0, 2, 500).astype(float)
    predicted = RNG.integers(1, 20, 500) / 20.0
    weights = RNG.integers(0, 4, 500).astype(float)
    assert auc(labels, predicted, weights) == pytest.approx(roc_auc_score(labels, predicted, sample_weight=weights))
    expected = sklearn_log_loss(labels, predicted, sample_weight=weights)
    assert log_loss(labels, predicted, weights) == pytest.approx(expected)


def test_a_weight_of_two_is_the_moment_twice() -> None:
    labels, predicted = RNG.integers(0, 2, 60).astype(float), RNG.integers(1, 9, 60) / 9.0
    weights = RNG.integers(0, 3, 60)
    repeated = np.repeat(np.arange(60), weights)
    ones = np.ones(len(repeated))
    for statistic in (auc, log_loss, predicted_over_observed):
        assert statistic(labels, predicted, weights.astype(float)) == pytest.approx(
            statistic(labels[repeated], predicted[repeated], ones)
        )


def test_auc_needs_both_kinds() -> None:
    assert np.isnan(auc(np.ones(3), np.arange(3.0), np.ones(3)))
    assert np.isnan(auc(np.array([1.0, 0.0]), np.arange(2.0), np.array([1.0, 0.0])))


def test_certain_and_wrong_costs_a_finite_log_loss() -> None:
    assert np.isfinite(log_loss(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.ones(2)))


def test_calibration_error_is_the_mean_over_bins_of_equally_many() -> None:
    labels, predicted = RNG.integers(0, 2, 1500).astype(float), RNG.random(1500)
    order = np.argsort(predicted)
    bins = order.reshape(15, 100)
    expected = np.mean([abs(predicted[b].mean() - labels[b].mean()) for b in bins])
    assert calibration_error(labels, predicted, np.ones(1500)) == pytest.approx(expected)


def test_calibration_error_of_a_constant_is_its_distance_from_the_share() -> None:
    labels = np.repeat([1.0, 0.0], [150, 1350])
    shuffled = RNG.permutation(labels)
    error = calibration_error(shuffled, np.full(1500, 0.9), np.ones(1500))
    assert error == pytest.approx(0.8)


def test_predicted_over_observed_is_one_when_the_sums_agree() -> None:
    assert predicted_over_observed(np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.ones(2)) == pytest.approx(1.0)
    assert np.isnan(predicted_over_observed(np.zeros(2), np.ones(2), np.ones(2)))
