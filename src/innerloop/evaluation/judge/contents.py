"""The judge of what is listed: recomputes in float64 numpy what a release lists for a support set.

Of a release, only the tensors are taken: ridge regression around the prior, and every item scored. That can be said
where the head is the Bayesian one and there is no ranker, which knows what everybody does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from innerloop.evaluation.judge.oracle import Example
from innerloop.holdout import in_hold_out
from innerloop.learning.heads import BayesHead
from innerloop.learning.releases import Release

Floats = NDArray[np.float64]
Ranked = list[tuple[str, float]]
"""Items or ads with their scores, best first."""


@dataclass(frozen=True)
class Prior:
    """What a release knows: items with their vectors [N, d], and the head's mean [d] and root [d, d]."""

    item_ids: Sequence[str]
    vectors: Floats
    mean: Floats
    root: Floats
    noise: float
    half_life: float
    """In seconds."""

    def scores(self, examples: Sequence[Example]) -> Floats:
        """The score of every item [N] for somebody with these examples; of all of them the release has the item."""
        if not examples:
            return self.vectors @ self.mean
        rows = {item: row for row, item in enumerate(self.item_ids)}
        x = self.vectors[[rows[item] for _, _, item, _, _ in examples]]
        ages = (max(each[0] for each in examples) - np.array([each[0] for each in examples])) / 1000
        weights = np.array([each[4] for each in examples]) * 2.0 ** (-ages / self.half_life) / self.noise
        precision = np.linalg.inv(self.root @ self.root.T) + x.T @ (weights[:, None] * x)
        step = np.linalg.solve(precision, x.T @ (weights * (1.0 - x @ self.mean)))
        found: Floats = self.vectors @ (self.mean + step)
        return found


def prior_of(release: Release) -> Prior | None:
    """What its lists can be recomputed from; None where they can't."""
    head = release.head
    if not isinstance(head, BayesHead) or head.likelihood != "gaussian":
        return None
    if release.ranker is not None or release.sequence is not None or release.ads is not None:
        return None
    vectors, mean, root = (np.asarray(of, float) for of in (release.item_vectors, head.mean, head.root))
    return Prior(release.item_ids, vectors, mean, root, head.noise, head.half_life)


@dataclass(frozen=True)
class Contents:
    """What the lists of a run are made from: releases by version, and the ads with their items."""

    priors: Mapping[int, Prior]
    ads: Mapping[str, str]
    top: int
    hold_out: float
    """The share of users whose lists are those of somebody of whom nothing is known."""

    def expected(self, model: str, version: int, user: str, examples: Sequence[Example]) -> Ranked | None:
        """What the user's list by this release must be; None where that can't be said."""
        prior = self.priors.get(version)
        if prior is None:
            return None
        scores = prior.scores([] if in_hold_out(user, self.hold_out) else examples)
        of = dict(zip(prior.item_ids, scores.tolist(), strict=True))
        if model == "ads":
            of = {ad: of[item] for ad, item in self.ads.items()}
        return sorted(of.items(), key=lambda pair: -pair[1])[: self.top]
