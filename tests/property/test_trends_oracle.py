"""Trends against sums written plainly: one dictionary entry per item or pair, 2^(-age / half-life) for each event."""

import itertools
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop.events import CODES
from innerloop.learning.stream_log import stream_of
from innerloop.support import EXAMPLE, SupportSets, merge
from innerloop.trends import (
    ACTIVITY,
    HALF_LIVES,
    NEIGHBOURS,
    PAIR_HALF_LIVES,
    POPULAR,
    PREVIOUS,
    Activity,
    Floats,
    Trends,
    activity_of,
)

# (time in seconds, item, the items before it, newest first)
Plain = tuple[int, int, tuple[int, ...]]
STEP_WEIGHT = 0.7
LAST_CENTURY, NOW = 0, 1_750_000_000
# Minutes, hours and months apart: what the clock of a short half-life has to be restarted for.
gaps = st.sampled_from([0, 1, 60, 1_000, 40_000, 500_000, 10_000_000]) | st.integers(-50_000, 50_000)


@st.composite
def streams(draw: st.DrawFn, items: int = 8, most: int = 40) -> list[Plain]:
    """Events whose times mostly rise, now and then by months, and sometimes go back (late events)."""
    time = draw(st.sampled_from([LAST_CENTURY, NOW]))
    item = st.integers(0, items - 1)
    events = []
    for gap, met, before in draw(
        st.lists(st.tuples(gaps, item, st.lists(item, max_size=PREVIOUS)), min_size=1, max_size=most)
    ):
        time = max(0, time + gap)
        events.append((time, met, tuple(before)))
    return events


def told(events: list[Plain]) -> Activity:
    activity = np.zeros(len(events), ACTIVITY)
    for at, (time, item, before) in enumerate(events):
        activity[at]["time"], activity[at]["item"], activity[at]["type"] = 1_000 * time, item, 1
        activity[at]["previous"] = [*before, *[-1] * (PREVIOUS - len(before))]
    return activity


def cut(events: list[Plain], cuts: list[int]) -> list[list[Plain]]:
    places = sorted({0, len(events), *(each % len(events) for each in cuts)})
    return [events[a:b] for a, b in itertools.pairwise(places)]


def after(pieces: list[list[Plain]]) -> Trends:
    trends = Trends()
    for piece in pieces:
        trends.observe(told(piece))
    return trends


def shares(events: list[Plain], items: int) -> Floats:
    """The oracle of popularity, [items, H]."""
    newest = max(time for time, _, _ in events)
    sums = np.zeros((items, len(HALF_LIVES)))
    for time, item, _ in events:
        for column, half_life in enumerate(HALF_LIVES):
            sums[item, column] += 2.0 ** (-(newest - time) / half_life)
    found: Floats = (sums / sums.sum(0)).astype(np.float32)
    return found


def pairs(events: list[Plain]) -> dict[int, dict[int, list[float]]]:
    """The oracle of co-visits: item -> neighbour -> after and before by half-life."""
    newest = max(time for time, _, _ in events)
    sums: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0] * 4))
    for time, item, before in events:
        for step, earlier in enumerate(before):
            if earlier == item:
                continue
            for number, half_life in enumerate(PAIR_HALF_LIVES):
                weight = STEP_WEIGHT**step * 2.0 ** (-(newest - time) / half_life)
                sums[earlier][item][2 * number] += weight
                sums[item][earlier][2 * number + 1] += weight
    return sums


def neighbours(trends: Trends, item: int) -> dict[int, list[float]]:
    found, weights = trends.co_visits.of(np.array([item]))
    return dict(zip(found[found >= 0].tolist(), weights.tolist(), strict=True))


cuts = st.lists(st.integers(0, 100), max_size=6)


@settings(max_examples=150)
@given(streams(), cuts)
def test_popularity_is_the_decayed_share_of_events_however_they_come(events: list[Plain], cuts: list[int]) -> None:
    found = after(cut(events, cuts)).popularity.shares(np.arange(8))
    np.testing.assert_allclose(found, shares(events, 8), rtol=1e-4, atol=1e-7)


