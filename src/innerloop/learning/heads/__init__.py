"""Heads by name: one file for each way to adapt, one interface."""

from collections.abc import Callable

from torch import Tensor

from innerloop.learning.heads.anil import AnilHead
from innerloop.learning.heads.base import Head, Likelihood, Support, Uncertain
from innerloop.learning.heads.bayes import BayesHead
from innerloop.learning.heads.cavia import CaviaHead
from innerloop.learning.heads.maml import MamlHead
from innerloop.learning.heads.meta import Episodes, Recipe
from innerloop.learning.heads.none import NoneHead
from innerloop.learning.heads.placebo import PlaceboHead
from innerloop.learning.heads.reptile import ReptileHead

RESTORE: dict[str, Callable[[dict[str, Tensor]], Head]] = {
    BayesHead.name: BayesHead.restore,
    AnilHead.name: AnilHead.restore,
    CaviaHead.name: CaviaHead.restore,
    MamlHead.name: MamlHead.restore,
    ReptileHead.name: ReptileHead.restore,
    NoneHead.name: NoneHead.restore,
}
"""A head of its state, by the head's name."""

RESTORE[PlaceboHead.name] = lambda state: PlaceboHead.restore(state, RESTORE)

META_TRAIN: dict[str, Callable[[Episodes, Recipe], Head]] = {
    BayesHead.name: BayesHead.meta_train,
    AnilHead.name: AnilHead.meta_train,
    CaviaHead.name: CaviaHead.meta_train,
    MamlHead.name: MamlHead.meta_train,
    ReptileHead.name: ReptileHead.meta_train,
    NoneHead.name: NoneHead.meta_train,
}
"""A head learned from episodes, by its name; a placebo is made of one of these."""

__all__ = [
    "META_TRAIN",
    "RESTORE",
    "AnilHead",
    "BayesHead",
    "CaviaHead",
    "Episodes",
    "Head",
    "Likelihood",
    "MamlHead",
    "NoneHead",
    "PlaceboHead",
    "Recipe",
    "ReptileHead",
    "Support",
    "Uncertain",
]
