"""The second stage of a list: candidates in, how likely each is the task's next item.

A function f = b + g of a candidate's features, taught so that the softmax over a moment's candidates,

    P(i) = exp f(x_i) / sum over candidates j of exp f(x_j)

is high for the item that came next (listwise softmax cross-entropy; Cao et al. 2007). It aggregates models: the head's
score is one feature among live popularity, co-visits and the task's own items. b is the blend of them that is good in
any shop (`blend`), g a small network that learns what is different in this one: it begins at 0 and is held near it, so
few lessons change little.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from innerloop.learning.blend import WEIGHTS, blended
from innerloop.learning.candidates import FEATURES, PLAIN, Candidates

LEAST_LESSONS = 30
"""With fewer a ranker stays as it begins: of 17 it learned what was wrong, of 42 what was right."""
_HIDDEN = 32
_NEGATIVES = 96
_BATCH = 8, 32  # lessons in a step, at least and at most
_STEPS = 64  # in an epoch, about; more where the lessons are more than so many of the largest steps
_RATE = 3e-3
_DECAY = 0.01  # of the network's weights, towards the blend: with less, what it learns holds for less of the next day
_PATIENCE = 5  # epochs; with three, of 17,000 lessons one seed in two was stopped at a chance valley
_FAR = 10.0  # standard deviations: a value that was rare while learning must not outweigh all others
_HELD_OUT = 0.15
_LEAST_SPREAD = 1e-3
_LEAST_CHANCE = 1e-3
_JUDGED = 6_000  # lessons at most by which it is decided whether a sequence model pays


class Ranker:
    """`mean` and `scale` [F] standardise the features for the network; `blend` [K] are the weights of what is added.

    Rankers of before there was a blend have none.
    """

    def __init__(self, mean: Tensor, scale: Tensor, network: nn.Sequential, blend: Tensor | None) -> None:
        self.mean, self.scale, self.network, self.blend = mean, scale, network, blend

    @classmethod
    def new(cls, mean: Tensor, scale: Tensor, blend: Tensor | None = None) -> Self:
        """A network of two hidden layers as it is drawn."""
        network = nn.Sequential(
            nn.Linear(len(mean), _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1)
        )
        return cls(mean, scale, network, blend)

    @classmethod
    def untaught(cls) -> Self:
        """The ranker of a shop with too few events to teach one."""
        with torch.random.fork_rng(devices=[]):
            ranker = cls.new(torch.zeros(PLAIN), torch.zeros(PLAIN), WEIGHTS)
        with torch.no_grad():
            for weights in ranker.network.parameters():
                weights.zero_()
        ranker.network.requires_grad_(requires_grad=False)
        return ranker

    @property
    def taught(self) -> bool:
        """Whether it learned from this shop: without, or where all that it learned foretold less, it is the blend."""
        return any(bool(weights.any()) for weights in self.network[-1].parameters())

    def __call__(self, features: Tensor) -> Tensor:
        """Tell f of features [.., >= F], of which the network reads the first F: [..]."""
        standard = ((features[..., : len(self.mean)] - self.mean) * self.scale).clamp(-_FAR, _FAR)
        scores: Tensor = self.network(standard).squeeze(-1)
        return scores if self.blend is None else scores + blended(features, self.blend)

    def on(self, device: torch.device) -> Self:
        """The same on that device."""
        if self.mean.device == device:
            return self
        return type(self).restore({name: value.to(device) for name, value in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """Everything learned, by name.

        A version that knows no blend must not read the network alone, and doesn't: it looks for a `mean`.
        """
        told = {"mean": self.mean} if self.blend is None else {"centre": self.mean, "blend": self.blend}
        return {**told, "scale": self.scale, **self.network.state_dict()}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        """The ranker that `state()` is of. Raises KeyError or RuntimeError when it doesn't fit."""
        blend = state["blend"] if "centre" in state else None
        with torch.device("meta"):  # nothing is drawn for weights that are replaced
            ranker = cls.new(state["mean" if blend is None else "centre"], state["scale"], blend)
        layers = {key: value for key, value in state.items() if key[0].isdigit()}
        ranker.network.load_state_dict(layers, assign=True)
        return ranker


@dataclass(frozen=True)
class Lesson:
    """R moments: features [R, 1 + K, F] of what came next and of K other candidates, and how much each says [R].

    `offset` [R, 1 + K] is added to f: others that were drawn stand for those that weren't, and -inf is padding.
    """

    features: Tensor
    offset: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> "Lesson":
        """Some of the moments."""
        return Lesson(self.features[rows], self.offset[rows], self.weights[rows])

    def surprise(self, ranker: Ranker) -> Tensor:
        """-log P(what came next), [R]; inf where that was no candidate."""
        logits = ranker(self.features) + self.offset
        return logits.logsumexp(1) - logits[:, 0]

    def loss(self, ranker: Ranker) -> Tensor:
        """Weighted mean of -log P(what came next)."""
        return (self.weights * self.surprise(ranker)).sum() / self.weights.sum()

    def plain(self) -> "Lesson":
        """The same moments as they were without a sequence model: its features and its own candidates left out.

        What came next may be among these: its offset is -inf then.
        """
        only = self.features[..., -1] > 0
        return Lesson(self.features[..., :PLAIN], self.offset.masked_fill(only, -torch.inf), self.weights)

    def learnable(self) -> "Lesson":
        """The moments whose next item is a candidate, and not the only one."""
        able = (self.offset[:, 0] > -torch.inf) & (self.offset[:, 1:] > -torch.inf).any(1)
        return self[able]


