"""Several scorers' opinions of a catalogue made into one: a softmax regression over the candidates of a moment.

A scorer's best items after a history are candidates. Each scorer describes each candidate i by

    share      s_i / max s             for scores that are weights (co-visits, linear models)
    log share  log(s_i / max s + 0.001)
    log P      log softmax(s)_i        for scores that are logits, over the whole catalogue
    rank       1 / (3 + rank of i among the candidates)

once as they are and once times log(1 + history length), centred, so that long and short histories weigh differently.
The weights maximise the likelihood of what came next among its moment's candidates, with a ridge. A moment whose
next item is no candidate teaches nothing: no weighting could have ranked it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.evaluation.baselines.sequence_scorers import Scorer, Scores
from innerloop.evaluation.outcome import Bools, Ints
from innerloop.evaluation.sequences import Sequences

BEST = 100  # of each scorer are candidates
_RANK_OFFSET = 3.0
_LEAST_SHARE = 1e-3
_RIDGES = (0.1, 0.03, 0.01, 0.003, 0.001)
_HELD_OUT = 0.25
_ROUNDS = 40


@dataclass(frozen=True)
class Candidates:
    """C candidates of B moments, one moment after another."""

    items: Ints  # [C]
    starts: Ints  # [B + 1]
    features: Scores  # [C, F]

    @property
    def moments(self) -> Ints:
        """The moment of each candidate, [C]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


class Describer:
    """Turns the scores of `scorers` into candidates with features; those named in `logits` give logits."""

    def __init__(self, scorers: Mapping[str, Scorer], *, logits: frozenset[str], repeats: bool) -> None:
        self.scorers, self.logits, self.repeats = scorers, logits, repeats

    @property
    def features(self) -> list[str]:
        """The names of the F features, in their order."""
        kinds = {name: ("log P",) if name in self.logits else ("share", "log share") for name in self.scorers}
        plain = [f"{name} {kind}" for name in self.scorers for kind in (*kinds[name], "rank")]
        return [*plain, *(f"{name} x length" for name in plain)]

    def scores(self, histories: Sequences) -> dict[str, Scores]:
        """Every scorer's scores [B, N]; without repeats the history's own items are at -inf."""
        own = histories.matrix().nonzero()
        found = {}
        for name, scorer in self.scorers.items():
            found[name] = scorer.scores(histories)
            if not self.repeats:
                found[name][own] = -np.inf
        return found

    def candidates(self, scores: Mapping[str, Scores], lengths: Ints) -> Candidates:
        """Candidates of B moments from every scorer's scores [B, N] and the lengths [B] of their histories."""
        chosen = _chosen(scores)
        moments, items = chosen.nonzero()
        starts = np.searchsorted(moments, np.arange(len(lengths) + 1))
        columns = [
            column for name, found in scores.items() for column in self._columns(name, found, moments, items, starts)
        ]
        plain = np.stack(columns, 1)
        length = (np.log1p(lengths) - np.log1p(5.0)).astype(np.float32)[moments]
        return Candidates(items, starts, np.concatenate([plain, plain * length[:, None]], 1))

    def _columns(self, name: str, scores: Scores, moments: Ints, items: Ints, starts: Ints) -> Iterator[Scores]:
        mine = scores[moments, items]
        if name in self.logits:
            yield mine - _log_sum_exp(scores)[moments]
        else:
            most = np.maximum(scores.max(1), 1e-12)
            share = np.maximum(mine, 0.0) / most[moments]
            yield share
            yield np.log(share + np.float32(_LEAST_SHARE))
        order = np.lexsort((-mine, moments))
        ranks = np.empty(len(mine), np.float32)
        ranks[order] = np.arange(len(mine)) - starts[moments[order]]
        yield 1.0 / (np.float32(_RANK_OFFSET) + ranks)


def _chosen(scores: Mapping[str, Scores]) -> Bools:
    """Where an item is among the `BEST` of any scorer, [B, N]; nothing at -inf, nor at a scorer's least score."""
    found = np.zeros(next(iter(scores.values())).shape, bool)
    for mine in scores.values():
        best = min(BEST, mine.shape[1])
        top = np.argpartition(mine, mine.shape[1] - best, axis=1)[:, -best:]
        np.put_along_axis(found, top, values=True, axis=1)
    first = next(iter(scores.values()))
    return found & (first > -np.inf)


def _log_sum_exp(scores: Scores) -> Scores:
    most = scores.max(1, keepdims=True)
    total: Scores = np.log(np.exp(scores - most).sum(1)) + most[:, 0]
    return total


