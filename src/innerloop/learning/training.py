"""The outer loop: from a history of events to a release.

1. The last three tenths of the history are held out; an encoder is learned on the rest. Where the shop describes its
   items, that foretells the taste of those the history hasn't, if it foretells more than their category (`described`).
2. The popularity's half-life, then the head's three numbers (how fast examples age, how much one says, how much an item
   that wasn't clicked says) are chosen one at a time, by hit@20 on one half of a sample of held-out clicks. For each
   candidate the prior is learned anew by EM.
3. The release's metrics are measured on the other half of that sample.
4. A sequence model is trained on the rest (`sequence_training`), and what followed what is counted.
5. The ranker is taught on the held-out events, with what was learned before them: it has not seen what it has to
   foresee. Whether it reads the sequence model is decided on the newest of them (`ranker.worth_of_sequences`).
6. Encoder and prior are learned once more, on all of the history, with what was chosen; the sequence model goes on.
7. Where there are purchases enough, the ad model is learned, calibrated and measured (`ads.teaching`); where there are
   impressions, so are clicks on what is shown (`ads.click_teaching`), without purchases alone.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.events import IMPRESSION
from innerloop.learning.ads.attribution import HOUR
from innerloop.learning.ads.click_teaching import learn_clicks
from innerloop.learning.ads.teaching import learn_ads, without_purchases
from innerloop.learning.candidates import PLAIN
from innerloop.learning.described import Described, Worth, with_described
from innerloop.learning.encoder import FIXED, Encoder, learn_encoder, with_popularity
from innerloop.learning.episodes import Log, episodes_of, log_of
from innerloop.learning.heads import META_TRAIN, BayesHead, Head, NoneHead, Recipe
from innerloop.learning.heads.bayes import learn_prior
from innerloop.learning.processes import agreed
from innerloop.learning.ranker import LEAST_LESSONS, Ranker, learn_ranker, worth_of_sequences
from innerloop.learning.ranker_training import lessons
from innerloop.learning.releases import Card, DataSummary, Release
from innerloop.learning.scorer import Scorer
from innerloop.learning.sequence_training import Recipe as SequenceRecipe
from innerloop.learning.sequence_training import Taught, continue_learning, learn_sequences
from innerloop.learning.stream_log import kind_weights, stream_of
from innerloop.learning.transitions import Transitions

Progress = Callable[[str, float], None]

_HELD_OUT = 0.3
LEAST_EVENTS = 100
_SELECTION_TASKS, _FINAL_TASKS = 500, 4_000
_SAMPLE = 2_000
_NEGATIVES = 128
_MOMENTS, _LEAST_MOMENTS = 20_000, 100  # to teach the ranker with, and to judge a sequence model by
_RANKED_AT_ONCE = 128
_SURE = 2.0  # standard errors by which lists must be better for a sequence model, which makes them slower
_INF = float("inf")


class Settings(Protocol):
    """What training needs of config.LearningSettings."""

    @property
    def method(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def sequence(self) -> str: ...
    @property
    def sequence_episodes(self) -> bool: ...
    @property
    def sequence_positions(self) -> int: ...
    @property
    def described_items(self) -> int: ...
    @property
    def attribution_hours(self) -> float: ...
    @property
    def click_hours(self) -> float: ...


@dataclass(frozen=True)
class Choice:
    """What is chosen on held-out clicks. Half-lives are in seconds, inf is no decay."""

    popularity_half_life: float = _INF
    half_life: float = 21_600.0
    noise: float = 0.2
    alpha: float = 0.03


_CANDIDATES: dict[str, tuple[float, ...]] = {
    "half_life": (900.0, 3_600.0, 21_600.0, 86_400.0, _INF),
    "noise": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "alpha": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
}
_POPULARITY_HALF_LIVES = (_INF, 604_800.0, 86_400.0, 21_600.0, 3_600.0)


def train(
    history: pl.DataFrame,
    *,
    settings: Settings,
    weights: Mapping[str, float],
    capacity: int,
    version: int,
    impressions: int = 32,
    items: pl.DataFrame | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> Release:
    """Learn a release from an event table; `weights` by event type and `capacity` are those of the support sets.

    `items` is what the shop says of its items, with `described.COLUMNS`: one that isn't in the history has a sensible
    vector by it, and one whose events name no category has the one that is said.

    The table's impressions teach clicks on ads, as if `impressions` of each user were kept, and nothing else.

    `progress` is called with what is being done and the share that is done. `checkpoint` names a directory from which
    the training of the sequence model is resumed. Started by torchrun, after `processes.join_processes`, all processes
    give the same history and share that training; the first one's release is the one to keep.

    Raises SettingsError when the history is too small or the method is unknown. The same history and seed give the same
    release on the same machine.
    """
    if settings.method not in META_TRAIN:
        raise SettingsError(f"learning.method is {settings.method}: choose one of {', '.join(META_TRAIN)}.")
    tell = progress or (lambda _what, _share: None)
    shown, history = (
        history.filter(kind) for kind in (pl.col("event_type") == IMPRESSION, pl.col("event_type") != IMPRESSION)
    )
    lesson = _Lesson(history, settings, weights, capacity, items)
    history = lesson.history
    tell("encoder on the earlier part", 0.0)
    choice, metrics, early = lesson.choose(tell)
    early, taught, of_sequences = lesson.foresee(early, tell, checkpoint)
    ranker, of_lists = lesson.rank(early, tell)
    tell("encoder on everything", 0.9)
    log = lesson.log_of(history)
    encoder = with_popularity(lesson.encoder_of(log, history), log, choice.popularity_half_life)
    tell("prior", 0.95)
    head = lesson.teach(log, encoder.vectors, choice, _FINAL_TASKS)
    sequence, transitions = None, None
    if agreed(taught is not None and len(ranker.mean) > PLAIN) and taught is not None:
        recipe = lesson.recipe
        sequence = continue_learning(
            taught,
            log,
            encoder,
            recipe,
            described=lesson.described,
            tell=lambda _what, share: tell("sequences of everything", 0.95 + 0.02 * share),
            checkpoint=checkpoint,
        ).encoder(recipe)
        transitions = Transitions.learn(log)
    tell("ads", 0.97)
    windows = round(settings.attribution_hours * HOUR), round(settings.click_hours * HOUR)
    ads, of_ads = learn_ads(history, encoder, capacity=capacity, seed=settings.seed, window=windows[0])
    clicks, of_clicks = learn_clicks(
        history,
        shown,
        encoder,
        capacities=(capacity, impressions),
        seed=settings.seed,
        windows=windows,
        purchases=ads is not None,
    )
    if clicks is not None:
        ads = replace(ads or without_purchases(history, encoder, window=windows[0]), clicks=clicks)
    tell("release", 1.0)
    card = _card(history, settings, version, choice, metrics | of_sequences | of_lists | of_ads | of_clicks)
    return Release(card, encoder, head, ranker, ads, sequence, transitions)


def _counting(events: pl.DataFrame, weights: Mapping[str, float]) -> int:
    """How many are of a kind that says something."""
    silent = [kind for kind, weight in weights.items() if not weight]
    return events.filter(~pl.col("event_type").cast(pl.String).is_in(silent)).height


class _Lesson:
    """One training run: the history and the settings that every step needs."""

    def __init__(
        self,
        history: pl.DataFrame,
        settings: Settings,
        weights: Mapping[str, float],
        capacity: int,
        items: pl.DataFrame | None = None,
    ) -> None:
        if (counting := _counting(history, weights)) < LEAST_EVENTS:
            raise SettingsError(
                f"The history has {counting} events besides impressions and what support.weights gives 0; "
                f"training needs {LEAST_EVENTS} or more."
            )
        self.told, self.settings, self.weights, self.capacity = history, settings, weights, capacity
        self.random = torch.Generator().manual_seed(settings.seed)
        self.history = history if items is None else with_categories(history, items)
        self.named = _categories(history)  # by events: of an item that a release hasn't met a service knows no more
        self.described = Described.none() if items is None else Described.of(items, self.named)

    def log_of(self, events: pl.DataFrame, item_ids: list[str] | None = None) -> Log:
        return log_of(events, self.weights, item_ids or events["item_id"].unique().sort().to_list())

    def encoder_of(self, log: Log, events: pl.DataFrame) -> Encoder:
        encoder = learn_encoder(log, self.settings.dimension, _categories(events), self.settings.seed)
        return self.described_by(encoder)[0]

    def described_by(self, encoder: Encoder) -> tuple[Encoder, Worth | None]:
        most = self.settings.described_items
        return with_described(encoder, self.described, most=most, seed=self.settings.seed, told=self.named)

    def teach(self, log: Log, vectors: Tensor, choice: Choice, tasks: int) -> Head:
        """Learn the head whose prior the newest support sets of at most `tasks` tasks teach."""
        teach = _methods(self.settings.seed)[self.settings.method]
        return teach(log, vectors, self.newest(log, tasks), choice, self.capacity)

    def newest(self, log: Log, tasks: int) -> Tensor:
        """The newest event of each of at most `tasks` tasks, drawn at random."""
        last = torch.cat([log.first[1:] != log.first[:-1], torch.tensor([True])]).nonzero().squeeze(1)
        return last[torch.randperm(len(last), generator=self.random)[:tasks]]

    def choose(self, tell: Progress) -> tuple[Choice, dict[str, float], Release]:
        """What was chosen, how good it is, and the release of the earlier part alone."""
        early = self.history.head(round(self.history.height * (1.0 - _HELD_OUT)))
        if not _counting(early, self.weights):
            raise SettingsError(
                f"The first {1.0 - _HELD_OUT:.0%} of the history's events are of kinds that support.weights gives 0: "
                "give one of them a weight, or train when the others have been recorded for longer."
            )
        log = self.log_of(early)
        encoder = learn_encoder(log, self.settings.dimension, _categories(early), self.settings.seed)
        described, told = self.described_by(encoder)
        if agreed(told is not None and told.sure):
            encoder = described
        else:
            self.described = Described.none()
        items = self.history["item_id"].unique().sort().to_list()
        whole, early_log = self.log_of(self.history, items), self.log_of(early, items)
        rows = self._held_out_clicks(whole, int(early["event_time"][-1]))
        tuning, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]

        names = self.named

        def vectors_of(half_life: float) -> Tensor:
            counted = with_popularity(encoder, log, half_life)
            return counted.vectors_for(items, [names.get(item) for item in items])

        choice = Choice(popularity_half_life=_popularity_half_life(vectors_of, whole.items[tuning]))
        vectors = vectors_of(choice.popularity_half_life)

        def head_of(candidate: Choice) -> Head:
            return self.teach(early_log, vectors, candidate, _SELECTION_TASKS)

        def quality(candidate: Choice) -> float:
            ranks = ranks_of(whole, tuning, vectors, head_of(candidate), self.capacity)
            return hit_rate(ranks, 20) + 0.1 * hit_rate(ranks, 50)

        if self.settings.method == BayesHead.name:
            choice = _one_at_a_time(choice, quality, tell)
        head = head_of(choice)
        ranks = ranks_of(whole, test, vectors, head, self.capacity)
        prior = ranks_of(whole, test, vectors, head, self.capacity, adapted=False)
        metrics = {f"hit@{k}": hit_rate(ranks, k) for k in (20, 50)}
        metrics |= {f"unadapted_hit@{k}": hit_rate(prior, k) for k in (20, 50)}
        if told is not None:
            metrics |= {"content_explains": told.content, "category_explains": told.category}
            metrics["content_used"] = float(len(self.described.item_ids) > 0)
        early_release = Release(
            _card(early, self.settings, 0, choice, {}), with_popularity(encoder, log, choice.popularity_half_life), head
        )
        return choice, metrics | {"clicks": float(len(test))}, early_release

    @property
    def recipe(self) -> SequenceRecipe:
        """How the sequence model is trained."""
        kind = "pooled" if self.settings.sequence == "auto" else self.settings.sequence
        return SequenceRecipe(
            kind=kind,
            dimension=self.settings.dimension,
            capacity=self.capacity,
            positions=self.settings.sequence_positions,
            through_head=self.settings.sequence_episodes,
            seed=self.settings.seed,
        )

    def foresee(
        self, early: Release, tell: Progress, checkpoint: Path | None
    ) -> tuple[Release, Taught | None, dict[str, float]]:
        """Give the early release a sequence model of the same events, judged by what came after."""
        few = self.history.height - early.card.data.events < _LEAST_MOMENTS
        if self.settings.sequence == "off" or few:
            return early, None, {}
        log = self.log_of(self.history, early.item_ids)
        cut = early.card.data.last_event_time
        taught = learn_sequences(
            log,
            early.encoder,
            self.recipe,
            cut=cut,
            described=self.described,
            tell=lambda _what, share: tell("sequences", 0.55 + 0.1 * share),
            checkpoint=checkpoint,
        )
        if taught is None:
            return early, None, {}
        before = self.log_of(self.history.filter(pl.col("event_time") <= cut), early.item_ids)
        early = replace(early, sequence=taught.encoder(self.recipe), transitions=Transitions.learn(before))
        return early, taught, taught.metrics

    def rank(self, early: Release, tell: Progress) -> tuple[Ranker, dict[str, float]]:
        """Teach the ranker on a sample of the events after `early`, unless they are too few to teach it anything."""
        # What only the catalogue says of an item that is new to `early` a service learns with the next release.
        log = stream_of(self.told, seed=self.settings.seed)
        weights = kind_weights(self.weights)
        rows = np.flatnonzero((log.times > early.card.data.last_event_time) & (weights[log.kinds] > 0))
        if len(rows) < LEAST_LESSONS:
            return Ranker.untaught(), {}
        rng = np.random.default_rng(self.settings.seed)
        if len(rows) > _MOMENTS:
            rows = np.sort(rng.choice(rows, _MOMENTS, replace=False))
        taught = lessons(
            Scorer(early, torch.device("cpu")),
            log,
            rows,
            weights,
            self.capacity,
            rng,
            lambda share: tell("what came next", 0.65 + 0.15 * share),
        )
        plain = taught.plain().learnable()
        if len(plain) < LEAST_LESSONS:
            return Ranker.untaught(), {}

        def told(_what: str, share: float) -> None:
            tell("ranker", 0.8 + 0.1 * share)

        metrics = {"list_moments": float(len(rows))}
        chosen = plain if early.sequence is None or len(plain) < _LEAST_MOMENTS else taught
        if chosen is taught:
            metrics["sequence_worth"] = worth_of_sequences(taught, seed=self.settings.seed)
            if self.settings.sequence == "auto" and metrics["sequence_worth"] < _SURE:
                chosen = plain
        metrics["list_candidate_recall"] = len(chosen) / len(rows)
        return learn_ranker(chosen, seed=self.settings.seed, tell=told), metrics

    def _held_out_clicks(self, log: Log, cut: int) -> Tensor:
        """Rows after `cut` (epoch ms) of tasks that have an example by then, at most `_SAMPLE`, in random order."""
        at = torch.arange(len(log.items))
        rows = at[(log.times > cut) & (at > log.first)]
        return rows[torch.randperm(len(rows), generator=self.random)[:_SAMPLE]]


def _bayes(log: Log, vectors: Tensor, rows: Tensor, choice: Choice, capacity: int) -> Head:
    return learn_prior(
        log.support(rows, vectors, capacity),
        vectors.T @ vectors,
        alpha=choice.alpha,
        noise=choice.noise,
        half_life=choice.half_life,
    ).head()


def _none(log: Log, vectors: Tensor, rows: Tensor, choice: Choice, capacity: int) -> Head:
    return NoneHead(_bayes(log, vectors, rows, choice, capacity).prior)


_Teach = Callable[[Log, Tensor, Tensor, Choice, int], Head]


def _methods(seed: int) -> dict[str, _Teach]:
    """How each head is taught, by its name."""
    return {name: _by_steps(name, seed) for name in META_TRAIN} | {BayesHead.name: _bayes, NoneHead.name: _none}


def _by_steps(name: str, seed: int) -> _Teach:
    """Teach a head by episodes, from the closed form's prior."""

    def teach(log: Log, vectors: Tensor, rows: Tensor, choice: Choice, capacity: int) -> Head:
        episodes = episodes_of(log, rows, vectors, capacity, negatives=_NEGATIVES, seed=seed)
        start = _bayes(log, vectors, rows, choice, capacity).prior
        return META_TRAIN[name](episodes, Recipe(seed=seed, half_life=choice.half_life, start=start))

    return teach


