"""From support sets to lists: alone or in a batch, before and after another release, live or replayed."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from innerloop.config import LearningSettings
from innerloop.evaluation.shop import Process, Shop
from innerloop.learning.candidates import FEATURES, Candidates
from innerloop.learning.catalogue import Catalogue, unadapted_list
from innerloop.learning.heads import Head
from innerloop.learning.ranker import lesson
from innerloop.learning.ranker_training import Replay, lessons
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Lists, Scorer, _contained
from innerloop.learning.stream_log import StreamLog, kind_weights, stream_of
from innerloop.learning.training import teach_heads, train
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY, HALF_LIVES

WEIGHTS = {"click": 1.0, "purchase": 4.0}
CAPACITY, CPU = 16, torch.device("cpu")
KIND_WEIGHTS = kind_weights(WEIGHTS)


def _history() -> pl.DataFrame:
    return Shop(0, users=60, items=150, process=Process(categories=6)).history(2_400)


def _train(history: pl.DataFrame, version: int = 1) -> Release:
    settings = LearningSettings(dimension=12, sequence="off")
    return train(history, settings=settings, weights=WEIGHTS, capacity=CAPACITY, version=version)


@pytest.fixture(scope="module")
def history() -> pl.DataFrame:
    return _history()


@pytest.fixture(scope="module")
def release(history: pl.DataFrame) -> Release:
    made = _train(history.head(1_600))
    assert made.ranker is not None
    return made


@pytest.fixture(scope="module")
def log(history: pl.DataFrame) -> StreamLog:
    return stream_of(history)


def _shown(release: Release, log: StreamLog, upto: int) -> tuple[Scorer, Replay]:
    scorer = Scorer(release, CPU)
    replay = Replay(scorer, log)
    replay.show(upto)
    return scorer, replay


def _sets(log: StreamLog, rows: list[int]) -> SupportSets:
    return log.sets(log.before(np.array(rows, np.int64), CAPACITY)[0], KIND_WEIGHTS)


def _alone(release: Release) -> Release:
    return replace(release, ranker=None)


def _same(found: Lists, wanted: Lists) -> None:
    """Equal but for rounding: places may change where scores are equal to it."""
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-6)
    differ = found.places != wanted.places
    assert (np.abs(np.diff(wanted.scores, append=0))[differ] < 1e-4).all()
    assert (differ.sum(1) <= 2).all()


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize(("ranked", "k"), [(True, 10), (True, 50), (False, 10)])
def test_a_list_does_not_depend_on_whose_lists_are_made_with_it(
    release: Release,
    log: StreamLog,
    left_out: bool,  # noqa: FBT001
    ranked: bool,  # noqa: FBT001
    k: int,
) -> None:
    scorer, _ = _shown(release if ranked else _alone(release), log, 2_000)
    # The first rows of the log have had nothing or one event before; the last ones many.
    rows = [0, 1, 40, 300, 2_000, 2_300, 2_399]

    def lists(rows: list[int]) -> Lists:
        sets = _sets(log, rows)
        return scorer.lists(sets, k, seen=sets if left_out else None)

    together = lists(rows)
    alone = [lists([row]) for row in rows]
    places, scores = np.concatenate([each.places for each in alone]), np.concatenate([each.scores for each in alone])
    _same(Lists(places, scores), together)


@pytest.mark.parametrize("ranked", [True, False])
def test_lists_name_k_different_items_best_first(release: Release, log: StreamLog, ranked: bool) -> None:  # noqa: FBT001
    scorer, _ = _shown(release if ranked else _alone(release), log, 2_000)
    found = scorer.lists(_sets(log, list(range(2_000, 2_050))), 12)
    assert found.places.shape == found.scores.shape == (50, 12)
    assert all(len(set(row)) == 12 for row in found.places.tolist())
    assert (found.places >= 0).all()
    assert (np.diff(found.scores) <= 0).all()
    if ranked:
        assert ((found.scores >= 0) & (found.scores <= 1)).all(), "how likely each is"
        assert (found.scores.sum(1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("ranked", [True, False])
def test_a_task_without_examples_gets_a_list(release: Release, log: StreamLog, ranked: bool) -> None:  # noqa: FBT001
    scorer, _ = _shown(release if ranked else _alone(release), log, 1_000)
    found = scorer.lists(SupportSets.empty(3), 10)
    assert (found.places >= 0).all()
    assert np.isfinite(found.scores).all()
    assert (found.places == found.places[0]).all()
    if not ranked:
        names = [scorer.catalogue.item_ids[place] for place in found.places[0].tolist()]
        prior = scorer.catalogue.vectors @ release.head.prior
        assert prior[found.places[0]].tolist() == pytest.approx(prior.topk(10).values.tolist())
        assert len(set(names) & set(unadapted_list(release, 10))) >= 9


def test_before_any_activity_everybody_still_gets_a_list(release: Release) -> None:
    scorer = Scorer(release, CPU)
    found = scorer.lists(SupportSets.empty(2), 10)
    assert (found.places >= 0).all()
    assert np.isfinite(found.scores).all()


@pytest.fixture(scope="module")
def heads(history: pl.DataFrame, release: Release) -> dict[str, Head]:
    """Every head by its name."""
    settings = LearningSettings(dimension=12, sequence="off")
    return teach_heads(history.head(1_600), release, settings=settings, weights=WEIGHTS, capacity=CAPACITY)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("name", ["bayes", "anil", "cavia", "maml", "reptile"])
def test_no_tasks_get_no_lists(release: Release, heads: dict[str, Head], name: str, ranked: bool) -> None:  # noqa: FBT001
    """Adapt is asked that when all users of a batch were erased meanwhile."""
    scorer = Scorer(replace(release if ranked else _alone(release), head=heads[name]), CPU)
    assert scorer.lists(SupportSets.empty(0), 10).places.shape == (0, 10)
    assert scorer.lists_by(heads[name], SupportSets.empty(0), 10).places.shape == (0, 10)


def test_only_the_search_for_what_a_head_likes_best_wakes_more_than_one_thread(
    release: Release, log: StreamLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, _ = _shown(release, log, 1_500)
    assert scorer.catalogue.release.ranker is not None
    seen: dict[str, int] = {}

    def watched(owner: object, name: str) -> None:
        called = getattr(owner, name)

        def call(*given: object) -> object:
            seen[name] = torch.get_num_threads()
            return called(*given)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((scorer, "parameters"), (scorer, "_liked"), (scorer, "_ranked"), (torch, "mv")):
        watched(owner, name)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        scorer.lists(_sets(log, [1_500, 1_600]), 10)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {"parameters": 1, "_liked": 3, "_ranked": 1, "mv": 1}


@pytest.mark.parametrize("ranked", [True, False])
def test_what_was_seen_is_left_out_and_the_rest_stays_in_order(release: Release, log: StreamLog, ranked: bool) -> None:  # noqa: FBT001
    scorer, replay = _shown(release if ranked else _alone(release), log, 2_000)
    rows = list(range(2_000, 2_060))
    replay.meet_support(log.before(np.array(rows), CAPACITY)[0])
    sets = _sets(log, rows)
    every = scorer.lists(sets, 60)
    left = scorer.lists(sets, 10, seen=sets)
    places = scorer.catalogue.places(sets.examples["item"])
    removed = 0
    for task in range(len(rows)):
        seen = set(places[sets.starts[task] : sets.starts[task + 1]].tolist())
        wanted = [place for place in every.places[task].tolist() if place not in seen][:10]
        removed += bool(seen & set(every.places[task][:10].tolist()))
        assert not seen & set(left.places[task].tolist())
        assert left.places[task].tolist()[: len(wanted)] == wanted
    assert removed > 10, "the test can tell"


@pytest.mark.parametrize("k", [50, 80])
@pytest.mark.parametrize("left_out", [False, True])
def test_a_ranked_list_is_as_long_as_asked_for_while_there_are_items(
    release: Release,
    log: StreamLog,
    left_out: bool,  # noqa: FBT001
    k: int,
) -> None:
    scorer, _ = _shown(release, log, 1_500)
    items = len(scorer.catalogue)
    assert items > 80 + CAPACITY
    sets = _sets(log, [1_500, 1_540, 1_580, 3])
    places = scorer.lists(sets, k, seen=sets if left_out else None).places
    assert (places >= 0).all()
    assert all(len(set(row)) == k for row in places.tolist())


@pytest.mark.parametrize("name", ["bayes", "anil", "cavia", "maml", "reptile"])
def test_an_example_of_no_weight_says_nothing(
    release: Release, log: StreamLog, heads: dict[str, Head], name: str
) -> None:
    """A shop may give a kind of event the weight 0, and lessons leave such events out."""
    scorer, _ = _shown(replace(release, head=heads[name]), log, 1_500)
    sets = _sets(log, [1_500, 1_600])
    silent = SupportSets(sets.starts, sets.examples.copy())
    silent.examples["weight"][1::2] = 0.0
    silent.examples["weight"][silent.starts[1:] - 1] = 0.0  # ages are counted from the newest that says something
    some = SupportSets(
        np.array([0, *np.cumsum([np.count_nonzero(silent.examples["weight"][a:b]) for a, b in pairwise(sets.starts)])]),
        silent.examples[silent.examples["weight"] > 0],
    )
    with torch.inference_mode():
        torch.testing.assert_close(scorer.parameters(silent), scorer.parameters(some), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**32 - 1))
def test_what_is_contained_is_what_a_set_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places, seen = (torch.from_numpy(rng.integers(-1, 6, (4, int(rng.integers(0, 7))))) for _ in range(2))
    own = zip(places.tolist(), seen.tolist(), strict=True)
    expected = [[at >= 0 and at in theirs for at in row] for row, theirs in own]
    assert _contained(places, seen).tolist() == expected


def _small(release: Release, items: int, *, ranked: bool) -> Release:
    encoder = replace(
        release.encoder,
        item_ids=release.encoder.item_ids[:items],
        vectors=release.encoder.vectors[:items],
        item_categories=release.encoder.item_categories[:items],
    )
    return replace(release, encoder=encoder, ranker=release.ranker if ranked else None)


@pytest.mark.parametrize("ranked", [True, False])
def test_with_fewer_items_than_asked_for_all_are_listed(release: Release, ranked: bool) -> None:  # noqa: FBT001
    scorer = Scorer(_small(release, 4, ranked=ranked), CPU)
    found = scorer.lists(SupportSets.empty(2), 10)
    listed = [[place for place in row if place >= 0] for row in found.places.tolist()]
    assert [sorted(row) for row in listed] == [[0, 1, 2, 3]] * 2
    assert np.isfinite(found.scores[found.places >= 0]).all()


@pytest.mark.parametrize("ranked", [True, False])
def test_who_has_seen_everything_gets_an_empty_list(release: Release, ranked: bool) -> None:  # noqa: FBT001
    scorer = Scorer(_small(release, 3, ranked=ranked), CPU)
    scorer.catalogue.add([(n, item, None) for n, item in enumerate(scorer.catalogue.item_ids, 1)])
    examples = np.zeros(3, EXAMPLE)
    examples["item"], examples["weight"], examples["time"], examples["type"] = [1, 2, 3], 1.0, [5, 6, 7], 1
    sets = SupportSets(np.array([0, 3, 3]), examples)
    found = scorer.lists(sets, 5, seen=sets)
    assert (found.places[0] == -1).all()
    assert (found.places[1] >= 0).sum() == 3


def test_an_item_nobody_knows_does_no_harm(release: Release, log: StreamLog) -> None:
    """A support set may name items that the catalogue hasn't read yet."""
    scorer, _ = _shown(release, log, 1_000)
    examples = np.zeros(2, EXAMPLE)
    examples["item"], examples["weight"], examples["time"], examples["type"] = [10**6, 0], 1.0, [5, 6], 1
    sets = SupportSets(np.array([0, 2]), examples)
    found = scorer.lists(sets, 10, seen=sets)
    assert (found.places >= 0).all()
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("name", ["bayes", "cavia"])
def test_the_head_is_told_as_a_feature_and_as_its_lift_over_the_prior(
    release: Release, log: StreamLog, heads: dict[str, Head], name: str
) -> None:
    """Also where scores aren't linear in the vectors."""
    head = heads[name]
    assert head.linear == (name == "bayes")
    scorer, _ = _shown(replace(release, head=head), log, 1_500)
    sets = _sets(log, [1_500, 1_600, 3])
    with torch.inference_mode():
        parameters = scorer.parameters(sets)
        found = scorer.candidates(sets, parameters)
        every = head.score(parameters, scorer.catalogue.vectors)
        prior = head.score(head.prior.unsqueeze(0), scorer.catalogue.vectors)[0]
    own = every[torch.from_numpy(found.rows()), torch.from_numpy(found.places)]
    np.testing.assert_allclose(found.features[:, FEATURES.index("head")], own, rtol=1e-4, atol=1e-4)
    lift = own - prior[torch.from_numpy(found.places)]
    np.testing.assert_allclose(found.features[:, FEATURES.index("head_lift")], lift, rtol=1e-3, atol=1e-4)


