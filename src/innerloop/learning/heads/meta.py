"""Meta-training: the outer loop that all heads share.

An episode is a task's support set and a query that came after it. What a head starts from (a prior, initial weights,
step sizes) is learned so that, once adapted on the support set, it predicts the query: gradient descent through the
adaptation (Finn, Abbeel, Levine 2017; through a closed-form solve: Bertinetto et al. 2019, Harrison et al. 2018).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from innerloop.errors import SettingsError
from innerloop.learning.heads.base import Likelihood, Support
from innerloop.learning.heads.solve import exact_float32

Weights = dict[str, Tensor]
Predict = Callable[[Weights, Support, Tensor], Tensor]
"""Query scores [T, Q], differentiable in the weights, of a support set of T tasks and features [T, Q, d] or [Q, d]."""

_LOOKS = 20  # how often the held-out loss is looked at
_HELD_OUT = 0.2
_LEAST_TASKS = 5  # fewer are not split
_CLIP = 10.0
_SCALE = "logit_scale"
_SCALES = tuple(2.0**power for power in range(-1, 6))


@dataclass(frozen=True)
class Episodes:
    """T tasks with their queries.

    `squared` and `logistic` losses: features [T, Q, d], labels [T, Q], mask [T, Q]. `softmax`: labels [T] int64, the
    place of the one that was chosen among the candidates features [T, Q, d] or, shared by all, [Q, d]; mask [T, Q] or
    None; offsets [Q] or [T, Q] are added to the logits (minus log q corrects for candidates sampled with odds q).
    """

    support: Support
    features: Tensor
    labels: Tensor
    mask: Tensor | None = None
    loss: Literal["squared", "logistic", "softmax"] = "squared"
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self) == 0 or len(self.labels) != len(self):
            raise SettingsError(
                f"Meta-training got {len(self)} support sets and {len(self.labels)} queries: it needs as many of both."
            )
        if self.loss not in ("squared", "logistic", "softmax"):
            raise SettingsError(f"There is no loss {self.loss}: choose squared, logistic or softmax.")
        if self.loss != "softmax" and self.features.ndim != 3:  # noqa: PLR2004
            raise SettingsError(f"The loss {self.loss} needs a query per task: give features as [T, Q, d].")

    def __len__(self) -> int:
        return len(self.support.mask)

    def take(self, rows: Tensor) -> "Episodes":
        """Return the tasks of the indices rows [t]."""

        def of(values: Tensor, dimensions: int) -> Tensor:
            return values[rows] if values.ndim == dimensions else values

        return replace(
            self,
            support=self.support.take(rows),
            features=of(self.features, 3),
            labels=self.labels[rows],
            mask=None if self.mask is None else self.mask[rows],
            offsets=None if self.offsets is None else of(self.offsets, 2),
        )

    def query_mask(self) -> Tensor:
        """Which candidates count, [T, Q] bool."""
        if self.mask is not None:
            return self.mask
        shape = (len(self), self.features.shape[-2])
        return torch.ones(shape, dtype=torch.bool, device=self.features.device)

    def query_loss(self, scores: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Mean loss of scores [T, Q]; `scale` multiplies the logits of a softmax, so that only their order counts."""
        mask = self.query_mask()
        if self.loss == "softmax":
            logits = scores * scale if self.offsets is None else scores * scale + self.offsets
            return functional.cross_entropy(logits.masked_fill(~mask, -torch.inf), self.labels)
        labels = self.labels.masked_fill(~mask, 0.0)
        if self.loss == "squared":
            losses = (scores - labels) ** 2
        else:
            losses = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        return losses.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Recipe:
    """How to meta-train, the same for every head; each takes what it has a use for.

    `rates` are Adam's, tried in turn, the best on held-out tasks kept; `start` [d] is a linear prior to begin from
    (zeros if None); `half_life` in seconds; `first_order` ignores second derivatives where a head has them; `gram`
    [d, d], the sum of v v' over all items, and `alpha`, what an item that isn't an example says, are for `bayes`.
    """

    seed: int = 0
    steps: int = 200
    batch: int = 64
    rates: tuple[float, ...] = (0.003, 0.03)
    inner_steps: int = 5
    hidden: int = 32
    context: int = 8
    likelihood: Likelihood = "gaussian"
    half_life: float = math.inf
    first_order: bool = False
    start: Tensor | None = None
    gram: Tensor | None = None
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.likelihood not in ("gaussian", "logistic"):
            raise SettingsError(f"There is no likelihood {self.likelihood}: choose gaussian or logistic.")

    def linear_start(self, episodes: Episodes) -> Tensor:
        """The linear prior to begin from, [d]."""
        features = episodes.support.features
        if self.start is None:
            return torch.zeros(features.shape[-1], device=features.device)
        return self.start.detach().to(features.device).clone()

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def learn(start: Weights, predict: Predict, episodes: Episodes, recipe: Recipe) -> Weights:
    """Descend the query loss from `start`; the weights that were best on a fifth of the tasks, held out.

    The start itself is among the candidates, so the held-out loss never ends above it. Deterministic by the seed.
    """
    clean = replace(
        episodes,
        support=episodes.support.cleaned(),
        features=episodes.features
        if episodes.mask is None or episodes.features.ndim == 2  # noqa: PLR2004
        else episodes.features.masked_fill(~episodes.mask.unsqueeze(-1), 0.0),
    )
    training, held_out = split(clean, recipe)
    if episodes.loss == "softmax":
        start = start | {_SCALE: torch.zeros((), device=episodes.features.device)}  # its logarithm
    best, lowest = start, math.inf
    with exact_float32(episodes.features.device):
        for rate in recipe.rates:
            for weights in _descend(start, predict, training, recipe, rate):
                if (reached := mean_loss(predict, weights, held_out, recipe)) < lowest:
                    best = {name: value.detach().clone() for name, value in weights.items()}
                    lowest = reached
    return {name: value for name, value in best.items() if name != _SCALE}


