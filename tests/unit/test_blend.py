"""The blend that a ranker begins with: shares added up as said, each source alone orders as it would by itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from innerloop.learning.blend import WEIGHTS, blended
from innerloop.learning.candidates import FEATURES
from innerloop.trends import EPSILON

UNKNOWN = {name: math.log(EPSILON) for name in FEATURES if name.startswith(("log_share", "log_after", "log_before"))}


def _row(**features: float) -> torch.Tensor:
    """Features [F] of which only some are told."""
    told = UNKNOWN | features
    return torch.tensor([told.get(name, 0.0) for name in FEATURES])


def _share(share: float) -> float:
    return math.log(share + EPSILON)


SHARES = st.floats(0.0, 1.0)


@given(st.tuples(*[SHARES] * 8, st.floats(-30.0, 30.0)))
def test_it_is_the_logarithm_of_the_weighted_shares(shares: tuple[float, ...]) -> None:
    after, before, last, hour, day, recency, kept, category, head = shares
    found = blended(
        _row(
            log_after_long=_share(after),
            log_before_long=_share(before),
            log_after_last=_share(last),
            log_share_3600s=_share(hour),
            log_share_86400s=_share(day),
            own_recency=recency,
            own_kept=kept,
            category_share=category,
            head=head,
        ),
        WEIGHTS,
    )
    mixed = after + 0.5 * before + last + hour + 0.3 * day
    mixed += 0.3 * recency * (1 + kept) + 3 * category * day + 0.01 * (0.5 + 0.5 * head / (1 + abs(head)))
    assert float(found) == pytest.approx(math.log(mixed + 1e-6), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"own_recency": 1.0}, {"own_recency": 0.5}),
        ({"own_recency": 0.25, "own_kept": 1.0}, {"own_recency": 0.25}),
        ({"log_after_last": _share(0.2)}, {"log_after_last": _share(0.1)}),
        ({"log_after_long": _share(0.1)}, {"log_before_long": _share(0.1)}),
        ({"log_share_3600s": _share(0.01)}, {"log_share_3600s": _share(0.005)}),
        ({"log_share_86400s": _share(0.01), "category_share": 0.5}, {"log_share_86400s": _share(0.01)}),
        ({"head": 0.3}, {"head": 0.1}),
        ({"own_recency": 0.1}, {"head": 1.0}),
        ({"log_after_last": _share(0.5)}, {"log_share_3600s": _share(0.05)}),
        ({"head": 0.01}, {}),
        ({"head": -1.0}, {"head": -2.0}),
        ({"head": 21.4}, {"head": 21.3}),
    ],
)
def test_more_of_a_share_is_likelier(better: dict[str, float], worse: dict[str, float]) -> None:
    assert blended(_row(**better), WEIGHTS) > blended(_row(**worse), WEIGHTS)


def test_values_that_are_no_shares_stay_finite() -> None:
    """A head's score is not bounded, and an item that was never met has no share at all."""
    wild = torch.stack([_row(head=-7.0), _row(head=1e30), torch.full((len(FEATURES),), 1e30), _row()])
    assert bool(blended(wild, WEIGHTS).isfinite().all())
