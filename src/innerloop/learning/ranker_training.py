"""Lessons for the ranker: past moments, with the candidates that the service would have had at each of them."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.events import CODES
from innerloop.learning.ranker import Lesson, join, lesson
from innerloop.learning.scorer import Scorer
from innerloop.learning.stream_log import Ints, StreamLog

_BLOCK_SECONDS = 60.0
"""How old what everybody does may be. Longer is quicker, and was tried: with seven minutes the ranker learned to do
without the co-visits of the visit that is going on, and a shop's next purchase was on the list in 56%, not 61%."""
_NEXT_VISIT = 0.2
"""How much a moment says whose list was made in an earlier visit: by then others have changed what is likely."""

_UNKNOWN = 0.05
"""So many moments are taught as if nothing were known of their user, for newcomers and the hold-out have lists too."""


class Replay:
    """A scorer that is shown a log in order of time, items as they appear: to it, the past is live."""

    def __init__(self, scorer: Scorer, log: StreamLog) -> None:
        self._scorer, self._log = scorer, log
        self._shown = 0
        self._known = np.zeros(len(log.item_ids), bool)

    def show(self, upto: int) -> None:
        """Show the events before row `upto` that haven't been shown."""
        if upto > self._shown:
            self._meet(np.arange(self._shown, upto))
            self._scorer.observe(self._log.activity(self._shown, upto))
            self._shown = upto

    def meet_before(self, upto: int) -> None:
        """Know the items of the events before row `upto`, and nothing else of them."""
        if upto > self._shown:
            self._meet(np.arange(self._shown, upto))
            self._shown = upto

    def _meet(self, rows: Ints) -> None:
        log = self._log
        new, at = np.unique(log.items[rows], return_index=True)
        fresh = ~self._known[new]
        self._known[new] = True
        categories = log.categories[rows[at[fresh]]].tolist()
        self._scorer.catalogue.add(
            [
                (item, log.item_ids[item], log.category_names[category] if category >= 0 else None)
                for item, category in zip(new[fresh].tolist(), categories, strict=True)
            ]
        )

    def meet_support(self, support: Ints) -> None:
        """Know the items of these rows [Q, S] (-1 for none), which may be newer than what has been shown."""
        rows = support[support >= 0]
        if len(rows):
            self._meet(rows)


def lessons(  # noqa: PLR0917 - what a pass over the past needs
    scorer: Scorer,
    log: StreamLog,
    rows: Ints,
    weights: NDArray[np.float32],
    capacity: int,
    rng: np.random.Generator,
    tell: Callable[[float], None] = lambda _share: None,
) -> Lesson:
    """A lesson for each moment before `rows` [Q] whose item was a candidate; `weights` by event type code."""
    replay, balance = Replay(scorer, log), _balance(log.kinds[rows], weights)
    taught: list[Lesson] = []
    done = 0
    for upto, some in log.lists(rows, _BLOCK_SECONDS):
        replay.show(upto)
        support, _ = log.before(rows[some], capacity)
        support[rng.random(len(support)) < _UNKNOWN] = -1
        replay.meet_support(support)
        sets = log.sets(support, weights)
        with torch.inference_mode():
            found = scorer.candidates(sets, scorer.parameters(sets))
        target = scorer.catalogue.places(log.items[rows[some]])
        says = balance[log.kinds[rows[some]]] * np.where(log.within_visit(rows[some]), 1.0, _NEXT_VISIT)
        taught.append(lesson(found, target.tolist(), says.tolist(), rng))
        done += len(some)
        tell(done / len(rows))
    return join(taught)


def _balance(kinds: Ints, weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """What a moment says, by its event type code: all purchases together say as much as all else together.

    They are what a list is for, and one event in fifty.
    """
    said = weights.astype(np.float64)
    purchases = kinds == CODES["purchase"]
    others = said[kinds[~purchases]].sum()
    if purchases.any() and others:
        said[CODES["purchase"]] = max(said[CODES["purchase"]], others / purchases.sum())
    return said
