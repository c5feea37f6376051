"""How an answer is counted: its rank among candidates, pessimistic in ties, own items removed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from innerloop.evaluation.stream.arms import ranks

ITEMS, WIDTH = 8, 5


@st.composite
def _moments(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], list[int], list[list[int]]]:
    """Up to six moments: candidates that don't repeat, some missing, few different scores, a target, items seen."""
    count = draw(st.integers(1, 6))
    item = st.integers(0, ITEMS - 1)
    rows = [draw(st.lists(item, min_size=WIDTH, max_size=WIDTH, unique=True)) for _ in range(count)]
    missing = [draw(st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)) for _ in range(count)]
    items = [[-1 if gone else i for i, gone in zip(*pair, strict=True)] for pair in zip(rows, missing, strict=True)]
    scores = [[float(draw(st.integers(-2, 2))) for _ in range(WIDTH)] for _ in range(count)]
    targets = [draw(item) for _ in range(count)]
    seen = [draw(st.lists(st.integers(-1, ITEMS - 1), min_size=3, max_size=3)) for _ in range(count)]
    return items, scores, targets, seen


def _rank(items: list[int], scores: list[float], target: int, seen: list[int]) -> int:
    left = {item: score for item, score in zip(items, scores, strict=True) if item >= 0 and item not in seen}
    if target not in left:
        return 0
    return sum(score >= left[target] for score in left.values())


@given(_moments())
def test_ranks_are_those_of_a_loop_over_candidates(
    moments: tuple[list[list[int]], list[list[float]], list[int], list[list[int]]],
) -> None:
    items, scores, targets, seen = moments
    found = ranks(np.array(items), np.array(scores), np.array(targets), np.array(seen))
    assert found.tolist() == [_rank(*moment) for moment in zip(items, scores, targets, seen, strict=True)]
    found = ranks(np.array(items), np.array(scores), np.array(targets))
    assert found.tolist() == [_rank(i, s, t, []) for i, s, t in zip(items, scores, targets, strict=True)]


def test_among_equal_scores_the_target_is_last() -> None:
    assert ranks(np.array([[3, 4, 5, 6]]), np.array([[1.0, 1.0, 1.0, 0.0]]), np.array([3])).tolist() == [3]


def test_an_item_that_was_seen_makes_room_for_the_next() -> None:
    items, scores, target = np.array([[7, 8, 9]]), np.array([[3.0, 2.0, 1.0]]), np.array([9])
    assert ranks(items, scores, target).tolist() == [3]
    assert ranks(items, scores, target, np.array([[8, -1]])).tolist() == [2]
    assert ranks(items, scores, target, np.array([[8, 9]])).tolist() == [0]


def test_what_another_moment_has_seen_removes_nothing() -> None:
    items, scores = np.array([[0, 1], [0, 1]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    assert ranks(items, scores, np.array([1, 1]), np.array([[0], [-1]])).tolist() == [1, 2]


def test_no_candidates_are_no_hit() -> None:
    assert ranks(np.empty((2, 0), np.int64), np.empty((2, 0)), np.array([0, 1]), np.array([[0], [1]])).tolist() == [
        0,
        0,
    ]


def test_the_inputs_are_left_as_they_were() -> None:
    items, scores, seen = np.array([[0, 1, -1]]), np.array([[1.0, 2.0, 9.0]]), np.array([[1]])
    copies = items.copy(), scores.copy(), seen.copy()
    ranks(items, scores, np.array([0]), seen)
    assert all((old == new).all() for old, new in zip(copies, (items, scores, seen), strict=True))
