import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.learning.ads.attribution import HOUR, NEVER, Attribution, attribute, counted_before

_EVENT = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 30), st.sampled_from(["click", "buy", "cart"]))


def _columns(events: list[tuple[int, int, int, str]]) -> tuple[np.ndarray, ...]:
    users, items, times = (np.array([event[at] for event in events], np.int64) for at in range(3))
    kinds = np.array([event[3] for event in events], dtype=str)
    return users, items, times, kinds == "click", kinds == "buy"


def _oracle(events: list[tuple[int, int, int, str]], window: int) -> list[int]:
    """For each event the time of the earliest purchase that it led to, by looking at all of them."""
    found = []
    for user, item, time, kind in events:
        later = [t for u, i, t, k in events if k == "buy" and (u, i) == (user, item) and time < t <= time + window]
        found.append(min(later) if kind == "click" and later else NEVER)
    return found


@given(st.lists(_EVENT, max_size=40), st.integers(1, 40))
def test_attribution_is_what_looking_at_every_purchase_finds(
    events: list[tuple[int, int, int, str]], window: int
) -> None:
    assert attribute(*_columns(events), window=window).converted_at.tolist() == _oracle(events, window)


@given(st.lists(_EVENT, max_size=30), st.integers(1, 40), st.integers(0, 45))
def test_a_later_purchase_changes_no_label_of_now(
    events: list[tuple[int, int, int, str]], window: int, now: int
) -> None:
    """What is known at a time is the same whether or not the events from then on are there."""
    events = sorted(events, key=lambda event: event[2])
    earlier = [event for event in events if event[2] < now]
    whole, part = (attribute(*_columns(some), window=window) for some in (events, earlier))
    for ours, theirs in zip(whole.known(now, wait=5), part.known(now, wait=5), strict=True):
        assert ours[: len(earlier)].tolist() == theirs.tolist()
        assert not ours[len(earlier) :].any()


def test_times_of_today_do_not_overflow() -> None:
    start = 1_800_000_000_000
    users, items = np.array([10**12, 10**12]), np.array([10**15, 10**15])
    found = attribute(users, items, np.array([start, start + 5]), np.array([True, False]), np.array([False, True]))
    assert found.converted_at.tolist() == [start + 5, NEVER]


def test_a_click_is_a_negative_after_the_wait_and_a_positive_once_bought() -> None:
    at = Attribution(np.array([0]), np.array([True]), np.array([3 * HOUR]))
    labels = [tuple(bool(x[0]) for x in at.known(now)) for now in (HOUR, HOUR + 1, 3 * HOUR, 3 * HOUR + 1)]
    assert labels == [(False, False), (False, True), (False, True), (True, True)]
    assert at.known_at().tolist() == [HOUR]


def test_a_window_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        attribute(*_columns([(0, 0, 0, "click")]), window=0)


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=30),
    st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 9)), max_size=10),
)
def test_counts_are_of_equal_keys_at_strictly_earlier_times(
    events: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    e, a = np.array(events, np.int64).reshape(-1, 2), np.array(asked, np.int64).reshape(-1, 2)
    expected = [sum(key == k and time < now for key, time in events) for k, now in asked]
    assert counted_before(e[:, 0], e[:, 1], a[:, 0], a[:, 1]).tolist() == expected