# --- another release


def test_a_new_release_keeps_places_numbers_trends_and_ads(
    history: pl.DataFrame, release: Release, log: StreamLog
) -> None:
    scorer, _ = _shown(release, log, 2_300)
    numbers = np.unique(log.items[:2_300])
    scorer.catalogue.set_ads([("ad", int(numbers[0]))])
    names, places = list(scorer.catalogue.item_ids), scorer.catalogue.places(numbers)
    assert (places >= 0).all()
    assert len(names) > len(release.item_ids), "items that the first release doesn't know"
    shares = scorer.trends.popularity.shares(places)
    newer = _train(history.head(2_300), version=2)
    scorer.use(newer)
    assert scorer.catalogue.release.version == 2
    assert scorer.catalogue.item_ids[: len(names)] == names
    assert set(newer.item_ids) <= set(scorer.catalogue.item_ids)
    assert scorer.catalogue.places(numbers).tolist() == places.tolist()
    assert scorer.trends.popularity.shares(places).tolist() == shares.tolist()
    assert shares.any()
    assert scorer.catalogue.ad_items == [names[places[0]]]
    expected = newer.vectors_for(names, [None] * len(names))
    known = [at for at, name in enumerate(names) if name in set(newer.item_ids)]
    assert torch.equal(scorer.catalogue.vectors[known], expected[known])


