"""`innerloop evaluate sequence`: every user's last item is to be found among the whole catalogue.

The last item of each user is the test target, the one before it the validation target, everything before that the
training part (see course.py for what is learned from which). Test targets are ranked among all items, ties
pessimistically. Whether items that a user has had before are ranked too follows from the data: they are left out where
validation targets are hardly ever repeats. Published full rankings differ in this; SASRec's leaves them out.

Arms: `default` is what adapt serves, a release trained on everything before the test targets (see served.py);
`none` is what it gives a user of whom nothing is known, `placebo` what it gives another user, `stale-1h` and `stale-1d`
what it gives for the history as it was known an hour and a day before the test target. Each head is adapted around the
vector of a history encoder of this protocol's own (see heads.py). Baselines: popularity, item-kNN with sequential
rules, V-SkNN, iALS, EASE where the catalogue's inverse fits, and SASRec (attention trained with many negatives). Where
they apply: popularity of the last hour and in the category (see log_baselines.py), own recents, carted then recents.

What is learned is every user's items but the last, whenever they were: some may be later than another user's test
target, as in published figures. Only what log_baselines.py counts is strictly earlier than the target, and only that
and the stale arms go by the file's clock. A file of positions has none, and what needs one is left out. The facts say
what is left out, and why.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from innerloop.config import LearningSettings
from innerloop.evaluation.event_table import spanned
from innerloop.evaluation.metrics import hit_rate, ndcg_of_one
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.evaluation.sequence.baselines import Scorer
from innerloop.evaluation.sequence.course import Course, Options
from innerloop.evaluation.sequence.log_baselines import (
    CARTED,
    IN_CATEGORY,
    LAST_HOUR,
    NO_CLOCK,
    NO_OWN_ITEMS,
    list_ranks,
    reasons_against,
)
from innerloop.evaluation.sequence.sequences import SequenceFile, Sequences, read_sequences
from innerloop.evaluation.sequence.served import ServedSequences

BASELINES = frozenset(
    {"popularity", LAST_HOUR, IN_CATEGORY, "recents", CARTED, "item-knn", "vsknn", "ials", "ease", "sasrec"}
)
_STALE = {"stale-1h": 3_600_000, "stale-1d": 86_400_000}
_CUTOFFS = (10, 20)
_SIZES = {"1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 10**9)}


def run(
    data: Path,
    *,
    seed: int,
    tell: Tell,
    options: Options | None = None,
    columns: Mapping[str, str] | None = None,
) -> Outcome:
    """Judge every arm; `columns` as for `read_events`. Raises SettingsError for a file without usable sequences."""
    file = read_sequences(data, seed=seed, columns=columns)
    sequences = file.sequences
    course = Course(sequences, options or Options(), seed, lambda what, share: tell(what, 0.5 * share))
    course.learn()
    settings = LearningSettings(seed=seed, sequence_positions=course.options.positions)
    served = ServedSequences.learn(course.before, settings, lambda what, share: tell(what, 0.5 + 0.4 * share))
    able = np.flatnonzero(sequences.lengths > 1)
    users = _some(able, course.options.users, seed)
    histories, targets = course.before.take(users), sequences.take(users).last()
    tell("test", 0.9)
    stale = {arm: file.known(delay).take(users) for arm, delay in _STALE.items()} if file.clock else {}
    ranks = _served(served, course, histories, targets, stale) | _ranks(course, histories, targets)
    ranks |= list_ranks(file, users, own_items=course.repeats)
    course.facts |= {
        "users": len(users),
        "users with one item, not tested": len(sequences) - len(able),
        "users with more, drawn for the test": f"{len(users)} of {len(able)}",
        "items": sequences.catalogue,
        "times": spanned(file.times) if file.clock else "none: positions",
        "seconds": course.seconds,
        "release": {"metrics": served.release.card.metrics, "settings": served.release.card.settings},
        "served by": served.scorer.method,
        "counted": _counted(file, ranks),
        "left out": _left_out(file, course, len(users)),
    }
    return Outcome(
        users=users,
        baselines=BASELINES,
        means={arm: _metrics(found) for arm, found in ranks.items()},
        slices=_slices(histories.lengths),
        release=f"{served.release.card.method}, trained on {served.release.card.data.events} events",
        facts=course.facts,
    )


def _counted(file: SequenceFile, arms: Collection[str]) -> dict[str, str]:
    """What of the file each arm has seen, and which clock it goes by."""
    found = {"learned from": "every user's items but the last, whenever they were"}
    if file.clock:
        strict = ", ".join(name for name in (LAST_HOUR, IN_CATEGORY, CARTED) if name in arms)
        found[strict] = "of these, what is strictly earlier than the judged item"
    return found | {"a release's clock": "made up: a user's items five minutes apart, all histories ending together"}


def _left_out(file: SequenceFile, course: Course, users: int) -> dict[str, str]:
    """Why each arm and baseline that other protocols have isn't in this table."""
    found = {} if file.clock else dict.fromkeys(_STALE, NO_CLOCK)
    if users == 1:
        found["placebo"] = "there is no other user"
    found |= reasons_against(file, own_items=course.repeats)
    if "recents" not in course.scorers:
        found["recents"] = NO_OWN_ITEMS
    if "ease" not in course.scorers:
        found["ease"] = "the inverse of so large a catalogue does not fit"
    return found | {"covisits-1h": "a user's items are one sequence, without visits: item-knn counts what follows what"}


