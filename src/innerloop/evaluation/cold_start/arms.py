"""The heads of the cold-start protocol, learned from training ratings."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from innerloop.evaluation.cold_start.baselines import RatingArm, known_support
from innerloop.evaluation.cold_start.episodes import draw_episodes
from innerloop.evaluation.cold_start.heads import HeadArm
from innerloop.learning.heads import META_TRAIN, BayesHead, Episodes, Head, NoneHead, Recipe
from innerloop.learning.rating_model import RatingModel, Ratings
from innerloop.learning.rating_tasks import RatingTasks

META_TRAINED = ("anil", "cavia", "maml", "reptile")
OURS = frozenset({"default", "bayes", "none", "placebo", *META_TRAINED})
_SHOTS = (0, 1, 2, 3, 5, 10, 20, 50)
_QUERIES, _MOST_TASKS = 10, 2_000

Arms = dict[str, RatingArm]


@dataclass(frozen=True)
class ModelSettings:
    """Number of factors; how much a new item is like those often rated (`with_new`); what multiplies the noise."""

    factors: int
    popularity: float
    noise: float

    def tasks(self, model: RatingModel) -> RatingTasks:
        """The tasks of a model with that many factors."""
        return RatingTasks.of(model.with_new_items(self.popularity))


def learn_heads(
    tasks: RatingTasks, settings: ModelSettings, ratings: Ratings, recipe: Recipe, tell: Callable[[str], None]
) -> Arms:
    """`default` knows a user's training ratings too, where there are any; the others know the support set alone.

    `ratings` are those that the model was learned from; `recipe` is that of the heads learned by gradient descent.
    """
    head = bayes(tasks, settings.noise)
    none: Head = NoneHead(torch.zeros(tasks.width))
    arms: Arms = {"default": HeadArm(head, tasks, history=True), "bayes": HeadArm(head, tasks)}
    episodes = meta_training_episodes(tasks, ratings, recipe.seed)
    for name in META_TRAINED:
        tell(name)
        arms[name] = HeadArm(META_TRAIN[name](episodes, recipe), tasks)
    return arms | {"none": HeadArm(none, tasks, zero_shot=True)}


def bayes(tasks: RatingTasks, noise: float) -> BayesHead:
    """The closed form around the whitened prior, N(0, I); `noise` multiplies the model's."""
    identity = torch.eye(tasks.width)
    return BayesHead.from_prior(
        torch.zeros(tasks.width), identity, 0 * identity, alpha=0.0, noise=noise * tasks.noise, half_life=float("inf")
    )


def meta_training_episodes(tasks: RatingTasks, ratings: Ratings, seed: int) -> Episodes:
    """Training users with ten ratings to foresee and as many examples as a draw from the shot curve says."""
    rng = np.random.default_rng(seed)
    drawn = draw_episodes(ratings, seed=seed, queries=_QUERIES, most=_QUERIES + max(_SHOTS))
    drawn = drawn.where(rng.permutation(len(drawn.users))[:_MOST_TASKS])
    mask = known_support(drawn, rng.choice(_SHOTS, len(drawn.users)))
    asked, examples = drawn.items[:, :_QUERIES], drawn.items[:, _QUERIES:]
    labels = drawn.asked - tasks.zero_shot(drawn.users, asked)
    return Episodes(
        tasks.support(drawn.users, examples, drawn.values[:, _QUERIES:], mask),
        tasks.query(asked),
        torch.from_numpy(labels).float(),
        loss="squared",
    )
