"""The stream protocol's baselines: each against loops in plain Python, all of them against the promises of an arm."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from innerloop.evaluation.baselines import covisits
from innerloop.evaluation.baselines.candidate_lists import WIDTH
from innerloop.evaluation.baselines.covisits import Covisits
from innerloop.evaluation.baselines.ials import ImplicitFactors
from innerloop.evaluation.baselines.item_knn import SequentialRules
from innerloop.evaluation.baselines.popularity import Popularity, PopularityInCategory, PopularityLastHour
from innerloop.evaluation.baselines.recents import CartedRecents, Recents
from innerloop.evaluation.baselines.sasrec import SasRec
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.baselines.vsknn import SessionNeighbours
from innerloop.evaluation.outcome import Ints
from innerloop.evaluation.stream.arms import StreamArm
from innerloop.evaluation.stream.baselines import NAMES, baselines
from innerloop.evaluation.stream.options import StreamOptions
from innerloop.learning.stream_log import StreamLog, stream_of

MINUTE = 60_000
USERS, ITEMS, CATEGORIES, EVENTS = 7, 12, 3, 240
KINDS = ("click", "click", "click", "cart", "favorite", "purchase")
Scores = dict[int, float]


def _table(seed: int, *, sessions: bool = True, last: int = EVENTS) -> pl.DataFrame:
    """A day of random events; from row `last` on users, items and types are dealt out differently."""
    rng = np.random.default_rng(seed)
    users, items, kinds = rng.integers(USERS, size=EVENTS), rng.integers(ITEMS, size=EVENTS), rng.choice(KINDS, EVENTS)
    times = 1_700_000_000_000 + np.cumsum(rng.integers(1, 12 * MINUTE, size=EVENTS))
    users[:USERS], items[:ITEMS] = np.arange(USERS), np.arange(ITEMS)
    if last < EVENTS:
        for column in (users, items, kinds):
            rng.shuffle(column[last:])
    categories = [None if item == 0 else f"c{item % CATEGORIES}" for item in items]
    columns = {"session_id": [f"s{time // (180 * MINUTE)}" for time in times]} if sessions else {}
    return pl.DataFrame(
        {
            "event_type": kinds,
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item:02}" for item in items],
            "event_time": times,
            "category": categories,
            **columns,
        }
    )


def _log(seed: int, *, sessions: bool = True) -> StreamLog:
    return stream_of(_table(seed, sessions=sessions))


MAKERS: dict[str, Callable[[StreamLog], StreamArm]] = {
    "popularity": Popularity,
    "popularity-1h": PopularityLastHour,
    "popularity-in-category": PopularityInCategory,
    "recents": Recents,
    "carted-recents": CartedRecents,
    "covisits-1h": lambda log: Covisits(log, Visits(log)),
    "item-knn": lambda log: SequentialRules(log, Visits(log)),
    "vsknn": lambda log: SessionNeighbours(log, Visits(log)),
    "ials": ImplicitFactors,
    "sasrec": SasRec,
}
SIMPLE = [name for name in MAKERS if name not in {"ials", "sasrec"}]


def _asked(arm: StreamArm, log: StreamLog, rows: list[int], *, shown: int) -> list[Scores]:
    arm.observe(0, shown)
    return _answers(arm, log, np.array(rows))


def _answers(arm: StreamArm, log: StreamLog, rows: Ints, capacity: int = 64) -> list[Scores]:
    items, scores = arm.candidates(rows, log.before(rows, capacity)[0])
    assert items.shape == scores.shape
    answers = []
    for some, theirs in zip(items, scores, strict=True):
        named = some[some >= 0].tolist()
        assert len(named) == len(set(named)) <= 2 * WIDTH
        assert np.isfinite(theirs[some >= 0]).all()
        answers.append(dict(zip(named, theirs[some >= 0].tolist(), strict=True)))
    return answers


def _in_order(scores: Scores) -> list[int]:
    return sorted(scores, key=lambda item: -scores[item])


def _groups(scores: Scores) -> list[set[int]]:
    """Items from the best down, those of (nearly) equal scores together."""
    groups: list[set[int]] = []
    score_before = None
    for item in _in_order(scores):
        if score_before is None or score_before - scores[item] > 1e-9:
            groups.append(set())
        groups[-1].add(item)
        score_before = scores[item]
    return groups


def _visits(log: StreamLog, shown: int) -> list[list[int]]:
    """Each visit's shown rows, in order of time."""
    visits: dict[int, list[list[int]]] = defaultdict(list)
    for row in range(shown):
        own = visits[int(log.users[row])]
        if not own or not _together(log, own[-1][-1], row):
            own.append([])
        own[-1].append(row)
    return [visit for own in visits.values() for visit in own]