def _served(
    served: ServedSequences, course: Course, histories: Sequences, targets: Ints, stale: Mapping[str, Sequences]
) -> dict[str, Ints]:
    """The rank of each target on the lists that adapt publishes, by what it knows of the user.

    `stale` is known of the same users a while before; `placebo` is the list of a user drawn at random, if there is
    another.
    """
    asked = {"default": histories, "none": histories.without_last(len(histories.items)), **stale}
    if len(targets) > 1:
        asked["placebo"] = histories.take(_other_users(len(targets), course.seed))
    removed = None if course.repeats else histories
    return {arm: served.ranks(known, targets, longest=max(_CUTOFFS), removed=removed) for arm, known in asked.items()}


def _ranks(course: Course, histories: Sequences, targets: Ints) -> dict[str, Ints]:
    """The rank of each target by every other arm."""
    found: dict[str, list[Ints]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for rows in course.parts(histories):
        some = histories.take(rows)
        for arm, scorer in _arms(course).items():
            began = time.monotonic()
            found[arm].append(course.ranks(scorer.scores(some), some, targets[rows]))
            seconds[arm] += time.monotonic() - began
    course.facts["seconds of scoring and ranking"] = {arm: round(s, 1) for arm, s in seconds.items()}
    return {arm: np.concatenate(parts) for arm, parts in found.items()}


def _arms(course: Course) -> dict[str, Scorer]:
    baselines = {name: scorer for name, scorer in course.scorers.items() if name in BASELINES}
    return {**course.heads, **baselines, "sasrec": course.sasrec}


def _some(users: Ints, most: int, seed: int) -> Ints:
    """At most so many of the users, drawn at random, in their order."""
    if len(users) <= most:
        return users
    return np.sort(np.random.default_rng(seed).choice(users, most, replace=False))


def _other_users(count: int, seed: int) -> Ints:
    """For each of `count` > 1 users another one, each serving once."""
    circle = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, np.int64)
    others[circle] = np.roll(circle, 1)
    return others


def _metrics(ranks: Ints) -> dict[str, Floats]:
    hits = {f"hr@{cutoff}": hit_rate(ranks, cutoff) for cutoff in _CUTOFFS}
    return hits | {"ndcg@10": ndcg_of_one(ranks, 10)}


def _slices(lengths: Ints) -> dict[str, Bools]:
    return {f"support {name}": (lengths >= low) & (lengths <= high) for name, (low, high) in _SIZES.items()}
