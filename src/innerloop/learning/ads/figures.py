"""How good probabilities were: told in a release's card."""

import numpy as np
import torch
from torch import Tensor

_BINS = 10


def auc(predictions: Tensor, labels: Tensor) -> float:
    """The chance that a positive of [N] is above a negative, ties half."""
    groups = np.unique(predictions.numpy(), return_inverse=True)[1]
    positive = np.bincount(groups, labels.numpy())
    negative = np.bincount(groups, 1.0 - labels.numpy())
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def calibration_error(predictions: Tensor, labels: Tensor) -> float:
    """Mean over ten bins of equally many of |mean prediction - share of positives|, both [N]."""
    gaps = (predictions - labels)[predictions.argsort(stable=True)]
    return float(sum(part.sum().abs() for part in torch.tensor_split(gaps, _BINS)) / len(gaps))
