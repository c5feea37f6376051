"""Corners of the trends: nothing known, tables that grow, directions, and a row of neighbours that is full."""

import numpy as np

from innerloop import trends as trends_module
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY, EPSILON, HALF_LIVES, NEIGHBOURS, POPULAR, Activity, Trends, activity_of

NOW = 1_750_000_000_000


def _told(items: list[int], previous: list[list[int]] | None = None, times: list[int] | None = None) -> Activity:
    activity = np.zeros(len(items), ACTIVITY)
    activity["item"] = items
    activity["time"] = NOW if times is None else times
    rows = [[*row, -1, -1, -1][:3] for row in previous or [[] for _ in items]]
    activity["previous"] = np.array(rows, np.int32).reshape(-1, 3)
    return activity


def _neighbours(trends: Trends, item: int) -> list[int]:
    return sorted(n for n in trends.co_visits.of(np.array([item]))[0][0].tolist() if n >= 0)


def test_nothing_is_known_at_first() -> None:
    trends = Trends()
    trends.observe(_told([]))
    asked = np.array([[0, -1], [5, 10**7]])
    assert trends.newest == 0
    assert trends.popularity.most.tolist() == []
    assert trends.popularity.shares(asked).shape == (2, 2, len(HALF_LIVES))
    assert not trends.popularity.shares(asked).any()
    assert np.isinf(trends.popularity.ages(asked, np.array([[NOW]]))).all()
    found, weights = trends.co_visits.of(asked)
    assert found.shape == (2, 2, NEIGHBOURS)
    assert (found == -1).all()
    assert weights.shape == (0, 4)


def test_shares_of_all_items_sum_to_one_and_unknown_items_have_none() -> None:
    trends = Trends()
    trends.observe(_told([3, 3, 1, 7]))
    shares = trends.popularity.shares(np.array([-1, 1, 3, 7, 9, 10**7]))
    assert shares[:, 0].tolist() == [0.0, 0.25, 0.5, 0.25, 0.0, 0.0]
    np.testing.assert_allclose(shares.sum(0), 1.0, rtol=1e-6)


def test_logarithms_of_shares_are_of_now_however_often_and_of_how_many_they_are_asked() -> None:
    trends, items = Trends(), np.array([4, 0, 4, 2, 5])
    for step, count in enumerate((6, 6, 2_000)):
        trends.observe(_told([0, step, 4]))
        wanted = np.log(trends.popularity.shares(items).T.astype(np.float64) + EPSILON)
        for _ in range(4):
            np.testing.assert_allclose(trends.popularity.log_shares(items, count), wanted, rtol=1e-5)
    more = np.arange(2_500)  # also such as nobody has met
    wanted = np.log(trends.popularity.shares(more).T.astype(np.float64) + EPSILON)
    for _ in range(2):
        np.testing.assert_allclose(trends.popularity.log_shares(more, 2_500), wanted, rtol=1e-5)


def test_tables_grow_with_the_items_and_keep_what_they_had() -> None:
    trends = Trends()
    for item in (1, 1_023, 1_024, 5_000, 300_000):
        trends.observe(_told([item, item], [[1], [2]]))
    for item in (1_023, 1_024, 5_000, 300_000):
        assert trends.popularity.shares(np.array([item]))[0, -1] == np.float32(0.2)
        assert _neighbours(trends, item) == [1, 2]
    assert _neighbours(trends, 1) == [2, 1_023, 1_024, 5_000, 300_000]
    assert np.isinf(trends.popularity.ages(np.array([299_999]), np.array([NOW])))


def test_rows_of_neighbours_grow_past_their_first_table() -> None:
    trends = Trends()
    for first in range(0, 900, 90):
        trends.observe(
            _told([2 * n for n in range(first, first + 90)], [[2 * n + 1] for n in range(first, first + 90)])
        )
    assert all(_neighbours(trends, 2 * n) == [2 * n + 1] for n in range(900))
    assert all(_neighbours(trends, 2 * n + 1) == [2 * n] for n in range(900))


def test_what_comes_after_and_what_comes_before_are_told_apart() -> None:
    trends = Trends()
    trends.observe(_told([5], [[4]]))
    _, of_four = trends.co_visits.of(np.array([4]))
    _, of_five = trends.co_visits.of(np.array([5]))
    assert of_four.sum(0).tolist() == [1.0, 0.0, 1.0, 0.0], "5 comes after 4"
    assert of_five.sum(0).tolist() == [0.0, 1.0, 0.0, 1.0], "4 comes before 5"


def test_an_item_is_not_its_own_neighbour() -> None:
    trends = Trends()
    trends.observe(_told([5], [[5, 5, 4]]))
    assert _neighbours(trends, 5) == [4]


