"""The statistics of `metrics` for many weightings of the same predictions: what needs sorting is sorted once.

The bootstrap asks for one arm's figure under hundreds of weightings in a row, with the very same array of predictions.
"""

from dataclasses import dataclass, field

import numpy as np

from innerloop.evaluation.outcome import Floats, Ints

_BINS = 15


@dataclass
class _Order:
    """How the predictions that were last asked about are sorted; equal ones share a group."""

    predictions: Floats = field(default_factory=lambda: np.empty(0))
    order: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    groups: Ints = field(default_factory=lambda: np.empty(0, np.int64))

    def of(self, predictions: Floats) -> "_Order":
        if predictions is not self.predictions:
            self.predictions = predictions
            self.order = np.argsort(predictions, kind="stable")
            self.groups = np.unique(predictions, return_inverse=True)[1].astype(np.int64)
        return self


@dataclass
class Auc:
    """As `metrics.auc`."""

    _order: _Order = field(default_factory=_Order)

    def __call__(self, labels: Floats, predictions: Floats, weights: Floats) -> float:
        groups = self._order.of(predictions).groups
        positive = np.bincount(groups, weights * labels)
        negative = np.bincount(groups, weights * (1.0 - labels))
        below = np.cumsum(negative) - negative
        total = positive.sum() * negative.sum()
        return float(positive @ (below + negative / 2) / total) if total > 0 else float("nan")


@dataclass
class CalibrationError:
    """As `metrics.calibration_error`."""

    _order: _Order = field(default_factory=_Order)

    def __call__(self, labels: Floats, predictions: Floats, weights: Floats) -> float:
        order = self._order.of(predictions).order
        w, y, p = weights[order], labels[order], predictions[order]
        bins = np.minimum((_BINS * (np.cumsum(w) - w / 2) / w.sum()).astype(int), _BINS - 1)
        return float(np.abs(np.bincount(bins, w * (p - y))).sum() / w.sum())
