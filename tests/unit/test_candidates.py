"""Candidates and their features against loops over one task and one place at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from innerloop.events import CODES
from innerloop.learning.candidates import (
    CATEGORIES,
    FEATURES,
    NEAR,
    POPULAR_IN_CATEGORY,
    Candidates,
    Categories,
    Pool,
    Recent,
    gather,
)
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY, HALF_LIVES, Trends

NOW = 1_750_000_000_000
PLACES, MOST = 25, 9
EPSILON, LAST, CATEGORY_LAST = 1e-6, 0.6, 0.9
Ints = NDArray[np.int64]
KINDS = [CODES[name] for name in ("click", "cart", "favorite", "purchase")]


@dataclass(frozen=True)
class Case:
    """T tasks over some places: (place, kind, weight, time) of each example, oldest first."""

    tasks: list[list[tuple[int, int, float, int]]]
    categories: Ints
    trends: Trends
    popular: Ints
    liked: Ints

    def now(self) -> Ints:
        return np.array([task[-1][3] if task else NOW for task in self.tasks])

    def pool(self) -> Pool:
        return Pool(self.trends, Categories(self.categories), self.popular)

    def found(self, tasks: Sequence[int] | None = None) -> Candidates:
        """Candidates of all tasks, or of some."""
        some = range(len(self.tasks)) if tasks is None else tasks
        flat = [example for task in some for example in self.tasks[task]]
        examples = np.zeros(len(flat), EXAMPLE)
        for name, column in (("type", 1), ("weight", 2), ("time", 3)):
            examples[name] = [example[column] for example in flat]
        starts = np.cumsum([0, *(len(self.tasks[task]) for task in some)])
        places = np.array([example[0] for example in flat], np.int64)
        recent = Recent.of(SupportSets(starts, examples), places)
        return gather(recent, self.now()[list(some)], self.pool(), self.liked[list(some)], PLACES)


def _activity(rng: np.random.Generator, count: int, *, span: int = 200_000) -> NDArray[np.void]:
    activity = np.zeros(count, ACTIVITY)
    activity["item"] = rng.integers(0, PLACES - 5, count)
    activity["previous"] = rng.integers(-1, PLACES - 5, (count, 3))
    activity["time"] = np.sort(NOW - 1_000 * rng.integers(0, span, count))
    return activity


def _case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    tasks = []
    for size in [0, 1, *rng.integers(0, MOST, 4)]:
        times = np.sort(NOW - rng.integers(0, 7_200_000, size))
        kinds, weights = rng.choice(KINDS, size), rng.integers(1, 5, size)
        places = rng.integers(-1, PLACES, size)  # -1: an item that isn't known
        tasks.append([*zip(places.tolist(), kinds.tolist(), weights.tolist(), times.tolist(), strict=True)])
    trends = Trends()
    trends.observe(_activity(rng, 60))
    return Case(
        tasks=tasks,
        categories=rng.integers(-1, 4, PLACES - int(rng.integers(0, 2))),
        trends=trends,
        popular=rng.choice(PLACES, 3, replace=False),
        liked=rng.integers(-1, PLACES, (len(tasks), 2)),
    )


# --- the oracle


def _category(case: Case, place: int) -> int:
    return int(case.categories[place]) if 0 <= place < len(case.categories) else -1


def _near(case: Case, place: int) -> dict[int, list[float]]:
    found, weights = case.trends.co_visits.of(np.array([place]))
    return dict(zip(found[found >= 0].tolist(), weights.tolist(), strict=True))


def _expected_places(case: Case, task: int) -> list[int]:
    newest = [place for place, *_ in case.tasks[task]][::-1]
    found = {*newest, *case.popular.tolist(), *case.liked[task].tolist()}
    for place in newest[:NEAR]:
        found |= set(_near(case, place))
    wanted = {_category(case, place) for place in newest[:CATEGORIES]} - {-1}
    found |= {place for place in range(len(case.categories)) if int(case.categories[place]) in wanted}
    return sorted(found - {-1})


def _expected(case: Case, task: int, place: int) -> dict[str, float]:
    newest, now = case.tasks[task][::-1], int(case.now()[task])
    popularity, at = case.trends.popularity, np.array([place])
    shares, age = popularity.shares(at)[0], float(popularity.ages(at, np.array([now]))[0])
    near = [0.0] * 5
    for step, (other, *_) in enumerate(newest[:NEAR]):
        weights = _near(case, other).get(place, [0.0] * 4)
        for column in range(4):
            near[column] += LAST**step / sum(LAST**n for n in range(NEAR)) * weights[column]
        near[4] += weights[2] if step == 0 else 0.0
    own = [(step, *example[1:]) for step, example in enumerate(newest) if example[0] == place]
    mine = [_category(case, other) for other, *_ in newest]
    heavy = [CATEGORY_LAST**step * (category >= 0) for step, category in enumerate(mine)]
    category = _category(case, place)
    of_category = sum(w for w, other in zip(heavy, mine, strict=True) if other == category and category >= 0)
    gap = math.log1p((newest[0][3] - newest[1][3]) / 60_000) if len(newest) > 1 and newest[1][0] >= 0 else 0.0
    return {f"log_share_{int(h)}s": math.log(s + EPSILON) for h, s in zip(HALF_LIVES, shares, strict=True)} | {
        "log_age": math.log1p(min(age, 3e7) / 60),
        "log_after_short": math.log(near[0] + EPSILON),
        "log_before_short": math.log(near[1] + EPSILON),
        "log_after_long": math.log(near[2] + EPSILON),
        "log_before_long": math.log(near[3] + EPSILON),
        "log_after_last": math.log(near[4] + EPSILON),
        "own_recency": 1 / (1 + own[0][0]) if own else 0.0,
        "own_log_step": math.log1p(own[0][0]) if own else 0.0,
        "own_count": math.log1p(len(own)),
        "own_weight": math.log1p(sum(weight for _, _, weight, _ in own)),
        "own_kept": float(any(kind in {CODES["cart"], CODES["favorite"]} for _, kind, _, _ in own)),
        "own_bought": float(any(kind == CODES["purchase"] for _, kind, _, _ in own)),
        "own_log_age": math.log1p((now - own[0][3]) / 60_000) if own else 0.0,
        "category_share": of_category / sum(heavy) if sum(heavy) else 0.0,
        "category_is_last": float(bool(mine) and category >= 0 and category == mine[0]),
        "head": 0.0,
        "head_lift": 0.0,
        "log_size": math.log1p(sum(other >= 0 for other, *_ in newest)),
        "log_gap": gap,
    }


@pytest.mark.parametrize("seed", range(12))
def test_candidates_are_those_of_a_loop_over_the_five_sources(seed: int) -> None:
    case = _case(seed)
    found = case.found()
    assert found.starts[0] == 0
    assert found.starts[-1] == len(found.places) == len(found.features)
    for task in range(len(case.tasks)):
        assert found.places[found.starts[task] : found.starts[task + 1]].tolist() == _expected_places(case, task)


@pytest.mark.parametrize("seed", range(12))
def test_features_are_those_of_a_loop_over_candidates(seed: int) -> None:
    case = _case(seed)
    found = case.found()
    assert found.features.shape == (len(found.places), len(FEATURES))
    assert found.features.dtype == np.float32
    assert np.isfinite(found.features).all()
    for row, (task, place) in enumerate(zip(found.rows().tolist(), found.places.tolist(), strict=True)):
        for name, value in _expected(case, task, place).items():
            told = found.features[row, FEATURES.index(name)]
            assert told == pytest.approx(value, rel=1e-3, abs=1e-3), f"{name} of place {place} for task {task}"


@pytest.mark.parametrize("seed", range(6))
def test_a_tasks_candidates_are_its_own_whoever_is_asked_for_with_it(seed: int) -> None:
    case = _case(seed)
    together = case.found()
    for task in range(len(case.tasks)):
        alone, of_task = case.found([task]), slice(together.starts[task], together.starts[task + 1])
        assert alone.places.tolist() == together.places[of_task].tolist()
        np.testing.assert_allclose(alone.features, together.features[of_task], rtol=1e-6, atol=1e-6)


def test_no_tasks_have_no_candidates() -> None:
    found = _case(0).found([])
    assert found.starts.tolist() == [0]
    assert found.features.shape == (0, len(FEATURES))


def test_without_categories_or_trends_only_own_and_liked_are_left() -> None:
    case = Case([[(3, 1, 1.0, NOW)], []], np.empty(0, np.int64), Trends(), np.empty(0, np.int64), np.array([[7], [-1]]))
    found = case.found()
    assert found.starts.tolist() == [0, 2, 2]
    assert found.places.tolist() == [3, 7]
    assert np.isfinite(found.features).all()


def test_of_a_large_category_the_most_popular_are_candidates() -> None:
    count, trends = POPULAR_IN_CATEGORY + 40, Trends()
    popular = np.random.default_rng(0).permutation(count)[:POPULAR_IN_CATEGORY]
    activity = np.zeros(POPULAR_IN_CATEGORY, ACTIVITY)
    activity["item"], activity["time"], activity["previous"] = popular, NOW, -1
    trends.observe(activity)
    recent = Recent.of(SupportSets.empty(1), np.empty(0, np.int64))
    recent.places[0, 0] = last = int(popular[0])
    pool = Pool(trends, Categories(np.zeros(count, np.int64)), np.empty(0, np.int64))
    found = gather(recent, np.array([NOW]), pool, np.full((1, 1), -1), count)
    assert last in popular
    assert found.places.tolist() == sorted(popular.tolist())


def test_places_of_an_unknown_category_are_nobodys_members() -> None:
    categories = Categories(np.array([1, -1, 0, 1, -1]))
    assert categories.members(1).tolist() == [0, 3]
    assert categories.members(0).tolist() == [2]
    assert categories.members(2).tolist() == []
    assert categories.of(np.array([[0, -1], [4, 99]])).tolist() == [[1, -1], [-1, -1]]


def test_the_newest_examples_come_first_and_padding_is_behind() -> None:
    examples = np.zeros(3, EXAMPLE)
    examples["time"], examples["weight"], examples["type"] = [1, 2, 3], [1.0, 2.0, 4.0], [1, 2, 4]
    recent = Recent.of(SupportSets(np.array([0, 2, 2, 3]), examples), np.array([7, 8, 9]))
    assert recent.places.tolist() == [[8, 7], [-1, -1], [9, -1]]
    assert recent.times.tolist() == [[2, 1], [0, 0], [3, 0]]
    assert recent.weights.tolist() == [[2.0, 1.0], [0.0, 0.0], [4.0, 0.0]]
    assert recent.kinds.tolist() == [[2, 1], [0, 0], [4, 0]]
