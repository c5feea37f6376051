"""MAML: all of a small network moves by a few gradient steps from learned weights (Finn, Abbeel, Levine 2017).

Meta-training differentiates through the steps; `first_order` takes the inner gradients as constants (FOMAML), which
needs less memory and time and loses what the second derivatives say. `reptile` adapts the same network the same way.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from innerloop.learning.heads.base import Support
from innerloop.learning.heads.chunks import in_chunks
from innerloop.learning.heads.meta import Episodes, Recipe, Weights, learn
from innerloop.learning.heads.mlp import Layers, forward, gradient, hidden_units, scores
from innerloop.learning.heads.steps import DEFAULT_RULE, Examples, Rule, first_rates

_SECOND = 0.3  # of the second layer's weights, times 1 / sqrt(hidden): small beside the linear part, but not blind


@dataclass(frozen=True)
class MamlHead:
    """`start` [P], the network `mlp.Layers` of features [d]; `rates` [k], `slope` []: see `steps`."""

    start: Tensor
    rates: Tensor
    slope: Tensor
    dimension: int
    rule: Rule = DEFAULT_RULE
    name: ClassVar[str] = "maml"
    linear: ClassVar[bool] = False

    @property
    def prior(self) -> Tensor:
        return self.start

    def adapt(self, support: Support) -> Tensor:
        device = support.features.device
        weights = {name: value.to(device) for name, value in self._weights().items()}
        with torch.autocast(device.type, enabled=False):
            return in_chunks(
                lambda some: adapted(weights, Examples.of(some, self.rule), self.rule),
                support,
                len(self.start),
                len(self.start),
            )

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        return scores(parameters, features)

    def state(self) -> dict[str, Tensor]:
        return self._weights() | {"rule": self.rule.state(), "dimension": torch.tensor(self.dimension)}

    def _weights(self) -> Weights:
        return {"start": self.start, "rates": self.rates, "slope": self.slope}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        rule, dimension = Rule.restore(state["rule"]), int(state["dimension"])
        if hidden_units(len(state["start"]), dimension) * (dimension + 2) + dimension + 1 != len(state["start"]):
            raise ValueError(f"{len(state['start'])} numbers make no network of {dimension} features")
        return cls(state["start"], state["rates"], state["slope"], dimension, rule)

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> Self:
        """Learn the network, rates and slope through the steps."""
        rule = Rule(recipe.likelihood, recipe.half_life, recipe.first_order)

        def predict(weights: Weights, support: Support, features: Tensor) -> Tensor:
            return scores(adapted(weights, Examples.of(support, rule), rule), features)

        learned = learn(first_weights(episodes, recipe, rule), predict, episodes, recipe)
        return cls(learned["start"], learned["rates"], learned["slope"], episodes.features.shape[-1], rule)


def first_weights(episodes: Episodes, recipe: Recipe, rule: Rule) -> Weights:
    """Weights to begin from: the linear start, with a random network beside it."""
    random, skip = recipe.generator(), recipe.linear_start(episodes)
    length = float(episodes.support.cleaned().features.square().sum() / episodes.support.mask.sum().clamp(1)) ** 0.5
    first = torch.randn(1, recipe.hidden, len(skip), generator=random) / max(length, 1e-6)
    second = torch.randn(1, recipe.hidden, generator=random) * _SECOND * recipe.hidden**-0.5
    layers = Layers(
        skip=skip.unsqueeze(0),
        first=first.to(skip.device),
        bias=torch.zeros(1, recipe.hidden, device=skip.device),
        second=second.to(skip.device),
        level=torch.zeros(1, 1, device=skip.device),
    )
    rates = first_rates(episodes.support, rule, recipe.inner_steps)
    return {"start": layers.pack()[0], "rates": rates, "slope": torch.zeros((), device=skip.device)}


def adapted(weights: Weights, examples: Examples, rule: Rule) -> Tensor:
    """Return the networks [T, P] after the steps, differentiable in the weights `start`, `rates`, `slope`."""
    tasks, _, dimension = examples.features.shape
    layers = Layers.unpack(weights["start"].unsqueeze(0), dimension)
    for size in examples.sizes(weights["rates"], weights["slope"]):
        found, hidden = forward(layers, examples.features)
        pulled = gradient(layers, examples.features, hidden, examples.pull(found))
        layers = layers.plus(pulled.detach() if rule.first_order else pulled, size)
    return layers.expand(tasks).pack()