def teach_heads(
    history: pl.DataFrame, release: Release, *, settings: Settings, weights: Mapping[str, float], capacity: int
) -> dict[str, Head]:
    """Every head by its name, taught on the history that `release` was made of, over its vectors."""
    lesson = _Lesson(history, settings, weights, capacity)
    log = lesson.log_of(history, release.item_ids)
    chosen = {name: _INF if value is None else float(value) for name, value in release.card.settings.items()}
    choice = Choice(**{field.name: chosen[field.name] for field in fields(Choice)})
    rows = lesson.newest(log, _FINAL_TASKS)
    return {
        name: release.head if name == release.head.name else teach(log, release.item_vectors, rows, choice, capacity)
        for name, teach in _methods(settings.seed).items()
        if name != NoneHead.name
    }


def ranks_of(log: Log, rows: Tensor, vectors: Tensor, head: Head, capacity: int, *, adapted: bool = True) -> Tensor:
    """For each event of rows [T] the rank [T] of its item among vectors [N, d] just before it; 0 is best."""
    ranks = [torch.empty(0, dtype=torch.int64)]
    at_once = _RANKED_AT_ONCE if head.linear else _RANKED_AT_ONCE // 16  # a network holds numbers for every item
    for some in torch.split(rows, at_once):
        support = log.support(some, vectors, capacity)
        parameters = head.adapt(support) if adapted else head.prior.expand(len(some), -1)
        ranks.append(_ranks(head.score(parameters, vectors), log.items[some]))
    return torch.cat(ranks)


