"""The promises that every head keeps, whatever it learned; a new head joins by one line in `HEADS`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop.learning.heads import RESTORE, BayesHead, Head, NoneHead, Support

DIMENSION = 8


def _bayes(seed: int) -> Head:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(DIMENSION, DIMENSION, generator=g)
    gram = torch.randn(50, DIMENSION, generator=g)
    return BayesHead.from_prior(
        torch.randn(DIMENSION, generator=g),
        root @ root.T + torch.eye(DIMENSION),
        gram.T @ gram,
        alpha=0.01,
        noise=0.5,
        half_life=3600.0,
    )


def _none(seed: int) -> Head:
    return NoneHead(torch.randn(DIMENSION, generator=torch.Generator().manual_seed(seed)))


HEADS: dict[str, Callable[[int], Head]] = {"bayes": _bayes, "none": _none}

heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
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
        labels=torch.ones(shape),
        weights=torch.tensor(np.where(mask, rng.uniform(0.1, 4.0, shape), 0.0), dtype=torch.float32),
        ages=torch.tensor(rng.exponential(3600.0, shape), dtype=torch.float32),
        mask=torch.tensor(mask),
    )


def _take(support: Support, rows: torch.Tensor | slice, columns: torch.Tensor | slice = slice(None)) -> Support:
    return Support(*(getattr(support, name)[rows][:, columns] for name in support.__dataclass_fields__))


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_head_is_tried() -> None:
    assert set(HEADS) == set(RESTORE)


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


@heads
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
