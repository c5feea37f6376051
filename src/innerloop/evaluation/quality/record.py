"""What `innerloop quality` says of one window: the message on the topic quality.windows."""

from typing import Literal

import msgspec

CUTOFFS = (10, 20)
JudgedArm = Literal["adapted", "hold_out", "placebo"]
"""What clicks are judged by: a list of one of the two arms of scores; `placebo` is another adapted user's list."""


class AtCutoff(msgspec.Struct, frozen=True):
    """Of the clicks: `hits` were among the first `k` of their lists; `mrr` is the mean of 1 / rank, 0 beyond `k`."""

    k: int
    hits: int
    hit_rate: float
    mrr: float


class AdFigures(msgspec.Struct, frozen=True):
    """Of the clicks on ads whose attribution window ended in this one, where a probability had been published.

    `auc` and `predicted_over_observed` are null where the clicks do not have both outcomes, or no purchase.
    """

    clicks: int
    purchases: int
    predicted: float
    auc: float | None
    predicted_over_observed: float | None


class Group(msgspec.Struct, frozen=True):
    """Figures of one arm, of one model version or (null) of all."""

    arm: JudgedArm
    model_version: int | None
    users: int
    clicks: int
    at: list[AtCutoff]
    ads: AdFigures | None


class Lift(msgspec.Struct, frozen=True):
    """Hit rate at `k`, adapted minus hold-out, and the ends of its 95% interval."""

    k: int
    difference: float
    low: float
    high: float


class QualityWindow(msgspec.Struct, frozen=True):
    """One window [start, end) of event time; times are epoch milliseconds.

    `clicks` are those of the sample in this window, `without_list` those of them that no list had been published for
    before; `late` records came since the last window for windows that had been closed.
    """

    window_start: int
    window_end: int
    closed_at: int
    clicks: int
    without_list: int
    late: int
    arms: list[Group]
    versions: list[Group]
    lift: list[Lift]