def hit_rate(ranks: Tensor, k: int) -> float:
    """Return the share of ranks [T] below k; 0 for none."""
    return float((ranks < k).float().mean()) if len(ranks) else 0.0


def _ranks(scores: Tensor, items: Tensor) -> Tensor:
    """How many of scores [T, N] are above that of items [T], plus half of those equal: a tie earns nothing."""
    own = scores.gather(1, items.unsqueeze(1))
    return (scores > own).sum(1) + ((scores == own).sum(1) - 1) // 2


def _popularity_half_life(vectors_of: Callable[[float], Tensor], items: Tensor) -> float:
    """Choose the longest half-life that no shorter one beats by a tenth: how many of items [T] are in the top 50.

    A short half-life counts few events: where popularity doesn't move, its small gains are noise.
    """
    chosen, best = _INF, 0.0
    for half_life in _POPULARITY_HALF_LIVES:
        popularity = vectors_of(half_life)[:, -FIXED]
        reached = hit_rate(_ranks(popularity.expand(len(items), -1), items), 50)
        if reached > 1.1 * best:
            chosen, best = half_life, reached
    return chosen


def _one_at_a_time(choice: Choice, quality: Callable[[Choice], float], tell: Progress) -> Choice:
    """Coordinate ascent: one round over `_CANDIDATES`, in their order; an equal candidate doesn't replace the best."""
    best, done, total = quality(choice), 0, sum(map(len, _CANDIDATES.values()))
    for name, values in _CANDIDATES.items():
        for value in values:
            tell("choosing on held-out clicks", 0.1 + 0.45 * done / total)
            candidate, done = replace(choice, **{name: value}), done + 1
            if candidate != choice and (reached := quality(candidate)) > best:
                best, choice = reached, candidate
    return choice


