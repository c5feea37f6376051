import itertools
import logging
from random import Random
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.score_view import ScoreView, Tombstone
from innerloop.scores import AdScores, AdsKind, RecommendationScores, ScoredItem

KEY = b"u-1"


def scores(
    model_version: int = 1, support_version: int = 1, scored_at: int = 1_000, *, user: str = "u-1", item: str = "a"
) -> RecommendationScores:
    return RecommendationScores(
        user_id=user,
        model="recommendations",
        model_version=model_version,
        support_version=support_version,
        support_size=support_version,
        event_time=500,
        scored_at=scored_at,
        method="bayes",
        items=[ScoredItem(item_id=item, score=1.0)],
    )


def put(view: ScoreView, record: RecommendationScores) -> object:
    return view.apply(record.user_id.encode(), msgspec.json.encode(record))


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 1, 9), (1, 2, 8), (2, 1, 7), (1, 9, 99)])))
def test_the_highest_order_holds_whichever_comes_last(order: tuple[tuple[int, int, int], ...]) -> None:
    view = ScoreView("recommendations")
    advanced = [each for each in order if put(view, scores(*each)) is not None]
    assert view.get("u-1") == scores(2, 1, 7)
    assert advanced == sorted(advanced)
    assert len(advanced) + view.stale_dropped == 4


def test_an_exact_repeat_is_dropped_and_counted() -> None:
    view = ScoreView("recommendations")
    assert put(view, scores()) == scores()
    assert put(view, scores()) is None
    assert view.stale_dropped == 1


def test_of_the_same_order_the_later_computation_holds_both_ways_round() -> None:
    early, late = scores(scored_at=10, item="old"), scores(scored_at=20, item="new")
    for first, second in ((early, late), (late, early)):
        view = ScoreView("recommendations")
        put(view, first)
        put(view, second)
        assert view.get("u-1") == late


def test_a_later_computation_never_moves_the_order_back() -> None:
    view = ScoreView("recommendations")
    put(view, scores(2, 5, scored_at=10))
    assert put(view, scores(1, 9, scored_at=99_999)) is None
    assert put(view, scores(2, 4, scored_at=99_999)) is None
    assert view.get("u-1") == scores(2, 5, scored_at=10)


def test_a_tombstone_forgets_the_user_and_the_order() -> None:
    view = ScoreView("recommendations")
    put(view, scores(3, 30))
    assert view.apply(KEY, None) == Tombstone("u-1")
    assert view.get("u-1") is None
    assert len(view) == 0
    assert put(view, scores(1, 1)) == scores(1, 1), "a user who comes back begins at the first version"


AD = AdScores(
    user_id="u-1",
    model="ads",
    model_version=1,
    support_version=1,
    support_size=1,
    event_time=1,
    scored_at=1,
    method="bayes",
    ads=[],
)
BAD = [
    (KEY, b""),
    (KEY, b"{"),
    (KEY, b"[]"),
    (KEY, b"\xff\xfe"),
    (KEY, b"[" * 100_000),
    (KEY, msgspec.json.encode(AD)),
    (KEY, msgspec.json.encode({**msgspec.to_builtins(scores()), "model": "ads"})),
    (KEY, msgspec.json.encode({**msgspec.to_builtins(scores()), "model_version": "1"})),
    (b"somebody else", msgspec.json.encode(scores())),
    (b"\xff", msgspec.json.encode(scores())),
    (None, msgspec.json.encode(scores())),
    (None, None),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_what_is_no_score_record_is_skipped_counted_and_logged(
    key: bytes | None, value: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    view = ScoreView("recommendations")
    put(view, scores(5, 5))
    with caplog.at_level(logging.WARNING):
        assert view.apply(key, value) is None
    assert view.undecodable == 1
    assert len(caplog.messages) == 1
    assert view.get("u-1") == scores(5, 5)


def test_ads_of_a_kind_from_a_later_version_are_read_as_a_ranking() -> None:
    view = ScoreView("ads")
    assert view.apply(KEY, msgspec.json.encode({**msgspec.to_builtins(AD), "kind": "margin"})) is not None
    assert view.undecodable == 0
    found = view.get("u-1")
    assert isinstance(found, AdScores)
    assert found.kind not in get_args(AdsKind)


def test_a_view_of_one_user_keeps_nobody_else() -> None:
    view = ScoreView("recommendations", user_id="u-2")
    assert put(view, scores(user="u-1")) is None
    assert put(view, scores(user="u-2")) is not None
    assert view.users() == ["u-2"]


RECORDS = st.lists(st.tuples(*[st.integers(0, 3)] * 3, st.sampled_from(["u-1", "u-2"])), max_size=30)


@given(RECORDS, st.randoms())
def test_readers_agree_whatever_order_the_records_came_in(
    records: list[tuple[int, int, int, str]], random: Random
) -> None:
    shuffled = random.sample(records, len(records))
    views = [ScoreView("recommendations"), ScoreView("recommendations")]
    for view, order in zip(views, (records, shuffled), strict=True):
        for model, support, scored, user in order:
            put(view, scores(model, support, scored, user=user))
    for user in ("u-1", "u-2"):
        best = max((each[:3] for each in records if each[3] == user), default=None)
        expected = None if best is None else scores(*best, user=user)
        assert views[0].get(user) == views[1].get(user) == expected