def _together(log: StreamLog, one: int, other: int) -> bool:
    if log.sessions[one] >= 0 or log.sessions[other] >= 0:
        return bool(log.sessions[one] == log.sessions[other])
    return bool(abs(log.times[other] - log.times[one]) <= 30 * MINUTE)


def _history(log: StreamLog, row: int) -> list[int]:
    """The user's rows strictly before, newest first."""
    own = [n for n in range(len(log)) if log.users[n] == log.users[row] and log.times[n] < log.times[row]]
    return own[::-1]


def _last_visit(log: StreamLog, row: int) -> list[int]:
    """Of these the newest visit's."""
    history = _history(log, row)
    end = next((n for n, (new, old) in enumerate(pairwise(history), 1) if not _together(log, old, new)), len(history))
    return history[:end]


def _counts(log: StreamLog, rows: Iterable[int]) -> Scores:
    return {item: float(count) for item, count in Counter(log.items[list(rows)].tolist()).items()}


def _then_popular(scores: Scores, log: StreamLog, shown: int) -> Scores:
    """Below the least of the scores' differences, what is popular."""
    counts = _counts(log, range(shown))
    return {item: scores.get(item, 0.0) + 1e-7 * counts.get(item, 0.0) for item in scores | counts}


@pytest.mark.parametrize("seed", range(3))
def test_popularity_counts_all_that_was_shown(seed: int) -> None:
    log = _log(seed)
    assert _asked(Popularity(log), log, [200, 201], shown=150) == [_counts(log, range(150))] * 2


@pytest.mark.parametrize("seed", range(3))
def test_the_last_hours_popularity_counts_what_is_an_hour_old_at_most(seed: int) -> None:
    log = _log(seed)
    arm = PopularityLastHour(log)
    shown = 0
    for row in (5, 40, 41, 130, EVENTS - 1):
        arm.observe(shown, row)
        shown = row
        recent = [n for n in range(row) if log.times[n] >= log.times[row] - 60 * MINUTE]
        assert _answers(arm, log, np.array([row])) == [_counts(log, recent)]


def test_popularity_of_some_types_counts_those_alone() -> None:
    log = _log(0)
    clicks = [row for row in range(150) if log.kinds[row] == 1]
    assert _asked(Popularity(log, [1]), log, [200], shown=150) == [_counts(log, clicks)]
    arm = PopularityLastHour(log, [1])
    recent = [row for row in clicks if log.times[row] >= log.times[150] - 60 * MINUTE]
    assert _asked(arm, log, [150], shown=150) == [_counts(log, recent)]


def test_the_most_popular_are_kept_when_there_are_more_items_than_an_arm_names() -> None:
    rng = np.random.default_rng(0)
    items = (rng.random(6_000) ** 2 * 900).astype(int)
    log = stream_of(
        pl.DataFrame(
            {
                "event_type": "click",
                "user_id": "u",
                "item_id": [f"i{item}" for item in items],
                "event_time": 1_000 + np.arange(len(items)) * 1_000,
            }
        )
    )
    arm, recent = Popularity(log), PopularityLastHour(log)
    for first in range(0, 5_500, 500):
        arm.observe(first, first + 500)
        recent.observe(first, first + 500)
        for some, rows in ((arm, range(first + 500)), (recent, range(max(0, first + 500 - 3_600), first + 500))):
            (found,) = _answers(some, log, np.array([first + 500]))
            counts = sorted(_counts(log, rows).values(), reverse=True)
            assert sorted(found.values(), reverse=True) == counts[:WIDTH]


@pytest.mark.parametrize("seed", range(3))
def test_popularity_in_category_puts_the_last_events_category_first(seed: int) -> None:
    log = _log(seed)
    rows = list(range(160, 200))
    for row, found in zip(rows, _asked(PopularityInCategory(log), log, rows, shown=150), strict=True):
        last = log.categories[_history(log, row)[0]]
        counts = _counts(log, range(150))
        within = _counts(log, [n for n in range(150) if log.categories[n] == last]) if last >= 0 else {}
        assert _groups(found) == _groups({item: 1_000 * within.get(item, 0.0) + counts[item] for item in counts})


