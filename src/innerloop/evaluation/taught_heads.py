"""Every head that learns by episodes, taught alike: where the closed form is the default, these are arms beside it."""

from torch import Tensor

from innerloop.learning.heads import META_TRAIN, BayesHead, Episodes, Head, NoneHead, Recipe

HEADS = tuple(name for name in META_TRAIN if name not in {BayesHead.name, NoneHead.name})
STEPS = 200
"""Steps of meta-training."""
_EARLIER = 0.7


def earlier_part(examples: int) -> int:
    """So many of the training examples everybody's answer is learned from; the rest are episodes."""
    return max(1, int(_EARLIER * examples))


def taught(episodes: Episodes, start: Tensor, *, seed: int) -> dict[str, Head]:
    """Each of the HEADS by its name, from the linear prior `start` [d]; labels are yes or no, and do not age."""
    recipe = Recipe(seed=seed, steps=STEPS, likelihood="logistic", start=start)
    return {name: META_TRAIN[name](episodes, recipe) for name in HEADS}
