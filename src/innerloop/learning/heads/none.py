"""No adaptation: every task gets the prior. What the other heads are measured against."""

from typing import ClassVar

from torch import Tensor

from innerloop.learning.heads.base import Support, linear_scores
from innerloop.learning.heads.meta import Episodes, Recipe, learn


class NoneHead:
    """Parameters [d] that are the same for all."""

    name: ClassVar[str] = "none"
    linear: ClassVar[bool] = True

    def __init__(self, prior: Tensor) -> None:
        self._prior = prior

    @property
    def prior(self) -> Tensor:
        return self._prior

    def adapt(self, support: Support) -> Tensor:
        return self._prior.to(support.features.device).expand(len(support.features), -1).clone()  # [T, d]

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        return linear_scores(parameters, features)

    def state(self) -> dict[str, Tensor]:
        return {"prior": self._prior}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "NoneHead":
        return cls(state["prior"])

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> "NoneHead":
        """Learn the one parameter vector that serves all tasks' queries best: what adapting has to beat."""

        def predict(weights: dict[str, Tensor], support: Support, features: Tensor) -> Tensor:
            return linear_scores(weights["prior"].expand(len(support.mask), -1), features)

        learned = learn({"prior": recipe.linear_start(episodes)}, predict, episodes, recipe)
        return cls(learned["prior"])
