"""Slate: rank the items shown at a click-out, in order of time, from strictly earlier actions.

The first part of the log (by time) trains; every later choice is scored and then learned from. The shared weights are
fitted again whenever the lists learned from have grown by a quarter. Arms:

    default            the user's own actions as features, and the user's own weights from earlier lists
    bayes, anil, cavia, maml, fomaml, reptile   heads on what the user's own weights act on, taught once (see heads.py)
    shared             the user's own actions as features, everybody's weights
    none               nothing of the user: position, price and popularity alone, weights fitted for just that
    placebo            actions and lists of another user, where somebody else was there before
    stale-1h, -1d      actions and lists as known an hour, a day earlier
    last-interacted    the item last acted on in the session first, then as shown
    recents            the items of the user's newest 64 actions first, newest before others, then as shown
    shown-order, popularity (halved every six hours), popularity-1h, price-rank (cheapest first), item-knn (like the
                       session's recent items), and of the stream protocol vsknn, ials, sasrec; ties as shown
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import spanned
from innerloop.evaluation.metrics import pessimistic_ranks
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.evaluation.slate.baselines import ARMS as STREAM_ARMS
from innerloop.evaluation.slate.baselines import stream_scores
from innerloop.evaluation.slate.features import (
    Action,
    Features,
    Layout,
    Population,
    common_kinds,
    common_levels,
    distinct,
    features,
    positions_of,
    price_ranks,
)
from innerloop.evaluation.slate.heads import EPISODES, LISTS, HeadArms, teach
from innerloop.evaluation.slate.log import SlateLog, read_log
from innerloop.evaluation.slate.replay import DAY, HOUR, Choice, Replay, is_choice, until
from innerloop.evaluation.taught_heads import HEADS
from innerloop.learning.ads.choosers import Chooser, Seen

_OWN = ("position slopes", "price", "recency", "own counts", "population")
_OWN_LISTS = 20
_MOST_LISTS, _MOST_KEPT = 20_000, 50_000  # newest lists that the shared weights, and users' own, are learned from
_GROWTH = 1.25
_FEWEST = 20
MOST_SCORED = 50_000
SIZES = {"0": (0, 0), "1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 1 << 62)}


def run(
    data: Path,
    *,
    seed: int,
    tell: Tell,
    train_share: float = 0.5,
    most: int = MOST_SCORED,
    columns: Mapping[str, str] | None = None,
) -> Outcome:
    """Judge every arm on the choices after the first `train_share` of the time span of `data` (a file or folder).

    `columns` as for `log.read_log`. Of more than `most` of them every so-manieth is scored; all are learned from.
    Raises SettingsError when the data cannot be read or too few choices lie in the training part or after it.
    """
    if not 0.0 < train_share < 1.0:
        raise SettingsError(f"The training share is {train_share}: give one between 0 and 1.")
    log = read_log(data, seed=seed, columns=columns)
    cut = int(log.times[0] + train_share * (log.times[-1] - log.times[0]))
    earlier = int(np.searchsorted(log.times, cut))
    rows = np.array([is_choice(log, row) for row in range(len(log))])
    trained, later = int(rows[:earlier].sum()), earlier + np.flatnonzero(rows[earlier:])
    if trained < _FEWEST or not len(later):
        raise SettingsError(
            f"{data} has {trained} choices to train on and {len(later)} to score: "
            f"at least {_FEWEST} and 1 are needed, so give a longer log."
        )
    asked = later[:: -(-len(later) // most)]
    layout = Layout(
        common_kinds(log.actions[:earlier], log.items[:earlier]),
        common_levels(log.contexts[:earlier]),
        positions_of([log.shown[row] for row in np.flatnonzero(rows[:earlier]).tolist()]),
    )
    course = _Course(log, layout, frozenset(asked.tolist()), seed)
    course.run(earlier, lambda what, share: tell(what, 0.8 * share))
    tell("vsknn, ials and sasrec", 0.8)
    for arm, scores in stream_scores(log, asked, [of.shown for of in course.scored], seed=seed).items():
        course.judge(arm, scores)
    return _outcome(log, course, {"train_share": train_share, "trained_on": trained, "choices after": len(later)})


@dataclass(frozen=True, slots=True)
class _Scored:
    """What is kept of a choice that was scored: whose, what was chosen of how many, and what was known."""

    user: int
    chosen: int
    shown: Ints
    history: int
    first: bool


@dataclass
class _Course:
    """One walk over the log: every choice is learned from, and before that those `asked` (rows) are scored."""

    log: SlateLog
    layout: Layout
    asked: frozenset[int]
    seed: int
    scored: list[_Scored] = field(default_factory=list)
    ranks: dict[str, list[float]] = field(default_factory=dict)
    heads: HeadArms | None = None

    def __post_init__(self) -> None:
        self.learner = _Learner(self.layout)

    def run(self, earlier: int, tell: Tell) -> None:
        replay, waiting = Replay(self.log, self.seed), list[tuple[Choice, Features]]()
        for choice in replay.choices():
            tell("ranking" if choice.row >= earlier else "training", choice.row / len(self.log))
            if waiting and waiting[0][0].slate.time < choice.slate.time:
                self._learn(waiting)
            known = features(self.layout, choice.slate, choice.history, replay.population)
            if choice.row in self.asked:
                self._score(choice, known, replay.population)
            waiting.append((choice, known))  # choices of one time know nothing of each other
        self._learn(waiting)
        if self.heads is not None:
            self.heads.answer()
            self._judge_heads(self.heads)

    def judge(self, arm: str, scores: Iterable[Floats]) -> None:
        """Take the arm's scores of the next choices that it has not been judged by: NaN alone is no answer.

        An item that an arm which answers has no number for is its last, tied with all such.
        """
        mine = self.ranks.setdefault(arm, [])
        for score in scores:
            asked = arm != "placebo" or not np.isnan(score).all()
            known, chosen = np.nan_to_num(score, nan=-np.inf), np.array([self.scored[len(mine)].chosen])
            mine.append(float(pessimistic_ranks(known[None, :], chosen)[0]) if asked else np.nan)

    def _learn(self, waiting: list[tuple[Choice, Features]]) -> None:
        for choice, known in waiting:
            self.learner.learn(choice, known)
        waiting.clear()

    def _score(self, choice: Choice, known: Features, population: Population) -> None:
        learner = self.learner
        self.scored.append(
            _Scored(choice.user, choice.chosen, choice.slate.items, len(choice.history), first=choice.first)
        )
        for arm, score in (_ours(learner, choice, known, population) | _baselines(choice, population)).items():
            self.judge(arm, [score])
        if self.heads is None:
            seen, users = learner.newest
            self.heads = HeadArms(teach(seen, users, self.layout.groups, learner.own, seed=self.seed))
        chooser, now = learner.fit()[0], choice.slate.time
        lists = [chooser.own(one) for one in learner.lists(choice.user, now)[-LISTS:]]
        self.heads.ask(chooser.own(Seen(known, 0, now)).features, lists)  # as `default` is asked
        self._judge_heads(self.heads)

    def _judge_heads(self, heads: HeadArms) -> None:
        for arm, scores in heads.scores.items():
            self.judge(arm, scores)
            scores.clear()


@dataclass
class _Learner:
    """The newest lists learned from, and the ranker that was last fitted to them."""

    layout: Layout
    kept: deque[tuple[int, Seen]] = field(default_factory=deque)  # whose, and what
    by_user: dict[int, deque[Seen]] = field(default_factory=dict)
    fitted: tuple[Chooser, Chooser] | None = None
    learned: int = 0
    due: int = 0
    fits: int = 0

    @property
    def own(self) -> Ints:
        """The columns that users have own weights for."""
        return np.flatnonzero(np.isin([name for name, width in self.layout.blocks for _ in range(width)], _OWN))

    @property
    def newest(self) -> tuple[list[Seen], list[int]]:
        """The lists that the shared weights are learned from, and whose they are."""
        some = list(self.kept)[-_MOST_LISTS:]
        return [one for _, one in some], [user for user, _ in some]

    def fit(self) -> tuple[Chooser, Chooser]:
        """The ranker, and the one that knows nothing of users, fitted again first when that is due."""
        if self.fitted is None or self.learned >= self.due:
            layout, before = self.layout, self.fitted or (None, None)
            own, (seen, users) = self.own, self.newest
            kept = layout.of_nobody
            nobody = [replace(one, features=one.features[:, kept]) for one in seen]
            self.fitted = (
                Chooser.fit(seen, users, layout.groups, own, before[0]),
                Chooser.fit(nobody, range(len(seen)), layout.groups[kept], own[:0], before[1]),
            )
            self.due = int(self.learned * _GROWTH) + 1
            self.fits += 1
        return self.fitted

    def learn(self, choice: Choice, known: Features) -> None:
        one = Seen(known, choice.chosen, choice.slate.time)
        self.learned += 1
        self.kept.append((choice.user, one))
        self.by_user.setdefault(choice.user, deque(maxlen=_OWN_LISTS)).append(one)
        if len(self.kept) > _MOST_KEPT:
            self._forget(*self.kept.popleft())

    def _forget(self, user: int, oldest: Seen) -> None:
        mine = self.by_user[user]
        if mine[0] is oldest:
            mine.popleft()
        if not mine:
            del self.by_user[user]

    def lists(self, user: int, before: int) -> list[Seen]:
        """The lists that this user chose from before that time."""
        return [one for one in self.by_user.get(user, ()) if one.time < before]


def _ours(learner: _Learner, choice: Choice, known: Features, population: Population) -> dict[str, Floats]:
    chooser, nobody = learner.fit()
    layout, slate, now = learner.layout, choice.slate, choice.slate.time

    def adapted(history: Sequence[Action], user: int | None, before: int) -> Floats:
        found = features(layout, slate, history, population)
        lists = [] if user is None else [chooser.own(one) for one in learner.lists(user, before)]
        return chooser.score_for(found, chooser.adapt(lists))

    lists = [chooser.own(one) for one in learner.lists(choice.user, now)]
    return {
        "default": chooser.score_for(known, chooser.adapt(lists)),
        "shared": chooser.score(known),
        "none": nobody.score(known[:, layout.of_nobody]),
        "placebo": np.full(len(known), np.nan)
        if choice.other_user is None
        else adapted(choice.other, choice.other_user, now),
        "stale-1h": adapted(until(choice.history, now - HOUR), choice.user, now - HOUR),
        "stale-1d": adapted(until(choice.history, now - DAY), choice.user, now - DAY),
    }


def _baselines(choice: Choice, population: Population) -> dict[str, Floats]:
    slate = choice.slate
    items = slate.items.tolist()
    session = [one for one in choice.history if one.session == slate.session]
    recent = distinct(session)
    shown = -np.arange(len(items), dtype=np.float64) / (len(items) + 1)  # breaks ties as shown: less than 1
    last = slate.items == (recent[0] if recent else -1)
    back = {item: at for at, item in enumerate(distinct(choice.history, most=len(choice.history)))}
    return {
        "last-interacted": last + shown,
        "recents": _then(np.array([-back.get(item, len(back)) for item in items], np.float64), shown),
        "shown-order": shown,
        "popularity": _then(population.popularity(items, slate.time), shown),
        "popularity-1h": _then(population.last_hour(items, slate.time), shown),
        "price-rank": _then(-price_ranks(slate.prices), shown),
        "item-knn": _then(population.similarity(items, recent), shown),
    }


def _then(first: Floats, second: Floats) -> Floats:
    """Ranks by `first`, equal ones by `second`, as scores."""
    score = np.empty(len(first))
    score[np.lexsort((second, first))] = np.arange(len(first))
    return score


_BASELINES = frozenset(
    {"last-interacted", "recents", "shown-order", "popularity", "popularity-1h", "price-rank", "item-knn", *STREAM_ARMS}
)


def _outcome(log: SlateLog, course: _Course, facts: dict[str, object]) -> Outcome:
    scored, learner = course.scored, course.learner
    sizes = np.array([len(one.shown) for one in scored])
    ranks = {arm: np.array(found) for arm, found in course.ranks.items()}
    return Outcome(
        users=np.array([one.user for one in scored], np.int64),
        baselines=_BASELINES,
        means={arm: {"mrr": 1.0 / rank} for arm, rank in ranks.items()},
        slices=_slices(scored),
        labels=(sizes * (sizes > 1)).astype(np.float64),
        predictions={arm: (sizes - rank) / np.maximum(sizes - 1, 1) for arm, rank in ranks.items()},
        pooled={"gauc": weighted_mean},
        release="fitted during the run",
        facts=facts
        | {
            "default": "a conditional logit that is this protocol's own: adapt orders no lists that it is given",
            "scored": len(scored),
            "actions": len(log),
            "times": spanned(log.times),
            "fits": learner.fits,
            "kinds": [log.action_names[kind] for kind in learner.layout.kinds],
            "positions with a weight": learner.layout.positions,
            "variance of users' own weights": learner.fit()[0].variance,
            "lists in a head's support set at most": LISTS,
            "episodes of the heads at most": EPISODES,
            "newest lists learned from at most": {"shared weights": _MOST_LISTS, "users' own": _MOST_KEPT},
            "trained once, before the first choice that is scored": [*HEADS, "sasrec"],
            "left out": {
                "popularity in category": "the log names no categories",
                "carted, then recents": "the log's kinds of action are its own: none is known to be a cart",
            },
            "gauc": "each list weighs as many as it has items",
        },
    )


def weighted_mean(sizes: Floats, values: Floats, weights: Floats) -> float:
    """GAUC: the mean of the lists' AUCs, each weighted by its size; NaN without any."""
    total = float(weights @ sizes)
    return float((weights * sizes) @ values / total) if total > 0 else float("nan")


def _slices(scored: list[_Scored]) -> dict[str, Bools]:
    sizes = np.array([one.history for one in scored])
    first = np.array([one.first for one in scored])
    found: dict[str, Bools] = {
        f"support {name}": (sizes >= low) & (sizes <= high) for name, (low, high) in SIZES.items()
    }
    return found | {"first action of the session": first, "later in the session": ~first}
