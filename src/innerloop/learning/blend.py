"""What makes a candidate likely before anything is learned of a shop: shares of what was done, added up.

    b(x) = log(sum over k of w_k v_k(x) + epsilon)

(linear interpolation of models; Jelinek and Mercer 1980). Each v_k is between 0 and 1, most of them 0: the task's own
items by how recent they are, what others met near its newest items, what is popular now, and so on. That is what
recents, co-visits and popularity each foresee alone.
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
_OTHERS = {"own_recency": 0.3, "own_kept": 0.3, "category_share": 3.0, "head": 0.01}
WEIGHTS = torch.tensor([*_SHARES.values(), *_OTHERS.values()])
"""The weights [K] that hold for any shop: chosen by hand on small cuts of two public logs, a shop's and a paper's.

Items that the task put into its cart or kept count twice; popularity within a category is a small share of all events,
hence its large weight; what the head likes orders those of which nothing else is known.
"""

_AT = [FEATURES.index(name) for name in _SHARES]
_RECENCY, _KEPT, _CATEGORY, _HEAD = (FEATURES.index(name) for name in _OTHERS)
_DAY = list(_SHARES).index("log_share_86400s")
_LEAST = 1e-6


def blended(features: Tensor, weights: Tensor) -> Tensor:
    """Tell b [..] of features [.., F] by weights [K]."""
    column = features.unbind(-1)
    # By column, as they lie in memory, and not by an index, which a GPU would have to be sent each time.
    shares = (torch.stack([column[at] for at in _AT]).clamp_(max=0.0).exp_() - EPSILON).clamp_(min=0.0)
    recency, kept, category = (column[at].clamp(0.0, 1.0) for at in (_RECENCY, _KEPT, _CATEGORY))
    liked = 0.5 + 0.5 * column[_HEAD] / (1.0 + column[_HEAD].abs())  # a head's scores have no bounds
    others = torch.stack([recency, recency * kept, category * shares[_DAY], liked])
    found: Tensor = torch.log(torch.tensordot(weights, torch.cat([shares, others]), 1) + _LEAST)
    return found
