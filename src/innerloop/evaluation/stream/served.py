"""The arms of the stream protocol that are the service itself: its scorer, asked when the service would be.

A list is made when the user's event comes in, so what it is judged by is the user's next event, however much later.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
import torch

from innerloop.config import LearningSettings, SupportSettings
from innerloop.evaluation.baselines.candidate_lists import WIDTH
from innerloop.evaluation.outcome import Floats, Ints, Tell
from innerloop.evaluation.stream.arms import ranks
from innerloop.evaluation.stream.options import StreamOptions
from innerloop.learning.heads import Head
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Lists, Scorer
from innerloop.learning.stream_log import StreamLog, kind_weights
from innerloop.learning.training import teach_heads, train

HEAD_MOMENTS = 5_000
"""A head alone scores the whole catalogue, some by a network: they are asked at so many moments at most."""
_OTHERS, _DRAWS = 10_000, 10  # a placebo's task is one of the users of so many events before, by so many draws
_SEEN_AT_ONCE = 2_000_000  # own items to remove, for the memory that they need
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000


class School:
    """Trains releases on what has happened, and on what is said of items, as `innerloop train` does every night."""

    def __init__(
        self, events: pl.DataFrame, options: StreamOptions, seed: int, items: pl.DataFrame | None = None
    ) -> None:
        self._events, self._options, self._items = events, options, items
        self._settings = LearningSettings(seed=seed, sequence=options.sequence)

    def release(self, upto: int, tell: Tell = lambda _what, _share: None) -> Release:
        """A release of the newest events that are earlier than row `upto`."""
        return train(
            self._newest(upto),
            settings=self._settings,
            weights=SupportSettings().weights,
            capacity=self._options.capacity,
            version=1,
            items=self._items,
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
        # By time: the log shuffles the events of one millisecond, so the rows before a row of it are others' here.
        times = self._events["event_time"].to_numpy()
        upto = int(np.searchsorted(times, times[upto], "left"))
        return self._events.slice(max(0, upto - self._options.train_on), min(upto, self._options.train_on))


def _facts(release: Release) -> dict[str, object]:
    taught = release.ranker is not None and release.ranker.taught
    return {
        "trained_on": release.card.data.events,
        "ranker": "taught with it" if taught else "the one for any shop: too few events to teach a better one",
        "sequence_model": release.sequence is not None,
        "metrics": release.card.metrics,
        "settings": release.card.settings,
    }


class Served:
    """A release's scorer over a log, shown in order of time, and trained again every so often."""

    def __init__(self, log: StreamLog, school: School, release: Release, options: StreamOptions) -> None:
        self._log, self._school, self._release, self._options = log, school, release, options
        self._scorer = Scorer(release, torch.device("cpu"))
        self._alone = Scorer(release, torch.device("cpu"))
        self._weights = kind_weights(SupportSettings().weights)
        self._top = list_length(options)
        self.releases = [_facts(release)]
        """What there is to say of each that served, in their order."""

    def answers(self, rows: Ints, *, seed: int, tell: Callable[[float], None]) -> dict[str, Ints]:
        """The rank [Q] of each moment's item, by arm; -1 where an arm wasn't asked."""
        asked = np.zeros(len(rows), bool)
        asked[:: len(rows) // HEAD_MOMENTS + 1] = True
        rng = np.random.default_rng(seed)
        replay, alone = Replay(self._scorer, self._log), Replay(self._alone, self._log)
        heads = self._school.heads(int(rows[0]), self._release)
        found: dict[str, Ints] = {}
        done, trained_at = 0, self._log.times[rows[0]]
        for upto, some in self._log.lists(rows, self._options.block_seconds):
            replay.show(upto)
            now = self._log.times[upto]
            if now - trained_at > self._options.train_every_hours * _HOUR_MS:
                self._serve(self._school.release(upto))
                trained_at = now
            others = self._others(rows[some], rng)
            supports = self._supports(rows[some], others)
            stacked = np.concatenate([_wide(support, self._options.capacity) for support in supports.values()])
            replay.meet_support(stacked)
            all_ranks = self._ranks(np.tile(rows[some], len(supports)), stacked)
            for arm, mine in zip(supports, np.split(all_ranks, len(supports)), strict=True):
                found.setdefault(arm, np.full(len(rows), -1))[some] = mine
            found["placebo"][some[others < 0]] = -1
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

    def _serve(self, release: Release) -> None:
        self._scorer.use(release)
        self.releases.append(_facts(release))

    def _supports(self, rows: Ints, others: Ints) -> dict[str, Ints]:
        """What each arm knows of the task: rows [Q, S], newest first, -1 for none."""
        log, capacity = self._log, self._options.capacity
        theirs = log.before(np.maximum(others, 0), capacity)[0]
        return {
            "default": log.before(rows, capacity)[0],
            "none": np.full((len(rows), 1), -1),
            "placebo": np.where(others[:, None] >= 0, theirs, -1),
            "stale-1h": log.before(rows, capacity, delay_ms=_HOUR_MS)[0],
            "stale-1d": log.before(rows, capacity, delay_ms=_DAY_MS)[0],
        }

    def _others(self, rows: Ints, rng: np.random.Generator) -> Ints:
        """For each row one of another user, drawn at random of those before the list was made; -1 where there is none.

        It is one of the last `_OTHERS`, if possible. Where one user has nearly all events the draws may miss the
        others, who are looked for then. A later row would make items known before their time.
        """
        users, drawn = self._log.users, rows
        end = np.searchsorted(self._log.times, self._log.answered(rows), "left")
        for _ in range(_DRAWS):
            back = (rng.random(len(rows)) * np.minimum(end, _OTHERS)).astype(np.int64)
            again = np.where(end > 0, end - 1 - back, rows)
            drawn = np.where(users[drawn] == users[rows], again, drawn)
        for at in np.flatnonzero(users[drawn] == users[rows]).tolist():
            user, before = users[rows[at]], users[: end[at]]
            there = max(0, len(before) - _OTHERS) + np.flatnonzero(before[-_OTHERS:] != user)
            there = there if len(there) else np.flatnonzero(before != user)[-1:]
            drawn[at] = rng.choice(there) if len(there) else -1
        return drawn

    def _ranks(self, rows: Ints, support: Ints) -> Ints:
        lists = self._scorer.lists(self._log.sets(support, self._weights), self._top)
        return self._judged(self._scorer, rows, lists)

    def _judged(self, scorer: Scorer, rows: Ints, lists: Lists) -> Ints:
        def places(items: Ints) -> Ints:
            return np.where(items >= 0, scorer.catalogue.places(np.maximum(items, 0)), -1)

        return judged(self._log, rows, self._options, (lists.places, lists.scores.astype(np.float64)), places)


def judged(
    log: StreamLog, rows: Ints, options: StreamOptions, lists: tuple[Ints, Floats], places: Callable[[Ints], Ints]
) -> Ints:
    """The rank [Q] of each row's item on its list, given items [Q, C] and scores [Q, C], without what was removed.

    `places` says by which numbers the lists name the log's items; -1 stays -1. An item without one is on no list.
    """
    named, scores = lists
    target = places(log.items[rows])
    if not options.remove_seen:
        return ranks(named, scores, target)
    found = np.zeros(len(rows), np.int64)
    order = np.argsort(log.support_sizes(rows), kind="stable")  # those with long histories apart from the others
    longest = np.maximum(log.support_sizes(rows)[order], 1)
    first = 0
    while first < len(order):
        # Histories are in order of length: as many as fit, padded to the last of them.
        fits = longest[first:] * np.arange(1, len(order) - first + 1) <= _SEEN_AT_ONCE
        some = order[first : first + max(1, int(fits.sum()))]
        own = seen(log, rows[some], options)
        found[some] = ranks(named[some], scores[some], target[some], None if own is None else places(own))
        first += len(some)
    return found


def list_length(options: StreamOptions) -> int:
    """How long a list must be so that enough is left when what the user has seen is removed."""
    longest = max(*options.hits, *options.reciprocal)
    return max(WIDTH, longest + 2 * options.capacity) if options.remove_seen else longest


def _wide(support: Ints, capacity: int) -> Ints:
    return np.pad(support, ((0, 0), (0, capacity - support.shape[1])), constant_values=-1)


def seen(log: StreamLog, rows: Ints, options: StreamOptions) -> Ints | None:
    """The items [Q, H] that are removed from the lists for `rows`, -1 for none; None if nothing is."""
    if not options.remove_seen:
        return None
    before, there = log.before(rows, max(1, int(log.support_sizes(rows).max(initial=0))))
    return np.where(there, log.items[before], -1)
