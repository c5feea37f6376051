"""The arms of the stream protocol that are the service itself: its scorer, asked when the service would be.

A list is made when the user's event comes in, so what it is judged by is the user's next event, however much later.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
import torch

from innerloop.config import LearningSettings, SupportSettings
from innerloop.evaluation.outcome import Ints, Tell
from innerloop.evaluation.stream_arms import ranks
from innerloop.evaluation.stream_options import StreamOptions
from innerloop.learning.heads import Head
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Lists, Scorer
from innerloop.learning.stream_log import StreamLog, kind_weights
from innerloop.learning.training import teach_heads, train

HEAD_MOMENTS = 5_000
"""A head alone scores the whole catalogue, some by a network: they are asked at so many moments at most."""
_SEEN = 256  # of a user's own items, the newest that are removed
_OTHERS = 10_000  # a placebo's task is one of the users of so many events before
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000


class School:
    """Trains releases on what has happened, as `innerloop train` does every night."""

    def __init__(self, events: pl.DataFrame, options: StreamOptions, seed: int) -> None:
        self._events, self._options, self._settings = (
            events,
            options,
            LearningSettings(seed=seed, sequence=options.sequence),
        )

    def release(self, upto: int, tell: Tell = lambda _what, _share: None) -> Release:
        """A release of the newest events before row `upto`."""
        return train(
            self._newest(upto),
            settings=self._settings,
            weights=SupportSettings().weights,
            capacity=self._options.capacity,
            version=1,
            progress=tell,
        )

    def heads(self, upto: int, release: Release) -> dict[str, Head]:
        """Every head by its name, taught on what `release` was."""
        return teach_heads(
            self._newest(upto),
            release,
            settings=self._settings,
            weights=SupportSettings().weights,
            capacity=self._options.capacity,
        )

    def _newest(self, upto: int) -> pl.DataFrame:
        return self._events.slice(max(0, upto - self._options.train_on), min(upto, self._options.train_on))


class Served:
    """A release's scorer over a log, shown in order of time, and trained again every so often."""

    def __init__(self, log: StreamLog, school: School, release: Release, options: StreamOptions) -> None:
        self._log, self._school, self._release, self._options = log, school, release, options
        self._scorer = Scorer(release, torch.device("cpu"))
        self._alone = Scorer(release, torch.device("cpu"))
        self._weights = kind_weights(SupportSettings().weights)
        self._top = list_length(options)
        self.trained_again = 0

    def answers(self, rows: Ints, *, seed: int, tell: Callable[[float], None]) -> dict[str, Ints]:
        """The rank [Q] of each moment's item, by arm; -1 where an arm wasn't asked."""
        asked = np.zeros(len(rows), bool)
        asked[:: len(rows) // HEAD_MOMENTS + 1] = True
        rng = np.random.default_rng(seed)
        replay, alone = Replay(self._scorer, self._log), Replay(self._alone, self._log)
        heads = self._school.heads(int(rows[0]), self._release)
        found: dict[str, Ints] = {}
        done, trained_at = 0, self._log.times[rows[0]]
        for upto, some in self._log.blocks(self._log.answered(rows), self._options.block_seconds):
            replay.show(upto)
            now = self._log.times[upto]
            if now - trained_at > self._options.train_every_hours * _HOUR_MS:
                self._scorer.use(self._school.release(upto))
                trained_at, self.trained_again = now, self.trained_again + 1
            supports = self._supports(rows[some], rng)
            stacked = np.concatenate([_wide(support, self._options.capacity) for support in supports.values()])
            replay.meet_support(stacked)
            all_ranks = self._ranks(np.tile(rows[some], len(supports)), stacked)
            for arm, mine in zip(supports, np.split(all_ranks, len(supports)), strict=True):
                found.setdefault(arm, np.full(len(rows), -1))[some] = mine
            few = some[asked[some]]
            if len(few):
                alone.meet_before(upto)
                support = self._log.before(rows[few], self._options.capacity)[0]
                alone.meet_support(support)
                for name, head in heads.items():
                    lists = self._alone.lists_by(head, self._log.sets(support, self._weights), self._top)
                    found.setdefault(name, np.full(len(rows), -1))[few] = self._judged(self._alone, rows[few], lists)
            done += len(some)
            tell(done / len(rows))
        return found

    def _supports(self, rows: Ints, rng: np.random.Generator) -> dict[str, Ints]:
        """What each arm knows of the task: rows [Q, S], newest first, -1 for none."""
        log, capacity = self._log, self._options.capacity
        return {
            "default": log.before(rows, capacity)[0],
            "none": np.full((len(rows), 1), -1),
            "placebo": log.before(self._others(rows, rng), capacity)[0],
            "stale-1h": log.before(rows, capacity, delay_ms=_HOUR_MS)[0],
            "stale-1d": log.before(rows, capacity, delay_ms=_DAY_MS)[0],
        }

    def _others(self, rows: Ints, rng: np.random.Generator) -> Ints:
        """For each row an earlier one of another user, where one turns up in a few draws."""
        drawn = rows
        for _ in range(5):
            back = (rng.random(len(rows)) * np.minimum(rows, _OTHERS)).astype(np.int64)
            again = np.maximum(rows - 1 - back, 0)
            drawn = np.where(self._log.users[drawn] == self._log.users[rows], again, drawn)
        return drawn

    def _ranks(self, rows: Ints, support: Ints) -> Ints:
        lists = self._scorer.lists(self._log.sets(support, self._weights), self._top)
        return self._judged(self._scorer, rows, lists)

    def _judged(self, scorer: Scorer, rows: Ints, lists: Lists) -> Ints:
        # Places are the catalogue's; the judge speaks of the log's items.
        target = scorer.catalogue.places(self._log.items[rows])
        own = seen(self._log, rows, self._options)
        own = None if own is None else np.where(own >= 0, scorer.catalogue.places(np.maximum(own, 0)), -1)
        return ranks(lists.places, lists.scores.astype(np.float64), target, own)


def list_length(options: StreamOptions) -> int:
    """How long a list must be so that enough is left when what the user has seen is removed."""
    return max(*options.hits, *options.reciprocal) + (2 * options.capacity if options.remove_seen else 0)


def _wide(support: Ints, capacity: int) -> Ints:
    return np.pad(support, ((0, 0), (0, capacity - support.shape[1])), constant_values=-1)


def seen(log: StreamLog, rows: Ints, options: StreamOptions) -> Ints | None:
    """The items [Q, H] that are removed from the lists for `rows`, -1 for none; None if nothing is."""
    if not options.remove_seen:
        return None
    before, there = log.before(rows, _SEEN)
    return np.where(there, log.items[before], -1)