def test_after_a_swap_lists_are_those_of_a_scorer_that_had_the_release_from_the_start(
    history: pl.DataFrame, release: Release, log: StreamLog
) -> None:
    newer = _train(history.head(2_300), version=2)
    swapped, _ = _shown(release, log, 2_300)
    swapped.use(newer)
    fresh, _ = _shown(newer, log, 2_300)
    sets = _sets(log, list(range(2_300, 2_330)))
    found, wanted = swapped.lists(sets, 10), fresh.lists(sets, 10)
    named = [
        [[scorer.catalogue.item_ids[place] for place in row] for row in lists.places.tolist()]
        for scorer, lists in ((swapped, found), (fresh, wanted))
    ]
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-5)
    assert np.mean([a == b for x, y in zip(*named, strict=True) for a, b in zip(x, y, strict=True)]) > 0.98


def test_a_category_that_only_the_new_release_knows_is_taken_over(release: Release) -> None:
    bare = replace(release.encoder, item_categories=torch.full_like(release.encoder.item_categories, -1))
    scorer = Scorer(replace(release, encoder=bare), CPU)
    assert (scorer.catalogue.categories.of_place == -1).all()
    scorer.use(release)
    assert [category for _, category in scorer.catalogue.named()] == release.encoder.item_category_names()