@settings(max_examples=150)
@given(streams(), cuts)
def test_an_item_is_as_old_as_its_oldest_event(events: list[Plain], cuts: list[int]) -> None:
    popularity = after(cut(events, cuts)).popularity
    now = max(time for time, _, _ in events)
    for item in range(8):
        own = [time for time, met, _ in events if met == item]
        expected = np.inf if not own else now - min(own)
        assert popularity.ages(np.array([item]), np.array([1_000 * now]))[0] == np.float32(expected)


@settings(max_examples=60)
@given(streams(items=3 * POPULAR, most=150), cuts)
def test_the_most_popular_are_the_true_top_after_every_piece(events: list[Plain], cuts: list[int]) -> None:
    trends, so_far = Trends(), []
    for piece in cut(events, cuts):
        trends.observe(told(piece))
        so_far += piece
        true = shares(so_far, 3 * POPULAR).astype(np.float64)
        most = set(trends.popularity.most.tolist())
        met = {item for _, item, _ in so_far}
        assert most <= met
        for column in true.T:
            least = np.sort(column)[-POPULAR]
            # What is clearly above the 40th must be there; equals may or may not be.
            assert {item for item in met if column[item] > least * (1 + 1e-6) and column[item] > 1e-30} <= most


@settings(max_examples=150)
@given(streams(), cuts)
def test_co_visits_are_the_decayed_counts_of_pairs_however_they_come(events: list[Plain], cuts: list[int]) -> None:
    trends, expected = after(cut(events, cuts)), pairs(events)
    for item in range(8):
        found = neighbours(trends, item)
        assert found.keys() == expected[item].keys()
        totals = np.array([*expected[item].values()]).reshape(-1, 4).sum(0)
        for other, weights in expected[item].items():
            for column, total in enumerate(totals):
                if total > 1e-25:  # below, float32 says nothing
                    assert found[other][column] == pytest.approx(weights[column] / total, rel=1e-3, abs=1e-6)
                assert 0.0 <= found[other][column] <= 1.0 + 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_heaviest_neighbours_survive_many_rare_ones(seed: int, size: int) -> None:
    """A popular item is met near more others than its row holds: those met often stay, in pieces or at once."""
    rng = np.random.default_rng(seed)
    often, rare = np.repeat(np.arange(1, 31), 20), np.arange(100, 100 + 3 * NEIGHBOURS)
    met = rng.permutation(np.concatenate([often, rare]))
    events: list[Plain] = [(NOW + n, int(item), (0,)) for n, item in enumerate(met)]
    for pieces in ([events], [events[first : first + size] for first in range(0, len(events), size)]):
        found = neighbours(after(pieces), 0)
        assert len(found) == NEIGHBOURS
        assert sum(n <= 30 for n in found) >= 30 - (0 if len(pieces) == 1 else 2)


# --- what ingest tells and what a replay of the past tells


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 60, 1_700, 1_800, 1_801])),
        min_size=1,
        max_size=50,
    ),
    cuts,
)
def test_ingest_tells_what_the_replay_of_a_log_tells(events: list[tuple[int, int, int]], cuts: list[int]) -> None:
    """Events in order, each second another one, merged in batches as ingest does."""
    users, items = np.array([u for u, _, _ in events]), np.array([i for _, i, _ in events])
    times = 1_000 * (NOW + np.cumsum([gap for _, _, gap in events]))
    table = pl.DataFrame(
        {
            "event_type": ["click"] * len(events),
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "event_time": times,
        }
    )
    log = stream_of(table)
    sets, parts = SupportSets.empty(4), []
    places = sorted({0, len(events), *(each % len(events) for each in cuts)})
    for first, last in itertools.pairwise(places):
        batch = np.zeros(last - first, EXAMPLE)
        batch["time"], batch["hash"] = times[first:last], np.arange(first, last)
        batch["item"], batch["type"] = items[first:last], CODES["click"]
        merged = merge(sets, users[first:last], batch, 64)
        sets = merged.sets
        parts.append(activity_of(sets, merged.fresh, 2**62))
    ingested = np.concatenate(parts)
    ingested = ingested[np.argsort(ingested["time"])]
    replayed = log.activity(0, len(log))
    name_of = np.array([int(name[1:]) for name in log.item_ids] + [-1])
    assert ingested["time"].tolist() == replayed["time"].tolist()
    assert ingested["type"].tolist() == replayed["type"].tolist()
    assert ingested["item"].tolist() == name_of[replayed["item"]].tolist()
    assert ingested["previous"].tolist() == name_of[replayed["previous"]].tolist()
