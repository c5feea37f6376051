"""ANIL: the weights of a linear last layer, moved by a few gradient steps from learned ones (Raghu et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.learning.heads.base import Support, linear_scores
from innerloop.learning.heads.chunks import in_chunks
from innerloop.learning.heads.meta import Episodes, Recipe, Weights, learn
from innerloop.learning.heads.steps import DEFAULT_RULE, Examples, Rule, first_rates


@dataclass(frozen=True)
class AnilHead:
    """`start` [d]; `rates` [k], the logarithms of k steps' rates (none: no adaptation), and `slope` []: see `steps`."""

    start: Tensor
    rates: Tensor
    slope: Tensor
    rule: Rule = DEFAULT_RULE
    name: ClassVar[str] = "anil"
    linear: ClassVar[bool] = True

    @property
    def prior(self) -> Tensor:
        return self.start

    def adapt(self, support: Support) -> Tensor:
        device = support.features.device
        weights = {name: value.to(device) for name, value in self._weights().items()}
        with torch.autocast(device.type, enabled=False):
            return in_chunks(
                lambda some: adapted(weights, Examples.of(some, self.rule), self.rule), support, len(self.start)
            )

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        return linear_scores(parameters, features)

    def state(self) -> dict[str, Tensor]:
        return self._weights() | {"rule": self.rule.state()}

    def _weights(self) -> Weights:
        return {"start": self.start, "rates": self.rates, "slope": self.slope}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "AnilHead":
        return cls(state["start"], state["rates"], state["slope"], Rule.restore(state["rule"]))

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> "AnilHead":
        """Learn start, rates and slope through the steps."""
        rule = Rule(recipe.likelihood, recipe.half_life, recipe.first_order)
        rates = first_rates(episodes.support, rule, recipe.inner_steps)
        start = {
            "start": recipe.linear_start(episodes),
            "rates": rates,
            "slope": torch.zeros_like(rates[:1]).squeeze(0),
        }

        def predict(weights: Weights, support: Support, features: Tensor) -> Tensor:
            return linear_scores(adapted(weights, Examples.of(support, rule), rule), features)

        learned = learn(start, predict, episodes, recipe)
        return cls(learned["start"], learned["rates"], learned["slope"], rule)


def adapted(weights: Weights, examples: Examples, rule: Rule) -> Tensor:
    """Return the parameters [T, d] after the steps, differentiable in the weights `start`, `rates`, `slope`."""
    parameters = weights["start"].expand(len(examples.features), -1)
    for size in examples.sizes(weights["rates"], weights["slope"]):
        pull = examples.pull(linear_scores(parameters, examples.features))
        gradient = (pull.unsqueeze(1) @ examples.features).squeeze(1)
        parameters = parameters + size * (gradient.detach() if rule.first_order else gradient)
    return parameters.clone()
