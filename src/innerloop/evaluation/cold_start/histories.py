"""What users rated in training, as examples in front of those of an episode: for arms that know a user by examples."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from innerloop.evaluation.cold_start.baselines import RatingArm
from innerloop.evaluation.cold_start.decision import Prediction
from innerloop.evaluation.cold_start.episodes import Episodes
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.rating_model import Ratings

_AT_ONCE = 256  # episodes: some have thousands of ratings


@dataclass(frozen=True)
class Histories:
    """The ratings of user u are those from `starts`[u] to `starts`[u + 1] of `items` [N] and `values` [N]."""

    starts: Ints
    items: Ints
    values: Floats

    @classmethod
    def of(cls, ratings: Ratings) -> "Histories":
        order = np.argsort(ratings.users, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(ratings.users))])
        return cls(starts, ratings.items[order], ratings.values[order])

    def counts(self, users: Ints) -> Ints:
        """How many ratings each of `users` has, [E]."""
        last = len(self.starts) - 1
        counts: Ints = self.starts[np.minimum(users + 1, last)] - self.starts[np.minimum(users, last)]
        return counts

    def before(self, episodes: Episodes, shots: Ints) -> Episodes:
        """The episodes with the users' histories and the first `shots` [E] of their examples, and no others."""
        q, own = episodes.queries, self.counts(episodes.users)
        known = own + np.minimum(shots, episodes.support)
        place = np.broadcast_to(np.arange(int(known.max(initial=0))), (len(own), int(known.max(initial=0))))
        told, shot = place < own[:, None], (place >= own[:, None]) & (place < known[:, None])
        from_history = (self.starts[np.minimum(episodes.users, len(self.starts) - 1)][:, None] + place)[told]
        row, column = np.nonzero(shot)
        from_episode = row, q + column - own[row]
        items = _filled(told, self.items[from_history], shot, episodes.items[from_episode])
        values = _filled(told, self.values[from_history], shot, episodes.values[from_episode])
        return replace(
            episodes,
            items=np.concatenate([episodes.items[:, :q], items], 1),
            values=np.concatenate([episodes.values[:, :q], values], 1),
            counts=q + known,
        )


def _filled(told: Bools, history: NDArray[Any], shot: Bools, examples: NDArray[Any]) -> NDArray[Any]:
    found = np.zeros(told.shape, history.dtype)
    found[told], found[shot] = history, examples
    return found


@dataclass(frozen=True)
class WithHistory:
    """`arm`, to which a user's training ratings are examples, too; to users without any it is as it was."""

    arm: RatingArm
    histories: Histories

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        """What is asked, [E, Q]."""
        own = self.histories.counts(episodes.users)
        if not own.any():
            return self.arm.predict(episodes, shots)
        order = np.argsort(own + shots, kind="stable")
        parts = [order[first : first + _AT_ONCE] for first in range(0, len(order), _AT_ONCE)]
        predicted = [self._predict(episodes.where(some), shots[some]) for some in parts]
        back = np.argsort(order)
        return Prediction(*(np.concatenate(column)[back] for column in zip(*predicted, strict=True)))

    def _predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        informed = self.histories.before(episodes, shots)
        return self.arm.predict(informed, informed.support)
