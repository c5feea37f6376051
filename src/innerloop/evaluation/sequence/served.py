"""What adapt would publish after each user's history: a release trained on all histories, and its scorer.

Sequences have an order and perhaps no clock, so one is made up, whatever the file has: a user's items are five minutes
apart, which makes a history one visit, and all histories end within the same five minutes, each at a moment of its own.
Then what is held out while training are the newest items of every user, as it is in what is asked.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from innerloop.config import LearningSettings, SupportSettings
from innerloop.evaluation.outcome import Ints, Tell
from innerloop.evaluation.sequence.sequences import Sequences
from innerloop.evaluation.stream.arms import ranks
from innerloop.events import CODES
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Scorer
from innerloop.learning.stream_log import stream_of
from innerloop.learning.training import train
from innerloop.support import EXAMPLE, SupportSets

_STEP_MS = 300_000
_END_MS = 1_700_000_000_000
_TASKS_AT_ONCE = 1_024
_KIND = "click"


@dataclass
class ServedSequences:
    """A release's scorer that has seen the histories it was trained on."""

    release: Release
    scorer: Scorer
    numbers: Ints  # [catalogue], the number by which the scorer knows each item, -1 for none
    capacity: int

    @classmethod
    def learn(cls, train_on: Sequences, settings: LearningSettings, tell: Tell) -> "ServedSequences":
        """Train as `innerloop train` does. Raises SettingsError when there is too little to learn from."""
        support, events = SupportSettings(), as_events(train_on, settings.seed)
        release = train(
            events,
            settings=settings,
            weights=support.weights,
            capacity=support.capacity,
            version=1,
            progress=tell,
        )
        scorer, log = Scorer(release, torch.device("cpu")), stream_of(events, seed=settings.seed)
        Replay(scorer, log).show(len(log))
        numbers = np.full(train_on.catalogue, -1)
        numbers[np.array([int(item) for item in log.item_ids])] = np.arange(len(log.item_ids))
        return cls(release, scorer, numbers, support.capacity)

    def ranks(self, known: Sequences, targets: Ints, *, longest: int, removed: Sequences | None = None) -> Ints:
        """The rank [B] of each target on the list after what is known; the catalogue's size if not among `longest`.

        The lists lack what is in `removed` [B], which is the users' own whatever is known of them: all arms choose
        among the same items. None removes nothing.
        """
        parts = [np.empty(0, np.int64)]
        for rows in np.split(np.arange(len(known)), range(_TASKS_AT_ONCE, len(known), _TASKS_AT_ONCE)):
            own = None if removed is None else self._places(removed.take(rows))
            top = longest + (0 if own is None else own.shape[1])
            lists = self.scorer.lists(self._sets(known.take(rows)), top)
            places = self.scorer.catalogue.places(self.numbers[targets[rows]])
            unknown = self.numbers[targets[rows]] < 0
            found = ranks(lists.places, lists.scores.astype(np.float64), np.where(unknown, -2, places), own)
            parts.append(np.where((found > 0) & (found <= longest), found, known.catalogue))
        return np.concatenate(parts)

    def _sets(self, histories: Sequences) -> SupportSets:
        kept = (histories.recency < self.capacity) & (self.numbers[histories.items] >= 0)
        examples = np.zeros(int(kept.sum()), EXAMPLE)
        examples["time"] = _END_MS - histories.recency[kept] * _STEP_MS
        examples["item"] = self.numbers[histories.items[kept]]
        examples["weight"], examples["type"] = SupportSettings().weights[_KIND], CODES[_KIND]
        examples["hash"] = np.arange(len(examples))
        counts = np.bincount(histories.users[kept], minlength=len(histories))
        return SupportSets(np.concatenate([[0], np.cumsum(counts)]), examples)

    def _places(self, histories: Sequences) -> Ints:
        """Places of everything in each history, [B, H], -1 for none."""
        own = np.full((len(histories), int(histories.lengths.max(initial=1))), -1)
        numbers = self.numbers[histories.items]
        places = np.where(numbers >= 0, self.scorer.catalogue.places(np.maximum(numbers, 0)), -1)
        own[histories.users, histories.recency] = places
        return own


def as_events(sequences: Sequences, seed: int) -> pl.DataFrame:
    """An event table of sequences: items are named by their numbers, users by theirs, in order of time."""
    users = sequences.users
    ends = _END_MS - np.random.default_rng(seed).integers(0, _STEP_MS, len(sequences))
    return pl.DataFrame(
        {
            "event_type": pl.Series([_KIND], dtype=pl.String).new_from_index(0, len(users)),
            "user_id": pl.Series(users).cast(pl.String),
            "item_id": pl.Series(sequences.items).cast(pl.String),
            "event_time": ends[users] - sequences.recency * _STEP_MS,
        }
    ).sort("event_time", maintain_order=True)
