"""What makes a candidate likely before anything is learned of a shop: shares of what was done, added up.

    b(x) = log(sum over k of w_k v_k(x) + epsilon)

(linear interpolation of models; Jelinek and Mercer 1980). Each v_k is a share between 0 and 1, most of them 0: the
task's own items by how recent they are, what others met near its newest items, what is popular now, and so on. That is
what recents, co-visits and popularity each foresee alone.
"""

import torch
from torch import Tensor

from innerloop.learning.candidates import FEATURES
from innerloop.trends import EPSILON

_SHARES = {
    "log_after_long": 1.0,
    "log_before_long": 0.5,
    "log_after_last": 1.0,
    "log_share_3600s": 1.0,
    "log_share_86400s": 0.3,
}
_OWN = {"own_recency": 0.3, "own_kept": 0.3, "category_share": 3.0, "head": 0.02}
WEIGHTS = torch.tensor([*_SHARES.values(), *_OWN.values()])
"""The weights [K] that hold for any shop: chosen by hand on small cuts of two public logs, a shop's and a paper's.

Items that the task put into its cart or kept count twice; popularity within a category is a small share of all events,
hence its large weight; what the head likes orders those of which nothing else is known.
"""
NOTHING = torch.zeros_like(WEIGHTS)
"""Weights [K] by which all candidates are alike."""

_AT = [FEATURES.index(name) for name in _SHARES]
_RECENCY, _KEPT, _CATEGORY, _HEAD = (FEATURES.index(name) for name in _OWN)
_DAY = len(_SHARES) - 1
_LEAST = 1e-6


def blended(features: Tensor, weights: Tensor) -> Tensor:
    """Tell b [..] of features [.., F] by weights [K]."""
    shares = (features[..., _AT].clamp(max=0.0).exp() - EPSILON).clamp(min=0.0)
    own = features[..., _RECENCY].clamp(0.0, 1.0)
    others = [
        own,
        own * features[..., _KEPT].clamp(0.0, 1.0),
        features[..., _CATEGORY].clamp(0.0, 1.0) * shares[..., _DAY],
        features[..., _HEAD].clamp(0.0, 1.0),
    ]
    values = torch.cat([shares, torch.stack(others, -1)], -1)
    found: Tensor = torch.log(values @ weights + _LEAST)
    return found
