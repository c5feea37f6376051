"""The factor model of ratings and the tasks made of it, against formulas written another way."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose

from innerloop.evaluation.cold_start.arms import bayes
from innerloop.learning.content import Content, read_content
from innerloop.learning.rating_model import Factors, RatingModel, Ratings, _Table, _update, learn_ratings
from innerloop.learning.rating_tasks import RatingTasks

USERS, ITEMS, NEW = 120, 60, 10


def contents(rng: np.random.Generator) -> tuple[Content, Content, np.ndarray]:
    """Users without content; items of four kinds, the last `NEW` of them without ratings."""
    kinds = rng.integers(0, 4, ITEMS)
    items = pl.DataFrame({"id": [str(n) for n in range(ITEMS)], "kind": [f"k{kind}" for kind in kinds]})
    users = pl.DataFrame({"id": [str(n) for n in range(USERS)]})
    return (
        read_content(users, "id", users["id"].to_list(), np.ones(USERS, bool)),
        read_content(items, "id", items["id"].to_list(), np.arange(ITEMS) < ITEMS - NEW),
        kinds,
    )


def world(seed: int = 0) -> tuple[Ratings, Content, Content, np.ndarray]:
    """Ratings of a world that is as the model says; also what every user would give every item."""
    rng = np.random.default_rng(seed)
    users, items, kinds = contents(rng)
    vectors = rng.normal(size=(4, 3))[kinds] + 0.3 * rng.normal(size=(ITEMS, 3))
    truth = 3.5 + np.array([-1.0, 0.0, 0.5, 1.0])[kinds] + 0.5 * rng.normal(size=(USERS, 1))
    truth = truth + 0.6 * rng.normal(size=(USERS, 3)) @ vectors.T
    at = np.argwhere(rng.random((USERS, ITEMS - NEW)) < 0.5)
    values = truth[at[:, 0], at[:, 1]] + 0.3 * rng.normal(size=len(at))
    return Ratings(at[:, 0], at[:, 1], values), users, items, truth


@pytest.fixture(scope="module")
def model() -> RatingModel:
    ratings, users, items, _ = world()
    return learn_ratings(ratings.where(ratings.users < 100), users, items, factors=4, seed=0, iterations=30)


def test_one_update_is_the_posterior_and_the_expected_error_of_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    ratings, user_content, item_content, _ = world(4)
    users = Factors.start(user_content, np.bincount(ratings.users, minlength=USERS), 3, 0.1, rng)
    items = Factors.start(item_content, np.bincount(ratings.items, minlength=ITEMS), 3, 0.5, rng)
    roots = rng.normal(size=(ITEMS, 3, 3))
    items = replace(items, mean=rng.normal(size=(ITEMS, 3)), covariance=0.1 * roots @ roots.mT)
    users = replace(users, prior=rng.normal(size=(USERS, 3)), spread=np.diag([0.5, 1.0, 2.0]))
    center, noise = float(ratings.values.mean()), 0.7
    found = _update(users, items, _Table.of(ratings, center, (USERS, ITEMS))[0], noise)
    expected = 0.0
    for user in range(USERS):
        precision = np.linalg.inv(users.spread)
        pull = precision @ users.prior[user]
        mine = ratings.where(ratings.users == user)
        for item, value in zip(mine.items, mine.values, strict=True):
            mean, covariance = items.mean[item], items.covariance[item]
            x = np.array([1.0, *mean[1:]])
            second = np.outer(x, x)
            second[1:, 1:] += covariance[1:, 1:]
            precision = precision + second / noise
            pull = pull + (x * (value - center - mean[0]) - np.array([0.0, *covariance[1:, 0]])) / noise
        assert_allclose(users.covariance[user], np.linalg.inv(precision), rtol=1e-8)
        assert_allclose(users.mean[user], np.linalg.solve(precision, pull), rtol=1e-8, atol=1e-10)
        for item, value in zip(mine.items, mine.values, strict=True):
            x = np.array([1.0, *items.mean[item][1:]])
            w = np.array([1.0, *users.mean[user][1:]])  # (b, v) . (1, w)
            off = value - center - items.mean[item][0] - x @ users.mean[user]
            own = users.covariance[user]
            both = np.trace(items.covariance[item][1:, 1:] @ own[1:, 1:])
            expected += off**2 + w @ items.covariance[item] @ w + x @ own @ x + both
    assert found == pytest.approx(expected / len(ratings.values))


def test_ratings_that_were_not_trained_on_are_foretold(model: RatingModel) -> None:
    _, _, _, truth = world()
    known, vectors = model.users.mean[:100], model.items.design()[0]
    foretold = model.mean + model.items.mean[:, 0] + known @ vectors.T
    old, new = slice(None, ITEMS - NEW), slice(ITEMS - NEW, None)
    assert np.sqrt(np.mean((foretold - truth[:100])[:, old] ** 2)) < 0.3
    assert np.sqrt(np.mean((foretold - truth[:100])[:, new] ** 2)) < 0.7 * truth[:100, new].std()


def test_the_noise_is_found(model: RatingModel) -> None:
    assert model.noise == pytest.approx(0.09, rel=0.35)


def test_a_new_item_is_where_its_content_says_and_less_certain(model: RatingModel) -> None:
    new = ~model.items.known
    shift = (model.items.mean - model.items.prior)[new]
    assert_allclose(shift, np.tile(shift[0], (NEW, 1)), atol=1e-12)
    certain = np.trace(model.items.covariance[~new], axis1=1, axis2=2)
    assert np.trace(model.items.covariance[new], axis1=1, axis2=2).min() > certain.max()


def test_new_items_move_towards_the_often_rated_ones_alone(model: RatingModel) -> None:
    counts = np.where(model.items.known, 1, 0)
    counts[0] = 1_000_000
    moved = replace(model.items, counts=counts).with_new(1.0)
    new = ~model.items.known
    expected = model.items.prior[new] + (model.items.mean - model.items.prior)[0]
    assert_allclose(moved.mean[new], expected, atol=1e-3)
    assert_allclose(moved.mean[~new], model.items.mean[~new])


def test_the_same_seed_learns_the_same_and_the_order_of_ratings_does_not_matter() -> None:
    ratings, users, items, _ = world()
    order = np.random.default_rng(1).permutation(len(ratings.users))
    mixed = Ratings(ratings.users[order], ratings.items[order], ratings.values[order])
    one, same, other = (
        learn_ratings(given, users, items, factors=2, seed=3, iterations=4) for given in (ratings, ratings, mixed)
    )
    assert np.array_equal(one.items.mean, same.items.mean)
    assert_allclose(one.items.mean, other.items.mean, atol=1e-8)


def test_equal_ratings_are_learned_without_failing() -> None:
    ratings, users, items, _ = world()
    flat = replace(ratings, values=np.full(len(ratings.values), 4.0))
    found = learn_ratings(flat, users, items, factors=2, seed=0, iterations=10)
    assert np.isfinite(found.items.mean).all()
    assert found.mean + found.items.mean[:, 0] == pytest.approx(np.full(ITEMS, 4.0), abs=1e-3)


def posterior(tasks: RatingTasks, user: int, items: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bayesian linear regression on the features as they are, in float64."""
    model = tasks.model
    x = tasks.designs[items]
    weights = 1.0 / (model.noise + tasks.extra[items])
    precision = np.linalg.inv(model.users.spread)
    covariance = np.linalg.inv(precision + (x.T * weights) @ x)
    pull = precision @ tasks.priors[user] + (x.T * weights) @ (values - tasks.biases[items])
    return covariance @ pull, covariance