def test_items_have_the_new_releases_category_in_a_process_that_changed_and_in_one_that_began(release: Release) -> None:
    """Its head was taught with that one; and the same release and set give the same list everywhere."""
    moved = replace(release.encoder, item_categories=release.encoder.item_categories.roll(1))
    newer = replace(release, encoder=moved)
    changed, began = Scorer(release, CPU), Scorer(newer, CPU)
    changed.use(newer)
    assert dict(changed.catalogue.named()) == dict(began.catalogue.named())
    assert dict(began.catalogue.named()) != dict(Catalogue(release, CPU).named())


# --- the catalogue


def test_places_never_move_whatever_is_added(release: Release) -> None:
    catalogue = Catalogue(release, CPU)
    vectors = {item: catalogue.vectors[at].clone() for at, item in enumerate(catalogue.item_ids)}
    for step in range(30):
        catalogue.add([(2_000 * step + n, f"new-{(step * 7 + n) % 50}", None) for n in range(10)])
        vectors |= {
            item: catalogue.vectors[at].clone() for at, item in enumerate(catalogue.item_ids) if item not in vectors
        }
    assert catalogue.item_ids == list(vectors)
    assert torch.equal(catalogue.vectors, torch.stack([*vectors.values()]))
    assert len(catalogue.categories.of_place) == len(catalogue)
    assert catalogue.item_ids[catalogue.places(np.array([58_003]))[0]] == f"new-{(29 * 7 + 3) % 50}"
    assert catalogue.places(np.array([0, 58_000, 58_010, 10**7])).tolist()[2:] == [-1, -1]