@pytest.mark.parametrize("seed", range(3))
def test_recents_are_own_items_newest_first_then_what_is_popular(seed: int) -> None:
    log = _log(seed)
    rows = list(range(100, 140))
    for row, found in zip(rows, _asked(Recents(log), log, rows, shown=90), strict=True):
        own = list(dict.fromkeys(log.items[_history(log, row)].tolist()))
        assert _in_order(found)[: len(own)] == own
        rest = {item: count for item, count in _counts(log, range(90)).items() if item not in own}
        assert _groups({item: found[item] for item in found if item not in own}) == _groups(rest)


@pytest.mark.parametrize("seed", range(3))
def test_carted_items_come_first_until_they_are_purchased(seed: int) -> None:
    log = _log(seed)
    rows = list(range(100, 180))
    waiting_found = False
    for row, found in zip(rows, _asked(CartedRecents(log), log, rows, shown=90), strict=True):
        waiting: dict[int, int] = {}
        for n in reversed(_history(log, row)):
            if log.kinds[n] in (2, 3):
                waiting.pop(int(log.items[n]), None)
                waiting[int(log.items[n])] = n
            elif log.kinds[n] == 4:
                waiting.pop(int(log.items[n]), None)
        own = list(dict.fromkeys([*reversed(waiting), *log.items[_history(log, row)].tolist()]))
        assert _in_order(found)[: len(own)] == own
        waiting_found |= bool(waiting)
    assert waiting_found


