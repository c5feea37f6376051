"""Slate: rank the items shown at a click-out, in order of time, from strictly earlier actions.

The first part of the log (by time) trains; every later choice is scored and then learned from. The shared weights are
fitted again whenever the lists learned from have grown by a quarter. Arms:

    default, bayes     the user's own actions as features, and the user's own weights from earlier lists
    anil, cavia, maml, reptile   heads on what the user's own weights act on, taught once (`slate_heads`)
    shared             the user's own actions as features, everybody's weights
    none               nothing of the user: position, price and popularity alone, weights fitted for just that
    placebo            actions and lists of another user
    stale-1h, -1d      actions and lists as known an hour, a day earlier
    last-interacted    the item last acted on in the session first, then as shown
    shown-order, popularity, price-rank (cheapest first), item-knn (like the session's recent items); ties as shown
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from innerloop.errors import SettingsError
from innerloop.evaluation.metrics import pessimistic_ranks
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.evaluation.slate_features import (
    Action,
    Features,
    Layout,
    Population,
    common_kinds,
    common_levels,
    distinct,
    features,
    price_ranks,
)
from innerloop.evaluation.slate_heads import EPISODES, LISTS, HeadArms, teach
from innerloop.evaluation.slate_log import SlateLog, read_log
from innerloop.evaluation.slate_replay import DAY, HOUR, Choice, Replay, is_choice, until
from innerloop.learning.ads.choosers import Chooser, Seen

_OWN = ("position slopes", "price", "recency", "own counts", "population")
_OWN_LISTS = 20
_MOST_LISTS = 20_000
_GROWTH = 1.25
_FEWEST = 20
SIZES = {"0": (0, 0), "1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 1 << 62)}


def run(data: Path, *, seed: int, tell: Tell, train_share: float = 0.5) -> Outcome:
    """Judge every arm on the choices after the first `train_share` of the time span of `data` (a file or folder).

    Raises SettingsError when the data cannot be read or too few choices lie in the training part or after it.
    """
    if not 0.0 < train_share < 1.0:
        raise SettingsError(f"The training share is {train_share}: give one between 0 and 1.")
    log = read_log(data)
    cut = int(log.times[0] + train_share * (log.times[-1] - log.times[0]))
    earlier = int(np.searchsorted(log.times, cut))
    rows = np.array([is_choice(log, row) for row in range(len(log))])
    if rows[:earlier].sum() < _FEWEST or not rows[earlier:].any():
        raise SettingsError(
            f"{data} has {rows[:earlier].sum()} choices to train on and {rows[earlier:].sum()} to score: "
            f"at least {_FEWEST} and 1 are needed, so give a longer log."
        )
    layout = Layout(common_kinds(log.actions[:earlier], log.items[:earlier]), common_levels(log.contexts[:earlier]))
    learner = _Learner(layout)
    scored: list[Choice] = []
    scores: dict[str, list[Floats]] = {}
    arms: HeadArms | None = None
    replay = Replay(log, seed)
    for choice in replay.choices():
        tell("ranking" if choice.row >= earlier else "training", choice.row / len(log))
        if choice.row >= earlier:
            scored.append(choice)
            for arm, score in (
                _ours(learner, choice, replay.population) | _baselines(choice, replay.population)
            ).items():
                scores.setdefault(arm, []).append(score)
            arms = arms or HeadArms(teach(learner.seen, learner.users, layout.groups, learner.own, seed=seed))
            _ask(arms, learner, choice, replay.population)
        learner.learn(choice, features(layout, choice.slate, choice.history, replay.population))
    if arms is not None:
        arms.answer()
        scores |= arms.scores
    return _outcome(log, scored, scores, learner, {"train_share": train_share, "trained_on": int(rows[:earlier].sum())})


@dataclass
class _Learner:
    """The lists learned from so far, and the ranker that was last fitted to them."""

    layout: Layout
    seen: list[Seen] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    by_user: dict[int, list[Seen]] = field(default_factory=dict)
    fitted: tuple[Chooser, Chooser] | None = None
    due: int = 0
    fits: int = 0

    @property
    def own(self) -> Ints:
        """The columns that users have own weights for."""
        return np.flatnonzero(np.isin([name for name, width in self.layout.blocks for _ in range(width)], _OWN))

    def fit(self) -> tuple[Chooser, Chooser]:
        """The ranker, and the one that knows nothing of users, fitted again first when that is due."""
        if self.fitted is None or len(self.seen) >= self.due:
            layout, before = self.layout, self.fitted or (None, None)
            own = self.own
            seen, users = self.seen[-_MOST_LISTS:], self.users[-_MOST_LISTS:]
            kept = layout.of_nobody
            nobody = [replace(one, features=one.features[:, kept]) for one in seen]
            self.fitted = (
                Chooser.fit(seen, users, layout.groups, own, before[0]),
                Chooser.fit(nobody, range(len(seen)), layout.groups[kept], own[:0], before[1]),
            )
            self.due = int(len(self.seen) * _GROWTH) + 1
            self.fits += 1
        return self.fitted

    def learn(self, choice: Choice, known: Features) -> None:
        one = Seen(known, choice.chosen, choice.slate.time)
        self.seen.append(one)
        self.users.append(choice.user)
        mine = self.by_user.setdefault(choice.user, [])
        mine.append(one)
        del mine[:-_OWN_LISTS]

    def lists(self, user: int, before: int) -> list[Seen]:
        """The lists that this user chose from before that time."""
        return [one for one in self.by_user.get(user, []) if one.time < before]


def _ours(learner: _Learner, choice: Choice, population: Population) -> dict[str, Floats]:
    chooser, nobody = learner.fit()
    layout, slate, now = learner.layout, choice.slate, choice.slate.time

    def adapted(history: Sequence[Action], user: int | None, before: int) -> Floats:
        known = features(layout, slate, history, population)
        lists = [] if user is None else [chooser.own(one) for one in learner.lists(user, before)]
        return chooser.score_for(known, chooser.adapt(lists))

    known = features(layout, slate, choice.history, population)
    lists = [chooser.own(one) for one in learner.lists(choice.user, now)]
    default = chooser.score_for(known, chooser.adapt(lists))
    return {
        "default": default,
        "bayes": default,
        "shared": chooser.score(known),
        "none": nobody.score(known[:, layout.of_nobody]),
        "placebo": adapted(choice.other, choice.other_user, now),
        "stale-1h": adapted(until(choice.history, now - HOUR), choice.user, now - HOUR),
        "stale-1d": adapted(until(choice.history, now - DAY), choice.user, now - DAY),
    }


def _ask(arms: HeadArms, learner: _Learner, choice: Choice, population: Population) -> None:
    """Ask the heads as `default` is asked."""
    chooser, now = learner.fit()[0], choice.slate.time
    known = features(learner.layout, choice.slate, choice.history, population)
    lists = [chooser.own(one) for one in learner.lists(choice.user, now)[-LISTS:]]
    arms.ask(chooser.own(Seen(known, 0, now)).features, lists)


def _baselines(choice: Choice, population: Population) -> dict[str, Floats]:
    slate = choice.slate
    items = slate.items.tolist()
    session = [one for one in choice.history if one.session == slate.session]
    recent = distinct(session)
    shown = -np.arange(len(items), dtype=np.float64) / (len(items) + 1)  # breaks ties as shown: less than 1
    last = slate.items == (recent[0] if recent else -1)
    return {
        "last-interacted": last + shown,
        "shown-order": shown,
        "popularity": _then(population.popularity(items, slate.time), shown),
        "price-rank": _then(-price_ranks(slate.prices), shown),
        "item-knn": _then(population.similarity(items, recent), shown),
    }


def _then(first: Floats, second: Floats) -> Floats:
    """Ranks by `first`, equal ones by `second`, as scores."""
    score = np.empty(len(first))
    score[np.lexsort((second, first))] = np.arange(len(first))
    return score


_BASELINES = frozenset({"last-interacted", "shown-order", "popularity", "price-rank", "item-knn"})


def _outcome(
    log: SlateLog, scored: list[Choice], scores: dict[str, list[Floats]], learner: _Learner, facts: dict[str, object]
) -> Outcome:
    sizes = np.array([len(choice.slate.items) for choice in scored])
    ranks = {arm: _ranks(scored, given) for arm, given in scores.items()}
    chooser = learner.fit()[0]
    return Outcome(
        users=np.array([choice.user for choice in scored], np.int64),
        baselines=_BASELINES,
        means={arm: {"mrr": 1.0 / rank} for arm, rank in ranks.items()},
        slices=_slices(scored),
        labels=(sizes * (sizes > 1)).astype(np.float64),
        predictions={arm: (sizes - rank) / np.maximum(sizes - 1, 1) for arm, rank in ranks.items()},
        pooled={"gauc": weighted_mean},
        release="fitted during the run",
        facts=facts
        | {
            "default": "bayes",
            "scored": len(scored),
            "actions": len(log),
            "fits": learner.fits,
            "kinds": [log.action_names[kind] for kind in learner.layout.kinds],
            "variance of users' own weights": chooser.variance,
            "lists in a head's support set at most": LISTS,
            "episodes of the heads at most": EPISODES,
            "gauc": "each list weighs as many as it has items",
        },
    )


def weighted_mean(sizes: Floats, values: Floats, weights: Floats) -> float:
    """GAUC: the mean of the lists' AUCs, each weighted by its size; NaN without any."""
    total = float(weights @ sizes)
    return float((weights * sizes) @ values / total) if total > 0 else float("nan")


def _ranks(scored: list[Choice], given: list[Floats]) -> Ints:
    return np.array(
        [
            int(pessimistic_ranks(score[None, :], np.array([choice.chosen]))[0])
            for choice, score in zip(scored, given, strict=True)
        ]
    )


def _slices(scored: list[Choice]) -> dict[str, Bools]:
    sizes = np.array([len(choice.history) for choice in scored])
    first = np.array([choice.first for choice in scored])
    found: dict[str, Bools] = {
        f"support {name}": (sizes >= low) & (sizes <= high) for name, (low, high) in SIZES.items()
    }
    return found | {"first action of the session": first, "later in the session": ~first}