def test_a_newcomer_enters_a_full_row_in_the_place_of_the_least() -> None:
    trends = Trends()
    for n in range(1, NEIGHBOURS + 1):
        trends.observe(_told([n] * (1 if n == 9 else 2), [[0]] * (1 if n == 9 else 2)))
    assert len(_neighbours(trends, 0)) == NEIGHBOURS
    trends.observe(_told([500], [[0]]))
    assert _neighbours(trends, 0) == [n for n in range(1, NEIGHBOURS + 1) if n != 9] + [500]


def test_a_crowd_of_newcomers_costs_a_full_row_its_least_alone() -> None:
    trends = Trends()
    for n in range(1, NEIGHBOURS + 1):
        trends.observe(_told([n] * 2, [[0]] * 2))
    trends.observe(_told(list(range(500, 700)), [[0]] * 200))
    found = _neighbours(trends, 0)
    assert len(found) == NEIGHBOURS
    assert sum(n <= NEIGHBOURS for n in found) == NEIGHBOURS - 1


def test_heavier_newcomers_replace_what_is_lighter() -> None:
    trends = Trends()
    trends.observe(_told(list(range(1, NEIGHBOURS + 1)), [[0]] * NEIGHBOURS))
    heavy = list(range(500, 510)) * 3
    trends.observe(_told(heavy, [[0]] * len(heavy)))
    assert set(range(500, 510)) <= set(_neighbours(trends, 0))


def test_much_activity_is_folded_in_by_parts(monkeypatch) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    rng = np.random.default_rng(0)
    activity = _told(rng.integers(0, 50, 1_000).tolist(), rng.integers(-1, 50, (1_000, 3)).tolist())
    whole, parts = Trends(), Trends()
    whole.observe(activity)
    monkeypatch.setattr(trends_module, "_AT_ONCE", 7)
    parts.observe(activity)
    every = np.arange(50)
    np.testing.assert_allclose(parts.popularity.shares(every), whole.popularity.shares(every), rtol=1e-6)
    assert all(_neighbours(parts, item) == _neighbours(whole, item) for item in range(50))


def test_every_half_life_has_its_own_most_popular() -> None:
    trends = Trends()
    week = 7 * 86_400_000
    long_ago = [item for item in range(POPULAR) for _ in range(50)]
    trends.observe(_told(long_ago, times=[NOW - week] * len(long_ago)))
    trends.observe(_told(list(range(100, 100 + POPULAR)) * 2))
    assert set(trends.popularity.most.tolist()) == {*range(POPULAR), *range(100, 100 + POPULAR)}


def _sets(times: list[list[int]]) -> SupportSets:
    """Items 0, 1, 2, ... in order; times in ms."""
    flat = [time for each in times for time in each]
    examples = np.zeros(len(flat), EXAMPLE)
    examples["time"], examples["item"], examples["type"] = flat, np.arange(len(flat)), 2
    return SupportSets(np.concatenate(([0], np.cumsum([len(each) for each in times]))), examples)


def test_a_tasks_first_event_has_nothing_before_it_though_another_task_is_stored_before() -> None:
    sets = _sets([[1, 2], [], [3, 4]])
    activity = activity_of(sets, np.ones(4, bool), NOW)
    assert activity["previous"].tolist() == [[-1, -1, -1], [0, -1, -1], [-1, -1, -1], [2, -1, -1]]
    assert activity["time"].tolist() == [1, 2, 3, 4]
    assert activity["type"].tolist() == [2] * 4


def test_only_what_is_fresh_is_told_with_what_was_there_before() -> None:
    activity = activity_of(_sets([[1, 2, 3, 4, 5]]), np.array([False, False, True, False, True]), NOW)
    assert activity["item"].tolist() == [2, 4]
    assert activity["previous"].tolist() == [[1, 0, -1], [3, 2, 1]]


def test_another_visits_items_are_not_told() -> None:
    half_hour = 1_800_000
    activity = activity_of(_sets([[0, 1, half_hour + 1, half_hour + 2]]), np.ones(4, bool), NOW)
    assert activity["previous"].tolist() == [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [2, -1, -1]]


def test_what_is_dated_ahead_is_told_as_of_now_and_belongs_to_its_visit_all_the_same() -> None:
    hour = 3_600_000
    ahead = _sets([[NOW - 2, NOW - 1], [NOW + 20 * hour, NOW + 20 * hour + 1]])
    activity = activity_of(ahead, np.ones(4, bool), NOW)
    assert activity["time"].tolist() == [NOW - 2, NOW - 1, NOW, NOW]
    assert activity["previous"][:, 0].tolist() == [-1, 0, -1, 2]
    assert ahead.examples["time"].tolist()[2:] == [NOW + 20 * hour, NOW + 20 * hour + 1], "the set stays as it is"


def test_of_nothing_nothing_is_told() -> None:
    assert len(activity_of(SupportSets.empty(3), np.zeros(0, bool), NOW)) == 0
    assert len(activity_of(_sets([[1], [2]]), np.zeros(2, bool), NOW)) == 0