@pytest.mark.parametrize("sessions", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_covisits_are_shares_of_neighbours_within_five_steps_and_the_last_hour(seed: int, *, sessions: bool) -> None:
    log, shown = _log(seed, sessions=sessions), 150
    together: dict[int, Scores] = defaultdict(lambda: defaultdict(float))
    for visit in _visits(log, shown):
        for at, new in enumerate(visit):
            for old in visit[max(0, at - 5) : at]:
                if log.items[new] != log.items[old]:
                    together[int(log.items[new])][int(log.items[old])] += 1
                    together[int(log.items[old])][int(log.items[new])] += 1
    row = shown  # what is the last hour's changes from one moment to the next
    recent = _counts(log, [n for n in range(shown) if log.times[n] >= log.times[row] - 60 * MINUTE])
    expected: Scores = {item: 0.5 * count / max(recent.values()) for item, count in recent.items()}
    for step, last in enumerate(_last_visit(log, row)[:3]):
        neighbours = together[int(log.items[last])]
        for item, count in neighbours.items():
            expected[item] = expected.get(item, 0.0) + 3 * 0.7**step * count / sum(neighbours.values())
    (found,) = _asked(Covisits(log, Visits(log)), log, [row], shown=shown)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("sessions", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sequential_rules_weigh_what_came_after_the_last_item_by_one_over_the_steps(
    seed: int, *, sessions: bool
) -> None:
    log, shown = _log(seed, sessions=sessions), 150
    rules: dict[int, Scores] = defaultdict(lambda: defaultdict(float))
    for visit in _visits(log, shown):
        for at, new in enumerate(visit):
            for steps, old in enumerate(visit[max(0, at - 10) : at][::-1], 1):
                if log.items[new] != log.items[old]:
                    rules[int(log.items[old])][int(log.items[new])] += 1 / steps
    rows = list(range(155, 175))
    for row, found in zip(rows, _asked(SequentialRules(log, Visits(log)), log, rows, shown=shown), strict=True):
        expected = _then_popular(dict(rules[int(log.items[_history(log, row)[0]])]), log, shown)
        assert _groups(found) == _groups(expected)


def _neighbours(log: StreamLog, row: int, shown: int) -> list[tuple[float, list[int]]]:
    """Other visits that share an item with the user's last one: similarity times weight of the newest shared, items."""
    last = _last_visit(log, row)
    weight: Scores = {}
    for step, n in enumerate(last[:10]):
        weight.setdefault(int(log.items[n]), 1 - step / 10)
    found = []
    for visit in _visits(log, shown):
        shared = [weight[item] for item in {int(log.items[n]) for n in visit} if item in weight]
        if shared and visit[0] not in _with(log, last):
            found.append((sum(shared) * max(shared), sorted({int(log.items[n]) for n in visit})))
    return found


def _with(log: StreamLog, last: list[int]) -> set[int]:
    """All rows of the visit that `last` is of, shown or not."""
    visits = _visits(log, len(log))
    return next(set(visit) for visit in visits if last[0] in visit)


@pytest.mark.parametrize("sessions", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_session_neighbours_vote_by_shared_items_weighted_by_position(seed: int, *, sessions: bool) -> None:
    log, shown = _log(seed, sessions=sessions), 150
    rows = list(range(155, 175))
    for row, found in zip(rows, _asked(SessionNeighbours(log, Visits(log)), log, rows, shown=shown), strict=True):
        expected: Scores = {}
        for similarity, items in _neighbours(log, row, shown):
            for item in items:
                expected[item] = expected.get(item, 0.0) + similarity
        assert _groups(found) == _groups(_then_popular(expected, log, shown))


def test_of_many_neighbours_the_most_similar_of_the_newest_vote() -> None:
    """User 0 looks at a and b. 450 old visits with both, 300 with a alone, 250 newest with b alone."""
    visits = [["a", "b", "old"]] * 450 + [["a", "middle"]] * 300 + [["b", "new"]] * 250 + [["a", "b", "end"]]
    rows = [(f"u{n:05}", item) for n, visit in enumerate(visits) for item in visit]
    log = stream_of(
        pl.DataFrame(
            {
                "event_type": "click",
                "user_id": [user for user, _ in rows],
                "item_id": [item for _, item in rows],
                "event_time": 1_000_000_000_000 + np.arange(len(rows)) * 1_000,
            }
        )
    )
    asked = len(log) - 1
    (found,) = _asked(SessionNeighbours(log, Visits(log)), log, [asked], shown=asked)
    named = {log.item_ids[item]: score for item, score in found.items()}
    # The 500 newest: all 250 with b (the user's last item, weight 1) and 250 with a (0.9): 100 of those with b.
    assert named["new"] == pytest.approx(100 * 1.0, abs=0.01)
    assert named["middle"] < 0.01
    assert named["old"] < 0.01


def test_a_users_factors_solve_the_weighted_least_squares() -> None:
    """(Y'Y + Y'(C - I)Y + 0.01 I) x = Y'C p, with confidence 40 per event (Hu et al. 2008, equation 4)."""
    log, shown, rows = _log(0), 200, np.arange(205, 225)
    arm = ImplicitFactors(log)
    arm.observe(0, shown)
    support, there = log.before(rows, 64)
    arm.candidates(rows, support)
    found = arm._users(np.where(there, log.items[support], -1))
    factors = arm._model.item_factors.astype(np.float64)
    for user, own in zip(found, support, strict=True):
        counts = np.bincount(log.items[own[own >= 0]], minlength=len(log.item_ids))
        left = factors.T @ (np.where(counts, 40.0 * counts, 1.0)[:, None] * factors) + 0.01 * np.eye(64)
        assert left @ user == pytest.approx(factors.T @ (40.0 * counts), rel=1e-2, abs=1e-2)


def test_factors_follow_tastes_and_are_fitted_anew_as_time_passes() -> None:
    """Two crowds, who at noon swap what they like."""
    hours, users = 24, 20
    rows = [(hour, user) for hour in range(hours) for user in range(users)]
    rng = np.random.default_rng(0)
    items = [f"{'ab'[(user % 2) ^ (hour >= 12)]}{rng.integers(8)}" for hour, user in rows]
    log = stream_of(
        pl.DataFrame(
            {
                "event_type": "click",
                "user_id": [f"u{user:02}" for _, user in rows],
                "item_id": items,
                "event_time": 1_000_000_000_000 + np.arange(len(rows)) * (60 * MINUTE // users),
            }
        )
    )
    arm = ImplicitFactors(log)
    arm.observe(0, 200)
    before = arm.candidates(np.array([200]), log.before(np.array([200]), 64)[0])
    liked = [log.item_ids[item][0] for item in before[0][0, np.argsort(-before[1][0])][:4]]
    assert set(liked) == {"a"}  # user 0
    first = arm._item_factors.copy()
    arm.candidates(np.array([201]), log.before(np.array([201]), 64)[0])
    assert (arm._item_factors == first).all()
    arm.observe(200, 460)
    arm.candidates(np.array([460]), log.before(np.array([460]), 64)[0])
    assert not (arm._item_factors == first).all()


def test_self_attention_learns_what_follows_what() -> None:
    """Every user walks round a ring of ten items."""
    rows = [(step, user) for step in range(30) for user in range(40)]
    log = stream_of(
        pl.DataFrame(
            {
                "event_type": "click",
                "user_id": [f"u{user:02}" for _, user in rows],
                "item_id": [f"i{(user + step) % 10}" for step, user in rows],
                "event_time": 1_000_000_000_000 + np.arange(len(rows)) * 1_000,
            }
        )
    )
    asked = np.arange(800, 840)
    arm = SasRec(log)
    arm.observe(0, 800)
    answers = _answers(arm, log, asked)
    best = [_in_order(answer)[0] for answer in answers]
    assert np.mean(np.array(best) == log.items[asked]) > 0.9


@pytest.mark.parametrize("name", MAKERS)
def test_an_arm_never_looks_ahead(name: str) -> None:
    """Two logs that are alike up to a row get the same lists at that row."""
    row = 120
    answers = []
    for last in (EVENTS, row):
        log = stream_of(_table(3, last=last))
        rows = np.array([row])
        support, _ = log.before(rows, 64)
        # The row asked for is another user's in the other log: of it only the time is used.
        arm = MAKERS[name](log)
        arm.observe(0, row)
        answers.append(arm.candidates(rows, np.arange(row - 1, row - 1 - support.shape[1], -1)[None, :40]))
    assert (answers[0][0] == answers[1][0]).all()
    assert answers[0][1] == pytest.approx(answers[1][1])


@pytest.mark.parametrize("name", SIMPLE)
def test_events_may_be_shown_in_any_portions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covisits, "_AT_ONCE", 50)
    log = _log(4)
    arm, other = MAKERS[name](log), MAKERS[name](log)
    for first in range(0, 180, 9):
        other.observe(first, first + 9)
    rows = list(range(180, 184))
    whole = _asked(arm, log, rows, shown=180)
    for answer, in_portions in zip(whole, _answers(other, log, np.array(rows)), strict=True):
        assert answer == pytest.approx(in_portions)


@pytest.mark.parametrize("name", MAKERS)
def test_a_moments_list_does_not_depend_on_the_others_asked_for(name: str) -> None:
    log = _log(5)
    rows = np.arange(180, 190)
    arm = MAKERS[name](log)
    arm.observe(0, 180)
    log.times[rows] = log.times[180]  # all at once: the last hour is the same
    support, _ = log.before(rows, 64)
    together = arm.candidates(rows, support)
    for number, row in enumerate(rows):
        alone = arm.candidates(rows[number : number + 1], support[number : number + 1])
        found, expected = (
            {i: s for i, s in zip(items.tolist(), scores.tolist(), strict=True) if i >= 0}
            for items, scores in ((alone[0][0], alone[1][0]), (together[0][number], together[1][number]))
        )
        assert found == pytest.approx(expected, abs=1e-4), row


@pytest.mark.parametrize("name", MAKERS)
def test_without_a_history_or_any_event_an_arm_still_answers(name: str) -> None:
    log = _log(6)
    arm = MAKERS[name](log)
    nothing = np.full((3, 5), -1)
    items, scores = arm.candidates(np.arange(3), nothing)
    assert len(items) == len(scores) == 3
    assert (items < 0).all()
    arm.observe(0, 100)
    items, _ = arm.candidates(np.arange(100, 103), nothing)
    assert (items >= 0).any(1).all()


@pytest.mark.parametrize("name", ["ials", "sasrec"])
def test_the_same_seed_gives_the_same_scores(name: str) -> None:
    log = _log(7)
    (one,), (other,) = (_asked(MAKERS[name](log), log, [150], shown=150) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", ["ials", "sasrec"])
def test_what_draws_at_random_draws_by_the_runs_seed(name: str) -> None:
    log = _log(7)

    def scores(seed: int) -> Scores:
        (arm,) = (arm for arm in baselines(log, StreamOptions(), seed=seed) if arm.name == name)
        return _asked(arm, log, [150], shown=150)[0]

    assert scores(5) == scores(5) != scores(6)


def test_every_log_gets_the_arms_that_apply() -> None:
    shop, bare = _log(8), stream_of(_table(8).drop("category").with_columns(event_type=pl.lit("click")))
    assert {arm.name for arm in baselines(shop, StreamOptions())} == NAMES == set(MAKERS)
    assert all(MAKERS[arm.name](shop).name == arm.name for arm in baselines(shop, StreamOptions()))
    own = {"recents", "carted-recents"}
    assert {arm.name for arm in baselines(shop, StreamOptions(remove_seen=True))} == NAMES - own
    assert {arm.name for arm in baselines(bare, StreamOptions())} == NAMES - {
        "carted-recents",
        "popularity-in-category",
    }
