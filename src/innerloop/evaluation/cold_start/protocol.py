"""Cold start: the ratings of users of whom little is known, and of items that nobody rated.

1. A part of the users and of the items is held out of meta_training. The factor model, the heads and every baseline are
   learned on the rest; their settings, and each arm's rule from a mean to the least wrong rating, on what was held out.
   All see ratings divided by their standard deviation, so that a scale from 1 to 100 is as good as one from 1 to 5.
2. All of it is learned again on the whole of meta_training, with those settings and rules.
3. For each test file, seed and user: 10 ratings to foresee, the others (or the first k of them) to learn from.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from innerloop.errors import SettingsError
from innerloop.evaluation.cold_start.arms import OURS, Arms
from innerloop.evaluation.cold_start.baselines import RatingArm
from innerloop.evaluation.cold_start.decision import DecisionRule, Prediction
from innerloop.evaluation.cold_start.episodes import FEWEST, MOST, QUERIES, Episodes, draw_episodes, other_users
from innerloop.evaluation.cold_start.ratings import read_rating_data
from innerloop.evaluation.cold_start.scale import Scale
from innerloop.evaluation.cold_start.validation import Chosen, choose, learn_arms
from innerloop.evaluation.metrics import ndcg_of_rows
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.learning.heads import Recipe
from innerloop.learning.rating_model import Ratings

_SEEDS = 5
_SHOTS = (0, 1, 2, 3, 5, 10, 20, 50)
_CUTOFFS = (1, 3, 5)
_CHOOSING, _LEARNING = 0.45, 0.6  # shares of the whole time, for the progress bar


def run(data: Path, *, seed: int, tell: Tell, steps: int = 200, columns: Mapping[str, str] | None = None) -> Outcome:
    """Measure every arm on the folder `data`; one moment is one user's ten query ratings under one seed.

    Slices: `all` is every test file under the main protocol (users with 13 to 100 ratings, or with more than ten where
    there is no such one; all examples but the ten); `<file>` is that of one file, `<file> k=<k>` the same file's shot
    curve (every user with more than ten ratings, no more than k examples). `steps` are those of the heads that are
    meta-trained by gradient descent. `columns` as for `event_table.read_events`.
    Raises SettingsError when the folder is not as it must be, no user of a test file has more than ten ratings, or all
    ratings to learn from are the same.
    """
    given = read_rating_data(data, columns)
    scale = Scale.of(given)
    ratings = given.over(scale.unit)
    if not any(_asks(test) for test in ratings.tests.values()):
        raise SettingsError("No test file has a user with more than ten ratings: give some more of their ratings.")
    recipe = Recipe(seed=seed, steps=steps)
    chosen = choose(ratings, recipe, _share_of(tell, 0.0, _CHOOSING))
    arms = learn_arms(ratings, chosen, recipe, _share_of(tell, _CHOOSING, _LEARNING))
    table = _Table(scale)
    main = _main_protocol(ratings.tests.values())
    rounds = [(name, test, at) for name, test in ratings.tests.items() for at in range(_SEEDS)]
    for done, (name, test, at) in enumerate(rounds):
        tell(f"{name}, seed {at + 1} of {_SEEDS}", _LEARNING + (1 - _LEARNING) * done / len(rounds))
        for part in _parts(test, name, main, seed + at):
            table.add(part, arms, chosen)
    facts: dict[str, object] = {"trained on": _size(ratings.training)}
    facts |= {name: _size(test) for name, test in ratings.tests.items()}
    facts |= {"ratings of meta_training left out, since a test file has them, too": ratings.repeated}
    facts |= {"all": f"every test file under the main protocol: users with {main}, all examples but the ten"}
    return table.outcome(arms, chosen, facts)


def _asks(test: Ratings) -> bool:
    """Whether any of its users has more ratings than there are to foresee."""
    return int(np.unique(test.users, return_counts=True)[1].max(initial=0)) > QUERIES


def _main_protocol(tests: Iterable[Ratings]) -> "_Limits":
    totals = np.concatenate([np.unique(test.users, return_counts=True)[1] for test in tests])
    usual = _Limits(FEWEST, MOST)
    return usual if usual.hold(totals).any() else _Limits(QUERIES + 1, int(totals.max()))


@dataclass(frozen=True)
class _Limits:
    """How many ratings a user of the main table has, from `fewest` to `most`."""

    fewest: int
    most: int

    def hold(self, totals: Ints) -> Bools:
        return (totals >= self.fewest) & (totals <= self.most)

    def __str__(self) -> str:
        return f"{self.fewest} to {self.most} ratings"


def _size(ratings: Ratings) -> dict[str, int]:
    found = {"ratings": len(ratings.users)}
    return found | {"users": len(np.unique(ratings.users)), "items": len(np.unique(ratings.items))}


def _share_of(tell: Tell, first: float, last: float) -> Tell:
    return lambda what, share: tell(what, first + (last - first) * share)


@dataclass(frozen=True)
class _Part:
    """Some episodes of a test file, how many examples are known, [E], and the slice they belong to."""

    slice: str
    main: bool
    episodes: Episodes
    shots: Ints
    donors: Ints


def _parts(test: Ratings, name: str, main: _Limits, seed: int) -> Iterator[_Part]:
    episodes = draw_episodes(test, seed=seed)
    usual = episodes.where(main.hold(episodes.totals))
    if len(usual.users):
        yield _Part(name, True, usual, usual.support, other_users(usual, seed))  # noqa: FBT003
    for shots in _SHOTS:
        if len(episodes.users):
            known = np.full(len(episodes.users), shots)
            yield _Part(f"{name} k={shots}", False, episodes, known, other_users(episodes, seed))  # noqa: FBT003


class _Table:
    """The moments as they come: whose, in which slice, and every arm's metrics."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._users: list[Ints] = []
        self._slices: list[str] = []
        self._main: list[Bools] = []
        self._metrics: dict[str, dict[str, list[Floats]]] = {}
        self._seconds: dict[str, float] = {}

    def add(self, part: _Part, arms: Arms, chosen: Chosen) -> None:
        episodes = part.episodes
        count = len(episodes.users)
        self._users.append(episodes.users)
        self._slices += [part.slice] * count
        self._main.append(np.full(count, part.main))
        for name, arm in arms.items():
            started = time.perf_counter()
            predicted = arm.predict(episodes, part.shots)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
            self._measure(name, episodes, predicted, chosen.rules.get(name))
        self._measure("placebo", episodes, _placebo(part, arms["bayes"]), chosen.rules["placebo"])

    def _measure(self, name: str, episodes: Episodes, predicted: Prediction, rule: DecisionRule | None) -> None:
        mine = self._metrics.setdefault(name, {})
        for metric, values in _metrics(episodes.asked, predicted, rule, self._scale).items():
            mine.setdefault(metric, []).append(values)

    def outcome(self, arms: Arms, chosen: Chosen, facts: Mapping[str, object]) -> Outcome:
        names = np.array(self._slices)
        main = np.concatenate(self._main)
        slices = {"all": main} | {name: names == name for name in dict.fromkeys(self._slices)}
        return Outcome(
            users=np.concatenate(self._users),
            baselines=frozenset(arms) - OURS,
            means={
                arm: {metric: np.concatenate(parts) for metric, parts in metrics.items()}
                for arm, metrics in self._metrics.items()
            },
            slices=slices,
            smaller_is_better=frozenset({"mae", "mae-of-mean"}),
            facts=_facts(chosen, self._seconds, self._scale) | dict(facts),
        )


