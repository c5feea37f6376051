"""What a partition's lag means, judged by a window of looks at it, without a threshold that somebody would have to set.

The rules are those that LinkedIn's Burrow made known (its wiki, "Consumer Lag Evaluation Rules"): a number of offsets
says little by itself, what it did over a while says all.

    ok        some look found no lag: it keeps up
    warning   it moves, but the lag never fell from one look to the next: it falls behind
    stalled   it has a member, does not move, and the lag does not fall
    stopped   the same, and nobody owns it (Burrow infers that from commits that cease; the group tells us)

Between two looks without any rule that applies (it moves and catches up) it is ok.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Status = Literal["ok", "warning", "stalled", "stopped"]
WORST_LAST: tuple[Status, ...] = ("ok", "warning", "stalled", "stopped")


@dataclass(frozen=True)
class Look:
    """One look at a partition: when (seconds, any clock), the group's offset, and how many offsets lie behind it."""

    at: float
    position: int
    offsets: int


@dataclass(frozen=True)
class Judgement:
    """`catch_up_seconds` is how long until there is no lag at the window's pace: 0 without lag, inf if it grows."""

    status: Status
    catch_up_seconds: float


def judge(window: Sequence[Look], *, owned: bool) -> Judgement:
    """Judge one partition by at least one look, in order of time; `owned` says whether a member has it now.

    One look alone finds ok without lag, stopped without an owner, and else warning: whether it moves is not known.
    """
    return Judgement(_status(window, owned=owned), catch_up_seconds([window]))


def _status(window: Sequence[Look], *, owned: bool) -> Status:
    if any(look.offsets == 0 for look in window):
        return "ok"
    moves = window[-1].position > window[0].position
    falls = any(later.offsets < earlier.offsets for earlier, later in pairwise(window))
    if moves or falls:
        return "ok" if falls else "warning"
    if not owned:
        return "stopped"
    return "stalled" if len(window) > 1 else "warning"


def catch_up_seconds(windows: Sequence[Sequence[Look]]) -> float:
    """Until all these partitions together have no lag, at the pace of their windows; inf when that never comes."""
    now = sum(window[-1].offsets for window in windows)
    if now == 0:
        return 0.0
    fell = sum(window[0].offsets - window[-1].offsets for window in windows)
    passed = max(window[-1].at - window[0].at for window in windows)
    return now * passed / fell if fell > 0 else math.inf
