from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from innerloop.learning.ads.ad_head import (
    COLUMNS,
    INTENT,
    OWN_CLICKS,
    POPULATION,
    SHARES,
    VARIANCES,
    AdHead,
    Ads,
    choose_variance,
    newest_known,
)
from innerloop.learning.ads.attribution import HOUR, NEVER
from innerloop.learning.ads.committee import train
from innerloop.learning.ads.pairs import NAMES, Past, describe

_START = 1_750_000_000_000


def _past(seed: int, tasks: int = 4, events: int = 10) -> Past:
    rng = torch.Generator().manual_seed(seed)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, (tasks, events), generator=rng)

    times = _START + draw(48) * HOUR
    converted = torch.where(draw(3) == 0, times + draw(20) * HOUR + 1, NEVER)
    return Past(draw(4), draw(2), draw(5), times, converted, draw(5) > 0)


def _describe(past: Past, now: int, lag: int = 0) -> torch.Tensor:
    tasks = len(past.items)
    items = torch.arange(4).expand(tasks, 4)
    return describe(past, items, items % 2, torch.full((tasks, 4), now), torch.full((tasks, 4), 0.05), lag=lag)


def _column(found: torch.Tensor, name: str) -> torch.Tensor:
    return found[..., NAMES.index(name)]


def test_counts_are_those_of_a_loop() -> None:
    past, now = _past(0), _START + 30 * HOUR
    found = _describe(past, now)
    assert found.shape == (4, 4, len(NAMES))
    for task in range(4):
        events = [
            (int(i), int(k), int(t))
            for i, k, t, m in zip(past.items[task], past.kinds[task], past.times[task], past.mask[task], strict=True)
            if m and t < now
        ]
        for item in range(4):
            clicks = [t for i, k, t in events if i == item and k == 0]
            expected = torch.log1p(torch.tensor(float(len(clicks))))
            torch.testing.assert_close(_column(found, "item: clicks")[task, item], expected)
            carts = sum(k == 1 for _, k, _ in events)
            torch.testing.assert_close(
                _column(found, "any: carts")[task, item], torch.log1p(torch.tensor(float(carts)))
            )
            age = (now - max(clicks)) / 60_000 + 0.5 if clicks else 1.0
            last = _column(found, "item: age of the last click")[task, item]
            torch.testing.assert_close(last, torch.log(torch.tensor(age)))


def test_what_happens_from_now_on_changes_nothing() -> None:
    past, now = _past(1), _START + 24 * HOUR
    later = past.times >= now
    changed = replace(
        past,
        items=torch.where(later, 3 - past.items, past.items),
        kinds=torch.where(later, 0, past.kinds),
        mask=past.mask | later,
        converted_at=torch.where(past.converted_at >= now, NEVER, past.converted_at),
    )
    assert later.any()
    torch.testing.assert_close(_describe(changed, now), _describe(past, now))


def test_the_order_of_events_and_padding_do_not_matter() -> None:
    past, now = _past(2), _START + 40 * HOUR
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    fields = ("items", "categories", "kinds", "times", "converted_at", "mask")
    shuffled = Past(**{name: getattr(past, name)[:, order] for name in fields})
    torch.testing.assert_close(_describe(shuffled, now), _describe(past, now))
    padded = Past(**{name: torch.cat([getattr(past, name)] * 2, 1) for name in fields})
    padded.mask[:, 10:] = False
    torch.testing.assert_close(_describe(padded, now), _describe(past, now))


def test_a_lag_hides_what_was_not_yet_known() -> None:
    past = _past(3)
    now = _START + 30 * HOUR
    for name in ("item: clicks", "any: carts", "user: conversion rate", "user: clicks with a label"):
        stale, then = _describe(past, now, lag=HOUR), _describe(past, now - HOUR)
        torch.testing.assert_close(_column(stale, name), _column(then, name))


def test_unknown_categories_have_nothing_in_common() -> None:
    past = _past(4)
    nothing = replace(past, categories=torch.full_like(past.categories, -1))
    items = torch.zeros(4, 1, dtype=torch.int64)
    now, rate = torch.full((4, 1), _START + 99 * HOUR), torch.full((4, 1), 0.1)
    found = describe(nothing, items, items - 1, now, rate)
    assert _column(found, "category: clicks").abs().max() == 0