@dataclass(frozen=True)
class Aggregation:
    """Scores candidates by standardised features times weights; `names` are the features'."""

    names: list[str]
    mean: Tensor  # [F]
    scale: Tensor  # [F]
    weights: Tensor  # [F]

    def __call__(self, candidates: Candidates) -> Scores:
        """The candidates' scores, [C]."""
        features = torch.from_numpy(candidates.features)
        found: NDArray[np.float32] = (((features - self.mean) * self.scale) @ self.weights).numpy()
        return found

    def ranks(self, candidates: Candidates, targets: Ints, catalogue: int) -> Ints:
        """The rank [B], from 1, of each moment's target, behind its equals; `catalogue` where it is no candidate."""
        scores, moments = self(candidates), candidates.moments
        own = np.full(len(targets), np.nan, np.float32)
        hits = candidates.items == targets[moments]
        own[moments[hits]] = scores[hits]
        above = np.bincount(moments[scores >= own[moments]], minlength=len(targets))
        return np.where(np.isnan(own), catalogue, above).astype(np.int64)


def learn_aggregation(parts: list[tuple[Candidates, Ints]], names: list[str]) -> Aggregation:
    """Fit the weights to moments given in parts, each with its targets [B]; zero weights when none can be learned from.

    The ridge is the one with the best likelihood on the last moments, held out; then all moments teach.
    """
    taught = [_taught(candidates, targets) for candidates, targets in parts]
    lesson = _Lesson(*(torch.cat([part[at] for part in taught]) for at in range(3))) if taught else None
    if lesson is None or not len(lesson.counts):
        return Aggregation(names, torch.zeros(len(names)), torch.ones(len(names)), torch.zeros(len(names)))
    mean, scale = lesson.features.mean(0), 1.0 / lesson.features.std(0).clamp(min=1e-6)
    lesson = _Lesson((lesson.features - mean) * scale, lesson.counts, lesson.is_target)
    ridge, weights = _chosen_ridge(lesson, len(names))
    return Aggregation(names, mean, scale, lesson.fit(weights, ridge))


@dataclass(frozen=True)
class _Lesson:
    """Features [C, F] of M moments' candidates, how many each moment has [M], which are the targets [C]."""

    features: Tensor
    counts: Tensor
    is_target: Tensor

    def loss(self, weights: Tensor) -> Tensor:
        """Mean of -log P(target)."""
        moments = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        scores = self.features @ weights
        most = torch.zeros(len(self.counts)).scatter_reduce(0, moments, scores, "amax", include_self=False).detach()
        total = torch.zeros(len(self.counts)).index_add(0, moments, (scores - most[moments]).exp())
        return (total.log() + most - scores[self.is_target]).mean()

    def fit(self, start: Tensor, ridge: float) -> Tensor:
        """The weights [F] that minimise loss + ridge |weights|^2: convex, so L-BFGS finds the one solution."""
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = self.loss(weights) + ridge * weights.square().sum()
            torch.autograd.backward(value)
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weights.detach()

    def split(self, share: float) -> tuple["_Lesson", "_Lesson"]:
        """The first moments and the last `share` of them."""
        first = max(1, round(len(self.counts) * (1.0 - share)))
        rows = int(self.counts[:first].sum())
        early = _Lesson(self.features[:rows], self.counts[:first], self.is_target[:rows])
        return early, _Lesson(self.features[rows:], self.counts[first:], self.is_target[rows:])


def _chosen_ridge(lesson: _Lesson, width: int) -> tuple[float, Tensor]:
    """The best of `_RIDGES` on held-out moments, and its weights; each starts from those of the next stronger."""
    early, late = lesson.split(_HELD_OUT)
    weights, best = torch.zeros(width), (float("inf"), _RIDGES[0], torch.zeros(width))
    if not len(late.counts):
        return _RIDGES[0], weights
    for ridge in _RIDGES:
        weights = early.fit(weights, ridge)
        if (reached := float(late.loss(weights))) < best[0]:
            best = (reached, ridge, weights)
    return best[1], best[2]


def _taught(candidates: Candidates, targets: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """Features [c, F] of the moments whose target is a candidate, their numbers of candidates, which is the target."""
    moments = candidates.moments
    is_target = candidates.items == targets[moments]
    able = np.bincount(moments[is_target], minlength=len(targets)) > 0
    kept = able[moments]
    counts = np.diff(candidates.starts)[able]
    return (
        torch.from_numpy(candidates.features[kept]),
        torch.from_numpy(counts),
        torch.from_numpy(is_target[kept]),
    )
