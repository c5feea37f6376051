"""Ranking metrics of one moment, with ties ranked pessimistically, and the statistics of all moments together.

AUC is of Hanley and McNeil 1982 with ties counted half; GAUC is its mean over groups weighted by their size (Zhou et
al. 2018); nDCG is of Jarvelin and Kekalainen 2002; the expected calibration error is of Naeini et al. 2015 over bins of
equally many moments.
"""

import numpy as np

from innerloop.evaluation.outcome import Floats, Ints

_BINS = 15
_LEAST = 1e-7


def pessimistic_ranks(scores: Floats, target: Ints) -> Ints:
    """Ranks [N], from 1, of column `target[n]` in row n of scores [N, C]: behind everything with an equal score."""
    own = np.take_along_axis(scores, target[:, None], 1)
    found: Ints = (scores >= own).sum(1)
    return found


def hit_rate(ranks: Ints, cutoff: int) -> Floats:
    """1 where the rank (from 1; 0 means not on the list) is within the cutoff, else 0."""
    return ((ranks > 0) & (ranks <= cutoff)).astype(np.float64)


def reciprocal_rank(ranks: Ints, cutoff: int) -> Floats:
    """1 / rank where within the cutoff, else 0; ranks as in `hit_rate`."""
    within = (ranks > 0) & (ranks <= cutoff)
    return np.where(within, 1.0 / np.maximum(ranks, 1), 0.0)


def ndcg_of_one(ranks: Ints, cutoff: int) -> Floats:
    """The nDCG of a list with one relevant item: 1 / log2(1 + rank) where within the cutoff, else 0."""
    within = (ranks > 0) & (ranks <= cutoff)
    return np.where(within, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)


def ndcg(predicted: Floats, gains: Floats, cutoff: int) -> float:
    """The nDCG of items with `gains` [n] >= 0 in descending order of `predicted` [n].

    Of items with equal predictions the one with the least gain comes first. 0 without any gain.
    """
    return float(ndcg_of_rows(predicted[None], gains[None], cutoff)[0])


def ndcg_of_rows(predicted: Floats, gains: Floats, cutoff: int) -> Floats:
    """The nDCG [N] of each row of `predicted` and `gains` [N, n], as `ndcg` has it."""
    discount = 1.0 / np.log2(np.arange(2, 2 + gains.shape[1]))
    discount[cutoff:] = 0.0
    ideal = np.sort(gains, axis=1)[:, ::-1] @ discount
    reached = np.take_along_axis(gains, np.lexsort((gains, -predicted), axis=1), 1) @ discount
    return np.where(ideal > 0, reached / np.where(ideal > 0, ideal, 1.0), 0.0)


def auc(labels: Floats, predictions: Floats, weights: Floats) -> float:
    """The chance that a positive is above a negative, ties half; NaN without both kinds."""
    groups = np.unique(predictions, return_inverse=True)[1]
    positive = np.bincount(groups, weights * labels)
    negative = np.bincount(groups, weights * (1.0 - labels))
    below = np.cumsum(negative) - negative
    total = positive.sum() * negative.sum()
    return float(positive @ (below + negative / 2) / total) if total > 0 else float("nan")


def log_loss(labels: Floats, predictions: Floats, weights: Floats) -> float:
    """Mean negative log-likelihood in nats."""
    p = np.clip(predictions, _LEAST, 1 - _LEAST)
    return float(-(weights @ (labels * np.log(p) + (1 - labels) * np.log1p(-p))) / weights.sum())


def calibration_error(labels: Floats, predictions: Floats, weights: Floats) -> float:
    """Mean over bins of equally many moments of |mean prediction - share of positives|, weighted by the bin."""
    order = np.argsort(predictions, kind="stable")
    w, y, p = weights[order], labels[order], predictions[order]
    bins = np.minimum((_BINS * (np.cumsum(w) - w / 2) / w.sum()).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, w * (p - y))).sum() / w.sum())


def predicted_over_observed(labels: Floats, predictions: Floats, weights: Floats) -> float:
    """Sum of predictions over the number of positives; NaN without positives."""
    observed = weights @ labels
    return float(weights @ predictions / observed) if observed > 0 else float("nan")
