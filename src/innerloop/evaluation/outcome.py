"""What a protocol found out: for every arm, what each moment it was asked at was worth.

A moment is one rating, click, click-out or purchase that the arms had to foresee. Two kinds of metric:

    means    each moment has a value of its own (a hit, a reciprocal rank, an absolute error)
    pooled   one figure of all moments together (AUC, log-loss, calibration error), made of their predictions
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Statistic = Callable[[Floats, Floats, Floats], float]
"""(labels [N], predictions [N], weights [N]) -> figure; a moment of weight 2 counts twice."""
Tell = Callable[[str, float], None]
"""What is being done, and the share of the whole that is finished, 0 to 1."""


@dataclass(frozen=True)
class Outcome:
    """N moments, what each arm made of them, and how they are divided.

    `users` [N] numbers the user of each moment: users, not moments, are what the bootstrap draws. `slices` names
    subsets; `all` is always there besides. `means[arm][metric]` is [N], NaN where the arm wasn't asked.
    `predictions[arm]` [N], NaN likewise, goes with `labels` [N] into each of the `pooled` statistics. `baselines` names
    the arms that are what shops run today, in contrast to ours and to the controls. Of the metrics in
    `smaller_is_better` the least is best, and of those in `undirected` neither: they have no differences. `differences`
    names pairs of arms whose difference is told besides the usual ones. `facts` (what was trained on, settings found,
    seconds by arm) goes into the report as it is.
    """

    users: Ints
    baselines: frozenset[str]
    means: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    slices: Mapping[str, Bools] = field(default_factory=dict)
    labels: Floats | None = None
    predictions: Mapping[str, Floats] = field(default_factory=dict)
    pooled: Mapping[str, Statistic] = field(default_factory=dict)
    smaller_is_better: frozenset[str] = frozenset()
    undirected: frozenset[str] = frozenset()
    differences: Sequence[tuple[str, str]] = ()
    release: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys([*self.means, *self.predictions]))
