"""Figures with their intervals: a bootstrap that draws users, the same users for every arm.

A user's moments depend on each other, so whole users are drawn with replacement (the cluster bootstrap; Efron and
Tibshirani 1993, chapter 8) and an interval is between the 2.5% and 97.5% points of what the draws give. Every arm is
judged on the same draws, so the interval of a difference is of the paired difference.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome

_DRAWS_AT_ONCE = 32
_CONTROLS = frozenset({"none", "placebo"})


@dataclass(frozen=True)
class Row:
    """One figure: its 95% interval from `low` to `high`, and the number `n` of moments it is of.

    Of a single user's moments there is no interval, as nothing is known of other users: both are NaN.
    """

    arm: str
    metric: str
    slice: str
    value: float
    low: float
    high: float
    n: int


def rows(outcome: Outcome, *, draws: int = 500, seed: int = 0) -> list[Row]:
    """Every arm's figures in every slice, then the differences that tell what an arm is worth.

    The slice `all` is every moment, unless the outcome has a slice of that name. A difference's arm is written
    `default - none`. There is one to `none` for each arm that is no baseline, one to the best baseline for each of
    those but the controls, and those that the outcome names, all in metrics that have a better and a worse; the best
    baseline is the one best in that metric and slice. A difference is of the moments at which both arms were asked. A
    figure that does not exist in a slice, such as an AUC without a positive, has no row.
    """
    everything = {"all": np.ones(len(outcome.users), bool), **outcome.slices}
    found: list[Row] = []
    for name, chosen in everything.items():
        if chosen.any():
            figures = _means(outcome, chosen, draws, seed) | _pooled(outcome, chosen, draws, seed)
            figures |= _differences(outcome, chosen, figures, draws, seed)
            found += [_row(arm, metric, name, figure) for (arm, metric), figure in figures.items() if figure.exists]
    return found


@dataclass(frozen=True)
class _Figure:
    """`draws[0]` is of the moments as they are, the others of the bootstrap's; `n` moments are of `users` users."""

    draws: Floats
    n: int
    users: int

    @property
    def value(self) -> float:
        return float(self.draws[0])

    @property
    def exists(self) -> bool:
        return bool(np.isfinite(self.draws[0]))


_Figures = dict[tuple[str, str], _Figure]


def _differences(outcome: Outcome, chosen: Bools, figures: _Figures, draws: int, seed: int) -> _Figures:
    """One draw's difference is that of the arms' figures; of arms that were asked at other moments, see below."""
    found: _Figures = {}
    apart: dict[tuple[str, str], Floats] = {}
    for arm, other, metric in _pairs(outcome, figures):
        key = f"{arm} - {other}", metric
        asked, also = _asked(outcome, arm, metric), _asked(outcome, other, metric)
        of = figures
        if not np.array_equal(asked[chosen], also[chosen]):
            if metric not in outcome.pooled:
                apart[key] = (outcome.means[arm][metric] - outcome.means[other][metric])[chosen]  # NaN but where both
                continue
            of = _pooled(_only(outcome, (arm, other), metric, asked & also), chosen, draws, seed)
        if (arm, metric) in of:
            mine = of[arm, metric]
            found[key] = replace(mine, draws=mine.draws - of[other, metric].draws)
    return found | _of_values(outcome.users[chosen], apart, draws, seed)


def _asked(outcome: Outcome, arm: str, metric: str) -> Bools:
    """At which moments [N] an arm has what the metric is made of."""
    return np.isfinite(outcome.predictions[arm] if metric in outcome.pooled else outcome.means[arm][metric])


def _only(outcome: Outcome, arms: Iterable[str], metric: str, moments: Bools) -> Outcome:
    """The same with these arms alone, asked at these moments [N] alone, for this pooled metric."""
    predictions = {arm: np.where(moments, outcome.predictions[arm], np.nan) for arm in arms}
    return replace(outcome, predictions=predictions, pooled={metric: outcome.pooled[metric]})


def _pairs(outcome: Outcome, figures: _Figures) -> Iterator[tuple[str, str, str]]:
    metrics = [name for name in dict.fromkeys(metric for _, metric in figures) if name not in outcome.undirected]
    best = {metric: _best_baseline(outcome, metric, figures) for metric in metrics}
    for arm in outcome.arms:
        others = [] if arm in outcome.baselines | {"none"} else ["none"]
        others += [] if arm in outcome.baselines | _CONTROLS else ["the best baseline"]
        others += [other for one, other in outcome.differences if one == arm]
        for other, metric in ((other, metric) for other in others for metric in metrics):
            name = best[metric] if other == "the best baseline" else other
            if (arm, metric) in figures and (name, metric) in figures:
                yield arm, name, metric


