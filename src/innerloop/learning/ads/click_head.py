"""The click head, where impressions exist: how likely a shown ad is clicked, and its item bought after that click.

Both see what the user's events and impressions say of an ad, and what everybody's do (`COLUMNS_SHOWN`). Their linear
logits are learned together over all impressions, the second's prior being the first (`entire_space`); where purchases
are too few to learn from, the click's is learned alone, and there is no second. A user's own weights act on the click's
logit and a few columns, found from the user's newest impressions with a label in a few Newton steps; Platt scaling
comes last:

    p(click) = platt((s, 1, x_own) . w_user),   s = x . w_click
    p(purchase | click) = platt(x . w_purchase)

A user without impressions that have a label gets everybody's answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from innerloop.learning.ads.ad_head import POPULATION, VARIANCES, Ads, design, newest_known
from innerloop.learning.ads.attribution import HOUR
from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.entire_space import fit_click_and_purchase
from innerloop.learning.ads.logistic import Normal, Tasks, fit_shared, map_estimate
from innerloop.learning.ads.pairs import NAMES, Past

_COLUMNS = (*NAMES, *POPULATION)
COLUMNS_SHOWN: tuple[str, ...] = (*_COLUMNS, *(f"impressions, {name}" for name in _COLUMNS))
"""Columns of an impression: those of a click, then the same of impressions, which convert when they are clicked."""
_OWN = ("category: clicks", "impressions, user and category: conversion rate", "impressions, category: conversion rate")

_OF_ITEM = [at for at, name in enumerate(COLUMNS_SHOWN) if name.removeprefix("impressions, ").startswith("item: ")]
_AS_NEW = 10
"""One in so many impressions is learned from a second time, as if nobody had met its item (as in DropoutNet, Volkovs
2017): counts of items that have all been shown for long don't tell what a new one's are worth."""

Describe = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Items, categories and times (epoch ms), all [T, A] -> what was known of them then, [T, A, 2C]."""


@dataclass(frozen=True)
class ClickHead:
    """2C = len(COLUMNS_SHOWN), F = 1 + 2C with the intercept first, K = 2 + the number of a user's own columns."""

    centre: Tensor  # [2C] float64
    scale: Tensor  # [2C] float64
    click: Tensor  # [F] float64
    purchase: Tensor | None  # [F] float64; None: purchases were too few to learn from
    own_columns: Tensor  # [K - 2] int64, columns of the design
    own_variances: Tensor  # [K] float64
    click_calibration: Platt = field(default_factory=Platt)
    purchase_calibration: Platt = field(default_factory=Platt)

    @classmethod
    def fit(cls, columns: Tensor, clicked: Tensor, bought: Tensor | None) -> "ClickHead":
        """Learn both heads from `columns` [N, 2C] of impressions and their final labels [N], or the click's alone.

        Raises ValueError as `fit_click_and_purchase` and `fit_shared` do.
        """
        some = torch.arange(0, len(columns), _AS_NEW)
        columns = torch.cat([columns, columns[some].index_fill(1, torch.tensor(_OF_ITEM), 0.0)])
        clicked = torch.cat([clicked, clicked[some]])
        bought = None if bought is None else torch.cat([bought, bought[some]])
        centre, scale = columns.double().mean(0), columns.double().std(0, correction=0)
        x, purchase = design(columns, centre, scale), None
        if bought is None:
            click = fit_shared(x, clicked, torch.arange(x.shape[1]).clamp(max=1)).mean
        else:
            click, purchase = fit_click_and_purchase(x, clicked, bought)
        own = torch.tensor([1 + COLUMNS_SHOWN.index(name) for name in _OWN])
        return cls(centre, scale, click, purchase, own, torch.full((2 + len(own),), VARIANCES[0], dtype=torch.float64))

    @property
    def own_mean(self) -> Tensor:
        mean = torch.zeros_like(self.own_variances)
        mean[0] = 1.0
        return mean

    def with_variance(self, variance: float) -> "ClickHead":
        """Let users differ by this much in every own weight."""
        return replace(self, own_variances=torch.full_like(self.own_variances, variance))

    def own_features(self, columns: Tensor) -> Tensor:
        """What a user's own weights act on, [.., 2C] -> [.., K] float64: everybody's logit, 1, the own columns."""
        x = design(columns, self.centre, self.scale)
        logit = (x @ self.click).unsqueeze(-1)
        return torch.cat([logit, torch.ones_like(logit), x[..., self.own_columns]], -1)

    def purchase_logits(self, columns: Tensor) -> Tensor:
        """Uncalibrated logits of a purchase given a click, [.., 2C] -> [..] float64; for a head that has them."""
        assert self.purchase is not None  # noqa: S101 - asked by who saw it
        return design(columns, self.centre, self.scale) @ self.purchase

    def adapt(self, features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """T users' own weights [T, K] from `own_features` [T, S, K], labels [T, S] and weights [T, S] (0 if padded)."""
        tasks = Tasks(features, labels.double(), weights.double())
        return map_estimate(tasks, Normal(self.own_mean, 1.0 / self.own_variances))[0]

    def probabilities(
        self, describe: Describe, shown: Past, ads: Ads, now: Tensor, *, wait: int = HOUR
    ) -> tuple[Tensor, Tensor | None]:
        """Click, and purchase given click, of these ads if shown at `now` [T] (epoch ms), [T, A] each.

        Without a purchase head there is no second. An impression that nobody has clicked is known for one after the
        `wait` (ms).
        """
        columns = describe(ads.items, ads.categories, now.unsqueeze(1).expand_as(ads.items))
        features = self.own_features(columns)
        bought = None if self.purchase is None else self.purchase_calibration(self.purchase_logits(columns))
        if float(self.own_variances.max()) <= VARIANCES[0]:  # nobody differs: there is nothing to adapt
            return self.click_calibration(features @ self.own_mean), bought
        clicked, known, newest = newest_known(shown, now, wait=wait)
        items, categories, times = (of.gather(1, newest) for of in (shown.items, shown.categories, shown.times))
        own_features = self.own_features(describe(items, categories, times))
        own = self.adapt(own_features, clicked.gather(1, newest), known.gather(1, newest))
        return self.click_calibration((features @ own.unsqueeze(-1)).squeeze(-1)), bought

    def state(self) -> dict[str, Tensor]:
        """Everything learned, by name, for a release."""
        platts = (self.click_calibration, self.purchase_calibration)[: 1 if self.purchase is None else 2]
        found = {
            "centre": self.centre,
            "scale": self.scale,
            "click": self.click,
            "own_columns": self.own_columns,
            "own_variances": self.own_variances,
            "calibrations": torch.tensor([[p.slope, p.intercept] for p in platts], dtype=torch.float64),
        }
        return found if self.purchase is None else found | {"purchase": self.purchase}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "ClickHead":
        """Raises KeyError when something is missing, RuntimeError when there isn't one calibration for each head."""
        purchase = state.get("purchase")
        calibrations = state["calibrations"].reshape(1 if purchase is None else 2, 2).tolist()
        return cls(
            state["centre"],
            state["scale"],
            state["click"],
            purchase,
            state["own_columns"],
            state["own_variances"],
            *(Platt(*each) for each in calibrations),
        )
