"""The ads' head: purchase given click, adapted to each user; see `click_head` for where impressions exist.

Of an ad it sees what the user's support set says of it (`pairs.describe`) and what everybody's events say
(`POPULATION`, `INTENT`). Everybody's answer s is a committee's logit and a linear one, whose priors are learned, mixed
as foretold the last of the clicks best. A user's own weights act on (s, 1, a few columns) around the prior mean
(1, 0, .. 0), found from the user's matured clicks in a few Newton steps, and Platt scaling comes last:

    p = sigmoid(slope * ((s, 1, x_own) . w_user) + intercept)

A user without matured clicks gets everybody's answer. How much users may differ is what foretold the last part of the
training period best, given the part before; nothing, if that was best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from innerloop.learning.ads.attribution import HOUR
from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.committee import Committee, train
from innerloop.learning.ads.logistic import Normal, Tasks, fit_shared, map_estimate
from innerloop.learning.ads.pairs import KINDS, NAMES, Past, describe

POPULATION: tuple[str, ...] = (
    "category: conversion rate",  # log of the shrunk rate over everybody's
    "category: share of clicks",  # log
    "category: clicks with a label",  # log(1 + n)
    "item: conversion rate",  # log of the shrunk rate over its category's
    "item: clicks of everybody",  # log(1 + n)
    "item: clicks with a label",  # log(1 + n)
)
"""Columns of what everybody's clicks say of an item."""
INTENT: tuple[str, ...] = tuple(f"{scope}: {kind}s per click" for scope in ("category", "item") for kind in KINDS[1:])
"""Columns of what everybody does besides clicking: logs of shrunk rates over everybody's."""
COLUMNS: tuple[str, ...] = (*NAMES, *POPULATION, *INTENT)
_OWN = ("item: clicks", "item: clicked before", "category: conversion rate")
OWN_CLICKS = 16
"""A user's own weights are found from so many newest clicks with a label: more cost more than they tell."""
_CLIP = 5.0  # standard deviations
_LEAST_SPREAD = 1e-6
_MOST_EPOCHS = 12
_HELD_OUT, _MOST_HELD_OUT = 0.3, 10_000  # of the training examples, the last ones
VARIANCES = (1e-9, 0.001, 0.003, 0.01, 0.03, 0.1)
"""How much users may differ: what is tried."""
SHARES = (0.0, 0.5, 1.0)
"""How much of everybody's answer is the linear logit: what is tried."""