def lesson(candidates: Candidates, target: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> Lesson:
    """Make a lesson of the moments whose item `target[t]` (a place) is a candidate; K of the others are drawn."""
    parts: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    offsets, kept = [], []
    for task, place in enumerate(target):
        first, last = candidates.starts[task], candidates.starts[task + 1]
        at = first + np.flatnonzero(candidates.places[first:last] == place)
        if not len(at) or last - first == 1:
            continue
        others = np.delete(np.arange(first, last), at[0] - first)
        drawn = rng.permutation(others)[:_NEGATIVES] if len(others) > _NEGATIVES else others
        features = np.zeros((1 + _NEGATIVES, len(FEATURES)), np.float32)
        features[: 1 + len(drawn)] = candidates.features[np.concatenate([at, drawn])]
        offset = np.full(1 + _NEGATIVES, -np.inf, np.float32)
        offset[0], offset[1 : 1 + len(drawn)] = 0.0, np.log(len(others) / len(drawn))
        parts.append(features)
        offsets.append(offset)
        kept.append(weights[task])
    shape = (0, 1 + _NEGATIVES, len(FEATURES))
    return Lesson(
        torch.from_numpy(np.stack(parts)) if parts else torch.zeros(shape),
        torch.from_numpy(np.stack(offsets)) if offsets else torch.zeros(shape[:2]),
        torch.tensor(kept, dtype=torch.float32),
    )


def join(lessons: Sequence[Lesson]) -> Lesson:
    """One after another, in order of time."""
    return Lesson(
        torch.cat([part.features for part in lessons]),
        torch.cat([part.offset for part in lessons]),
        torch.cat([part.weights for part in lessons]),
    )


def worth_of_sequences(lessons: Lesson, *, seed: int = 0) -> float:
    """By how many standard errors the newest lessons, held out, speak for a ranker that sees a sequence model.

    Two rankers are taught on some of the other lessons, with the sequence model and without. Judged is log P of what
    came next, at least log `_LEAST_CHANCE`: what isn't a candidate isn't on the list either.
    """
    early = lessons[: len(lessons) - _held_out(lessons)]
    some = early[:: -(-len(early) // _JUDGED)]
    with_them, without = (learn_ranker(part, seed=seed) for part in (some, some.plain().learnable()))
    test = lessons[len(lessons) - _held_out(lessons) :]
    with torch.inference_mode():
        pairs = (test.surprise(with_them), test.plain().surprise(without))
        better, worse = (surprise.nan_to_num(posinf=100.0).clamp(max=-math.log(_LEAST_CHANCE)) for surprise in pairs)
        gain = (worse - better) * test.weights / test.weights.mean()
    if len(gain) < 2 or not bool(gain.std() > 0.0):  # noqa: PLR2004 - a spread needs two
        return 0.0
    return float(gain.mean() / (gain.std() / len(gain) ** 0.5))


def _held_out(lessons: Lesson) -> int:
    return max(1, round(len(lessons) * _HELD_OUT))


def learn_ranker(
    lessons: Lesson, *, epochs: int = 20, seed: int = 0, tell: Callable[[str, float], None] = lambda _w, _s: None
) -> Ranker:
    """Teach a ranker by Adam; the newest lessons are held out and say when to stop. Needs `LEAST_LESSONS`.

    That may be before the first step. Steps are small and many: with 256 lessons in each, a small shop's ranker was
    still far from what its lessons teach.
    """
    based = replace(lessons, offset=lessons.offset + blended(lessons.features, WEIGHTS))  # once, and not in every step
    held = _held_out(lessons)
    train, test = based[: len(based) - held], based[len(based) - held :]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranker = _beginning(train)
    optimiser = torch.optim.Adam(ranker.network.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
    batch = min(_BATCH[1], max(_BATCH[0], len(train) // _STEPS))
    best, state, patience = _surprise(ranker, test), _copy(ranker), 0
    for epoch in range(epochs):
        tell("ranker", epoch / epochs)
        order = torch.randperm(len(train), generator=generator)
        for rows in torch.split(order, batch):
            optimiser.zero_grad()
            train[rows].loss(ranker).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        reached = _surprise(ranker, test)
        patience = 0 if reached < best else patience + 1
        if reached < best:
            best, state = reached, _copy(ranker)
        if patience == _PATIENCE:
            break
        for group in optimiser.param_groups:
            group["lr"] *= 0.87
    ranker = Ranker.restore(state)
    ranker.network.requires_grad_(requires_grad=False)
    return Ranker(ranker.mean, ranker.scale, ranker.network, WEIGHTS)


def _surprise(ranker: Ranker, lessons: Lesson) -> float:
    with torch.inference_mode():
        return float(lessons.loss(ranker))


def _copy(ranker: Ranker) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in ranker.state().items()}


def _beginning(lessons: Lesson) -> Ranker:
    """Features as these lessons have them, and a network that says 0 of all of them."""
    real = lessons.features[lessons.offset > -torch.inf]
    spread = real.std(0)
    # What never moved says nothing, now or later: divided by next to nothing, the first to move would outshout all.
    scale = torch.where(spread > _LEAST_SPREAD, 1.0 / spread, 0.0)
    scale[FEATURES.index("foreseen_only") :] = 0.0  # for telling lessons apart, not for ranking
    ranker = Ranker.new(real.mean(0), scale)
    with torch.no_grad():
        for weights in ranker.network[-1].parameters():
            weights.zero_()
    return ranker
