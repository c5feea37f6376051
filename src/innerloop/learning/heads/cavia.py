"""CAVIA: a context vector joins the features of a small shared network, and it alone adapts (Zintgraf et al. 2019).

    score(x; context) = skip . x + second . tanh(first x + mix context + bias)

The context starts at zero. It has few numbers, so little is stored or computed for each task.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.learning.heads.base import Support
from innerloop.learning.heads.chunks import in_chunks
from innerloop.learning.heads.meta import Episodes, Recipe, Weights, learn
from innerloop.learning.heads.mlp import blocks
from innerloop.learning.heads.steps import DEFAULT_RULE, Examples, Rule, first_rates

_START = 0.3  # of the second layer's weights, times 1 / sqrt(hidden): small beside the linear part, but not blind


@dataclass(frozen=True)
class CaviaHead:
    """`weights`: skip [d], first [H, d], mix [H, c], bias [H], second [H], rates [k] and slope [] (see `steps`)."""

    weights: Weights = field(repr=False)
    rule: Rule = DEFAULT_RULE
    name: ClassVar[str] = "cavia"
    linear: ClassVar[bool] = False

    @property
    def prior(self) -> Tensor:
        return torch.zeros_like(self.weights["mix"][0])

    def adapt(self, support: Support) -> Tensor:
        device = support.features.device
        weights = {name: value.to(device) for name, value in self.weights.items()}
        with torch.autocast(device.type, enabled=False):
            return in_chunks(
                lambda some: adapted(weights, Examples.of(some, self.rule), self.rule),
                support,
                len(self.prior),
                len(self.weights["bias"]) * support.mask.shape[1],
            )

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        weights = {name: value.to(features.device) for name, value in self.weights.items()}
        hidden = len(weights["bias"])
        parts = [
            forward(weights, parameters, features[..., some, :])[0]
            for some in blocks(features.shape[-2], len(parameters) * hidden)
        ]
        return torch.cat(parts, dim=1)

    def state(self) -> dict[str, Tensor]:
        return self.weights | {"rule": self.rule.state()}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "CaviaHead":
        return cls({name: value for name, value in state.items() if name != "rule"}, Rule.restore(state["rule"]))

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> "CaviaHead":
        """Learn the network, rates and slope through the steps of the context."""
        rule = Rule(recipe.likelihood, recipe.half_life, recipe.first_order)

        def predict(weights: Weights, support: Support, features: Tensor) -> Tensor:
            return forward(weights, adapted(weights, Examples.of(support, rule), rule), features)[0]

        return cls(learn(_first_weights(episodes, recipe, rule), predict, episodes, recipe), rule)


def _first_weights(episodes: Episodes, recipe: Recipe, rule: Rule) -> Weights:
    random, skip = recipe.generator(), recipe.linear_start(episodes)
    hidden, device = recipe.hidden, skip.device

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(device)

    rates = first_rates(episodes.support, rule, recipe.inner_steps)
    length = float(episodes.support.cleaned().features.square().sum() / episodes.support.mask.sum().clamp(1)) ** 0.5
    return {
        "skip": skip,
        "first": normal(hidden, len(skip), scale=1.0 / max(length, 1e-6)),
        "mix": normal(hidden, recipe.context, scale=recipe.context**-0.5),
        "bias": torch.zeros(hidden, device=device),
        "second": normal(hidden, scale=_START * hidden**-0.5),
        "rates": torch.zeros_like(rates),
        "slope": torch.zeros((), device=device),
    }


def forward(weights: Weights, context: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, N] and hidden units [T, N, H] for context [T, c] and features [N, d] or [T, N, d]."""
    shift = (context @ weights["mix"].T + weights["bias"]).unsqueeze(1)  # [T, 1, H]
    hidden = torch.tanh(features @ weights["first"].T + shift)
    return features @ weights["skip"] + hidden @ weights["second"], hidden


def adapted(weights: Weights, examples: Examples, rule: Rule) -> Tensor:
    """Return the contexts [T, c] after the steps, differentiable in all weights."""
    linear = examples.features @ weights["skip"]  # [T, S]
    before = examples.features @ weights["first"].T + weights["bias"]  # [T, S, H]
    context = weights["mix"].new_zeros(len(linear), weights["mix"].shape[1])
    for size in examples.sizes(weights["rates"], weights["slope"]):
        hidden = torch.tanh(before + (context @ weights["mix"].T).unsqueeze(1))
        pull = examples.pull(linear + hidden @ weights["second"])
        slopes = weights["second"] * (1.0 - hidden.square())  # [T, S, H], d score / d what tanh is given
        gradient = (pull.unsqueeze(1) @ slopes).squeeze(1) @ weights["mix"]
        context = context + size * (gradient.detach() if rule.first_order else gradient)
    return context
