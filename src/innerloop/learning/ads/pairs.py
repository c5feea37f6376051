"""What a user's support set says of an item: how often, how lately and in which way they met it and its category.

The same function describes an ad that might be shown now, for serving, and a click as of its own moment, for learning.
Only what happened strictly before that moment is looked at, labels of earlier clicks included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.learning.ads.attribution import HOUR

KINDS = ("click", "cart", "favorite", "purchase")
"""Kinds of event by code; anything else is not looked at."""
_SCOPES = ("item", "category", "any")
NAMES: tuple[str, ...] = (
    *(f"{scope}: {kind}s" for scope in _SCOPES for kind in KINDS),
    "item: clicks, 1 h half-life",
    "item: clicks, 1 d half-life",
    "item: clicked before",
    "item: age of the last click",
    "item: age of the first click",
    "user: conversion rate",
    "user: clicks with a label",
    "user and category: conversion rate",
    "user and category: clicks with a label",
)
"""What the columns are."""
_STRENGTH = 5.0  # clicks that everybody's rate is worth to a user
_MINUTE = 60_000.0


@dataclass(frozen=True)
class Past:
    """Events of T tasks, padded to S each, in any order. Where mask is False nothing else is looked at."""

    items: Tensor  # [T, S] int64
    categories: Tensor  # [T, S] int64, -1 where unknown
    kinds: Tensor  # [T, S] int64, as in KINDS; others are ignored
    times: Tensor  # [T, S] int64, epoch ms
    converted_at: Tensor  # [T, S] int64, epoch ms; attribution.NEVER where a click did not convert
    mask: Tensor  # [T, S] bool


def describe(
    past: Past, items: Tensor, categories: Tensor, now: Tensor, rate: Tensor, *, lag: int = 0, wait: int = HOUR
) -> Tensor:
    """Features [T, A, len(NAMES)] float32 of items [T, A] in categories [T, A] at times `now` [T, A] (epoch ms).

    `rate` [T, A] is everybody's conversion rate. With a `lag` (ms) the past is as it was known that long before `now`.
    """
    seen = now.unsqueeze(-1) - lag  # [T, A, 1]
    before = past.mask.unsqueeze(1) & (past.times.unsqueeze(1) < seen)  # [T, A, S]
    item = before & (past.items.unsqueeze(1) == items.unsqueeze(-1))
    category = before & (past.categories.unsqueeze(1) == categories.unsqueeze(-1)) & (categories.unsqueeze(-1) >= 0)
    kinds = (past.kinds.unsqueeze(-1) == torch.arange(len(KINDS), device=items.device)).float()  # [T, S, 4]
    counts = [torch.log1p(scope.float() @ kinds) for scope in (item, category, before)]  # [T, A, 4] each
    clicked = past.kinds.unsqueeze(1) == 0  # [T, 1, S]
    ages = (now.unsqueeze(-1) - past.times.unsqueeze(1)).float() / _MINUTE  # [T, A, S] minutes
    recency = _recency(item & clicked, ages)
    rates = _rates(past, before & clicked, category, seen, rate=rate, wait=wait)
    return torch.cat([*counts, recency, rates], -1)


def _recency(clicks: Tensor, ages: Tensor) -> Tensor:
    """Five columns of clicks on the item itself: decayed counts, whether any, log ages of the last and the first."""
    hour = torch.where(clicks, torch.exp2(-ages.clamp(min=0) / 60.0), 0.0).sum(-1)
    day = torch.where(clicks, torch.exp2(-ages.clamp(min=0) / 1440.0), 0.0).sum(-1)
    some = clicks.any(-1)
    last = torch.where(clicks, ages, torch.inf).amin(-1)
    first = torch.where(clicks, ages, -torch.inf).amax(-1)
    logs = [torch.where(some, torch.log(age.clamp(min=0) + 0.5), 0.0) for age in (last, first)]
    return torch.stack([torch.log1p(hour), torch.log1p(day), some.float(), *logs], -1)


def _rates(past: Past, clicks: Tensor, category: Tensor, seen: Tensor, *, rate: Tensor, wait: int) -> Tensor:
    """Log of the user's shrunk conversion rate over everybody's and of 1 + its clicks: all, and in the category."""
    bought = clicks & (past.converted_at.unsqueeze(1) < seen)
    known = bought | (clicks & (past.times.unsqueeze(1) + wait < seen))
    found = []
    for scope in (clicks, category):
        trials, successes = (known & scope).sum(-1).float(), (bought & scope).sum(-1).float()
        found += [torch.log((successes / rate + _STRENGTH) / (trials + _STRENGTH)), torch.log1p(trials)]
    return torch.stack(found, -1).float()
