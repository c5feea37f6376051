import pytest
import torch

from innerloop.learning import ranking
from innerloop.learning.ranking import scores_of, top_k


@pytest.mark.parametrize(("tasks", "items", "k"), [(1, 10, 3), (7, 1000, 50), (33, 257, 20), (3, 5, 5), (0, 9, 2)])
def test_top_k_is_what_sorting_everything_gives(
    tasks: int, items: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ranking._SCORES, "cpu", 4 * items)  # several chunks, the last one short
    g = torch.Generator().manual_seed(0)
    w, v = torch.randn(tasks, 6, generator=g), torch.randn(items, 6, generator=g)
    indices, scores = top_k(w, v, k)
    expected = (w @ v.T).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])


def test_k_beyond_the_catalogue_gives_the_catalogue() -> None:
    indices, _ = top_k(torch.ones(2, 1), torch.tensor([[1.0], [3.0], [2.0]]), 10)
    assert indices.tolist() == [[1, 2, 0]] * 2


def test_what_is_excluded_comes_last_with_no_score() -> None:
    vectors = torch.tensor([[1.0], [4.0], [3.0], [2.0]])
    excluded = torch.tensor([[1, -1], [2, 1], [-1, -1], [0, -1]])
    indices, scores = top_k(torch.ones(4, 1), vectors, 3, excluded)
    assert indices.tolist() == [[2, 3, 0], [3, 0, indices[1, 2]], [1, 2, 3], [1, 2, 3]]
    assert top_k(torch.ones(1, 1), vectors, 4, torch.tensor([[0]]))[0].tolist() == [[1, 2, 3, 0]]
    assert scores[1, 2] == float("-inf")
    assert bool(scores[0].isfinite().all())


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0], [], [0, 0, 2], [700]])
@pytest.mark.parametrize("with_prior", [True, False])
def test_scores_of_places_are_those_of_the_whole_table(sizes: list[int], *, with_prior: bool) -> None:
    g = torch.Generator().manual_seed(1)
    own, vectors, prior = (torch.randn(*shape, generator=g) for shape in ((len(sizes), 4), (9, 4), (4,)))
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    places = torch.randint(9, (len(rows),), generator=g)
    scores, unadapted = scores_of(own, rows, vectors, places, prior if with_prior else None)
    torch.testing.assert_close(scores, (own @ vectors.T)[rows, places])
    torch.testing.assert_close(unadapted, (vectors @ prior)[places] * with_prior)
