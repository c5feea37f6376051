"""Meta-training: every head predicts better after it than before, the same way for the same seed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.learning.heads import (
    META_TRAIN,
    RESTORE,
    BayesHead,
    Episodes,
    Head,
    NoneHead,
    PlaceboHead,
    Recipe,
    Support,
)
from innerloop.learning.heads.bayes import refine
from innerloop.learning.heads.meta import batches, learn, mean_loss, split

D, S, Q = 5, 6, 8
RECIPE = Recipe(seed=1, steps=60, batch=32, rates=(0.03,), inner_steps=3, hidden=8, context=4)
ADAPTING = sorted(set(META_TRAIN) - {"none"})
losses = pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])


def _episodes(loss: Any, tasks: int = 150, seed: int = 0) -> Episodes:
    """Tasks whose weights share a mean and vary in two directions; support sets of 0 to S examples."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    mean, spread = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0]), torch.zeros(2, D)
    spread[0, 1], spread[1, 3] = 1.5, 2.0
    w = mean + normal(tasks, 2) @ spread
    x, q = normal(tasks, S, D), normal(tasks, Q, D)
    mask = torch.arange(S) < torch.randint(0, S + 1, (tasks, 1), generator=g)
    y, scores = (x @ w.unsqueeze(-1)).squeeze(-1), (q @ w.unsqueeze(-1)).squeeze(-1)
    ones, zeros = torch.ones(tasks, S), torch.zeros(tasks, S)
    if loss == "squared":
        return Episodes(Support(x, y + 0.1 * normal(tasks, S), ones, zeros, mask), q, scores, loss=loss)
    support = Support(x, (y > 0).float(), ones, zeros, mask)
    if loss == "logistic":
        return Episodes(support, q, (scores > 0).float(), loss=loss)
    return Episodes(support, q, scores.argmax(1), loss=loss)


def _recipe(loss: str) -> Recipe:
    return RECIPE if loss == "squared" else replace(RECIPE, likelihood="logistic")


def _loss(head: Head, episodes: Episodes) -> float:
    scores = head.score(head.adapt(episodes.support), episodes.features)
    scales = [1.0] if episodes.loss != "softmax" else [2.0**power for power in range(-2, 6)]
    return min(float(episodes.query_loss(scores, scale)) for scale in scales)


def _untrained(name: str, episodes: Episodes, recipe: Recipe) -> Head:
    return META_TRAIN[name](episodes, replace(recipe, steps=1, rates=(1e-9,)))


@losses
@pytest.mark.parametrize("name", sorted(META_TRAIN))
def test_meta_training_predicts_new_tasks_better_than_before(name: str, loss: str) -> None:
    recipe, new = _recipe(loss), _episodes(loss, seed=9)
    episodes = _episodes(loss)
    before, after = _untrained(name, episodes, recipe), META_TRAIN[name](episodes, recipe)
    if name == "bayes" and loss == "squared":  # EM alone is nearly right for tasks like these
        assert _loss(after, new) < 1.05 * _loss(before, new)
        return
    assert _loss(after, new) < 0.98 * _loss(before, new)


@pytest.mark.parametrize("name", ADAPTING)
def test_adapting_beats_not_adapting_and_a_placebo_does_not(name: str) -> None:
    episodes, new = _episodes("squared", tasks=300), _episodes("squared", seed=9)
    head = META_TRAIN[name](episodes, replace(RECIPE, steps=120))
    none = _loss(META_TRAIN["none"](episodes, RECIPE), new)
    assert _loss(head, new) < 0.95 * none
    assert _loss(PlaceboHead(head), new) > none


