"""Co-occurrence, popularity and the vectors of items that aren't in the history, against plain counting."""

import itertools
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from innerloop.learning import encoder as subject
from innerloop.learning.encoder import learn_encoder, signatures, with_popularity
from innerloop.learning.episodes import Log, log_of

WEIGHTS = {"click": 1.0, "purchase": 4.0, "impression": 0.0}


def _events(tasks: int = 30, items: int = 12, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = 400
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, tasks, rows)],
            "item_id": [f"i{n:02d}" for n in np.minimum(rng.geometric(0.2, rows), items) - 1],
            "event_type": rng.choice(["click", "purchase"], rows, p=[0.9, 0.1]),
            "event_time": np.sort(rng.integers(0, 10_000_000, rows)),
        }
    )


def _log(events: pl.DataFrame) -> Log:
    return log_of(events, WEIGHTS, events["item_id"].unique().sort().to_list())


def _plain_pmi(events: pl.DataFrame, item_ids: list[str]) -> np.ndarray:
    at = {name: n for n, name in enumerate(item_ids)}
    histories: dict[str, list[int]] = defaultdict(list)
    for user, item in events.select("user_id", "item_id").iter_rows():
        histories[user].append(at[item])
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for history in histories.values():
        for (m, i), (n, j) in itertools.combinations(enumerate(history), 2):
            if n - m <= 5 and i != j:
                pairs[i, j] += 1 / (n - m)
                pairs[j, i] += 1 / (n - m)
    counts = np.zeros((len(at), len(at)))
    for (i, j), value in pairs.items():
        counts[i, j] = value
    r = counts.sum(1)
    with np.errstate(divide="ignore"):
        ppmi: NDArray[np.float64] = np.maximum(0, np.log(counts * (r**0.75).sum() / np.outer(r, r**0.75)))
    return ppmi


def test_the_factorised_matrix_is_that_of_plain_counting() -> None:
    events = _events()
    log = _log(events)
    matrix = subject._pmi(subject._pairs(log), len(log.item_ids)).to_dense()
    np.testing.assert_allclose(matrix, _plain_pmi(events, log.item_ids), atol=1e-4)


def test_taste_is_the_truncated_svd_with_rows_of_length_one() -> None:
    events = _events()
    log = _log(events)
    taste = learn_encoder(log, 6).vectors[:, :-2].double().numpy()
    u, s, _ = np.linalg.svd(_plain_pmi(events, log.item_ids))
    expected = u[:, :4] * np.sqrt(s[:4])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(taste @ taste.T, expected @ expected.T, atol=1e-3)  # up to signs of the axes


@pytest.mark.parametrize("half_life", [float("inf"), 3600.0])
def test_popularity_counts_weights_that_age(half_life: float) -> None:
    events = _events()
    log = _log(events)
    counts: dict[str, float] = defaultdict(float)
    for item, kind, time in events.select("item_id", "event_type", "event_time").iter_rows():
        counts[item] += WEIGHTS[kind] * 0.5 ** ((events["event_time"][-1] - time) / 1000 / half_life)
    expected = np.log1p([counts[name] for name in log.item_ids])
    vectors = with_popularity(learn_encoder(log, 6), log, half_life).vectors
    np.testing.assert_allclose(vectors[:, -2], expected / expected.max(), rtol=1e-4)
    assert bool((vectors[:, -1] == 1).all())


def test_the_same_history_gives_the_same_vectors() -> None:
    log = _log(_events())
    assert torch.equal(learn_encoder(log, 6, seed=3).vectors, learn_encoder(log, 6, seed=3).vectors)


def test_an_unknown_item_has_no_popularity_and_leans_towards_its_category() -> None:
    log = _log(_events())
    encoder = learn_encoder(log, 8, {name: "even" if int(name[1:]) % 2 == 0 else "odd" for name in log.item_ids})
    assert encoder.categories == ["even", "odd"]
    with_category, without, strange = (encoder.vector_of("new", c) for c in ("odd", None, "never seen"))
    torch.testing.assert_close(with_category[:-2] - without[:-2], encoder.category_vectors[1])
    assert torch.equal(without, strange)
    assert with_category[-2:].tolist() == [0.0, 1.0]


def test_vectors_come_in_the_order_asked_for() -> None:
    encoder = learn_encoder(_log(_events()), 6)
    asked = ["i03", "new", "i00", "newer"]
    together = encoder.vectors_for(asked)
    for n, name in enumerate(asked):
        assert torch.equal(together[n], encoder.vector_of(name))
    assert torch.equal(together[0], encoder.vectors[encoder.item_ids.index("i03")])
    assert encoder.vectors_for([]).shape == (0, 6)


def test_signatures_are_nearly_orthogonal_unit_vectors() -> None:
    vectors = signatures([f"item {n}" for n in range(500)], 62)
    products = vectors @ vectors.T
    torch.testing.assert_close(products.diagonal(), torch.ones(500))
    products.fill_diagonal_(0.0)
    assert float(products.abs().max()) < 0.75
    assert float(products.square().mean()) == pytest.approx(1 / 62, rel=0.05)


def test_support_is_what_the_task_did_just_before_newest_first() -> None:
    events = pl.DataFrame(
        {
            "user_id": ["a", "b", "a", "a", "a"],
            "item_id": ["x", "y", "y", "z", "x"],
            "event_type": ["click", "click", "purchase", "impression", "click"],
            "event_time": [1_000, 2_000, 3_000, 4_000, 9_000],
        }
    )
    log = log_of(events, WEIGHTS, ["x", "y", "z"])
    vectors = torch.eye(3)
    rows = torch.arange(len(log.items))
    support = log.support(rows, vectors, capacity=3)
    assert log.items.tolist() == [0, 1, 0, 1]  # a: x, y, x without the impression; b: y
    assert support.mask.sum(1).tolist() == [0, 1, 2, 0]
    assert support.features[2, :2].argmax(1).tolist() == [1, 0]
    assert support.weights[2].tolist() == [4.0, 1.0, 0.0]
    assert support.ages[2].tolist() == [0.0, 2.0, 0.0]
