"""On a GPU a release lists what it lists on the CPU: every kind of head and of release that serves, and ads."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from innerloop.config import LearningSettings
from innerloop.evaluation.shop import Process, Shop
from innerloop.learning import training
from innerloop.learning.ranker_training import Replay
from innerloop.learning.releases import Release
from innerloop.learning.scorer import Lists, Scorer
from innerloop.learning.stream_log import StreamLog, kind_weights, stream_of
from innerloop.learning.training import teach_heads, train
from innerloop.support import SupportSets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WEIGHTS, CAPACITY = {"click": 1.0, "purchase": 4.0}, 16
DEVICES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def history() -> pl.DataFrame:
    process = Process(categories=6, purchase_rate=0.3, sessions_per_hour=8.0)
    return Shop(0, users=60, items=150, process=process).history(6_000)


@pytest.fixture(scope="module")
def release(history: pl.DataFrame) -> Release:
    settings = LearningSettings(dimension=12, sequence="attention")
    made = train(history.head(5_000), settings=settings, weights=WEIGHTS, capacity=CAPACITY, version=1)
    assert made.ranker is not None
    assert made.sequence is not None
    assert made.ads is not None
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["sequence", "no sequence"])
def any_release(request: pytest.FixtureRequest, history: pl.DataFrame, release: Release) -> Release:
    if request.param:
        return release
    settings = LearningSettings(dimension=12, sequence="off")
    return train(history.head(5_000), settings=settings, weights=WEIGHTS, capacity=CAPACITY, version=1)


def _scorers(release: Release, log: StreamLog) -> list[Scorer]:
    """The same on the CPU and on a GPU, which have seen the same."""
    made = [Scorer(release, torch.device(device)) for device in DEVICES]
    for scorer in made:
        Replay(scorer, log).show(5_500)
    return made


def _sets(log: StreamLog) -> SupportSets:
    rows = np.array([0, 1, 40, 300, 2_000, *range(5_450, 5_500)], np.int64)
    return log.sets(log.before(rows, CAPACITY)[0], kind_weights(WEIGHTS))


def _same(found: Lists, wanted: Lists) -> None:
    """Equal but for rounding: places may change where scores are equal to it."""
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-5)
    assert (found.places != wanted.places).mean() < 0.05


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_lists_are_those_of_the_cpu(history: pl.DataFrame, any_release: Release, ranked: bool, seen: bool) -> None:  # noqa: FBT001
    log, asked = stream_of(history), any_release if ranked else replace(any_release, ranker=None)
    sets = _sets(log)
    on_cpu, on_gpu = (scorer.lists(sets, 10, seen=sets if seen else None) for scorer in _scorers(asked, log))
    _same(on_gpu, on_cpu)


@pytest.mark.parametrize("method", ["maml", "cavia", "reptile"])
@pytest.mark.parametrize("ranked", [False, True])
def test_lists_of_heads_that_are_not_linear_are_those_of_the_cpu(
    history: pl.DataFrame,
    release: Release,
    method: str,
    ranked: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, methods = stream_of(history), training._methods(0)
    monkeypatch.setattr(training, "_methods", lambda _seed: {method: methods[method]})
    settings = LearningSettings(dimension=12, sequence="off")
    taught = teach_heads(history.head(1_600), release, settings=settings, weights=WEIGHTS, capacity=CAPACITY)
    changed = replace(release, head=taught[method], ranker=release.ranker if ranked else None)
    on_cpu, on_gpu = (scorer.lists(_sets(log), 10) for scorer in _scorers(changed, log))
    _same(on_gpu, on_cpu)


@pytest.mark.parametrize("with_model", [True, False])
def test_ads_are_those_of_the_cpu(history: pl.DataFrame, release: Release, with_model: bool) -> None:  # noqa: FBT001
    log = stream_of(history)
    found = []
    for scorer in _scorers(release if with_model else replace(release, ads=None), log):
        scorer.catalogue.set_ads([(f"ad-{number}", number) for number in range(30)])
        found.append(scorer.ads(_sets(log), 10))
    (_, on_cpu), (_, on_gpu) = found
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-5)
