"""Heads as foreseers of ratings: episodes become support sets, parameters become ratings."""

from dataclasses import dataclass

import numpy as np
import torch

from innerloop.evaluation.cold_start.baselines import known_support
from innerloop.evaluation.cold_start.decision import Prediction
from innerloop.evaluation.cold_start.episodes import Episodes
from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.heads.base import Head, Support
from innerloop.learning.rating_tasks import RatingTasks

_AT_ONCE = 1024


@dataclass(frozen=True)
class HeadArm:
    """`head` on `tasks`; with `history` a user's training ratings are examples too, with `zero_shot` nothing is."""

    head: Head
    tasks: RatingTasks
    history: bool = False
    zero_shot: bool = False

    def predict(self, episodes: Episodes, shots: Ints) -> Prediction:
        """What is asked, [E, Q]; episodes with about equally many shots are solved together."""
        shots = np.minimum(shots, 0 if self.zero_shot else episodes.support)
        means, spreads = np.empty((2, len(shots), episodes.queries))
        order = np.argsort(shots, kind="stable")
        for first in range(0, len(order), _AT_ONCE):
            some = order[first : first + _AT_ONCE]
            means[some], spreads[some] = self._predict(episodes.where(some), shots[some])
        new = ~self.tasks.model.items.known[episodes.items[:, : episodes.queries]]
        informed = self.history & self.tasks.model.users.known[episodes.users]
        return Prediction(means, spreads, new + 2 * informed[:, None].astype(np.int64))

    def _predict(self, episodes: Episodes, shots: Ints) -> tuple[Floats, Floats]:
        q, longest = episodes.queries, int(shots.max(initial=0))
        asked, items = episodes.items[:, :q], episodes.items[:, q : q + longest]
        mask = known_support(episodes, shots)[:, :longest]
        support = self.tasks.support(episodes.users, items, episodes.values[:, q : q + longest], mask)
        if self.history:
            support = self._with_history(support, episodes.users)
        query = self.tasks.query(asked)
        parameters = self.head.adapt(support)
        means = self.tasks.zero_shot(episodes.users, asked) + self.head.score(parameters, query).double().numpy()
        return means, self.tasks.spread(support, query, asked)

    def _with_history(self, support: Support, users: Ints) -> Support:
        features, labels = self.tasks.history(users)
        ones = torch.ones_like(labels)
        mask = torch.from_numpy(self.tasks.model.users.known[users])[:, None].expand(labels.shape)
        return Support(
            torch.cat([support.features, features], 1),
            torch.cat([support.labels, labels], 1),
            torch.cat([support.weights, ones], 1),
            torch.cat([support.ages, 0 * ones], 1),
            torch.cat([support.mask, mask], 1),
        )
