"""The index of a large catalogue against a search of all of it, and the change from one to the other while serving."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from innerloop.learning import item_index
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads import BayesHead, MamlHead, NoneHead
from innerloop.learning.item_index import RECALL, Abandoned, ItemIndex, ItemSearch
from innerloop.learning.ranking import top_k
from innerloop.learning.releases import Card, DataSummary, Release
from innerloop.learning.scorer import Scorer
from innerloop.support import EXAMPLE, SupportSets

N, D, T, K = 6_000, 24, 300, 50
CPU = torch.device("cpu")
LINEAR = NoneHead(torch.zeros(D))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _clustered(count: int = N, seed: int = 0) -> Tensor:
    """Unit tastes in 60 clusters, popularity with a long tail, a constant."""
    of = torch.randint(60, (count,), generator=torch.Generator().manual_seed(seed + 1))
    taste = _normal(7, 60, D - 2)[of] + 0.5 * _normal(seed, count, D - 2)
    popularity = _normal(seed + 2, count, 1).exp()
    return torch.cat([taste / taste.norm(dim=1, keepdim=True), popularity / popularity.max(), torch.ones(count, 1)], 1)


def _tasks(vectors: Tensor, count: int = T, seed: int = 3) -> Tensor:
    """Parameters that like three items each, and what is popular."""
    items = torch.randint(len(vectors), (count, 3), generator=torch.Generator().manual_seed(seed))
    liked = vectors[items].mean(1)
    liked[:, -2:] = 0.3
    return liked


def _recall(places: Tensor, exact: Tensor) -> float:
    pairs = zip(places.tolist(), exact.tolist(), strict=True)
    return float(np.mean([len(set(found) & set(best)) / len(best) for found, best in pairs]))


def _indexed(vectors: Tensor, above: int = 0) -> ItemSearch:
    search = ItemSearch(above)
    search.best(LINEAR, _tasks(vectors, seed=11), vectors, K)
    search.wait().best(LINEAR, _tasks(vectors, 1), vectors, K)
    assert search.index is not None
    return search


# --- the index


def test_an_index_finds_nearly_what_a_search_of_everything_finds_and_looks_at_a_quarter_of_it_at_most() -> None:
    vectors = _clustered()
    index = ItemIndex(vectors)
    reached = index.measure(_tasks(vectors), vectors)
    assert reached >= RECALL
    assert index.probes <= index.lists // 4
    others = _tasks(vectors, seed=5)
    recall = _recall(index.search(others, vectors, K)[0], top_k(others, vectors, K)[0])
    assert recall >= 0.95
    index.probes = 1
    assert _recall(index.search(others, vectors, K)[0], top_k(others, vectors, K)[0]) < recall


def test_an_index_that_looks_at_every_list_finds_everything() -> None:
    vectors, tasks = _clustered(2_000), _tasks(_clustered(2_000))
    places, scores = ItemIndex(vectors).search(tasks, vectors, 20)
    exact = top_k(tasks, vectors, 20)
    torch.testing.assert_close(scores, exact[1], atol=1e-4, rtol=1e-4)
    assert _recall(places, exact[0]) > 0.999  # but for what float16 cannot tell apart


def test_scores_are_those_of_the_real_vectors_best_first() -> None:
    vectors, tasks = _clustered(), _tasks(_clustered())
    index = ItemIndex(vectors)
    index.measure(tasks, vectors)
    places, scores = index.search(tasks, vectors, K)
    torch.testing.assert_close(scores, (tasks @ vectors.T).gather(1, places), atol=1e-6, rtol=1e-5)
    assert bool((scores.diff(dim=1) <= 0).all())
    assert all(len(set(row)) == K for row in places.tolist())


def test_what_everybody_likes_is_found_wherever_it_lies() -> None:
    vectors, tasks = _clustered(), _tasks(_clustered())
    vectors[:10, :-2] *= -0.1  # in no cluster
    vectors[:10, -2] = 20.0
    index = ItemIndex(vectors)
    index.measure(tasks, vectors)
    index.probes = 1
    assert set(index.search(tasks, vectors, 10)[0].reshape(-1).tolist()) == set(range(10))


def test_items_added_are_found_at_once_and_the_others_stay_where_they_are() -> None:
    vectors = _clustered()
    index = ItemIndex(vectors)
    tasks = _tasks(vectors)
    index.measure(tasks, vectors)
    before = index.search(tasks, vectors, K)
    # The best item that there can be for each of two tasks, and one that nobody wants.
    new = torch.cat([5.0 * tasks[:2], -5.0 * tasks[:1]])
    grown = torch.cat([vectors, new])
    index.add(new)
    assert len(index) == N + 3
    places = index.search(tasks, grown, K)[0]
    assert places[:2, 0].tolist() == [N, N + 1]
    untouched = ~(places >= N).any(1)
    torch.testing.assert_close(places[untouched], before[0][untouched])


def test_k_beyond_the_catalogue_gives_the_catalogue() -> None:
    vectors, tasks = _clustered(37), _tasks(_clustered(37), 4)
    index = ItemIndex(vectors)
    index.probes = 1
    for k in (37, 100):
        places, scores = index.search(tasks, vectors, k)
        exact = top_k(tasks, vectors, k)
        assert torch.equal(places, exact[0])
        torch.testing.assert_close(scores, exact[1])


@pytest.mark.parametrize("probes", [1, 30])
def test_what_is_excluded_is_replaced_by_the_next_best(probes: int) -> None:
    vectors, tasks = _clustered(), _tasks(_clustered(), 20)
    index = ItemIndex(vectors)
    index.probes = probes
    found = index.search(tasks, vectors, K)[0]
    excluded = torch.cat([found[:, :10], torch.full((20, 3), -1)], 1)
    excluded[5] = -1  # a task that excludes nothing
    places, scores = index.search(tasks, vectors, K, excluded)
    assert not (places.unsqueeze(2) == excluded.unsqueeze(1)).any()
    assert bool(scores.isfinite().all())
    if probes > 1:
        exact = top_k(tasks, vectors, K, excluded)[0]
        assert _recall(places, exact) > 0.9
        assert torch.equal(places[5], found[5])


def test_excluding_everything_leaves_no_score() -> None:
    vectors, tasks = _clustered(30), _tasks(_clustered(30), 2)
    excluded = torch.arange(30).expand(2, -1)
    assert bool((ItemIndex(vectors).search(tasks, vectors, 5, excluded)[1] == -torch.inf).all())


def test_equal_items_are_all_as_good_when_recall_is_measured() -> None:
    vectors = torch.ones(1_000, D)
    index = ItemIndex(vectors)
    assert index.measure(_tasks(vectors, 20), vectors) == 1.0
    places, scores = index.search(_tasks(vectors, 20), vectors, K)
    assert all(len(set(row)) == K for row in places.tolist())
    assert float(scores.std(1).max()) < 1e-5


def test_the_same_vectors_and_seed_make_the_same_index() -> None:
    vectors, tasks = _clustered(), _tasks(_clustered())
    found = []
    for _ in range(2):
        index = ItemIndex(vectors, seed=4)
        index.measure(tasks, vectors)
        found.append((index.probes, *index.search(tasks, vectors, K)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_the_vectors_are_left_alone_and_one_task_gets_what_it_gets_among_others() -> None:
    vectors, tasks = _clustered(), _tasks(_clustered(), 9)
    before = vectors.clone(), tasks.clone()
    index = ItemIndex(vectors)
    index.measure(tasks, vectors)
    places, scores = index.search(tasks, vectors, K)
    assert torch.equal(vectors, before[0])
    assert torch.equal(tasks, before[1])
    for row in range(9):
        alone = index.search(tasks[row : row + 1], vectors, K)
        torch.testing.assert_close(alone[1][0], scores[row])
        assert _recall(alone[0], places[row : row + 1]) > 0.95
    assert index.search(tasks[:0], vectors, K)[0].shape == (0, K)


# --- exactly or by the index


def test_searches_are_exact_until_there_are_enough_items_and_different_tasks() -> None:
    vectors = _clustered()
    small, few, never = ItemSearch(N), ItemSearch(0), ItemSearch()
    tasks = _tasks(vectors)
    for search, some in ((small, tasks), (few, tasks[:9].repeat(100, 1)), (never, tasks)):
        for _ in range(2):
            found = search.wait().best(LINEAR, some, vectors, K)
            assert torch.equal(found[0], top_k(some, vectors, K)[0])
        assert search.index is None


def test_an_index_takes_over_once_it_is_built() -> None:
    vectors = _clustered()
    search, tasks = ItemSearch(N - 1), _tasks(vectors)
    for first in range(0, T, 60):  # in parts: no single batch has enough
        assert torch.equal(
            search.best(LINEAR, tasks[first : first + 60], vectors, K)[0],
            top_k(tasks[first : first + 60], vectors, K)[0],
        )
    search.wait()
    places, scores = search.best(LINEAR, tasks, vectors, K)
    assert search.index is not None
    exact = top_k(tasks, vectors, K)
    assert _recall(places, exact[0]) >= 0.95
    assert float((scores[:, 0] > exact[1][:, 0] - 1e-5).float().mean()) >= 0.98


def test_an_index_that_finds_too_little_is_not_used() -> None:
    noise = torch.nn.functional.normalize(_normal(0, 4_000, 64))
    head, tasks = NoneHead(torch.zeros(64)), _normal(1, T, 64)
    search = ItemSearch(0)
    for _ in range(3):
        found = search.wait().best(head, tasks, noise, K)
        assert torch.equal(found[0], top_k(tasks, noise, K)[0])
    assert search.index is None


def test_a_head_that_is_not_linear_is_never_searched_by_index() -> None:
    size = D + 8 * (D + 2) + 1
    head = MamlHead(0.1 * _normal(0, size), torch.zeros(1), torch.zeros(()), D)
    vectors = _clustered(400)
    search, tasks = ItemSearch(0), 0.1 * _normal(1, T, size)
    for _ in range(2):
        places = search.wait().best(head, tasks, vectors, 5)[0]
        assert torch.equal(places, head.score(tasks, vectors).topk(5).indices)
        assert search._thread is None  # not even tried
    assert search.index is None


def test_items_that_come_while_an_index_is_built_or_later_are_found() -> None:
    vectors, tasks = _clustered(), _tasks(_clustered())
    search = ItemSearch(0)
    search.best(LINEAR, tasks, vectors, K)
    grown = torch.cat([vectors, 5.0 * tasks[:1]])
    assert search.wait().best(LINEAR, tasks, grown, K)[0][0, 0] == N
    assert search.index is not None
    grown = torch.cat([grown, 5.0 * tasks[1:2]])
    assert search.best(LINEAR, tasks, grown, K)[0][:2, 0].tolist() == [N, N + 1]


def test_a_doubled_catalogue_gets_a_new_index_and_the_old_one_serves_meanwhile() -> None:
    vectors = _clustered()
    search = _indexed(vectors)
    old = search.index
    grown = torch.cat([vectors, _clustered(N + 1, seed=20)])
    tasks = _tasks(grown)
    search.best(LINEAR, tasks, grown, K)
    assert search.index is old
    places = search.wait().best(LINEAR, tasks, grown, K)[0]
    assert search.index is not old
    assert len(search.index or ()) == len(grown)
    assert _recall(places, top_k(tasks, grown, K)[0]) >= 0.95


def test_an_index_that_is_no_longer_wanted_is_not_finished() -> None:
    wanted = threading.Event()
    with pytest.raises(Abandoned):
        ItemIndex(_clustered(500), wanted=wanted)
    wanted.set()
    assert len(ItemIndex(_clustered(500), wanted=wanted)) == 500
    search = ItemSearch(0)
    search.close()
    search.best(LINEAR, _tasks(_clustered()), _clustered(), K)
    search.wait().best(LINEAR, _tasks(_clustered()), _clustered(), K)
    assert search.index is None


def test_a_failure_to_build_leaves_the_search_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(item_index, "ItemIndex", fails)
    vectors, tasks = _clustered(), _tasks(_clustered())
    search = ItemSearch(0)
    for _ in range(3):
        found = search.wait().best(LINEAR, tasks, vectors, K)
        assert torch.equal(found[0], top_k(tasks, vectors, K)[0])
    assert search.index is None


# --- in the service


@pytest.fixture(scope="module")
def release() -> Release:
    vectors = _clustered()
    head = BayesHead.from_prior(
        torch.cat([torch.zeros(D - 2), torch.tensor([0.3, 0.0])]),
        4.0 * torch.eye(D, dtype=torch.float64),
        (vectors.T @ vectors).double(),
        alpha=1e-3,
        noise=0.2,
        half_life=3_600.0,
    )
    names = [f"item-{place}" for place in range(N)]
    encoder = Encoder(names, vectors, [], torch.zeros(0, D - 2), torch.full((N,), -1))
    data = DataSummary(events=0, users=0, items=N, first_event_time=0, last_event_time=0)
    card = Card(
        version=1, created="", method=head.name, dimension=D, data=data, metrics={}, settings={}, innerloop="test"
    )
    return Release(card, encoder, head)


def _sets(seed: int) -> SupportSets:
    rng = np.random.default_rng(seed)
    examples = np.zeros(T * 4, EXAMPLE)
    examples["time"], examples["weight"] = np.arange(T * 4), 1.0
    examples["item"] = rng.integers(0, N, T * 4)
    return SupportSets(np.arange(T + 1) * 4, examples)


def _scorer(release: Release, index_above: int | None = None) -> Scorer:
    scorer = Scorer(release, CPU, index_above=index_above)
    scorer.catalogue.add([(number, f"item-{number}", None) for number in range(N)])
    return scorer


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_a_scorer_with_an_index_makes_nearly_the_lists_of_one_without(release: Release, *, exclude_seen: bool) -> None:
    scorer, exact = _scorer(release, N - 1), _scorer(release)
    scorer.lists(_sets(0), K)
    scorer._search.wait()
    sets = _sets(1)
    seen = sets if exclude_seen else None
    found, wanted = scorer.lists(sets, K, seen=seen), exact.lists(sets, K, seen=seen)
    assert scorer._search.index is not None
    assert exact._search.index is None
    assert _recall(torch.from_numpy(found.places), torch.from_numpy(wanted.places)) >= 0.95
    assert (found.scores[:, 0] > wanted.scores[:, 0] - 1e-5).mean() >= 0.98
    if exclude_seen:
        own = sets.examples["item"].reshape(T, 4)
        assert not (found.places[:, :, None] == own[:, None, :]).any()


def test_a_new_item_of_the_catalogue_is_in_the_lists_of_those_who_clicked_it(release: Release) -> None:
    scorer = _scorer(release, 0)
    scorer.lists(_sets(0), K)
    scorer._search.wait()
    scorer.lists(_sets(0), K)
    scorer.catalogue.add([(N, "brand-new", None)])
    sets = _sets(1)
    sets.examples["item"][:4] = N
    assert N in scorer.lists(sets, K).places[0].tolist()


def test_another_release_is_searched_exactly_until_it_is_indexed_itself(release: Release) -> None:
    scorer = _scorer(release, 0)
    scorer.lists(_sets(0), K)
    scorer._search.wait()
    turned = replace(release.encoder, vectors=release.item_vectors.flip(0).contiguous())
    other = replace(release, encoder=turned)
    scorer.use(other)
    exact = _scorer(other)
    wanted = exact.lists(_sets(1), K)
    assert np.array_equal(scorer.lists(_sets(1), K).places, wanted.places)
    scorer._search.wait()
    found = scorer.lists(_sets(1), K)
    assert scorer._search.index is not None
    assert _recall(torch.from_numpy(found.places), torch.from_numpy(wanted.places)) >= 0.95
