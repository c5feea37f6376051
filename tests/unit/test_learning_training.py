"""Training on a small synthetic shop, and releases written and read back."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.shop import Process, Shop
from innerloop.learning import training
from innerloop.learning.episodes import episodes_of, log_of
from innerloop.learning.heads import META_TRAIN, Episodes, Head, NoneHead, Recipe
from innerloop.learning.ranker import Ranker
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release, load, save
from innerloop.learning.scorer import Scorer
from innerloop.learning.stream_log import kind_weights, stream_of
from innerloop.learning.training import hit_rate, ranks_of, teach_heads, train
from innerloop.support import SupportSets

WEIGHTS = {"click": 1.0, "purchase": 4.0}


def _shop() -> tuple[pl.DataFrame, pl.DataFrame]:
    shop = Shop(0, users=200, items=400, process=Process(categories=10))
    return shop.history(6_000), shop.history(1_500)


def _train(history: pl.DataFrame, method: str = "bayes") -> Release:
    settings = LearningSettings(dimension=16, method=method, sequence="off")
    return train(history, settings=settings, weights=WEIGHTS, capacity=16, version=3)


@pytest.fixture(scope="module")
def release() -> Release:
    return _train(_shop()[0])


def test_adapting_beats_the_prior_and_another_tasks_parameters_on_later_events(release: Release) -> None:
    history, later = _shop()
    items = release.item_ids
    log = log_of(pl.concat([history, later]), WEIGHTS, items)
    rows = torch.arange(len(log.items))[
        (log.times >= later["event_time"][0]) & (log.first < torch.arange(len(log.items)))
    ]
    vectors = release.vectors_for(items)
    adapted = hit_rate(ranks_of(log, rows, vectors, release.head, 16), 20)
    unadapted = hit_rate(ranks_of(log, rows, vectors, NoneHead(release.head.prior), 16), 20)
    assert adapted > 1.5 * unadapted > 0.05


def test_the_prior_ranks_much_as_popularity_does(release: Release) -> None:
    scores = release.item_vectors @ release.head.prior
    order = scores.argsort().argsort().numpy(), release.item_vectors[:, -2].argsort().argsort().numpy()
    assert np.corrcoef(*order)[0, 1] > 0.8


def test_the_same_history_gives_the_same_release(release: Release) -> None:
    again = _train(_shop()[0])
    assert torch.equal(again.item_vectors, release.item_vectors)
    assert torch.equal(again.head.prior, release.head.prior)


def test_none_serves_the_prior_to_everyone() -> None:
    release = _train(_shop()[0], method="none")
    assert release.card.metrics["hit@50"] == release.card.metrics["unadapted_hit@50"]


def test_progress_grows_to_one() -> None:
    told: list[float] = []
    settings = LearningSettings(dimension=8, sequence="off")
    train(
        _shop()[0].head(1_000),
        settings=settings,
        weights=WEIGHTS,
        capacity=8,
        version=1,
        progress=lambda _what, share: told.append(share),
    )
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_history_of_which_nothing_counts_is_refused() -> None:
    history, settings = _shop()[0].head(1_000), LearningSettings(dimension=16, sequence="off")
    purchases_came_late = history.with_row_index("n").with_columns(
        event_type=pl.when(pl.col("n") >= 800).then(pl.lit("purchase")).otherwise(pl.lit("click"))
    )
    nothing = dict.fromkeys(("click", "cart", "favorite", "purchase"), 0.0)
    for events, weights, says in (
        (history, nothing, r"has 0 events besides impressions and what support\.weights gives 0"),
        (purchases_came_late, nothing | {"purchase": 4.0}, r"first 70% of the history's events are of kinds"),
    ):
        with pytest.raises(SettingsError, match=says):
            train(events, settings=settings, weights=weights, capacity=16, version=1)


def test_too_little_history_and_unknown_methods_are_refused() -> None:
    with pytest.raises(SettingsError, match="has 50 events"):
        _train(_shop()[0].head(50))
    with pytest.raises(SettingsError, match=r"choose one of bayes, .*none"):
        _train(_shop()[0], method="magic")


def test_what_is_loaded_is_what_was_saved(release: Release, tmp_path: Path) -> None:
    path = save(release, tmp_path / "releases")
    loaded = load(path)
    assert path.name == "release-3.json"
    assert loaded.item_ids == release.item_ids
    assert torch.equal(loaded.item_vectors, release.item_vectors)
    asked, categories = [release.item_ids[0], "new"], [None, "category-03"]
    assert torch.equal(loaded.vectors_for(asked, categories), release.vectors_for(asked, categories))
    assert {k: v.tolist() for k, v in loaded.head.state().items()} == {
        k: v.tolist() for k, v in release.head.state().items()
    }
    assert json.loads(path.read_text())["data"]["events"] == 6_000
    assert sorted(p.name for p in path.parent.iterdir()) == ["release-3.json", "release-3.safetensors"]


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "cannot be read"),
        (lambda p: p.write_text("{"), "is no release card"),
        (lambda p: _edit(p, version="three"), "is no release card"),
        (lambda p: _edit(p, dimension=17), "train it again"),
        (lambda p: _edit(p, method="magic"), "is no release that this version can read"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"x"), "not those its card was written for"),
    ],
)
def test_a_damaged_release_is_refused_in_one_sentence(release: Release, tmp_path: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    path = save(release, tmp_path)
    damage(path)
    with pytest.raises(SettingsError, match=says) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_made_is_said(release: Release, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be written"):
        save(release, tmp_path / "file" / "releases")


# --- the ranker and the categories of a release


def test_the_ranker_and_the_categories_are_what_was_saved(release: Release, tmp_path: Path) -> None:
    loaded = load(save(release, tmp_path))
    assert release.ranker is not None
    assert loaded.ranker is not None
    features = torch.randn(5, len(release.ranker.mean))
    with torch.inference_mode():
        assert torch.equal(loaded.ranker(features), release.ranker(features))
    names = release.encoder.item_category_names()
    assert loaded.encoder.item_category_names() == names
    newest = dict(_shop()[0].group_by("item_id").agg(pl.col("category").last()).iter_rows())
    assert names == [newest[item] for item in release.item_ids]


def test_the_same_history_gives_the_same_ranker(release: Release) -> None:
    again = _train(_shop()[0]).ranker
    assert again is not None
    assert release.ranker is not None
    assert all(torch.equal(value, again.state()[name]) for name, value in release.ranker.state().items())
    assert 0.3 < release.card.metrics["list_candidate_recall"] <= 1.0


def _with_ranker(release: Release, **changes: torch.Tensor) -> Release:
    assert release.ranker is not None
    return replace(release, ranker=Ranker.restore(release.ranker.state() | changes))


def test_a_ranker_that_does_not_fit_is_refused_in_one_sentence(release: Release, tmp_path: Path) -> None:
    assert release.ranker is not None
    state = release.ranker.state()
    fewer = {"centre": state["centre"][1:], "scale": state["scale"][1:], "0.weight": state["0.weight"][:, 1:]}
    broken = {"4.bias": torch.full_like(state["4.bias"], torch.nan)}
    infinite = ({name: torch.full_like(state[name], torch.inf)} for name in ("scale", "blend"))
    for changes in (fewer, broken, {"blend": state["blend"][:-1]}, *infinite):
        path = save(_with_ranker(release, **changes), tmp_path)
        with pytest.raises(SettingsError, match=r"of its ranker that are not finite float32.*train it again"):
            load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("item_categories"), "is no release that this version can read"),
        (lambda t: t.update(item_categories=t["item_categories"][:-1].clone()), "has categories of items"),
        (lambda t: t.update(item_categories=t["item_categories"] + 10_000), "has categories of items"),
        (lambda t: t.pop("ranker.0.weight"), "is no release that this version can read"),
        (lambda t: t.pop("ranker.centre"), "is no release that this version can read"),
        (lambda t: t.update({"ranker.0.weight": t["ranker.0.weight"][:1].clone()}), "is no release that this"),
    ],
)
def test_a_release_put_together_wrongly_is_refused(release: Release, tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    path = save(release, tmp_path)
    tensors = safetensors.torch.load(path.with_suffix(".safetensors").read_bytes())
    change(tensors)
    content = safetensors.torch.save(tensors)
    path.with_suffix(".safetensors").write_bytes(content)
    _edit(path, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(SettingsError, match=says):
        load(path)


@pytest.fixture(scope="module")
def heads(release: Release) -> dict[str, Head]:
    settings = LearningSettings(dimension=16, method="bayes", sequence="off")
    return teach_heads(_shop()[0], release, settings=settings, weights=WEIGHTS, capacity=16)


def test_every_head_is_taught_over_the_releases_vectors(release: Release, heads: dict[str, Head]) -> None:
    assert set(heads) == {"bayes", *META_TRAIN} - {"none"}
    assert heads["bayes"] is release.head
    log = log_of(_shop()[0], WEIGHTS, release.item_ids)
    support = log.support(torch.arange(50, 60), release.item_vectors, 16)
    for name, head in heads.items():
        scores = head.score(head.adapt(support), release.item_vectors)
        assert scores.shape == (10, len(release.item_ids)), name
        assert bool(scores.isfinite().all()), name


@pytest.mark.parametrize("method", ["anil", "cavia", "maml", "reptile"])
def test_a_head_is_taught_by_what_the_seed_draws(release: Release, method: str) -> None:
    log = log_of(_shop()[0].head(1_500), WEIGHTS, release.item_ids)
    rows = torch.arange(1_000, 1_060)

    def state(seed: int) -> dict[str, torch.Tensor]:
        teach = training._methods(seed)[method]
        return teach(log, release.item_vectors, rows, training.Choice(), 16).state()

    first, again, other = state(5), state(5), state(6)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("method", ["anil", "cavia", "maml", "reptile"])
def test_the_seed_of_the_settings_reaches_what_a_head_is_taught_by(
    release: Release, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: set[tuple[int, int]] = set()
    drawn: list[int] = []

    def episodes(*given: object, **named: object) -> Episodes:
        drawn[:] = [int(str(named["seed"]))]
        return episodes_of(*given, **named)  # type: ignore[arg-type]

    def taught(_episodes: Episodes, recipe: Recipe) -> Head:
        seeds.add((drawn[0], recipe.seed))
        assert recipe.start is not None
        return NoneHead(recipe.start)

    monkeypatch.setattr(training, "episodes_of", episodes)
    for name in META_TRAIN:
        monkeypatch.setitem(META_TRAIN, name, taught)
    settings = LearningSettings(dimension=16, method=method, sequence="off", seed=7)
    train(_shop()[0].head(1_000), settings=settings, weights=WEIGHTS, capacity=16, version=1)
    assert seeds == {(7, 7)}
    seeds.clear()
    settings = LearningSettings(dimension=16, sequence="off", seed=8)
    teach_heads(_shop()[0], release, settings=settings, weights=WEIGHTS, capacity=16)
    assert seeds == {(8, 8)}


def test_episodes_ask_for_what_came_next_among_items_drawn_as_often_as_they_are_met(release: Release) -> None:
    log = log_of(_shop()[0], WEIGHTS, release.item_ids)
    rows = torch.arange(1, 401)
    episodes = episodes_of(log, rows, release.item_vectors, 8, negatives=50, seed=0)
    assert episodes.offsets is not None
    assert episodes.mask is not None
    counts = torch.bincount(log.items, minlength=len(release.item_ids)).float()
    assert torch.equal(episodes.features[:, 0], release.item_vectors[log.items[rows]])
    torch.testing.assert_close(episodes.offsets[:, 0], -(counts / counts.sum())[log.items[rows]].log())
    assert bool(episodes.mask[:, 0].all())
    same = (episodes.features[:, 1:] == episodes.features[:, :1]).all(2)
    assert not bool((same & episodes.mask[:, 1:]).any()), "what came next is no example of what did not"
    # Each item's share among what was drawn is its share of events, so the mean of 1 / odds counts the items.
    assert float((-episodes.offsets[:, 1:]).exp().reciprocal().mean()) == pytest.approx(len(release.item_ids), rel=0.1)


@pytest.mark.parametrize("times", [[7] * 300, [0] * 290 + list(range(1, 11)), list(range(300))])
def test_a_history_too_odd_for_a_ranker_still_gives_a_release(times: list[int]) -> None:
    """All at one moment, nearly all, or one event a user: nothing is held out that could teach a ranker."""
    history = pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(300)],
            "event_type": ["click"] * 300,
            "user_id": [f"u{n % 20}" for n in range(300)] if len(set(times)) < 300 else [f"u{n}" for n in range(300)],
            "item_id": [f"i{n * 7 % 31}" for n in range(300)],
            "event_time": [1_750_000_000_000 + time for time in times],
        }
    )
    release = _train(history)
    assert bool(release.item_vectors.isfinite().all())
    assert release.ranker is not None
    assert not release.ranker.taught


def test_with_too_few_events_to_teach_a_ranker_lists_hold_what_people_come_back_to(tmp_path: Path) -> None:
    """Served with a hundred events, before anything is learned of this shop, better than the head alone."""
    shop = Shop(1, users=30, items=200, process=Process(categories=6))
    history, later = shop.history(100), shop.history(300)
    release = load(save(_train(history), tmp_path))
    assert release.ranker is not None
    assert not release.ranker.taught
    assert _hits(release, history, later) > 1.2 * _hits(replace(release, ranker=None), history, later)


def _hits(release: Release, history: pl.DataFrame, later: pl.DataFrame) -> float:
    """The share of later events whose item was among the ten listed just before."""
    log = stream_of(pl.concat([history, later]))
    scorer = Scorer(release, torch.device("cpu"))
    replay, hits = Replay(scorer, log), []
    for row in range(history.height, len(log)):
        replay.show(row)
        sets = log.sets(log.before(np.array([row]), 16)[0], kind_weights(WEIGHTS))
        hits.append(int(scorer.catalogue.places(log.items[[row]])[0]) in scorer.lists(sets, 10).places[0].tolist())
    return float(np.mean(hits))


@pytest.mark.parametrize("method", sorted(META_TRAIN))
def test_every_method_makes_a_release_that_serves(method: str, tmp_path: Path) -> None:
    history = Shop(0, users=60, items=120, process=Process(categories=6)).history(1_200)
    release = load(save(_train(history, method), tmp_path))
    assert release.card.metrics["hit@50"] > 0
    lists = Scorer(release, torch.device("cpu")).lists(SupportSets.empty(2), 5)
    assert (lists.places >= 0).all()
    assert np.array_equal(lists.places[0], lists.places[1])
