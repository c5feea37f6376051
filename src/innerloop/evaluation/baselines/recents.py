"""What the user came by before: newest first, or first what was put aside to buy."""

import numpy as np

from innerloop.evaluation.baselines.candidate_lists import Lists, first_of_each
from innerloop.evaluation.baselines.popularity import Counts, below_one
from innerloop.evaluation.outcome import Ints
from innerloop.events import CODES
from innerloop.learning.stream_log import StreamLog

ASIDE = (CODES["cart"], CODES["favorite"])


class Recents:
    """The user's own items, newest first, then what is popular."""

    name = "recents"

    def __init__(self, log: StreamLog) -> None:
        self._log = log
        self._counts = Counts(log)

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        return self._filled(self._own(support), len(rows))

    def _own(self, support: Ints) -> Ints:
        """The user's items [Q, C], best first, -1 for none; they may repeat."""
        return np.where(support >= 0, self._log.items[support], -1)

    def _filled(self, own: Ints, moments: int) -> Lists:
        popular, counts = self._counts.top()
        items = np.concatenate((own, np.tile(popular, (moments, 1))), 1)
        fill = below_one(counts)
        scores = np.concatenate((np.arange(own.shape[1], 0.0, -1.0), fill))
        return np.where(first_of_each(items), items, -1), np.tile(scores, (moments, 1))


class CartedRecents(Recents):
    """First the items the user carted or favoured and hasn't purchased since, newest first, then `Recents`."""

    name = "carted-recents"

    def _own(self, support: Ints) -> Ints:
        items = super()._own(support)
        kinds = np.where(support >= 0, self._log.kinds[support], 0)
        bought = (kinds == CODES["purchase"])[:, None, :] & (items[:, :, None] == items[:, None, :])
        since = np.tril(bought, -1).any(2)  # [Q, S]: a newer purchase of the same item
        waiting = np.isin(kinds, ASIDE) & ~since
        return np.concatenate((np.where(waiting, items, -1), items), 1)
