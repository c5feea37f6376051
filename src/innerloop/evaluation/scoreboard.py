"""Figures with their intervals: a bootstrap that draws users, the same users for every arm.

A user's moments depend on each other, so whole users are drawn with replacement (the cluster bootstrap; Efron and
Tibshirani 1993, chapter 8) and an interval is between the 2.5% and 97.5% points of what the draws give. Every arm is
judged on the same draws, so the interval of a difference is of the paired difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome

_DRAWS_AT_ONCE = 32


@dataclass(frozen=True)
class Row:
    """One figure: its 95% interval from `low` to `high`, and the number `n` of moments it is of."""

    arm: str
    metric: str
    slice: str
    value: float
    low: float
    high: float
    n: int


def rows(outcome: Outcome, *, draws: int = 500, seed: int = 0) -> list[Row]:
    """Every arm's figures in every slice, then `default`'s differences to `none` and to the best baseline.

    The slice `all` is every moment, unless the outcome has a slice of that name.
    A difference's arm is written `default - none`; the best baseline is the one best in that metric and slice.
    """
    everything = {"all": np.ones(len(outcome.users), bool), **outcome.slices}
    found: list[Row] = []
    for name, chosen in everything.items():
        if chosen.any():
            figures = _means(outcome, chosen, draws, seed) | _pooled(outcome, chosen, draws, seed)
            found += _slice_rows(outcome, name, figures)
    return found


@dataclass(frozen=True)
class _Figure:
    """`draws[0]` is of the moments as they are, the others of the bootstrap's."""

    draws: Floats
    n: int

    @property
    def value(self) -> float:
        return float(self.draws[0])


_Figures = dict[tuple[str, str], _Figure]


def _slice_rows(outcome: Outcome, name: str, figures: _Figures) -> Iterator[Row]:
    for (arm, metric), figure in figures.items():
        yield _row(arm, metric, name, figure)
    for metric in dict.fromkeys(metric for _, metric in figures):
        ours = figures.get(("default", metric))
        if ours is None:
            continue
        for other in ("none", _best_baseline(outcome, metric, figures)):
            theirs = figures.get((other, metric))
            if theirs is not None and theirs.n == ours.n:
                yield _row(f"default - {other}", metric, name, _Figure(ours.draws - theirs.draws, ours.n))


def _best_baseline(outcome: Outcome, metric: str, figures: _Figures) -> str:
    sign = -1.0 if metric in outcome.smaller_is_better else 1.0
    values = {arm: sign * figures[arm, metric].value for arm in outcome.baselines if (arm, metric) in figures}
    known = sorted(arm for arm, value in values.items() if not np.isnan(value))
    return max(known, key=values.__getitem__, default="")


def _row(arm: str, metric: str, name: str, figure: _Figure) -> Row:
    """Draws in which the figure doesn't exist (an AUC without a positive) are left out."""
    known = figure.draws[1:][~np.isnan(figure.draws[1:])]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Row(arm, metric, name, figure.value, float(low), float(high), figure.n)


def _means(outcome: Outcome, chosen: Bools, draws: int, seed: int) -> _Figures:
    """Sums and counts by user first: then a draw is one product, however many moments there are."""
    users = np.unique(outcome.users[chosen], return_inverse=True)[1]
    keys = [(arm, metric) for arm, metrics in outcome.means.items() for metric in metrics]
    values = [outcome.means[arm][metric][chosen] for arm, metric in keys]
    asked = [~np.isnan(value) for value in values]
    kept = [at for at, some in enumerate(asked) if some.any()]
    if not kept:
        return {}
    sums = np.stack([_by_user(users, np.nan_to_num(values[at])) for at in kept], 1)
    counts = np.stack([_by_user(users, asked[at].astype(float)) for at in kept], 1)
    parts = []
    for weights in _weights(len(sums), draws, seed):
        with np.errstate(invalid="ignore"):
            parts.append((weights @ sums) / (weights @ counts))
    results = np.concatenate(parts)  # [1 + draws, K]
    return {
        keys[at]: _Figure(np.where(np.isnan(results[:, column]), results[0, column], results[:, column]), n)
        for column, at in enumerate(kept)
        if (n := int(asked[at].sum()))
    }


def _pooled(outcome: Outcome, chosen: Bools, draws: int, seed: int) -> _Figures:
    if outcome.labels is None or not outcome.predictions:
        return {}
    labels = outcome.labels[chosen]
    users = np.unique(outcome.users[chosen], return_inverse=True)[1]
    count = int(users.max()) + 1
    figures: _Figures = {}
    for arm, predicted in outcome.predictions.items():
        mine = predicted[chosen]
        for metric, statistic in outcome.pooled.items():
            results = [
                statistic(labels, mine, weight[users]) for part in _weights(count, draws, seed) for weight in part
            ]
            figures[arm, metric] = _Figure(np.array(results), len(labels))
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
