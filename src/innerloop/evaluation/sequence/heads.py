"""Sequence encoders as scorers, alone and with a head adapted on top of them.

The encoder's vector h of a history is the task's prior. A head's parameters are adapted on the history's items around
it: an item v scores

    v . h + b_v  +  gain x head(v)

and meta-training learns the head from episodes in which the encoder's logits are given, by softmax over the whole
catalogue: the head learns what the encoder leaves to say. The gain is chosen on other users.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.evaluation.sequence.baselines import Scores
from innerloop.evaluation.sequence.sequences import Sequences
from innerloop.learning.heads.base import Head, Support
from innerloop.learning.heads.meta import Episodes, Recipe
from innerloop.learning.softmax_training import SequenceModel

GAINS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_OTHER_CANDIDATES = 1_000
_AGE_OF_A_STEP = 1.0  # ages count later items where there is no clock


@dataclass
class Encoded:
    """A trained sequence model and its table of items, on the CPU."""

    model: SequenceModel
    capacity: int

    def __post_init__(self) -> None:
        self.vectors, self.bias = (part.cpu() for part in self.model.table())

    def users(self, histories: Sequences) -> Tensor:
        """[B, d]."""
        return self.model.users(histories.histories(self.capacity)).cpu()

    def scores(self, histories: Sequences) -> Scores:
        found: Scores = torch.addmm(self.bias, self.users(histories), self.vectors.T).numpy()
        return found

    def features(self) -> Tensor:
        """What heads see of each item: its vector scaled to a mean length of 1, [N, d]."""
        scale: Tensor = self.vectors.norm(dim=1).mean()
        return self.vectors / scale

    def support(self, histories: Sequences) -> Support:
        """The newest examples of each history, every one a positive; ages count the examples since."""
        padded = histories.histories(self.capacity)
        ages = (padded.lengths.unsqueeze(1) - 1 - torch.arange(padded.items.shape[1])).clamp(min=0)
        ones = torch.ones(padded.items.shape)
        return Support(
            features=self.features()[padded.items],
            labels=ones,
            weights=ones * padded.mask,
            ages=ages.float() * _AGE_OF_A_STEP,
            mask=padded.mask,
        )

    def episodes(self, histories: Sequences, targets: Ints, *, seed: int) -> Episodes:
        """Episodes whose query is the target [B] among the catalogue, the encoder's logits given.

        Of a large catalogue all targets are candidates, and some of the rest, drawn at random, stand for all of it.
        """
        wanted = np.unique(targets)
        rest = np.setdiff1d(np.arange(len(self.vectors)), wanted)
        drawn = np.random.default_rng(seed).permutation(rest)[:_OTHER_CANDIDATES]
        candidates = torch.from_numpy(np.concatenate([wanted, drawn]))
        stands_for = torch.zeros(len(candidates))
        stands_for[len(wanted) :] = float(np.log(max(len(rest), 1) / max(len(drawn), 1)))
        logits = torch.addmm(self.bias[candidates] + stands_for, self.users(histories), self.vectors[candidates].T)
        return Episodes(
            support=self.support(histories),
            features=self.features()[candidates],
            labels=torch.from_numpy(np.searchsorted(wanted, targets)),
            loss="softmax",
            offsets=logits,
        )


def _lifted(base: Scores, head: Head, parameters: Tensor, features: Tensor, gain: float) -> Scores:
    lift = head.score(parameters, features).detach().numpy()
    return base + np.float32(gain) * lift.astype(np.float32)


@dataclass(frozen=True)
class Adapted:
    """The encoder with a head on top."""

    encoded: Encoded
    head: Head
    gain: float

    def scores(self, histories: Sequences) -> Scores:
        parameters = self.head.adapt(self.encoded.support(histories))
        return _lifted(self.encoded.scores(histories), self.head, parameters, self.encoded.features(), self.gain)


MetaTrain = Callable[[Episodes, Recipe], Head]


def teach(
    encoded: Encoded,
    meta_train: MetaTrain,
    *,
    episodes: Episodes,
    recipe: Recipe,
    judged: Sequences,
    worth: Callable[[Scores, Ints], Floats],
    at_once: int,
) -> Adapted:
    """Meta-train a head and choose its gain on the histories `judged`.

    `worth` says of scores [b, N] for some of them, rows [b], what each is worth; `at_once` are scored together.
    """
    head = meta_train(episodes, recipe)
    reached = np.zeros((len(judged), len(GAINS)))
    for first in range(0, len(judged), at_once):
        rows = np.arange(first, min(first + at_once, len(judged)))
        some = judged.take(rows)
        base, parameters = encoded.scores(some), head.adapt(encoded.support(some))
        lift = head.score(parameters, encoded.features()).detach().numpy().astype(np.float32)
        for column, gain in enumerate(GAINS):
            reached[rows, column] = worth(base + np.float32(gain) * lift, rows)
    return Adapted(encoded, head, chosen_gain(reached))


def chosen_gain(reached: Floats) -> float:
    """The gain that was worth most, given each history's worth [Q, gains]; 0 unless it is by a standard error.

    On few histories the best of several gains is best by luck, and a large one ruins the list.
    """
    if len(reached) < 2:  # noqa: PLR2004 - of one there is no standard error
        return GAINS[0]
    best = int(reached.mean(0).argmax())
    better = reached[:, best] - reached[:, 0]
    sure = better.mean() > better.std() / np.sqrt(len(better))
    return GAINS[best] if sure else GAINS[0]