def with_categories(events: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Events of items for which none names a category get the one of the table `items` (`described.COLUMNS`)."""
    if "category" not in events.columns:
        events = events.with_columns(category=pl.lit(None, pl.String))
    of_table = items.unique("item_id", keep="last").select("item_id", pl.col("category").alias("of_table"))
    nameless = pl.col("category").is_null().all().over("item_id")
    filled = events.join(of_table, on="item_id", how="left", maintain_order="left").with_columns(
        pl.when(nameless).then("of_table").otherwise("category").alias("category")
    )
    return filled.drop("of_table")


def _categories(events: pl.DataFrame) -> dict[str, str]:
    """Each item's newest category, where it has one."""
    if "category" not in events.columns:
        return {}
    newest = events.drop_nulls("category").group_by("item_id").agg(pl.col("category").last())
    return dict(newest.iter_rows())


def _card(history: pl.DataFrame, settings: Settings, version: int, choice: Choice, metrics: dict[str, float]) -> Card:
    chosen = {name: None if value == _INF else value for name, value in asdict(choice).items()}
    return Card(
        version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=settings.method,
        dimension=settings.dimension,
        data=DataSummary(
            events=history.height,
            users=history["user_id"].n_unique(),
            items=history["item_id"].n_unique(),
            first_event_time=int(history["event_time"][0]),
            last_event_time=int(history["event_time"][-1]),
        ),
        metrics=metrics,
        settings={"seed": settings.seed, **chosen},
        innerloop=importlib.metadata.version("innerloop"),
    )
