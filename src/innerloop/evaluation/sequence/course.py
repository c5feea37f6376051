"""What the baselines and heads of the `sequence` protocol learn from the training part and the validation targets.

1. The history encoder is trained on everything but the validation targets, which say when to stop.
2. The settings of item-kNN are chosen by coordinate ascent on validation targets, EASE's ridge and those of iALS from
   a few, as far as the size of the data lets them be learned several times.
3. Heads are meta-trained on some of the validation users, their gains chosen on others.
4. All scorers are learned again with the validation items; the encoder continues from its best epoch.
5. SASRec is the history encoder by itself. Where the heads are on another kind, one of attention is trained as well.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from innerloop.evaluation.metrics import ndcg_of_one
from innerloop.evaluation.outcome import Floats, Ints, Tell
from innerloop.evaluation.sequence.baselines import (
    Ease,
    Ials,
    IalsSettings,
    Popularity,
    Recents,
    Scorer,
    Scores,
    Transitions,
    TransitionSettings,
    VSknn,
)
from innerloop.evaluation.sequence.heads import Adapted, Encoded, teach
from innerloop.evaluation.sequence.sequences import Sequences
from innerloop.learning.heads import META_TRAIN, Recipe
from innerloop.learning.history_encoder import history_encoder
from innerloop.learning.item_encoder import ItemEncoder
from innerloop.learning.softmax_training import Plan, SequenceModel, Trainer

T = TypeVar("T")

HEADS = ("bayes", "anil", "cavia", "maml", "reptile")
_AT_ONCE, _SCORES_AT_ONCE = 400, 5_000_000  # histories scored together: at most so many, and so many scores
_TUNING, _EPISODES = 2_500, 1_500  # validation users for settings and heads
_RARE_REPEATS = 0.005
_SASREC = "attention"  # the kind of encoder that it is
_CONTINUED = 0.25  # of the best number of epochs, for the validation items
_RIDGE, _RIDGES = 60.0, (20.0, 200.0, 600.0)  # of EASE: the usual one, and what else is tried
_IALS = (IalsSettings(0.05, 10.0), IalsSettings(0.5, 10.0), IalsSettings(0.5, 40.0))  # what else is tried
_IALS_DIMENSION = 128
_MOST_INVERTED, _MOST_FACTORED = 16_000, 1_000_000  # items, and events, up to which these are chosen: minutes
_CANDIDATES: dict[str, tuple[float, ...]] = {
    "forget": (0.3, 0.5, 0.9, 1.0),
    "decay": (0.3, 0.5, 0.9, 1.0),
    "backward": (0.0, 0.2, 0.8, 1.0),
    "to_power": (0.0, 0.1, 0.3, 0.5),
    "from_power": (0.0, 0.2, 0.6, 1.0),
}


@dataclass(frozen=True)
class Options:
    """What may be changed about baselines and heads; `epochs` are the most the history encoder gets."""

    encoder: str = "attention"
    dimension: int = 96
    capacity: int = 50
    epochs: int = 14
    negatives: int = 2_048
    heads: tuple[str, ...] = HEADS
    positions: int = 1_500_000
    """Most events that the served release's own sequence model learns from."""
    users: int = 50_000
    """Most users that are tested, drawn at random; all are learned from."""


