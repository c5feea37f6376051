import numpy as np
import pytest
import torch

from innerloop.learning.ads.choice import Lists, fit_shared, maximum_a_posteriori, probabilities
from innerloop.learning.ads.choosers import Chooser, Seen, padded


def _lists(count: int, weights: np.ndarray, seed: int = 0, width: int = 6) -> Lists:
    """Lists of 2 to `width` candidates, chosen by the weights."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, width, len(weights))).astype(np.float32)
    mask = np.arange(width) < rng.integers(2, width + 1, count)[:, None]
    p = probabilities(features, mask, weights)
    chosen = np.array([rng.choice(width, p=row) for row in p])
    return Lists(features, mask, chosen)


def test_probabilities_are_the_softmax_over_what_is_there() -> None:
    lists = _lists(5, np.array([1.0, -2.0]))
    for x, mask, p in zip(
        lists.features, lists.mask, probabilities(*_parts(lists), np.array([1.0, -2.0])), strict=True
    ):
        expected = torch.softmax(torch.from_numpy(x[mask] @ np.array([1.0, -2.0])), 0).numpy()
        np.testing.assert_allclose(p[mask], expected, rtol=1e-6)
        assert (p[~mask] == 0).all()


def _parts(lists: Lists) -> tuple[np.ndarray, np.ndarray]:
    return lists.features, lists.mask


def test_the_map_is_where_autograd_finds_no_slope() -> None:
    lists = _lists(40, np.array([1.0, -1.0, 0.5]))
    mean, precision = np.array([0.3, 0.0, -0.2]), np.array([2.0, 1.0, 5.0])
    found, hessian = maximum_a_posteriori(lists, mean, precision, steps=40)

    def loss(w: torch.Tensor) -> torch.Tensor:
        logits = torch.from_numpy(lists.features).double() @ w
        logits = logits.masked_fill(torch.from_numpy(~lists.mask), -torch.inf)
        likelihood = torch.nn.functional.cross_entropy(logits, torch.from_numpy(lists.chosen), reduction="sum")
        return likelihood + 0.5 * (torch.from_numpy(precision) * (w - torch.from_numpy(mean)) ** 2).sum()

    at = torch.from_numpy(found)
    slope = torch.autograd.functional.jacobian(loss, at)  # type: ignore[no-untyped-call]
    assert slope.abs().max() < 1e-4
    expected = torch.autograd.functional.hessian(loss, at)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.from_numpy(hessian), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_found_again_and_useless_groups_are_held_to_nothing() -> None:
    lists = _lists(2_000, np.array([1.5, -1.0, 0.0, 0.0, 0.0]))
    weights, precision = fit_shared(lists, np.array([0, 0, 1, 1, 1]))
    np.testing.assert_allclose(weights, [1.5, -1.0, 0, 0, 0], atol=0.15)
    assert precision[2] > 20 * precision[0]


def test_fitting_again_from_where_it_was_gives_the_same() -> None:
    lists = _lists(500, np.array([1.5, -1.0, 0.0]))
    groups = np.array([0, 0, 1])
    first = fit_shared(lists, groups)
    np.testing.assert_allclose(fit_shared(lists, groups, start=first)[0], first[0], atol=0.02)


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 0.0, 0.031), (2.0, 0.09, 1.0)])
def test_users_that_differ_are_told_from_users_that_do_not(spread: float, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    tastes = [np.array([1.0, spread * rng.normal()]) for _ in range(40)]
    own = [_lists(15, taste, seed, 4) for seed, taste in enumerate(tastes)]
    seen, users = [], []
    for at in range(15):
        for user, lists in enumerate(own):
            mask = lists.mask[at]
            seen.append(Seen(lists.features[at][mask], int(lists.chosen[at]), at))
            users.append(user)
    variance = Chooser.fit(seen, users, np.array([0, 0]), np.array([1])).variance
    assert least <= variance <= most


def test_a_user_without_lists_has_the_shared_ranking() -> None:
    lists = _lists(60, np.array([1.0, -1.0]))
    seen = [Seen(x[m], int(c), 0) for x, m, c in zip(lists.features, lists.mask, lists.chosen, strict=True)]
    chooser = Chooser.fit(seen, range(60), np.array([0, 0]), np.array([1]))
    assert chooser.adapt([]).tolist() == [1.0, 0.0]
    x = lists.features[0]
    np.testing.assert_allclose(chooser.score_for(x, chooser.adapt([])), chooser.score(x), rtol=1e-5)


def test_a_users_lists_pull_the_weights_towards_what_was_chosen_in_any_order() -> None:
    lists = _lists(200, np.array([1.0, 0.0]))
    seen = [Seen(x[m], int(c), 0) for x, m, c in zip(lists.features, lists.mask, lists.chosen, strict=True)]
    chooser = Chooser(np.array([1.0, 0.0]), np.ones(2), np.array([1]), 1.0)
    odd = [Seen(one.features, int(one.features[:, 1].argmax()), 0) for one in seen[:10]]
    own = chooser.adapt([chooser.own(one) for one in odd])
    assert own[1] > 0.5
    np.testing.assert_allclose(chooser.adapt([chooser.own(one) for one in reversed(odd)]), own, atol=1e-6)


def test_padding_is_not_looked_at() -> None:
    lists = _lists(30, np.array([1.0, -1.0]))
    junk = lists.features.copy()
    junk[~lists.mask] = 1e6
    mean, precision = np.zeros(2), np.ones(2)
    ours = maximum_a_posteriori(lists, mean, precision)[0]
    np.testing.assert_allclose(maximum_a_posteriori(Lists(junk, lists.mask, lists.chosen), mean, precision)[0], ours)


def test_lists_of_different_lengths_are_padded_apart() -> None:
    both = padded([Seen(np.ones((2, 3), np.float32), 1, 0), Seen(np.full((4, 3), 2, np.float32), 0, 0)])
    assert both.mask.sum(1).tolist() == [2, 4]
    assert both.features[0, 2:].max() == 0
