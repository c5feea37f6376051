"""Every head by its name, taught alike by episodes: arms beside a default that is a model of another kind."""

from dataclasses import replace

from torch import Tensor

from innerloop.learning.heads import META_TRAIN, Episodes, Head, MamlHead, NoneHead, Recipe

_FIRST_ORDER = {"fomaml": MamlHead.name}
HEADS = (*(name for name in META_TRAIN if name != NoneHead.name), *_FIRST_ORDER)
STEPS = 200
"""Steps of meta-training."""
_EARLIER = 0.7


def earlier_part(examples: int) -> int:
    """So many of the training examples everybody's answer is learned from; the rest are episodes."""
    return max(1, int(_EARLIER * examples))


def taught(episodes: Episodes, start: Tensor, *, seed: int) -> dict[str, Head]:
    """Each of the HEADS by its name, from the linear prior `start` [d]; labels are yes or no, and do not age.

    `fomaml` is MAML without second derivatives (Finn, Abbeel and Levine 2017).
    """
    recipe = Recipe(seed=seed, steps=STEPS, likelihood="logistic", start=start)
    of = {name: replace(recipe, first_order=name in _FIRST_ORDER) for name in HEADS}
    return {name: META_TRAIN[_FIRST_ORDER.get(name, name)](episodes, of[name]) for name in HEADS}
