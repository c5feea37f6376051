"""The promises that every head keeps, whatever it learned; a new head joins by one line in `HEADS`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop.learning.heads import (
    RESTORE,
    AnilHead,
    BayesHead,
    CaviaHead,
    Head,
    MamlHead,
    NoneHead,
    PlaceboHead,
    ReptileHead,
    Support,
    Uncertain,
)
from innerloop.learning.heads.steps import Rule

DIMENSION, HIDDEN, CONTEXT = 8, 5, 3
RULE = Rule("gaussian", 3600.0)
RATES, SLOPE = torch.tensor([0.02, 0.01, 0.005]).log(), torch.tensor(0.2)


def _random(seed: int) -> Callable[..., torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g)


def _bayes(seed: int) -> BayesHead:
    normal = _random(seed)
    root, gram = normal(DIMENSION, DIMENSION), normal(50, DIMENSION)
    return BayesHead.from_prior(
        normal(DIMENSION),
        root @ root.T + torch.eye(DIMENSION),
        gram.T @ gram,
        alpha=0.01,
        noise=0.5,
        half_life=3600.0,
    )


def _logistic(seed: int) -> Head:
    return replace(_bayes(seed), likelihood="logistic")


def _anil(seed: int) -> Head:
    return AnilHead(_random(seed)(DIMENSION), RATES, SLOPE, RULE)


def _cavia(seed: int) -> Head:
    normal = _random(seed)
    weights = {
        "skip": normal(DIMENSION),
        "first": normal(HIDDEN, DIMENSION),
        "mix": normal(HIDDEN, CONTEXT),
        "bias": normal(HIDDEN),
        "second": normal(HIDDEN),
        "rates": RATES,
        "slope": SLOPE,
    }
    return CaviaHead(weights, RULE)


def _network(seed: int) -> torch.Tensor:
    return _random(seed)(DIMENSION + HIDDEN * (DIMENSION + 2) + 1)


def _maml(seed: int) -> Head:
    return MamlHead(_network(seed), RATES, SLOPE, DIMENSION, RULE)


def _reptile(seed: int) -> Head:
    return ReptileHead(_network(seed), RATES, SLOPE, DIMENSION, Rule("logistic", 60.0))


def _none(seed: int) -> Head:
    return NoneHead(_random(seed)(DIMENSION))


def _placebo(seed: int) -> Head:
    return PlaceboHead(_bayes(seed))


HEADS: dict[str, Callable[[int], Head]] = {
    "bayes": _bayes,
    "bayes-logistic": _logistic,
    "anil": _anil,
    "cavia": _cavia,
    "maml": _maml,
    "reptile": _reptile,
    "none": _none,
    "placebo": _placebo,
}
NOT_BY_ITSELF = ("placebo",)  # looks at the other tasks: that is what it is for

heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
by_itself = pytest.mark.parametrize("make", [pytest.param(HEADS[n], id=n) for n in HEADS if n not in NOT_BY_ITSELF])
quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.integers(0, 20), min_size=1, max_size=6)


def _support(seed: int, counts: list[int], padding: int = 0) -> Support:
    """Tasks with the given numbers of examples, in random places among the padding."""
    rng = np.random.default_rng(seed)
    length = max(counts) + padding
    mask = np.zeros((len(counts), length), bool)
    for row, count in enumerate(counts):
        mask[row, rng.permutation(length)[:count]] = True
    shape = mask.shape
    return Support(
        features=torch.tensor(rng.standard_normal((*shape, DIMENSION)), dtype=torch.float32),
        labels=torch.tensor(rng.integers(0, 2, shape), dtype=torch.float32),
        weights=torch.tensor(np.where(mask, rng.uniform(0.1, 4.0, shape), 0.0), dtype=torch.float32),
        ages=torch.tensor(rng.exponential(3600.0, shape), dtype=torch.float32),
        mask=torch.tensor(mask),
    )


def _take(support: Support, rows: torch.Tensor | slice, columns: torch.Tensor | slice = slice(None)) -> Support:
    return Support(**{name: getattr(support, name)[rows][:, columns] for name in support.__dataclass_fields__})


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [_anil, _cavia, _maml])
@quick
@given(seeds, sizes, st.sampled_from([1.0, 2.0, 4.0, 100.0]))
def test_a_task_whose_examples_all_weigh_more_takes_no_longer_steps(
    make: Callable[[int], Head], seed: int, counts: list[int], weight: float
) -> None:
    """Else some purchases of weight 4 send a head far away: its rates were learned for the mean of its examples."""
    support = _support(seed, counts)
    fresh = replace(support, ages=torch.zeros_like(support.ages))
    found = [make(seed).adapt(replace(fresh, weights=each * fresh.mask)) for each in (1.0, weight)]
    _close(found[1], found[0])


def test_every_head_is_tried() -> None:
    assert {make(0).name for make in HEADS.values()} == set(RESTORE)


@heads
@quick
@given(seed=seeds, tasks=st.integers(1, 5), length=st.integers(0, 20))
def test_no_examples_give_the_prior_bit_for_bit(
    make: Callable[[int], Head], seed: int, tasks: int, length: int
) -> None:
    head = make(seed)
    support = _support(seed, [0] * tasks, padding=length)
    for row in head.adapt(support):
        assert torch.equal(row, head.prior)


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_an_empty_task_gets_the_prior_beside_full_ones(
    make: Callable[[int], Head], seed: int, counts: list[int]
) -> None:
    head = make(seed)
    assert torch.equal(head.adapt(_support(seed, [*counts, 0]))[-1], head.prior)


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_order_does_not_matter(make: Callable[[int], Head], seed: int, counts: list[int]) -> None:
    support, head = _support(seed, counts, padding=3), make(seed)
    shuffled = torch.randperm(support.mask.shape[1], generator=torch.Generator().manual_seed(seed))
    _close(head.adapt(_take(support, slice(None), shuffled)), head.adapt(support))


@by_itself
@quick
@given(seed=seeds, counts=sizes)
def test_neither_batch_mates_nor_padding_matter(make: Callable[[int], Head], seed: int, counts: list[int]) -> None:
    support, head = _support(seed, counts, padding=5), make(seed)
    together = head.adapt(support)
    for task in range(len(counts)):
        alone = _take(support, slice(task, task + 1))
        _close(head.adapt(_take(alone, slice(None), alone.mask[0].nonzero().squeeze(1)))[0], together[task])


@heads
@quick
@given(seed=seeds, counts=sizes, rubbish=st.sampled_from([float("nan"), float("inf"), -7.0]))
def test_what_is_padded_is_not_looked_at(
    make: Callable[[int], Head], seed: int, counts: list[int], rubbish: float
) -> None:
    support, head = _support(seed, counts, padding=2), make(seed)
    expected = head.adapt(support)
    for name in ("features", "labels", "weights", "ages"):
        getattr(support, name)[~support.mask] = rubbish
    assert torch.equal(head.adapt(support), expected)


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_inputs_are_not_changed_and_the_answer_is_the_same_again(
    make: Callable[[int], Head], seed: int, counts: list[int]
) -> None:
    support, again = _support(seed, counts), _support(seed, counts)
    head = make(seed)
    assert torch.equal(head.adapt(support), head.adapt(support))
    for name in support.__dataclass_fields__:
        assert torch.equal(getattr(support, name), getattr(again, name))


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_a_restored_head_answers_the_same(make: Callable[[int], Head], seed: int, counts: list[int]) -> None:
    head, support = make(seed), _support(seed, counts)
    restored = RESTORE[head.name](head.state())
    assert torch.equal(restored.adapt(support), head.adapt(support))


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_scores_are_the_same_with_candidates_shared_or_given_to_each_task(
    make: Callable[[int], Head], seed: int, counts: list[int]
) -> None:
    head, parameters = make(seed), make(seed).adapt(_support(seed, counts))
    candidates = _random(seed + 1)(7, DIMENSION)
    shared = head.score(parameters, candidates)
    assert shared.shape == (len(counts), 7)
    _close(head.score(parameters, candidates.expand(len(counts), -1, -1)), shared)
    if head.linear:
        _close(parameters @ candidates.T, shared)


@heads
@quick
@given(seed=seeds, counts=sizes)
def test_parameters_are_float32_and_as_long_as_the_prior(
    make: Callable[[int], Head], seed: int, counts: list[int]
) -> None:
    head, support = make(seed), _support(seed, counts)
    parameters = head.adapt(support)
    assert parameters.dtype == torch.float32
    assert parameters.shape == (len(counts), len(head.prior))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _close(head.adapt(support), parameters)


@heads
@pytest.mark.parametrize("tasks", [0, 1])
def test_no_tasks_and_no_places_are_fine(make: Callable[[int], Head], tasks: int) -> None:
    head = make(0)
    empty = torch.zeros(tasks, 0)
    nothing = Support(torch.zeros(tasks, 0, DIMENSION), empty, empty, empty, empty.bool())
    assert torch.equal(head.adapt(nothing), head.prior.expand(tasks, -1))


@heads
def test_sizes_far_apart_change_nothing_that_rounding_does_not(make: Callable[[int], Head]) -> None:
    """Tasks are adapted in buckets by size, whichever way they are mixed."""
    head, counts = make(3), [0, 90, 1, 2, 3, 17, 0, 5, 40, 4, 8, 9]
    support = _left_packed(_support(3, counts))
    if head.name in NOT_BY_ITSELF:
        return
    for row, parameters in enumerate(head.adapt(support)):
        _close(head.adapt(_take(support, slice(row, row + 1)))[0], parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@heads
def test_a_gpu_gives_what_the_cpu_gives(make: Callable[[int], Head]) -> None:
    """To 1e-3 of the size of the parameters: the order of additions differs."""
    head, support = make(7), _support(7, [0, 1, 5, 20, 64, 200])
    there = RESTORE[head.name]({name: value.cuda() for name, value in head.state().items()})
    moved = Support(**{name: getattr(support, name).cuda() for name in support.__dataclass_fields__})
    expected, found = head.adapt(support), there.adapt(moved)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    candidates = _random(8)(30, DIMENSION)
    torch.testing.assert_close(
        there.score(found, candidates.cuda()).cpu(), head.score(expected, candidates), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("make", [_bayes, _logistic])
@quick
@given(seed=seeds, counts=sizes)
def test_more_examples_never_make_a_gaussian_head_less_sure(
    make: Callable[[int], Head], seed: int, counts: list[int]
) -> None:
    head, support, candidates = make(seed), _support(seed, counts), _random(seed)(6, DIMENSION)
    assert isinstance(head, Uncertain)
    nothing = replace(support, mask=torch.zeros_like(support.mask))
    before, after = head.variance(nothing, candidates), head.variance(support, candidates)
    assert bool((after >= 0).all())
    assert bool((after <= before * (1 + 1e-4)).all())
    _close(head.variance(support, candidates.expand(len(counts), -1, -1)), after)


@quick
@given(seed=seeds, counts=sizes)
def test_a_placebo_is_the_head_on_the_sets_of_others(seed: int, counts: list[int]) -> None:
    inner, support = _bayes(seed), _support(seed, counts)
    own, others = inner.adapt(support), PlaceboHead(inner).adapt(support)
    filled = [task for task, count in enumerate(counts) if count]
    if len(filled) < 2:
        assert torch.equal(others, inner.prior.expand(len(counts), -1))
        return
    used = [min(filled, key=lambda giver: float((own[giver] - others[task]).abs().max())) for task in filled]
    assert sorted(used) == filled
    assert all(task != giver for task, giver in zip(filled, used, strict=True))
    for task, giver in zip(filled, used, strict=True):
        _close(others[task], own[giver])


def _left_packed(support: Support) -> Support:
    order = (~support.mask).long().argsort(dim=1, stable=True)
    rows = torch.arange(len(order)).unsqueeze(1)
    return Support(**{name: getattr(support, name)[rows, order] for name in support.__dataclass_fields__})


@quick
@given(seed=seeds, counts=sizes)
def test_bayes_moves_towards_what_was_clicked(seed: int, counts: list[int]) -> None:
    """The weighted squared error on the task's own examples never grows."""
    head, support = _bayes(seed), _support(seed, counts)
    weight = torch.where(support.mask, support.weights * torch.exp2(-support.ages / 3600.0), 0.0)

    def error(parameters: torch.Tensor) -> torch.Tensor:
        predicted = (support.features @ parameters.unsqueeze(-1)).squeeze(-1)
        return (weight * (support.labels - predicted) ** 2).sum(1)

    before, after = error(head.prior.expand(len(counts), -1)), error(head.adapt(support))
    assert bool((after <= before * (1 + 1e-4) + 1e-5).all())
