"""The figures of a window from its judged clicks: rates by arm and model version, the lift and its interval.

A user's clicks are alike, so they are worth fewer than independent ones. The variance of a rate is that of a ratio of
sums over users (Cochran 1977, 6.3; for click rates Deng, Knoblich and Lu 2018); over the binomial variance it is the
design effect, and clicks / design effect, at most the clicks, is the effective sample (Korn and Graubard 1998). Of the
two effective samples the interval of the difference is Newcombe's hybrid score interval (1998, method 10), which is of
use at small counts and at rates of 0 and 1, where the normal one is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from innerloop.evaluation.metrics import auc, hit_rate, predicted_over_observed, reciprocal_rank
from innerloop.evaluation.outcome import Floats, Ints
from innerloop.evaluation.quality.record import CUTOFFS, AdFigures, AtCutoff, Group, JudgedArm, Lift
from innerloop.scores import Arm

_Z = 1.959963984540054
ARMS: tuple[JudgedArm, ...] = ("adapted", "hold_out", "placebo")


@dataclass(frozen=True)
class JudgedClick:
    """A click held against its list: the rank of its item from 1, 0 where it is not on the list."""

    user_id: str
    arm: JudgedArm
    model_version: int
    rank: int


@dataclass(frozen=True)
class JudgedAd:
    """A click on an ad, the probability that had been published, and whether the purchase came."""

    arm: Arm
    model_version: int
    probability: float
    bought: bool


def groups(clicks: Sequence[JudgedClick], ads: Sequence[JudgedAd]) -> tuple[list[Group], list[Group]]:
    """The figures by arm, and by arm and model version; a group with neither clicks nor ads is left out."""
    versions = sorted({(c.arm, c.model_version) for c in clicks} | {(a.arm, a.model_version) for a in ads})
    by_arm = [
        _group(arm, None, [c for c in clicks if c.arm == arm], [a for a in ads if a.arm == arm])
        for arm in ARMS
        if any(arm == each for each, _ in versions)
    ]
    by_version = [
        _group(
            arm,
            version,
            [c for c in clicks if (c.arm, c.model_version) == (arm, version)],
            [a for a in ads if (a.arm, a.model_version) == (arm, version)],
        )
        for arm, version in versions
    ]
    return by_arm, by_version


def lifts(clicks: Sequence[JudgedClick]) -> list[Lift]:
    """Adapted minus hold-out at each cutoff; none where an arm has no clicks."""
    first, second = ([c for c in clicks if c.arm == arm] for arm in ("adapted", "hold_out"))
    if not first or not second:
        return []
    found = []
    for k in CUTOFFS:
        (p1, l1, u1), (p2, l2, u2) = _rate_with_interval(first, k), _rate_with_interval(second, k)
        low = p1 - p2 - math.hypot(p1 - l1, u2 - p2)
        high = p1 - p2 + math.hypot(u1 - p1, p2 - l2)
        found.append(Lift(k, _rounded(p1 - p2), _rounded(low), _rounded(high)))
    return found


def effective_clicks(hits: Floats, users: Ints) -> float:
    """How many independent clicks `hits` [N] of 0 or 1, by `users` [N], are worth; between 1 and N.

    Where all or none hit the spread is unknown: then a user's clicks count as one, with Kish's (1965) correction for
    unequal numbers.
    """
    numbers = np.unique(users, return_inverse=True)[1]
    clicks = np.bincount(numbers).astype(np.float64)
    n, m, p = len(hits), len(clicks), hits.mean()
    if p in {0.0, 1.0} or m == 1:
        return float(n * n / (clicks @ clicks))
    residual = np.bincount(numbers, hits) - p * clicks
    variance = m / (m - 1) * (residual @ residual) / n**2
    return float(min(n, max(1.0, n / (n - 1) * p * (1 - p) / variance))) if variance > 0 else float(n)


def _rate_with_interval(clicks: Sequence[JudgedClick], k: int) -> tuple[float, float, float]:
    """Hit rate at k and Wilson's (1927) 95% interval of the effective sample."""
    hits = hit_rate(np.array([each.rank for each in clicks]), k)
    users = np.unique([each.user_id for each in clicks], return_inverse=True)[1]
    p, n = float(hits.mean()), effective_clicks(hits, users)
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return p, middle - half, middle + half


def _group(arm: JudgedArm, version: int | None, clicks: Sequence[JudgedClick], ads: Sequence[JudgedAd]) -> Group:
    ranks = np.array([each.rank for each in clicks], np.int64)
    at = []
    for k in CUTOFFS if clicks else ():
        hits = hit_rate(ranks, k)
        at.append(AtCutoff(k, int(hits.sum()), _rounded(hits.mean()), _rounded(reciprocal_rank(ranks, k).mean())))
    users = len({each.user_id for each in clicks})
    return Group(arm, version, users, len(clicks), at, _ad_figures(ads) if ads else None)


def _ad_figures(ads: Sequence[JudgedAd]) -> AdFigures:
    labels = np.array([each.bought for each in ads], np.float64)
    predicted = np.array([each.probability for each in ads])
    weights = np.ones(len(labels))
    return AdFigures(
        len(labels),
        int(labels.sum()),
        _rounded(predicted.sum()),
        _known(auc(labels, predicted, weights)),
        _known(predicted_over_observed(labels, predicted, weights)),
    )


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else _rounded(figure)


def _rounded(figure: float) -> float:
    return round(float(figure), 6)
