import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.streams.lag_window import Look, Status, catch_up_seconds, judge


def window(*looks: tuple[int, int]) -> list[Look]:
    """Looks a second apart, each (position, offsets behind)."""
    return [Look(float(at), position, offsets) for at, (position, offsets) in enumerate(looks)]


@pytest.mark.parametrize(
    ("looks", "owned", "status"),
    [
        (window((5, 0)), True, "ok"),
        (window((5, 0)), False, "ok"),
        (window((5, 3), (5, 0), (5, 9)), True, "ok"),
        (window((5, 9), (6, 8), (7, 7)), True, "ok"),
        (window((5, 3), (6, 3), (7, 3)), True, "warning"),
        (window((5, 3), (6, 9), (7, 20)), True, "warning"),
        (window((5, 3), (6, 9), (7, 8)), True, "ok"),
        (window((5, 3), (5, 3), (5, 3)), True, "stalled"),
        (window((5, 3), (5, 9)), True, "stalled"),
        (window((5, 3), (5, 9)), False, "stopped"),
        (window((5, 3)), False, "stopped"),
        (window((5, 3)), True, "warning"),
        (window((5, 3), (6, 4)), False, "warning"),
        (window((5, 9), (5, 4)), True, "ok"),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_the_rules(looks: list[Look], owned: bool, status: Status) -> None:  # noqa: FBT001 - a table
    assert judge(looks, owned=owned).status == status


def test_time_to_catch_up_is_at_the_window_s_pace() -> None:
    assert judge(window((0, 100), (30, 80), (60, 60)), owned=True).catch_up_seconds == pytest.approx(3.0)
    assert judge(window((0, 0)), owned=True).catch_up_seconds == 0.0
    assert judge(window((0, 5), (0, 5)), owned=True).catch_up_seconds == math.inf
    assert catch_up_seconds([window((0, 10), (5, 5)), window((0, 5), (5, 10))]) == math.inf
    assert catch_up_seconds([window((0, 10), (5, 5)), window((0, 5), (5, 5))]) == pytest.approx(2.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8), st.booleans())
def test_whoever_reaches_the_end_is_ok_and_whoever_stands_is_not(looks: list[tuple[int, int]], owned: bool) -> None:  # noqa: FBT001
    steps = sorted(position for position, _ in looks)
    seen = window(*zip(steps, (offsets for _, offsets in looks), strict=True))
    status = judge(seen, owned=owned).status
    if any(look.offsets == 0 for look in seen):
        assert status == "ok"
    elif steps[0] == steps[-1] and len({look.offsets for look in seen}) == 1 and len(seen) > 1:
        assert status == ("stalled" if owned else "stopped")