def test_the_head_on_whitened_tasks_is_bayesian_regression_on_the_features(model: RatingModel) -> None:
    tasks, rng = RatingTasks.of(model), np.random.default_rng(0)
    items, asked = rng.permutation(ITEMS)[None, :8], rng.permutation(ITEMS)[None, :5]
    values, user = rng.normal(3.5, 1.0, (1, 8)), np.array([110])
    mask = np.arange(8)[None] < 6
    support, query = tasks.support(user, items, values, mask), tasks.query(asked)
    head = bayes(tasks, 1.0)
    ours = tasks.zero_shot(user, asked) + head.score(head.adapt(support), query).numpy()
    mean, covariance = posterior(tasks, 110, items[0, :6], values[0, :6])
    x = tasks.designs[asked[0]]
    assert_allclose(ours[0], tasks.biases[asked[0]] + x @ mean, atol=1e-4)
    variance = np.einsum("qd,de,qe->q", x, covariance, x) + model.noise + tasks.extra[asked[0]]
    assert_allclose(tasks.spread(support, query, asked)[0], np.sqrt(variance), rtol=1e-4)


def test_a_users_history_as_examples_says_what_the_ratings_said(model: RatingModel) -> None:
    tasks, users = RatingTasks.of(model), np.arange(20)
    features, labels = tasks.history(users)
    width = tasks.width
    items = np.zeros((20, width), np.int64)
    support = replace(
        tasks.support(users, items, np.zeros((20, width)), np.ones((20, width), bool)),
        features=features,
        labels=labels,
        weights=torch.ones_like(labels),
    )
    found = bayes(tasks, 1.0).adapt(support).double().numpy()
    expected = model.users.mean[users] - model.users.prior[users]
    assert_allclose(found @ tasks.root.T, expected, atol=2e-3)


def test_a_user_without_ratings_has_a_history_that_says_nothing(model: RatingModel) -> None:
    features, labels = RatingTasks.of(model).history(np.arange(100, 110))
    assert features.abs().max() < 1e-2
    assert labels.isfinite().all()
