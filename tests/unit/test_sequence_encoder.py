"""The sequence model in a release: learned from a history, saved, served."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.learning.candidates import FEATURES, PLAIN
from innerloop.learning.described import Described
from innerloop.learning.encoder import learn_encoder
from innerloop.learning.episodes import log_of
from innerloop.learning.ranker import Lesson, Ranker, worth_of_sequences
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release, load, save
from innerloop.learning.scorer import Lists, Scorer
from innerloop.learning.sequence_encoder import SequenceEncoder
from innerloop.learning.sequence_training import Recipe, continue_learning, histories_of, learn_sequences
from innerloop.learning.stream_log import stream_of
from innerloop.learning.training import train
from innerloop.learning.transitions import KEPT, Transitions, best_followers, followers, says_of
from innerloop.support import EXAMPLE, SupportSets

ITEMS, STEP = 24, 600_000
WEIGHTS = {"click": 1.0}
CATEGORIES = ("even", "odd")


def circle(users: int = 120, steps: int = 10, *, chance: float = 0.9, seed: int = 0) -> pl.DataFrame:
    """Item n is mostly followed by item n + 1; even items are of one category, odd ones of another."""
    rng = np.random.default_rng(seed)
    at = rng.integers(ITEMS, size=users)
    rows = []
    for step in range(steps):
        at = np.where(rng.random(users) < chance, (at + 1) % ITEMS, rng.integers(ITEMS, size=users))
        rows += [
            (
                "click",
                f"u{user}",
                f"i{at[user]:02}",
                10**12 + step * STEP + user * 100,
                CATEGORIES[at[user] % 2],
            )
            for user in range(users)
        ]
    names = ["event_type", "user_id", "item_id", "event_time", "category"]
    return pl.DataFrame(rows, schema=names, orient="row")


def settings(sequence: str = "pooled") -> LearningSettings:
    return LearningSettings(dimension=8, sequence=sequence, sequence_positions=12_000)


def trained(history: pl.DataFrame, sequence: str = "pooled") -> Release:
    return train(history, settings=settings(sequence), weights=WEIGHTS, capacity=16, version=1)


@pytest.fixture(scope="module")
def release() -> Release:
    return trained(circle())


def sets_of(*histories: list[int]) -> SupportSets:
    examples = np.zeros(sum(map(len, histories)), EXAMPLE)
    examples["item"] = [item for history in histories for item in history]
    examples["time"] = np.concatenate([10**12 + STEP * np.arange(len(history)) for history in histories])
    examples["weight"], examples["type"], examples["hash"] = 1.0, 1, np.arange(len(examples))
    return SupportSets(np.cumsum([0, *map(len, histories)]), examples)


def scorer_of(release: Release) -> Scorer:
    """A scorer that has seen the history; item n has the number n."""
    scorer, log = Scorer(release, torch.device("cpu")), stream_of(circle())
    Replay(scorer, log).show(len(log))
    return scorer


def names(scorer: Scorer, sets: SupportSets, k: int = 3) -> list[list[str]]:
    return [[scorer.catalogue.item_ids[place] for place in row] for row in scorer.lists(sets, k).places.tolist()]


# --- what it learns


def test_a_release_with_a_sequence_model_puts_what_follows_first(release: Release) -> None:
    assert release.sequence is not None
    assert release.transitions is not None
    scorer = scorer_of(release)
    assert scorer.method == "bayes+sequence+ranker"
    histories = [[(first + step) % ITEMS for step in range(3)] for first in range(ITEMS)]
    lists = names(scorer, sets_of(*histories))
    found = sum(f"i{(history[-1] + 1) % ITEMS:02}" in shown for history, shown in zip(histories, lists, strict=True))
    assert found > 0.8 * ITEMS


def test_the_same_history_and_seed_give_the_same_model(release: Release) -> None:
    again = trained(circle())
    assert release.sequence is not None
    assert again.sequence is not None
    for name, value in release.sequence.state().items():
        assert torch.equal(value, again.sequence.state()[name]), name


def test_off_trains_none_and_lists_come_from_the_plain_features() -> None:
    plain = trained(circle(), sequence="off")
    assert plain.sequence is None
    assert plain.transitions is None
    assert plain.ranker is not None
    assert len(plain.ranker.mean) == PLAIN
    assert scorer_of(plain).method == "bayes+ranker"


def test_what_came_after_the_cut_is_held_out_once_a_task_and_nothing_is_lost_before_it() -> None:
    log = log_of(circle(users=7, steps=9), WEIGHTS, [f"i{n:02}" for n in range(ITEMS)])
    cut = int(log.times.sort().values[40])
    found = histories_of(log, 4, cut)
    early = log.times <= cut
    assert int((found.mask & ~found.held).sum()) == int(early.sum())
    assert int(found.held.sum()) == len(torch.unique(log.tasks[~early]))
    for row in found.held.any(1).nonzero().squeeze(1).tolist():
        assert found.held[row].nonzero().item() == found.lengths[row] - 1
    told = sorted(found.items[found.mask & ~found.held].tolist())
    assert told == sorted(log.items[early].tolist())


def test_an_item_that_was_never_met_gets_its_categorys_vector_and_a_low_bias(release: Release) -> None:
    assert release.sequence is not None
    even, odd, none = release.sequence_vectors_for(["new", "newer", "newest"], ["even", "odd", None])
    of_even = torch.tensor([int(item[1:]) % 2 == 0 for item in release.item_ids])
    known = release.sequence.vectors[:, :-1]
    apart = known[of_even].mean(0) - known[~of_even].mean(0)
    assert float((even - odd)[:-1] @ apart) > 0
    assert torch.equal(none, release.sequence.unseen)
    assert float(even[-1]) <= float(release.sequence.vectors[:, -1].median())


def test_going_on_with_a_longer_history_keeps_what_was_learned_and_takes_new_items_in() -> None:
    history = circle()
    more = history.with_columns(pl.col("item_id").replace({"i05": "later"}))
    both = pl.concat([history, more.with_columns(pl.col("event_time") + 20 * STEP)])
    recipe = Recipe(kind="pooled", dimension=16, capacity=16, positions=40_000)
    log = log_of(history, WEIGHTS, sorted(set(history["item_id"])))
    encoder = learn_encoder(log, 16, {})
    cut = int(history["event_time"][-300])
    nothing = Described.none()
    taught = learn_sequences(log, encoder, recipe, cut=cut, described=nothing, tell=lambda *_: None)
    assert taught is not None
    wider = log_of(both, WEIGHTS, sorted(set(both["item_id"])))
    gone_on = continue_learning(
        taught, wider, learn_encoder(wider, 16, {}), recipe, described=nothing, tell=lambda *_: None
    )
    model = gone_on.encoder(recipe)
    known = model.vectors[[gone_on.item_ids.index("i03"), gone_on.item_ids.index("i04")]]
    query = model.queries(known.unsqueeze(0), torch.tensor([2]))[0]
    scores = model.vectors @ query
    assert gone_on.item_ids.index("i05") in scores.topk(3).indices.tolist(), "learned before"
    assert float(scores[gone_on.item_ids.index("later")]) > float(model.unseen @ query), "met since, where i05 had been"


def test_too_short_histories_train_none_and_say_nothing() -> None:
    lonely = circle(users=400, steps=1)
    assert trained(lonely).sequence is None


class Stopped(Exception):  # noqa: N818 - as somebody's Ctrl-C
    pass


def stopped_at(phase: str, share: float = 0.0) -> Callable[[str, float], None]:
    """To give as progress: stops a training in this phase."""

    def tell(what: str, done: float) -> None:
        if what.startswith(phase) and done >= share:
            raise Stopped

    return tell


def checkpointed(at: Path, tell: Callable[[str, float], None] | None = None, *, seed: int = 0) -> Release:
    return train(
        circle(seed=seed),
        settings=settings(),
        weights=WEIGHTS,
        capacity=16,
        version=1,
        progress=tell,
        checkpoint=at,
    )


def test_a_stopped_training_resumed_from_its_checkpoint_ends_the_same(tmp_path: Path, release: Release) -> None:
    with pytest.raises(Stopped):
        checkpointed(tmp_path, stopped_at("sequences", 0.58))
    assert list(tmp_path.rglob("training.json"))
    resumed = checkpointed(tmp_path)
    assert resumed.sequence is not None
    assert release.sequence is not None
    for name, value in release.sequence.state().items():
        assert torch.equal(value, resumed.sequence.state()[name]), name


def test_a_checkpoint_of_another_history_is_not_gone_on_from(tmp_path: Path) -> None:
    """As many items and as many events: by their numbers alone nothing tells them apart."""
    with pytest.raises(Stopped):
        checkpointed(tmp_path, stopped_at("sequences of everything"))
    with pytest.raises(SettingsError, match="of another plan or history"):
        checkpointed(tmp_path, seed=5)


# --- serving


def test_saved_and_loaded_it_gives_the_same_lists(release: Release, tmp_path: Path) -> None:
    loaded = load(save(release, tmp_path))
    asked = sets_of([3, 4, 5], [7], [], [1, 9, 2, 15, 3])
    one, other = scorer_of(release).lists(asked, 5), scorer_of(loaded).lists(asked, 5)
    assert one.places.tolist() == other.places.tolist()
    assert one.scores.tolist() == other.scores.tolist()


@pytest.mark.parametrize("left_out", [False, True])
def test_a_task_alone_has_the_list_it_has_among_others(release: Release, left_out: bool) -> None:  # noqa: FBT001
    histories = [[3, 4, 5], [7], [], list(range(20)), [1, 9, 2]]

    def lists(*histories: list[int]) -> Lists:
        sets = sets_of(*histories)
        return scorer_of(release).lists(sets, 6, seen=sets if left_out else None)

    together = lists(*histories)
    for row, history in enumerate(histories):
        alone = lists(history)
        assert alone.places[0].tolist() == together.places[row].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-5)


def test_the_served_feature_is_the_trained_models_score(release: Release) -> None:
    assert release.sequence is not None
    scorer, asked = scorer_of(release), sets_of([3, 4, 5], [8])
    found = scorer.candidates(asked, scorer.parameters(asked))
    column = found.features[:, FEATURES.index("sequence")]
    for row, history in enumerate(([3, 4, 5], [8])):
        rows = release.encoder.rows_of([f"i{n:02}" for n in history])
        query = release.sequence.queries(release.sequence.vectors[rows].unsqueeze(0), torch.tensor([len(history)]))
        scores = (query @ release.sequence.vectors.T)[0]
        level = scores.topk(min(50, len(scores))).values.logsumexp(0)
        own = slice(found.starts[row], found.starts[row + 1])
        items = [scorer.catalogue.item_ids[place] for place in found.places[own].tolist()]
        expected = (scores - level)[release.encoder.rows_of(items)]
        np.testing.assert_allclose(column[own], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_second_release_is_used_though_items_keep_the_places_of_the_first(release: Release) -> None:
    scorer = Scorer(trained(circle(seed=1), sequence="off"), torch.device("cpu"))
    scorer.catalogue.add([(100 + n, f"first{n}", None) for n in range(7)])
    log = stream_of(circle())
    Replay(scorer, log).show(len(log))
    scorer.use(release)
    asked = sets_of([3, 4, 5], [20, 21, 22])
    assert names(scorer, asked) == names(scorer_of(release), asked)
    assert scorer.catalogue.item_ids[ITEMS].startswith("first"), "places are others than the release's rows"


def test_items_newer_than_the_release_take_nothing_of_the_next_users_transitions(release: Release) -> None:
    """Their places lie beyond the transitions' matrix, where the next task's would begin."""
    scorer = scorer_of(release)
    scorer.catalogue.add([(100 + n, f"new{n}", None) for n in range(ITEMS)])
    mine = [3, 4, *range(100, 100 + ITEMS)]
    others = [[first, first + 1] for first in range(8)]
    alone, together = (scorer.lists(sets_of(*histories), 5) for histories in ([mine], [mine, *others]))
    assert together.places[0].tolist() == alone.places[0].tolist()
    np.testing.assert_allclose(together.scores[0], alone.scores[0], rtol=1e-5)


def test_what_the_catalogue_lacks_is_passed_over(release: Release) -> None:
    scorer = scorer_of(release)
    whole, some = (scorer.recent(sets_of(history)) for history in ([3, 999, 4, 998, 5], [3, 4, 5]))
    assert scorer._foreseer is not None
    whole_says, some_say = (scorer._foreseer.foresee(recent, np.array([5])) for recent in (whole, some))
    torch.testing.assert_close(whole_says.queries, some_say.queries)
    np.testing.assert_allclose(whole_says.follows.toarray(), some_say.follows.toarray(), rtol=1e-6)


def test_an_event_of_no_weight_is_passed_over(release: Release) -> None:
    """It was when the model was taught."""
    scorer = scorer_of(release)
    silent, some = sets_of([3, 9, 4, 5, 12]), sets_of([3, 4, 5])
    silent.examples["weight"][[1, 4]] = 0.0
    assert scorer._foreseer is not None
    with_silence, without = (scorer._foreseer.foresee(scorer.recent(of), np.array([5])) for of in (silent, some))
    torch.testing.assert_close(with_silence.queries, without.queries)
    np.testing.assert_allclose(with_silence.follows.toarray(), without.follows.toarray(), rtol=1e-6)


def test_an_older_release_is_read_as_before(release: Release, tmp_path: Path) -> None:
    """What was saved before there were sequence models has none of their tensors, and a ranker of fewer features.

    That was before rankers began as a blend, too.
    """
    assert release.ranker is not None
    plain = trained(circle(), sequence="off")
    assert plain.ranker is not None
    plain = replace(plain, ranker=Ranker(plain.ranker.mean, plain.ranker.scale, plain.ranker.network, None))
    path = save(plain, tmp_path)
    stored = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    assert not [name for name in stored if name.startswith(("sequence.", "transitions."))]
    assert stored["ranker.mean"].shape == (PLAIN,)
    assert names(scorer_of(load(path)), sets_of([3])) == names(scorer_of(plain), sets_of([3]))


@pytest.mark.parametrize("fault", ["vectors", "nan", "neighbours"])
def test_a_sequence_model_that_does_not_fit_its_release_is_refused(
    release: Release, tmp_path: Path, fault: str
) -> None:
    sequence, transitions = release.sequence, release.transitions
    assert sequence is not None
    assert transitions is not None
    if fault == "vectors":
        sequence = replace(sequence, vectors=sequence.vectors[:-1])
    elif fault == "nan":
        sequence = replace(sequence, unseen=sequence.unseen * torch.nan)
    else:
        transitions = replace(transitions, neighbours=transitions.neighbours + 10_000)
    with pytest.raises(SettingsError, match="sequence model with"):
        load(save(replace(release, sequence=sequence, transitions=transitions), tmp_path))


@pytest.mark.parametrize("kind", ["pooled", "gru", "attention"])
@pytest.mark.parametrize("with_head", [False, True])
def test_every_kind_survives_saving_and_is_cut_to_its_capacity(kind: str, with_head: bool) -> None:  # noqa: FBT001
    history = circle(users=30)
    log = log_of(history, WEIGHTS, sorted(set(history["item_id"])))
    recipe = Recipe(kind=kind, dimension=8, capacity=5, positions=500, through_head=with_head)
    taught = learn_sequences(
        log,
        learn_encoder(log, 8, {}),
        recipe,
        cut=int(history["event_time"][-60]),
        described=Described.none(),
        tell=lambda *_: None,
    )
    assert taught is not None
    model = taught.encoder(recipe)
    again = SequenceEncoder.restore(model.state())
    vectors = model.vectors[torch.arange(8).expand(2, -1)]
    lengths = torch.tensor([8, 3])
    assert torch.equal(model.queries(vectors, lengths), again.queries(vectors, lengths))
    newest = model.queries(vectors[:1, 3:], torch.tensor([5]))
    torch.testing.assert_close(model.queries(vectors, lengths)[:1], newest, rtol=1e-5, atol=1e-5)


# --- transitions


def test_transitions_are_the_sum_over_pairs_by_definition() -> None:
    users = [[0, 1, 2, 0], [1, 2], [3], [2, 1]]
    rows = [("click", f"u{u}", f"i{i}", 10**12 + n) for u, own in enumerate(users) for n, i in enumerate(own)]
    table = pl.DataFrame(rows, schema=["event_type", "user_id", "item_id", "event_time"], orient="row")
    found = Transitions.learn(log_of(table, WEIGHTS, [f"i{n}" for n in range(4)]))
    expected = np.zeros((4, 4))
    for own in users:
        for first, earlier in enumerate(own):
            for steps, later in enumerate(own[first + 1 :]):
                if earlier != later:
                    expected[earlier, later] += 0.7**steps
                    expected[later, earlier] += 0.5 * 0.7**steps
    counts = np.bincount(np.concatenate(users))
    expected = expected / counts[:, None] ** 0.4 / counts[None] ** 0.2
    matrix = found.matrix(np.arange(4), 4)
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5)
    asked = followers(np.array([[2, 0], [3, -1], [-1, -1]]), matrix)
    history = np.array([0.7, 0, 1.0, 0])
    np.testing.assert_allclose(asked.toarray()[0], history @ expected, rtol=1e-5)
    assert asked[1:].nnz == 0
    says = says_of(asked, np.array([0, 0, 1, 2]), np.array([1, 3, 1, 0]))
    np.testing.assert_allclose(says, [(history @ expected)[1], 0, 0, 0], rtol=1e-5)
    assert says_of(asked, np.array([0, 0]), np.array([4, 7])).tolist() == [0.0, 0.0], "there are four places"
    assert sorted(best_followers(asked, 2)[0].tolist()) == sorted(np.argsort(history @ expected)[-2:].tolist())
    assert best_followers(asked, 2)[1].tolist() == [-1, -1]


def test_only_the_heaviest_neighbours_are_kept() -> None:
    rng = np.random.default_rng(0)
    rows = [("click", f"u{n}", item, 10**12 + at) for n in range(KEPT * 3) for at, item in enumerate(("hub", f"i{n}"))]
    rows += [
        ("click", f"v{n}", item, 10**12 + at)
        for n in rng.integers(5, size=50)
        for at, item in enumerate(("hub", f"i{n}"))
    ]
    table = pl.DataFrame(rows, schema=["event_type", "user_id", "item_id", "event_time"], orient="row")
    ids = sorted(set(table["item_id"]))
    found = Transitions.learn(log_of(table, WEIGHTS, ids))
    hub = ids.index("hub")
    kept = {ids[row] for row in found.neighbours[hub].tolist()}
    assert len(kept) == KEPT
    assert {f"i{n}" for n in range(5)} <= kept
    assert found.weights[hub].tolist() == sorted(found.weights[hub].tolist(), reverse=True)


# --- whether it pays


def lessons(gain: float, count: int = 400) -> Lesson:
    """The `sequence` feature tells what came next that clearly; everything else is noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 9, len(FEATURES), generator=generator)
    features[..., -1] = 0.0
    features[:, 0, FEATURES.index("sequence")] += gain
    return Lesson(features, torch.zeros(count, 9), torch.ones(count))


def test_a_sequence_model_pays_when_it_foresees_and_not_when_it_is_noise() -> None:
    assert worth_of_sequences(lessons(2.0)) > 4.0
    assert worth_of_sequences(lessons(0.0)) < 2.0


def test_lessons_that_are_all_alike_tell_nothing() -> None:
    """Their gains have no spread: infinitely many standard errors would make a card that nobody can read again."""
    alike = lessons(2.0)
    alike.features[:] = alike.features[0]
    assert worth_of_sequences(alike) == 0.0


def test_what_only_the_sequence_model_finds_counts_for_it() -> None:
    taught = lessons(0.0)
    taught.features[::2, 0, -1] = 1.0
    assert worth_of_sequences(taught) > 4.0
    assert len(taught.plain().learnable()) == len(taught) // 2