def _examples(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    columns = torch.randn(count, len(COLUMNS), generator=rng)
    columns[:, 5] = 3.0  # constant: says nothing, must not divide by zero
    labels = (torch.rand(count, generator=rng) < torch.sigmoid(2 * columns[:, 0] - 1)).float()
    return columns, labels


@pytest.fixture(scope="module")
def head() -> AdHead:
    return AdHead.fit(*_examples()).with_variance(0.1)


def _asked(tasks: int = 4) -> tuple[torch.Tensor, Ads, torch.Tensor, torch.Tensor]:
    items = torch.arange(3).expand(tasks, 3)
    width = len(POPULATION) + len(INTENT)
    population = torch.zeros(tasks, 10, width), torch.zeros(tasks, 3, width)
    return population[0], Ads(items, items % 2), population[1], torch.full((tasks,), _START + 50 * HOUR)


def test_what_was_learned_foretells(head: AdHead) -> None:
    columns, labels = _examples(500)
    logits = head.own_features(columns[300:])[:, 0]
    wins = (logits[labels[300:] == 1][:, None] > logits[labels[300:] == 0]).float().mean()
    assert wins > 0.75


def test_probabilities_are_some_and_a_users_do_not_depend_on_who_else_is_asked(head: AdHead) -> None:
    past = _past(5)
    support, ads, population, now = _asked()
    found = head.probabilities(past, support, ads, population, now, 0.05)
    assert found.shape == (4, 3)
    assert ((found > 0) & (found < 1)).all()
    fields = ("items", "categories", "kinds", "times", "converted_at", "mask")
    one = Past(**{name: getattr(past, name)[2:3] for name in fields})
    alone = head.probabilities(
        one, support[2:3], Ads(ads.items[2:3], ads.categories[2:3]), population[2:3], now[2:3], 0.05
    )
    torch.testing.assert_close(alone[0], found[2])


def test_a_user_with_nothing_known_gets_everybodys_answer(head: AdHead) -> None:
    past = _past(6)
    nobody = replace(past, mask=torch.zeros_like(past.mask))
    support, ads, population, now = _asked()
    with_own, without = (
        one.probabilities(nobody, support, ads, population, now, 0.05) for one in (head, head.with_variance(1e-9))
    )
    assert torch.equal(with_own, without)


def test_a_user_who_buys_what_they_click_gets_higher_chances(head: AdHead) -> None:
    past = _past(7)
    base = replace(past, kinds=torch.zeros_like(past.kinds), mask=torch.ones_like(past.mask))
    features = head.own_features(torch.zeros(4, 10, len(COLUMNS)))
    buys, never = (head.adapt(features, torch.full((4, 10), label), base.mask) for label in (1.0, 0.0))
    assert ((features[:, 0] * buys).sum(1) > (features[:, 0] * never).sum(1)).all()


def test_a_head_restored_from_its_state_answers_the_same(head: AdHead) -> None:
    again = AdHead.restore(head.state())
    past, (support, ads, population, now) = _past(8), _asked()
    first, second = (one.probabilities(past, support, ads, population, now, 0.05) for one in (head, again))
    assert torch.equal(first, second)


def test_the_linear_logits_share_is_what_foretold_best() -> None:
    """Few clicks of a linear law leave the committee nothing to find; a law with a bend is the committee's."""
    columns, labels = _examples(600)
    assert AdHead.fit(columns, labels).linear_share > SHARES[0]
    bent = ((columns[:, 0].abs() > 0.7) ^ (torch.arange(600) % 10 == 0)).float()
    assert AdHead.fit(columns.repeat(6, 1), bent.repeat(6)).linear_share == SHARES[0]


@pytest.mark.parametrize("padding", [1, 3, 40, 200])
def test_of_clicks_at_the_same_time_the_same_are_looked_at_however_far_a_task_is_padded(padding: int) -> None:
    """A page's impressions often share a millisecond."""
    count = OWN_CLICKS + 8

    def past(width: int) -> Past:
        there = torch.arange(width) < count
        zeros = torch.zeros(1, width, dtype=torch.int64)
        times = torch.where(there, 1_000, 0).unsqueeze(0)
        return Past(zeros, zeros, zeros, times, torch.full_like(zeros, NEVER), there.unsqueeze(0))

    now = torch.tensor([1_000 + 2 * HOUR])
    assert newest_known(past(count), now)[2].tolist() == newest_known(past(count + padding), now)[2].tolist()


def test_the_same_seed_learns_the_same() -> None:
    columns, labels = _examples(200)
    first, again, other = (train(columns, labels, 2, seed=seed)[0](columns) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_users_who_do_not_differ_are_not_adapted() -> None:
    columns, labels = _examples(300)

    def foretell(heads: Sequence[AdHead], last: slice) -> list[torch.Tensor]:
        logits, wrong = heads[0].own_features(columns[last])[:, 0], 1 - 2 * labels[last]
        return [logits + 1000 * float(head.own_variances[0]) * wrong for head in heads]

    variance, losses = choose_variance(columns, labels, foretell)
    assert variance == VARIANCES[0]
    assert len(losses) == len(VARIANCES)


def test_without_clicks_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="no click"):
        AdHead.fit(torch.zeros(0, len(COLUMNS)), torch.zeros(0))
    with pytest.raises(ValueError, match="no example"):
        train(torch.zeros(0, 3), torch.zeros(0), 1)