@dataclass
class Course:
    """Learns from all but the last item of each user of `sequences`; `learn` leaves behind what is to be tested."""

    sequences: Sequences
    options: Options
    seed: int
    tell: Tell
    facts: dict[str, object] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.sequences.without_last(1)
        train = self.sequences.without_last(2)
        order = np.random.default_rng(self.seed).permutation(np.flatnonzero(train.lengths > 0))
        self.taught = train.take(order)  # histories of validation users, in random order
        self.targets = self.before.take(order).last() if len(order) else np.zeros(0, np.int64)
        self.repeats = self._repeats()

    def learn(self) -> None:
        """Everything; afterwards `sasrec`, `scorers` and `heads` are those to be tested."""
        train = self.sequences.without_last(2)
        model, plan = self._encoder(
            self.options.encoder, "history encoder", lambda what, share: self.tell(what, 0.45 * share)
        )
        self.transitions = self._tune(train)
        self.ridge, self.factors = self._choose_ridge(train), self._choose_factors(train)
        encoded = Encoded(model, self.options.capacity)
        self.heads = self._heads(encoded)
        self.tell("all again with the validation items", 0.75)
        encoded = self._continued(model, plan, "history encoder")
        self.heads = {name: replace(head, encoded=encoded) for name, head in self.heads.items()}
        self.scorers = self._closed_form(self.before)
        self.sasrec = self._sasrec(encoded)

    def ranks(self, scores: Scores, histories: Sequences, targets: Ints) -> Ints:
        """Rank each target, from 1, among the catalogue, behind its equals; own items are last unless they repeat."""
        if not self.repeats:
            scores = scores.copy()
            scores[histories.matrix().nonzero()] = -np.inf
        own = scores[np.arange(len(targets)), targets]
        found: Ints = (scores >= own[:, None]).sum(1)
        return found

    def _repeats(self) -> bool:
        """Whether what a user has had is worth ranking."""
        users = self.taught.users
        again = np.unique(users[self.taught.items == self.targets[users]])
        share = len(again) / max(1, len(self.taught))
        self.facts["share of validation targets that the user had before"] = share
        self.facts["own items"] = "ranked with the others" if share > _RARE_REPEATS else "left out"
        return share > _RARE_REPEATS

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        began = time.monotonic()
        done = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)
        return done

    def _encoder(self, kind: str, name: str, progress: Tell) -> tuple[SequenceModel, Plan]:
        """A trained model, which the facts tell of by its name, and how to go on with it."""
        options = self.options
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            history = history_encoder(kind, options.dimension, capacity=options.capacity, dropout=0.5)
            model = SequenceModel(ItemEncoder(self.sequences.catalogue, options.dimension), history)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        plan = Plan(epochs=options.epochs, negatives=options.negatives, seed=self.seed, learning_rate=4e-3)
        histories = self.before.histories(options.capacity, hold_last=True)
        done = self._timed(name, Trainer(model, histories, plan, progress=progress).run)
        self.facts[name] = f"{kind}, best after {done.best_epoch} of {done.epochs} epochs"
        self.facts[f"held-out nDCG@10 of the {name} by epoch"] = done.scores
        epochs = max(1, round(_CONTINUED * done.best_epoch))
        return model, replace(plan, epochs=epochs, learning_rate=plan.learning_rate / 4, seed=self.seed + 1)

    def _continued(self, model: SequenceModel, plan: Plan, name: str) -> Encoded:
        histories = self.before.histories(self.options.capacity)
        self._timed(name, Trainer(model, histories, plan).run)
        return Encoded(model, self.options.capacity)

    def _sasrec(self, encoded: Encoded) -> Encoded:
        """The baseline to beat is in the table whatever the heads are on: trained as they would be on attention."""
        if self.options.encoder == _SASREC:
            self.facts["sasrec"] = "the history encoder by itself"
            return encoded
        model, plan = self._encoder(_SASREC, "sasrec", lambda what, share: self.tell(what, 0.75 + 0.25 * share))
        return self._continued(model, plan, "sasrec")

    def _tune(self, train: Sequences) -> TransitionSettings:
        """Coordinate ascent on the nDCG@10 of validation targets."""
        settings = TransitionSettings()

        def quality(candidate: TransitionSettings) -> float:
            return self._quality(Transitions.learn(train, candidate))

        best = self._timed("item-knn", lambda: quality(settings))
        for done, (name, values) in enumerate(_CANDIDATES.items()):
            self.tell("settings of item-kNN", 0.45 + 0.02 * done)
            for value in values:
                candidate = replace(settings, **{name: value})  # type: ignore[arg-type]
                if (reached := self._timed("item-knn", lambda c=candidate: quality(c))) > best:  # type: ignore[misc]
                    best, settings = reached, candidate
        self.facts["item-kNN"] = asdict(settings)
        return settings

    def _quality(self, scorer: Scorer) -> float:
        """The sum of the nDCG@10 of the first validation targets."""
        histories = self.taught.take(np.arange(min(_TUNING, len(self.taught))))
        return float(
            sum(self._worth(scorer.scores(histories.take(rows)), rows).sum() for rows in self.parts(histories))
        )

    def _choose_ridge(self, train: Sequences) -> float:
        def quality(ridge: float) -> float:
            scorer = Ease.learn(train, regularisation=ridge, forget=self.transitions.forget)
            return -np.inf if scorer is None else self._quality(scorer)

        self.tell("ridge of EASE", 0.5)
        tried = (_RIDGE, *_RIDGES) if train.catalogue <= _MOST_INVERTED else (_RIDGE,)
        best = self._timed("ease", lambda: max(tried, key=quality)) if len(tried) > 1 else _RIDGE
        self.facts["EASE"] = {"ridge": best, "chosen from": tried}
        return best

    def _choose_factors(self, train: Sequences) -> IalsSettings:
        def quality(settings: IalsSettings) -> float:
            return self._quality(Ials(train, dimension=_IALS_DIMENSION, seed=self.seed, settings=settings))

        self.tell("settings of iALS", 0.53)
        tried = (IalsSettings(), *_IALS) if 0 < len(train.items) <= _MOST_FACTORED else (IalsSettings(),)
        best = self._timed("ials", lambda: max(tried, key=quality)) if len(tried) > 1 else tried[0]
        self.facts["iALS"] = {**asdict(best), "factors": _IALS_DIMENSION, "chosen from": [asdict(one) for one in tried]}
        return best

    def parts(self, histories: Sequences) -> Iterator[Ints]:
        """Rows of histories, as many together as memory bears."""
        rows = np.arange(len(histories))
        size = max(1, min(_AT_ONCE, _SCORES_AT_ONCE // self.sequences.catalogue))
        yield from np.split(rows, range(size, len(rows), size))

    def _worth(self, scores: Scores, rows: Ints) -> Floats:
        """nDCG@10 of scores [b, N] for the validation users `rows` [b]."""
        return ndcg_of_one(self.ranks(scores, self.taught.take(rows), self.targets[rows]), 10)

    def _heads(self, encoded: Encoded) -> dict[str, Adapted]:
        """Meta-train each on the first validation users, choose its gain on the next."""
        most = max(1, min(_EPISODES, len(self.taught) // 8))
        episodes = encoded.episodes(self.taught.take(np.arange(most)), self.targets[:most], seed=self.seed)
        judged = self.taught.take(np.arange(most, min(2 * most, len(self.taught))))
        recipe = Recipe(seed=self.seed, half_life=10.0, steps=100, rates=(0.01,))
        found = {}
        for done, name in enumerate(self.options.heads):
            self.tell(f"head {name}", 0.55 + 0.02 * done)
            found[name] = self._timed(
                name,
                lambda name=name: teach(  # type: ignore[misc]
                    encoded,
                    META_TRAIN[name],
                    episodes=episodes,
                    recipe=recipe,
                    judged=judged,
                    worth=lambda scores, rows: self._worth(scores, rows + most),
                    at_once=max(1, len(next(self.parts(judged)))),
                ),
            )
        self.facts["gain of each head"] = {name: head.gain for name, head in found.items()}
        return found

    def _closed_form(self, train: Sequences) -> dict[str, Scorer]:
        makers: dict[str, Callable[[], Scorer | None]] = {
            "popularity": lambda: Popularity.learn(train),
            "recents": lambda: Recents() if self.repeats else None,
            "item-knn": lambda: Transitions.learn(train, self.transitions),
            "vsknn": lambda: VSknn.learn(train),
            "ials": lambda: Ials(train, dimension=_IALS_DIMENSION, seed=self.seed, settings=self.factors),
            "ease": lambda: Ease.learn(train, regularisation=self.ridge, forget=self.transitions.forget),
        }
        found = {name: self._timed(name, make) for name, make in makers.items()}
        return {name: scorer for name, scorer in found.items() if scorer is not None}