@dataclass(frozen=True)
class AdHead:
    """C = len(COLUMNS), F = 1 + C with the intercept first, K = 2 + the number of a user's own columns."""

    centre: Tensor  # [C] float64
    scale: Tensor  # [C] float64
    weights: Tensor  # [F] float64
    committee: Committee
    own_columns: Tensor  # [K - 2] int64, columns of the design
    own_variances: Tensor  # [K] float64
    calibration: Platt = field(default_factory=Platt)
    linear_share: float = 0.5
    BY_COLUMN: ClassVar[tuple[str, ...]] = ("centre", "scale", "weights", "committee.0")
    """What of its state ends with the columns."""

    @classmethod
    def fit(cls, columns: Tensor, labels: Tensor, *, seed: int = 0) -> "AdHead":
        """Learn everybody's answer from `columns` [N, C] of clicks in order of time and their matured labels [N].

        The number of epochs and the linear logit's share are those that were best on the last of the clicks. Raises
        ValueError when N is 0.
        """
        if not len(labels):
            raise ValueError("There is no click to learn from.")
        centre, scale = columns.double().mean(0), columns.double().std(0, correction=0)
        x = design(columns, centre, scale)
        epochs, share = _choose(x, labels, seed)
        committee, _ = train(x, labels, epochs, seed=seed)
        own = torch.tensor([1 + COLUMNS.index(name) for name in _OWN])
        none = torch.full((2 + len(own),), VARIANCES[0], dtype=torch.float64)
        weights = fit_shared(x, labels, _groups()).mean
        return cls(centre, scale, weights, committee, own, none, linear_share=share)

    def own_features(self, columns: Tensor) -> Tensor:
        """What a user's own weights act on, [.., C] -> [.., K] float64: everybody's logit, 1, the own columns."""
        x = design(columns, self.centre, self.scale)
        flat = x.reshape(-1, x.shape[-1])
        both = torch.lerp(self.committee(flat), flat @ self.weights, self.linear_share)
        logit = both.reshape(x.shape[:-1]).unsqueeze(-1)
        return torch.cat([logit, torch.ones_like(logit), x[..., self.own_columns]], -1)

    @property
    def own_mean(self) -> Tensor:
        mean = torch.zeros_like(self.own_variances)
        mean[0] = 1.0
        return mean

    def with_variance(self, variance: float) -> "AdHead":
        """Let users differ by this much in every own weight."""
        return replace(self, own_variances=torch.full_like(self.own_variances, variance))

    def adapt(self, features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """T users' own weights [T, K] from `own_features` [T, S, K], labels [T, S] and weights [T, S] (0 if padded)."""
        tasks = Tasks(features, labels.double(), weights.double())
        return map_estimate(tasks, Normal(self.own_mean, 1.0 / self.own_variances))[0]

    def probabilities(  # noqa: PLR0917 - six facts about what is asked
        self, past: Past, past_population: Tensor, ads: "Ads", population: Tensor, now: Tensor, rate: float
    ) -> Tensor:
        """Purchase given click [T, A] of these ads at `now` [T] (epoch ms).

        `past_population` [T, S, P] and `population` [T, A, P] are the columns POPULATION and INTENT of the past events'
        items and of the ads; `rate` is everybody's conversion rate.
        """
        at = now.unsqueeze(1)
        rates = torch.tensor(rate, dtype=torch.float32, device=at.device)
        asked = describe(past, ads.items, ads.categories, at.expand_as(ads.items), rates.expand(ads.items.shape))
        features = self.own_features(torch.cat([asked, population], -1))
        if float(self.own_variances.max()) <= VARIANCES[0]:  # nobody differs: there is nothing to adapt
            return self.calibration(features @ self.own_mean)
        bought, known, newest = newest_known(past, now)
        items, categories, times = (of.gather(1, newest) for of in (past.items, past.categories, past.times))
        earlier = describe(past, items, categories, times, rates.expand(items.shape))
        everybodys = past_population.gather(1, newest.unsqueeze(-1).expand(-1, -1, population.shape[-1]))
        own_features = self.own_features(torch.cat([earlier, everybodys], -1))
        own = self.adapt(own_features, bought.gather(1, newest), known.gather(1, newest))
        return self.calibration((features @ own.unsqueeze(-1)).squeeze(-1))

    def state(self) -> dict[str, Tensor]:
        """Everything learned, by name, for a release."""
        numbers = torch.tensor([self.calibration.slope, self.calibration.intercept], dtype=torch.float64)
        found = {
            "centre": self.centre,
            "scale": self.scale,
            "weights": self.weights,
            "own_columns": self.own_columns,
            "own_variances": self.own_variances,
            "calibration": numbers,
            "linear_share": torch.tensor([self.linear_share], dtype=torch.float64),
        }
        found |= {f"committee.{at}": tensor for at, tensor in enumerate(self.committee.tensors())}
        return found

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "AdHead":
        """Raises KeyError when something is missing. The first releases had a share of one half."""
        share = state.get("linear_share", torch.tensor([0.5]))
        return cls(
            state["centre"],
            state["scale"],
            state["weights"],
            Committee(*(state[f"committee.{at}"] for at in range(4))),
            state["own_columns"],
            state["own_variances"],
            Platt(*state["calibration"].tolist()),
            float(share),
        )


def newest_known(past: Past, now: Tensor, *, wait: int = HOUR) -> tuple[Tensor, Tensor, Tensor]:
    """Which past events [T, S] had converted by `now` [T] (epoch ms), which had a label, and the newest of these.

    These are places [T, at most OWN_CLICKS]; where fewer have a label, some of the places have none.
    """
    at = now.unsqueeze(1)
    positive = past.converted_at < at
    known = past.mask & (past.kinds == 0) & (past.times < at) & (positive | (past.times + wait < at))
    # Stable, so that of equal times the same are taken however far the batch is padded.
    newest = torch.where(known, past.times, -1).sort(dim=1, descending=True, stable=True).indices
    return positive, known, newest[:, :OWN_CLICKS]


@dataclass(frozen=True)
class Ads:
    """A ads for each of T users: `items` [T, A] and their `categories` [T, A] (-1 unknown), numbered as in Past."""

    items: Tensor
    categories: Tensor


Foretell = Callable[[Sequence[AdHead], slice], Sequence[Tensor]]
"""Heads that differ only in how much users may differ, and which clicks -> each head's logits of those clicks."""


def choose_variance(columns: Tensor, labels: Tensor, foretell: Foretell, *, seed: int = 0) -> tuple[float, list[float]]:
    """How much users differ: learned on the first clicks [N, C], judged by log-loss on the last; and all the losses."""
    cut = _held_out(len(labels))
    if not 0 < float(labels[:cut].sum()) < cut or cut == len(labels):
        return VARIANCES[0], []
    head, last = AdHead.fit(columns[:cut], labels[:cut], seed=seed), slice(cut, cut + _MOST_HELD_OUT)
    return best_variance(head, labels, foretell, last)


def best_variance(head: AdHead, labels: Tensor, foretell: Foretell, last: slice) -> tuple[float, list[float]]:
    """How much users differ, judged by log-loss on the `last` of clicks with labels [N]; and all the losses."""
    foretold = foretell([head.with_variance(variance) for variance in VARIANCES], last)
    losses = [float(binary_cross_entropy_with_logits(logits, labels[last].double())) for logits in foretold]
    return VARIANCES[min(range(len(losses)), key=losses.__getitem__)], losses


def _choose(x: Tensor, labels: Tensor, seed: int) -> tuple[int, float]:
    """How many epochs the committee is trained, and the share of the linear logit; on `x` [N, F] in order of time."""
    cut = _held_out(len(labels))
    first, last = (x[:cut], labels[:cut]), (x[cut:], labels[cut:].double())
    _, losses = train(*first, _MOST_EPOCHS, held_out=last, seed=seed)
    epochs = 1 + min(range(len(losses)), key=losses.__getitem__)
    if not len(last[1]):
        return epochs, 0.5
    committee, _ = train(*first, epochs, seed=seed)
    bent, straight = committee(last[0]), last[0] @ fit_shared(*first, _groups()).mean
    mixed = {s: float(binary_cross_entropy_with_logits(torch.lerp(bent, straight, s), last[1])) for s in SHARES}
    return epochs, min(mixed, key=mixed.__getitem__)


def _held_out(examples: int) -> int:
    """Where the last part begins; at least one example stays before it."""
    return max(1, int((1 - _HELD_OUT) * examples))


def design(columns: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Standardised, clipped, with the intercept: [.., C] -> [.., F] float64. A constant column becomes 0."""
    spread = torch.where(scale > _LEAST_SPREAD, scale, torch.inf)
    standard = ((columns.double() - centre) / spread).clamp(-_CLIP, _CLIP)
    return torch.cat([torch.ones_like(standard[..., :1]), standard], -1)


def _groups() -> Tensor:
    """One precision for the intercept and one for all the others, [F]."""
    groups = torch.ones(1 + len(COLUMNS), dtype=torch.int64)
    groups[0] = 0
    return groups