def split(episodes: Episodes, recipe: Recipe) -> tuple[Episodes, Episodes]:
    """Tasks to learn from and tasks to choose by, at random; the same ones for both when there are very few."""
    if len(episodes) < _LEAST_TASKS:
        return episodes, episodes
    order = torch.randperm(len(episodes), generator=recipe.generator()).to(episodes.features.device)
    held_out = max(1, round(_HELD_OUT * len(order)))
    return episodes.take(order[held_out:]), episodes.take(order[:held_out])


def batches(episodes: Episodes, recipe: Recipe) -> Iterator[Episodes]:
    """`recipe.steps` batches of tasks, drawn without replacement within each."""
    random, size = recipe.generator(), min(recipe.batch, len(episodes))
    for _ in range(recipe.steps):
        rows = torch.randperm(len(episodes), generator=random)[:size]
        yield episodes.take(rows.to(episodes.features.device))


def _descend(start: Weights, predict: Predict, training: Episodes, recipe: Recipe, rate: float) -> Iterator[Weights]:
    """The start, then the weights at each look; ends early when the loss is no number any more."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    yield weights
    every = max(1, recipe.steps // _LOOKS)
    for step, batch in enumerate(batches(training, recipe), 1):
        optimizer.zero_grad()
        loss = _loss(predict, weights, batch)
        if not bool(loss.isfinite()):
            return
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights.values(), _CLIP)
        optimizer.step()
        if step % every == 0 or step == recipe.steps:
            yield weights


@torch.no_grad()
def mean_loss(predict: Predict, weights: Weights, episodes: Episodes, recipe: Recipe) -> float:
    """The query loss over all episodes, a batch at a time: a network on many candidates is large.

    Without a scale among the weights a softmax has the scale, among a few, that suits it best.
    """
    free = episodes.loss == "softmax" and _SCALE not in weights
    scales = _SCALES if free else (float(weights[_SCALE].exp()) if _SCALE in weights else 1.0,)
    totals, count = [0.0] * len(scales), 0.0
    for first in range(0, len(episodes), recipe.batch):
        rows = torch.arange(first, min(first + recipe.batch, len(episodes)), device=episodes.features.device)
        some = episodes.take(rows)
        scores = predict(weights, some.support, some.features)
        size = float(len(some) if some.loss == "softmax" else some.query_mask().sum())
        totals = [
            total + size * float(some.query_loss(scores, scale)) for total, scale in zip(totals, scales, strict=True)
        ]
        count += size
    finite = [total / max(count, 1.0) for total in totals if math.isfinite(total)]
    return min(finite, default=math.inf)


def _loss(predict: Predict, weights: Weights, episodes: Episodes) -> Tensor:
    scale = weights[_SCALE].exp() if _SCALE in weights else 1.0
    return episodes.query_loss(predict(weights, episodes.support, episodes.features), scale)