@pytest.mark.parametrize("name", sorted(META_TRAIN))
def test_the_same_seed_gives_the_same_head_and_it_survives_its_state(name: str) -> None:
    episodes, recipe = _episodes("softmax", tasks=40), replace(RECIPE, steps=10)
    one, two = (META_TRAIN[name](episodes, recipe).state() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    restored = RESTORE[name](one)
    assert torch.equal(restored.adapt(episodes.support), META_TRAIN[name](episodes, recipe).adapt(episodes.support))
    assert not any(value.requires_grad for value in one.values())


@pytest.mark.parametrize("name", sorted(set(META_TRAIN) - {"none", "bayes"}))
def test_another_seed_gives_another_head(name: str) -> None:
    episodes, recipe = _episodes("squared", tasks=40), replace(RECIPE, steps=10)
    one, two = (META_TRAIN[name](episodes, replace(recipe, seed=seed)).state() for seed in (1, 2))
    assert any(not torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", sorted(META_TRAIN))
def test_what_is_padded_teaches_nothing(name: str) -> None:
    episodes, recipe = _episodes("squared", tasks=30), replace(RECIPE, steps=5)
    mask = torch.arange(Q) < torch.arange(len(episodes)).remainder(Q).unsqueeze(1)
    clean = replace(episodes, mask=mask)
    spoiled = replace(
        clean,
        features=clean.features.clone(),
        labels=clean.labels.clone(),
        support=Support(*(values.clone() for values in vars(clean.support).values())),
    )
    for values in (spoiled.features, spoiled.labels):
        values[~mask] = torch.nan
    for field in ("features", "labels", "weights", "ages"):
        getattr(spoiled.support, field)[~spoiled.support.mask] = torch.nan
    expected, found = META_TRAIN[name](clean, recipe).state(), META_TRAIN[name](spoiled, recipe).state()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_refining_is_never_worse_on_the_tasks_held_out() -> None:
    """However large the rate: the start is among the candidates."""
    episodes = _episodes("squared")
    recipe = replace(RECIPE, rates=(50.0,), steps=20)
    _, held_out = split(episodes, recipe)
    head = BayesHead(torch.zeros(D), torch.eye(D), 0.1)
    assert _loss(refine(head, episodes, recipe), held_out) <= _loss(head, held_out) * (1 + 1e-5)


def test_refining_learns_how_fast_examples_age() -> None:
    """Old examples whose labels are noise make it shorter than at the start, and true ones longer."""
    g = torch.Generator().manual_seed(0)
    clean = _episodes("squared", tasks=300)
    mask = torch.ones_like(clean.support.mask)
    ages = torch.where(torch.arange(S) < S // 2, 10_000.0, 0.0).expand(300, S)
    w = torch.linalg.lstsq(clean.features, clean.labels.unsqueeze(-1)).solution
    labels = (clean.support.features @ w).squeeze(-1)
    noisy = torch.where(ages > 0, 3.0 * torch.randn(300, S, generator=g), labels)
    found = []
    for given in (noisy, labels):
        support = replace(clean.support, ages=ages, labels=given, mask=mask)
        head = BayesHead(torch.zeros(D), torch.eye(D), 0.1, half_life=5_000.0)
        found.append(refine(head, replace(clean, support=support), replace(RECIPE, steps=150)).half_life)
    assert found[0] < 4_000.0
    assert found[1] > 6_000.0


def test_an_infinite_half_life_stays_so() -> None:
    head = BayesHead(torch.zeros(D), torch.eye(D))
    assert refine(head, _episodes("squared", tasks=20), replace(RECIPE, steps=3)).half_life == math.inf


def test_candidates_may_be_shared_and_offsets_count() -> None:
    episodes = _episodes("softmax", tasks=40)
    shared = replace(episodes, features=episodes.features[0], labels=episodes.labels % Q)
    assert float(NoneHead(torch.zeros(D)).score(torch.zeros(40, D), shared.features).abs().max()) == 0.0
    flat = shared.query_loss(torch.zeros(40, Q))
    assert float(flat) == pytest.approx(math.log(Q))
    tilted = replace(
        shared, offsets=torch.tensor([0.0, *[-math.inf] * (Q - 1)]), labels=torch.zeros(40, dtype=torch.int64)
    )
    assert float(tilted.query_loss(torch.zeros(40, Q))) == 0.0
    for name in META_TRAIN:
        assert META_TRAIN[name](shared, replace(RECIPE, steps=3)).prior.isfinite().all()


def test_a_loss_that_is_no_number_ends_the_descent_and_leaves_the_start() -> None:
    episodes, start = _episodes("squared", tasks=20), {"w": torch.ones(D)}

    def predict(weights: dict[str, Tensor], _support: Support, features: Tensor) -> Tensor:
        return (features @ weights["w"]) * torch.where(weights["w"].sum() == D, 1.0, torch.nan)

    assert torch.equal(learn(start, predict, episodes, RECIPE)["w"], torch.ones(D))


def test_batches_and_the_split_hold_each_task_once() -> None:
    episodes = _episodes("squared", tasks=20)
    tagged = replace(episodes, labels=torch.arange(20.0).unsqueeze(1).expand(20, Q))
    training, held_out = split(tagged, RECIPE)
    assert sorted([*training.labels[:, 0].tolist(), *held_out.labels[:, 0].tolist()]) == list(range(20))
    assert len(held_out) == 4
    for batch in batches(training, replace(RECIPE, batch=7, steps=5)):
        assert len(set(batch.labels[:, 0].tolist())) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros(3, Q)}, "as many of both"),
        ({"loss": "hinge"}, "choose squared, logistic or softmax"),
        ({"features": torch.zeros(Q, D)}, r"features as \[T, Q, d\]"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        replace(_episodes("squared", tasks=4), **change)


def test_an_unknown_likelihood_is_refused() -> None:
    unknown: Any = "poisson"
    with pytest.raises(SettingsError, match="choose gaussian or logistic"):
        Recipe(likelihood=unknown)


@losses
def test_the_loss_over_batches_is_that_of_all_at_once(loss: str) -> None:
    episodes = _episodes(loss, tasks=50)
    if loss != "softmax":
        episodes = replace(episodes, mask=torch.rand(50, Q, generator=torch.Generator().manual_seed(0)) < 0.3)
    head = NoneHead(torch.linspace(-1.0, 1.0, D))
    scores = head.score(head.adapt(episodes.support), episodes.features)
    scales = [1.0] if loss != "softmax" else [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    expected = min(float(episodes.query_loss(scores, scale)) for scale in scales)

    def predict(_weights: dict[str, Tensor], support: Support, features: Tensor) -> Tensor:
        return head.score(head.adapt(support), features)

    assert mean_loss(predict, {}, episodes, replace(RECIPE, batch=7)) == pytest.approx(expected, rel=1e-5)


def test_implicit_negatives_keep_a_head_from_liking_everything() -> None:
    """All examples are clicks: without the Gram matrix the best prior says yes to whatever there is."""
    episodes = _episodes("softmax", tasks=100)
    clicks = replace(episodes, support=replace(episodes.support, labels=torch.ones_like(episodes.support.labels)))
    items = torch.randn(400, D, generator=torch.Generator().manual_seed(3))
    recipe = replace(RECIPE, steps=1, rates=(1e-9,), gram=items.T @ items)
    sizes = []
    for alpha in (0.0, 0.1, 10.0):
        head = META_TRAIN["bayes"](clicks, replace(recipe, alpha=alpha))
        sizes.append(float((items @ head.adapt(clicks.support).T).square().mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.1 * sizes[0]