def test_new_categories_are_numbered_behind_the_releases(release: Release) -> None:
    catalogue = Catalogue(release, CPU)
    known = release.encoder.categories
    catalogue.add([(1, "a", "unheard of"), (2, "b", known[0]), (3, "c", None), (4, "d", "unheard of")])
    assert catalogue.categories.of_place[-4:].tolist() == [len(known), 0, -1, len(known)]


def test_an_item_twice_in_one_reading_is_one(release: Release) -> None:
    catalogue = Catalogue(release, CPU)
    before = len(catalogue)
    catalogue.add([(1, "a", "x"), (2, "b", None), (1, "a", "x")])
    assert sorted(catalogue.item_ids[before:]) == ["a", "b"]
    assert [catalogue.item_ids[place] for place in catalogue.places(np.array([1, 2]))] == ["a", "b"]


# --- what is observed, and no later


def test_activity_of_unknown_items_is_left_out_and_known_ones_are_counted_by_place(release: Release) -> None:
    scorer = Scorer(release, CPU)
    name = release.item_ids[7]
    scorer.catalogue.add([(500, name, None)])
    activity = np.zeros(3, ACTIVITY)
    activity["item"], activity["time"] = [500, 501, 500], 1_750_000_000_000
    activity["previous"] = [[501, -1, -1], [500, -1, -1], [-1, -1, -1]]
    told = activity.copy()
    scorer.observe(activity)
    assert (activity == told).all()
    assert scorer.trends.popularity.shares(np.array([7]))[0].tolist() == [1.0] * len(HALF_LIVES)
    assert scorer.trends.popularity.most.tolist() == [7]
    assert (scorer.trends.co_visits.of(np.array([7]))[0] == -1).all()


def _found(release: Release, history: pl.DataFrame, row: int) -> tuple[list[tuple[str, ...]], Candidates]:
    """Names and features of the candidates for the moment before a row, by a replay that stops there."""
    log = stream_of(history)
    scorer, replay = _shown(release, log, row)
    support = log.before(np.array([row]), CAPACITY)[0]
    replay.meet_support(support)
    sets = log.sets(support, KIND_WEIGHTS)
    with torch.inference_mode():
        found = scorer.candidates(sets, scorer.parameters(sets))
    return [(scorer.catalogue.item_ids[place],) for place in found.places.tolist()], found


