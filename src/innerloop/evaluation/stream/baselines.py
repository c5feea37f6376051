"""The baselines of the stream protocol."""

import numpy as np

from innerloop.evaluation.baselines.covisits import Covisits
from innerloop.evaluation.baselines.ials import ImplicitFactors
from innerloop.evaluation.baselines.item_knn import SequentialRules
from innerloop.evaluation.baselines.popularity import Popularity, PopularityInCategory, PopularityLastHour
from innerloop.evaluation.baselines.recents import ASIDE, CartedRecents, Recents
from innerloop.evaluation.baselines.sasrec import SasRec
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.baselines.vsknn import SessionNeighbours
from innerloop.evaluation.stream.arms import StreamArm
from innerloop.evaluation.stream.options import StreamOptions
from innerloop.learning.stream_log import StreamLog

NAMES = frozenset(
    arm.name
    for arm in (
        Popularity,
        PopularityLastHour,
        PopularityInCategory,
        Recents,
        CartedRecents,
        Covisits,
        SequentialRules,
        SessionNeighbours,
        ImplicitFactors,
        SasRec,
    )
)
"""Of all that there are; which of them a log gets depends on what it has."""


def baselines(log: StreamLog, options: StreamOptions, *, seed: int = 0) -> list[StreamArm]:
    """Fresh arms, those that apply: none by own items where these don't count, none by category where none is known."""
    visits = Visits(log)
    arms: list[StreamArm] = [Popularity(log), PopularityLastHour(log)]
    if (log.categories >= 0).any():
        arms.append(PopularityInCategory(log))
    if not options.remove_seen:
        arms.append(Recents(log))
        if np.isin(log.kinds, ASIDE).any():
            arms.append(CartedRecents(log))
    return [
        *arms,
        Covisits(log, visits),
        SequentialRules(log, visits),
        SessionNeighbours(log, visits),
        ImplicitFactors(log, seed=seed),
        SasRec(log, seed=seed),
    ]