def _placebo(part: _Part, arm: RatingArm) -> Prediction:
    """As if another user's examples were this one's; NaN where there is no other."""
    alone = part.donors < 0
    donors = np.where(alone, 0, part.donors)
    predicted = arm.predict(part.episodes.with_support_of(donors), part.shots)
    return predicted._replace(mean=np.where(alone[:, None], np.nan, predicted.mean))


def _metrics(asked: Floats, predicted: Prediction, rule: DecisionRule | None, scale: Scale) -> dict[str, Floats]:
    """By user, [E]: errors where there is a rule, nDCG of the ten by the predicted mean; both of ratings as given."""
    mean = predicted.mean
    found: dict[str, Floats] = {}
    if rule is not None:
        found["mae"] = scale.unit * np.abs(rule.decide(predicted) - asked).mean(1)
        found["mae-of-mean"] = scale.unit * np.abs(rule.clip(mean) - asked).mean(1)
    lost = np.isnan(mean).any(1)
    for kind, gains in scale.gains(asked * scale.unit).items():
        for cutoff in _CUTOFFS:
            found[f"{kind}@{cutoff}"] = np.where(lost, np.nan, ndcg_of_rows(np.nan_to_num(mean), gains, cutoff))
    return found


def _facts(chosen: Chosen, seconds: Mapping[str, float], scale: Scale) -> dict[str, object]:
    from_least = " - the least of the scale" if scale.least < 0 else ""
    exponential = {} if scale.exponential else {"ndcg-exp": "2^rating of so long a scale is the best one's alone"}
    return {
        "moment": "one user's ten query ratings under one seed; a figure is the mean over users and seeds",
        "k": "the shot curve: every user with more than ten ratings, the first k of the examples (all, if fewer)",
        "mae": "of the median: each arm's mean is turned into a level by a rule learned on held-out training users",
        "mae-of-mean": "of the mean itself, clipped to the scale",
        "ndcg": f"of the ten by predicted mean, gain = rating{from_least}; ndcg-exp: 2^gain - 1; ties pessimistic: "
        "a baseline to which all new items are alike has their worst order",
        "default": "the bayes head; where a user has ratings in meta_training, they are examples too, as they are for "
        "baselines. Its model of ratings is this protocol's own: adapt takes clicks and purchases, and publishes none",
        "unit of what arms see": scale.unit,
        "placebo": "the bayes head with the examples of another user with about as many ratings",
        "left out": exponential
        | {
            "stale-1h, stale-1d": "ratings have no times",
            "ials": "learns from what was chosen, not from ratings: it has no opinion on which of ten rated is best",
            "popularity-1h, recents, covisits, vsknn, sasrec": "ratings have no times and no order",
            "popularity-in-category": "only where the items have a column named category or genre",
            "item-knn": "only above 8,000 items: its similarities would not fit into memory",
        },
        "settings of the model": asdict(chosen.model),
        "settings of baselines": dict(chosen.baselines),
        **chosen.facts,
        "seconds to predict": {name: round(value, 2) for name, value in seconds.items()},
    }