@pytest.mark.parametrize("row", [50, 1_700, 2_200])
def test_what_happens_at_a_moment_or_later_changes_nothing_before_it(
    release: Release, history: pl.DataFrame, row: int
) -> None:
    changed = history.with_columns(
        pl.when(pl.int_range(pl.len()) >= row).then(pl.lit("item-00003")).otherwise("item_id").alias("item_id"),
        pl.when(pl.int_range(pl.len()) > row).then(pl.lit("purchase")).otherwise("event_type").alias("event_type"),
    )
    names, found = _found(release, history, row)
    again, same = _found(release, changed, row)
    before, after = np.argsort([n for (n,) in names]), np.argsort([n for (n,) in again])
    assert [names[at] for at in before] == [again[at] for at in after]
    np.testing.assert_allclose(found.features[before], same.features[after], rtol=1e-4, atol=1e-4)


def test_lessons_are_of_the_moments_candidates_with_a_visits_weight(release: Release, log: StreamLog) -> None:
    rows = np.arange(1_700, 1_760)
    taught = lessons(Scorer(release, CPU), log, rows, KIND_WEIGHTS, CAPACITY, np.random.default_rng(0))
    assert 0 < len(taught) <= len(rows)
    assert set(np.unique(taught.weights.numpy()).tolist()) <= {
        np.float32(says * visit) for says in np.unique([1.0, *_purchase_weight(log, rows)]) for visit in (1.0, 0.2)
    }


def test_some_lessons_are_of_users_of_whom_nothing_is_known(release: Release, log: StreamLog) -> None:
    """Newcomers and the hold-out are ranked by the same network: it must have met a moment without examples."""
    rows = np.arange(1_500, 2_200)
    rows = rows[log.before(rows, CAPACITY)[1].any(1)]
    taught = lessons(Scorer(release, CPU), log, rows, KIND_WEIGHTS, CAPACITY, np.random.default_rng(0))
    real = taught.offset > -torch.inf
    of_nobody = torch.where(real, taught.features[..., FEATURES.index("log_size")], 0.0).amax(1) == 0
    assert 0 < int(of_nobody.sum()) < 0.2 * len(taught)
    own = [at for at, name in enumerate(FEATURES) if name.startswith("own_")]
    assert not taught.features[of_nobody][:, :, own].any()


def test_what_nobody_had_met_is_no_lesson(release: Release, history: pl.DataFrame) -> None:
    """Where each event is of a new item, learned of by the next list: a candidate that no list could have had."""
    renamed = pl.col("item_id") + "-" + pl.int_range(pl.len()).cast(pl.String)
    fresh = history.with_columns(
        pl.when(pl.int_range(pl.len()) >= 1_700).then(renamed).otherwise("item_id").alias("item_id")
    )
    log = stream_of(fresh)
    taught = lessons(
        Scorer(release, CPU), log, np.arange(1_700, 2_200), KIND_WEIGHTS, CAPACITY, np.random.default_rng(0)
    )
    assert len(taught) == 0


def _purchase_weight(log: StreamLog, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    kinds = log.kinds[rows]
    clicks, purchases = int((kinds == 1).sum()), int((kinds == 4).sum())
    return [max(4.0, clicks / purchases)] if purchases else []


def test_a_target_that_is_no_place_is_no_lesson(release: Release, log: StreamLog) -> None:
    scorer, _ = _shown(release, log, 2_000)
    sets = _sets(log, [2_000, 2_001])
    with torch.inference_mode():
        found = scorer.candidates(sets, scorer.parameters(sets))
    target = [int(found.places[found.starts[1] - 1]), -1]
    assert len(lesson(found, target, [1.0, 1.0], np.random.default_rng(0))) == 1
