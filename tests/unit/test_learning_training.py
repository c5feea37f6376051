"""Training on a small synthetic shop, and releases written and read back."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.shop import Process, Shop
from innerloop.learning.episodes import log_of
from innerloop.learning.heads import NoneHead
from innerloop.learning.releases import Release, load, save
from innerloop.learning.training import hit_rate, ranks_of, train

WEIGHTS = {"click": 1.0, "purchase": 4.0}


def _shop() -> tuple[pl.DataFrame, pl.DataFrame]:
    shop = Shop(0, users=200, items=400, process=Process(categories=10))
    return shop.history(6_000), shop.history(1_500)


def _train(history: pl.DataFrame, method: str = "bayes") -> Release:
    settings = LearningSettings(dimension=16, method=method)
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
    settings = LearningSettings(dimension=8)
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


def test_too_little_history_and_unknown_methods_are_refused() -> None:
    with pytest.raises(SettingsError, match="has 50 events"):
        _train(_shop()[0].head(50))
    with pytest.raises(SettingsError, match="choose one of bayes, none"):
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