def _best_baseline(outcome: Outcome, metric: str, figures: _Figures) -> str:
    sign = -1.0 if metric in outcome.smaller_is_better else 1.0
    values = {arm: sign * figures[arm, metric].value for arm in outcome.baselines if (arm, metric) in figures}
    known = sorted(arm for arm, value in values.items() if not np.isnan(value))
    return max(known, key=values.__getitem__, default="")


def _row(arm: str, metric: str, name: str, figure: _Figure) -> Row:
    """Draws in which the figure doesn't exist are left out.

    The interval holds the figure itself: of a calibration error, which drawing users again makes larger, it may not.
    """
    known = figure.draws[1:][np.isfinite(figure.draws[1:])]
    if figure.users == 1:
        return Row(arm, metric, name, figure.value, np.nan, np.nan, figure.n)
    low, high = np.quantile(known, [0.025, 0.975]).tolist() if len(known) else (figure.value, figure.value)
    return Row(arm, metric, name, figure.value, min(low, figure.value), max(high, figure.value), figure.n)


def _means(outcome: Outcome, chosen: Bools, draws: int, seed: int) -> _Figures:
    values = {(arm, metric): of[chosen] for arm, metrics in outcome.means.items() for metric, of in metrics.items()}
    return _of_values(outcome.users[chosen], values, draws, seed)


def _of_values(owners: Ints, values: Mapping[tuple[str, str], Floats], draws: int, seed: int) -> _Figures:
    """Means of each moment's values. Sums and counts by user first: then a draw is one product, whatever the moments.

    A draw without any moment that was asked has no figure: NaN.
    """
    asked = {key: there for key, value in values.items() if (there := np.isfinite(value)).any()}
    if not asked:
        return {}
    users = np.unique(owners, return_inverse=True)[1]
    sums = np.stack([_by_user(users, np.where(there, values[key], 0.0)) for key, there in asked.items()], 1)
    counts = np.stack([_by_user(users, there.astype(float)) for there in asked.values()], 1)
    with np.errstate(invalid="ignore"):
        parts = [(weights @ sums) / (weights @ counts) for weights in _weights(len(sums), draws, seed)]
    results = np.concatenate(parts)  # [1 + draws, K]
    owned = (counts > 0).sum(0)
    return {
        key: _Figure(results[:, column], int(asked[key].sum()), int(owned[column])) for column, key in enumerate(asked)
    }


def _pooled(outcome: Outcome, chosen: Bools, draws: int, seed: int) -> _Figures:
    """Of each arm's moments that were asked. A draw of users without any has no figure: NaN."""
    if outcome.labels is None or not outcome.predictions:
        return {}
    users = np.unique(outcome.users[chosen], return_inverse=True)[1]
    count = int(users.max()) + 1
    figures: _Figures = {}
    for arm, predicted in outcome.predictions.items():
        asked = np.isfinite(predicted[chosen])
        if not asked.any():
            continue
        owners, labels, mine = users[asked], outcome.labels[chosen][asked], predicted[chosen][asked]
        for metric, statistic in outcome.pooled.items():
            drawn = (weight[owners] for part in _weights(count, draws, seed) for weight in part)
            results = [statistic(labels, mine, weights) if weights.any() else np.nan for weights in drawn]
            figures[arm, metric] = _Figure(np.array(results), len(labels), len(np.unique(owners)))
    return figures


def _by_user(users: Ints, values: Floats) -> Floats:
    return np.bincount(users, weights=values).astype(np.float64)


def _weights(users: int, draws: int, seed: int) -> Iterator[Floats]:
    """How often each user was drawn, [.., users]: first everyone once, then the draws, the same for the same seed."""
    yield np.ones((1, users))
    rng = np.random.default_rng(seed)
    for first in range(0, draws, _DRAWS_AT_ONCE):
        some = min(_DRAWS_AT_ONCE, draws - first)
        drawn = rng.integers(users, size=(some, users)) + users * np.arange(some)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=some * users).reshape(some, users).astype(np.float64)
