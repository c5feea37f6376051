"""Reptile: the start moves towards where the tasks' steps lead, without any derivative through them.

Nichol, Achiam, Schulman 2018. Adapts as `maml` does; only the outer loop differs. What it can't learn by gradient, the
step size, is chosen among a few on held-out tasks. Steps are taken on the support set and the query together.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from innerloop.learning.heads.base import Support
from innerloop.learning.heads.maml import MamlHead, adapted, first_weights
from innerloop.learning.heads.meta import Episodes, Recipe, Weights, batches, mean_loss, split
from innerloop.learning.heads.mlp import scores
from innerloop.learning.heads.steps import Examples, Rule

_FACTORS = (0.1, 0.3, 1.0)  # of `steps.first_rates`
_OUTER = 1.0  # the share of the way at the beginning, falling to 0
_NEGATIVES = 16  # candidates of a softmax that join a task's examples, labelled 0
_LOOKS = 5


@dataclass(frozen=True)
class ReptileHead(MamlHead):
    """As `MamlHead`, learned by Reptile's rule."""

    name: ClassVar[str] = "reptile"

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> Self:
        """Move the start towards the tasks' own solutions; rate and moment chosen on held-out tasks."""
        rule = Rule(recipe.likelihood, recipe.half_life)
        training, held_out = split(replace(episodes, support=episodes.support.cleaned()), recipe)
        start = first_weights(episodes, recipe, rule)
        best, lowest, every = start, math.inf, max(1, recipe.steps // _LOOKS)
        with torch.no_grad():
            for factor in _FACTORS:
                weights = start | {"rates": start["rates"] + math.log(factor)}
                for step, batch in enumerate(batches(training, recipe)):
                    if step % every == 0 and (loss := _loss(weights, held_out, rule, recipe)) < lowest:
                        best, lowest = weights, loss
                    together = Examples.of(_with_query(batch, recipe), rule)
                    towards = adapted(weights, together, rule).mean(0)
                    share = _OUTER * (1.0 - step / recipe.steps)
                    weights = weights | {"start": weights["start"] + share * (towards - weights["start"])}
                if (loss := _loss(weights, held_out, rule, recipe)) < lowest:
                    best, lowest = weights, loss
        return cls(best["start"], best["rates"], best["slope"], episodes.features.shape[-1], rule)


def _loss(weights: Weights, held_out: Episodes, rule: Rule, recipe: Recipe) -> float:
    def predict(weights: Weights, support: Support, features: Tensor) -> Tensor:
        return scores(adapted(weights, Examples.of(support, rule), rule), features)

    return mean_loss(predict, weights, held_out, recipe)


def _with_query(episodes: Episodes, recipe: Recipe) -> Support:
    """Support and query as one set of examples; of a softmax the chosen one, and some others labelled 0."""
    support, mask = episodes.support, episodes.query_mask()
    features, labels = episodes.features.expand(len(support.mask), -1, -1), episodes.labels
    if episodes.loss == "softmax":
        labels = functional.one_hot(episodes.labels, mask.shape[1]).float()
        some = torch.randperm(mask.shape[1], generator=recipe.generator())[:_NEGATIVES].to(labels.device)
        places = torch.cat([episodes.labels.unsqueeze(1), some.expand(len(labels), -1)], dim=1)
        chosen_twice = (places[:, 1:] == places[:, :1]).nonzero()
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1)
        features, labels, mask = features[rows, places], labels[rows, places], mask[rows, places]
        mask[chosen_twice[:, 0], chosen_twice[:, 1] + 1] = False
    ones, zeros = torch.ones_like(labels), torch.zeros_like(labels)
    return Support(
        features=torch.cat([support.features, features], dim=1),
        labels=torch.cat([support.labels, labels], dim=1),
        weights=torch.cat([support.weights, ones], dim=1),
        ages=torch.cat([support.ages, zeros], dim=1),
        mask=torch.cat([support.mask, mask], dim=1),
    )
