"""How the console writes numbers for people."""

import math

import pytest

from innerloop.worker.console.parts import as_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.0254, "25 ms"),
        (1.0, "1.0 s"),
        (599.94, "599.9 s"),
        (600.0, "10 min"),
        (449_855.2, "5 d"),
        (math.nan, "time unknown"),
    ],
)
def test_a_time_is_as_exact_as_is_worth_reading(seconds: float, text: str) -> None:
    assert as_seconds(seconds) == text
