"""From a predicted mean to the rating that is least wrong: the median of an ordinal distribution.

The absolute error is least at the median, and ratings are few ordered levels, so that the median is one of them.
P(rating <= level) is a logistic regression of the prediction and its spread for each level but the last (the
proportional-odds model of McCullagh 1980 with slopes of their own), learned on users that were not trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from innerloop.evaluation.outcome import Floats, Ints

_MOST_LEVELS = 20
_STEPS, _LONGEST_STEP = 25, 2.0
_RIDGE = 1e-3
_FEWEST = 300  # predictions that a rule is learned from


class Prediction(NamedTuple):
    """Of E episodes and Q ratings each, [E, Q]: the mean, how uncertain, and what sort of case it is.

    The scale of `spread` is the arm's own: it is larger the less is known. For each `kind` (an item with training
    ratings, a new one, ...) a rule of its own is learned.
    """

    mean: Floats
    spread: Floats
    kind: Ints


@dataclass(frozen=True)
class DecisionRule:
    """A median rule for each kind of case, and one for kinds of which there were too few to learn from."""

    kinds: Mapping[int, "MedianRule"]
    otherwise: "MedianRule"

    @classmethod
    def learn(cls, predicted: Prediction, ratings: Floats) -> "DecisionRule":
        """Learn from predictions and what the ratings [E, Q] were."""
        mean, spread, known = predicted.mean.ravel(), predicted.spread.ravel(), ratings.ravel()
        scale = (float(known.min()), float(known.max()))
        kinds, counts = np.unique(predicted.kind, return_counts=True)
        rules = {}
        for kind in kinds[counts >= _FEWEST]:
            some = predicted.kind.ravel() == kind
            rules[int(kind)] = MedianRule.learn(mean[some], spread[some], known[some], scale)
        return cls(rules, MedianRule.learn(mean, spread, known))

    def decide(self, predicted: Prediction) -> Floats:
        """The least wrong ratings [E, Q]; a NaN stays one."""
        decided = self.otherwise.decide(predicted.mean, predicted.spread)
        for kind, rule in self.kinds.items():
            decided = np.where(predicted.kind == kind, rule.decide(predicted.mean, predicted.spread), decided)
        return decided

    def clip(self, mean: Floats) -> Floats:
        """Within the scale of the ratings."""
        return np.clip(mean, self.otherwise.low, self.otherwise.high)


@dataclass(frozen=True)
class MedianRule:
    """`levels` [K] in ascending order and `weights` [K - 1, 4]; without levels a prediction is only clipped."""

    levels: Floats
    weights: Floats
    low: float
    high: float

    @classmethod
    def learn(
        cls, mean: Floats, spread: Floats, ratings: Floats, scale: tuple[float, float] | None = None
    ) -> "MedianRule":
        """Learn from N predictions [N], their spreads [N] and what the ratings [N] were; `scale` is theirs if None."""
        levels = np.unique(ratings)
        low, high = scale or (float(levels[0]), float(levels[-1]))
        if not 1 < len(levels) <= _MOST_LEVELS:
            return cls(np.empty(0), np.empty((0, 4)), low, high)
        features = _features(np.clip(mean, low, high), spread)
        weights = [_logistic(features, (ratings <= level).astype(float)) for level in levels[:-1]]
        return cls(levels, np.stack(weights), low, high)

    def decide(self, mean: Floats, spread: Floats) -> Floats:
        """The median's level for each prediction, in the shape of `mean`; a NaN stays one."""
        if not len(self.levels):
            return np.clip(mean, self.low, self.high)
        clipped = np.clip(mean, self.low, self.high).ravel()  # one wild prediction must not bend the rule
        above = (_features(clipped, spread.ravel()) @ self.weights.T < 0).sum(1)
        return np.where(np.isnan(mean), np.nan, self.levels[above].reshape(mean.shape))


def _features(mean: Floats, spread: Floats) -> Floats:
    return np.stack([np.ones_like(mean), mean, spread, mean * spread], 1)


def _logistic(features: Floats, labels: Floats) -> Floats:
    """Newton's method with a ridge on standardised features and no long steps; labels 0 or 1."""
    center, scale = features.mean(0), features.std(0)
    center[0], scale[scale < 1e-9] = 0.0, 1.0  # noqa: PLR2004
    scaled = (features - center) / scale
    weights = np.zeros(features.shape[1])
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(scaled @ weights, -30, 30)))
        curvature = (scaled * (p * (1 - p))[:, None]).T @ scaled / len(labels)
        gradient = scaled.T @ (labels - p) / len(labels) - _RIDGE * weights
        step = np.linalg.solve(curvature + _RIDGE * np.eye(len(weights)), gradient)
        weights = weights + step * min(1.0, _LONGEST_STEP / max(float(np.linalg.norm(step)), _LONGEST_STEP))
    raw = weights / scale
    raw[0] = weights[0] / scale[0] - (weights[1:] / scale[1:]) @ center[1:]
    return np.asarray(raw, np.float64)
