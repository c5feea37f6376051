"""`innerloop evaluate sequence`: every user's last item is to be found among the whole catalogue.

The last item of each user is the test target, the one before it the validation target, everything before that the
training part (see sequence_course for what is learned from which). Test targets are ranked among all items, ties
pessimistically. Whether items that a user has had before are ranked too follows from the data: they are left out where
validation targets are hardly ever repeats. Published full rankings differ in this; SASRec's leaves them out.

Arms: `default` aggregates all scorers and the Bayesian head (see sequence_aggregation). Each head is adapted around the
history encoder's vector (see sequence_heads). `none` is the encoder with the Bayesian head's prior, not adapted.
`placebo` is `default` given another user's history. Baselines: popularity, own recents, item-kNN with sequential
rules, V-SkNN, iALS, EASE where the catalogue's inverse fits, and SASRec (attention trained with many negatives, which
is the history encoder by itself). There are no clocks here, so the arms stale-1h and stale-1d don't apply.
"""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from innerloop.evaluation.baselines.sequence_scorers import Scorer
from innerloop.evaluation.metrics import hit_rate, ndcg_of_one
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.evaluation.sequence_course import Course, Options
from innerloop.evaluation.sequence_heads import Unadapted
from innerloop.evaluation.sequences import Sequences, read_sequences

BASELINES = frozenset({"popularity", "recents", "item-knn", "vsknn", "ials", "ease", "sasrec"})
_CUTOFFS = (10, 20)
_SIZES = {"1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 10**9)}


def run(data: Path, *, seed: int, tell: Tell, options: Options | None = None) -> Outcome:
    """Judge every arm. Raises SettingsError for a file without usable sequences."""
    sequences = read_sequences(data, seed=seed)
    course = Course(sequences, options or Options(), seed, tell)
    course.learn()
    users = np.flatnonzero(sequences.lengths > 1)
    histories, targets = course.before.take(users), sequences.take(users).last()
    ranks = _ranks(course, histories, targets)
    course.facts |= {
        "users": len(users),
        "users with one item, not tested": len(sequences) - len(users),
        "items": sequences.catalogue,
        "seconds": course.seconds,
        "none": "the history encoder with the Bayesian head's prior, not adapted",
        "sasrec": "the history encoder by itself",
    }
    return Outcome(
        users=users,
        baselines=BASELINES,
        means={arm: _metrics(found) for arm, found in ranks.items()},
        slices=_slices(histories.lengths),
        facts=course.facts,
    )


def _ranks(course: Course, histories: Sequences, targets: Ints) -> dict[str, Ints]:
    """The rank of each target by arm; `placebo` ranks it by the list of the user who is next in a random circle."""
    others = _other_users(len(targets), course.seed)
    found: dict[str, list[Ints]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for rows in course.parts(histories):
        course.tell("test", 0.85 + 0.15 * rows[0] / len(targets))
        some = histories.take(rows)
        scores = course.describer.scores(some)
        candidates = course.describer.candidates(scores, some.lengths)
        for arm, wanted in (("default", targets[rows]), ("placebo", targets[others[rows]])):
            found[arm].append(course.aggregation.ranks(candidates, wanted, course.sequences.catalogue))
        for arm, scorer in _arms(course).items():
            began = time.monotonic()
            known = scores[arm] if arm in scores else scorer.scores(some)
            found[arm].append(course.ranks(known, some, targets[rows]))
            seconds[arm] += time.monotonic() - began
    course.facts["seconds of scoring and ranking beyond the default"] = {arm: round(s, 1) for arm, s in seconds.items()}
    ranks = {arm: np.concatenate(parts) for arm, parts in found.items()}
    placebo = np.empty_like(ranks["placebo"])
    placebo[others] = ranks["placebo"]
    return ranks | {"placebo": placebo}


def _arms(course: Course) -> dict[str, Scorer]:
    baselines = {name: scorer for name, scorer in course.scorers.items() if name in BASELINES}
    sasrec: dict[str, Scorer] = {"sasrec": course.encoded} if course.options.encoder == "attention" else {}
    bayes = course.heads.get("bayes")
    none: Scorer = Unadapted(bayes.encoded, bayes.head, bayes.gain) if bayes else course.encoded
    return {**course.heads, "none": none, **baselines, **sasrec}


def _other_users(count: int, seed: int) -> Ints:
    """For each of the users another one, each serving once; a single user has nobody else."""
    circle = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, np.int64)
    others[circle] = np.roll(circle, 1)
    return others


def _metrics(ranks: Ints) -> dict[str, Floats]:
    hits = {f"hr@{cutoff}": hit_rate(ranks, cutoff) for cutoff in _CUTOFFS}
    return hits | {"ndcg@10": ndcg_of_one(ranks, 10)}


def _slices(lengths: Ints) -> dict[str, Bools]:
    return {f"support {name}": (lengths >= low) & (lengths <= high) for name, (low, high) in _SIZES.items()}
