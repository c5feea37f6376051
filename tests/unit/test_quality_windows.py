import math
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from innerloop.evaluation.quality.figures import JudgedClick, effective_clicks, lifts
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.evaluation.quality.state import AdsListed, Batch, Click, Listed, Progress, Purchase, User
from innerloop.evaluation.quality.windows import QualityWindows, WindowShape, held_against
from innerloop.holdout import place

SHAPE = WindowShape(window_ms=1_000, grace_ms=500, idle_ms=2_000)


def click(time: int, item: str = "a", *, user: str = "u", arrived: int | None = None, mark: int | None = None) -> Click:
    return Click(user, time, time if arrived is None else arrived, item, None, time if mark is None else mark)


def listed(time: int, items: list[str], *, published: int | None = None, version: int = 1, user: str = "u") -> Listed:
    at = time + 10 if published is None else published
    return Listed(user, version, time, at, time, at, "adapted", items)


def closed(windows: QualityWindows, now: int) -> list[QualityWindow]:
    found = []
    for start in windows.closable(now):
        found.append(windows.judge(start, now))
        windows.close(start)
    return found


def told(*batches: Batch, until: int) -> list[QualityWindow]:
    """The windows that are closed when the clock alone goes on for a while."""
    windows = QualityWindows(SHAPE)
    found = []
    for batch in batches:
        windows.hear(batch)
    for now in range(batches[-1].at, until, 1_000):
        windows.hear(Batch("", now))
        found += closed(windows, now)
    return found


def awake(now: int) -> QualityWindows:
    """With the start well behind it: the clock has ticked once a second."""
    windows = QualityWindows(SHAPE)
    for at in range(0, now, 1_000):
        windows.hear(Batch("", at + 1))
    return windows


def test_a_list_that_knew_the_click_never_judges_it() -> None:
    lists = [listed(1_000, ["a"]), listed(2_000, ["b"])]
    (window,) = told(Batch("c", 2_005, clicks=[click(2_000, "b")], lists=lists), until=9_000)
    assert [at.hits for at in window.arms[0].at] == [0, 0]


def test_a_list_that_knew_the_click_does_not_judge_it_by_a_wrong_clock() -> None:
    lists = [listed(1_000, ["a"]), listed(2_000, ["b"], published=1_500)]
    (window,) = told(Batch("c", 2_005, clicks=[click(2_000, "b")], lists=lists), until=9_000)
    assert window.arms[0].at[0].hits == 0


def test_a_list_that_was_published_after_the_click_does_not_judge_it() -> None:
    lists = [listed(1_000, ["a"]), listed(1_500, ["b"], published=2_000)]
    (window,) = told(Batch("c", 2_005, clicks=[click(2_000, "b")], lists=lists), until=9_000)
    assert window.arms[0].at[0].hits == 0


def test_the_list_with_the_higher_order_judges_whichever_came_last() -> None:
    lists = [listed(1_000, ["b"], version=2, published=1_100), listed(1_500, ["c"], version=1, published=1_600)]
    (window,) = told(Batch("c", 2_005, clicks=[click(2_000, "b")], lists=lists), until=9_000)
    assert window.versions[0].model_version == 2
    assert window.arms[0].at[0].hits == 1


def test_order_repetition_and_division_into_batches_change_nothing() -> None:
    rng = random.Random(0)
    clicks = [click(rng.randrange(9_000), rng.choice("abc"), user=rng.choice("uvw"), mark=n) for n in range(60)]
    lists = [listed(rng.randrange(9_000), rng.sample("abcdef", 3), user=rng.choice("uvw")) for _ in range(60)]
    whole = Batch("c", 10_000, clicks=clicks, lists=lists)
    expected = [msgspec.structs.replace(each, closed_at=0) for each in told(whole, until=60_000)]
    assert len(expected) == 9
    for _ in range(10):
        rng.shuffle(clicks)
        rng.shuffle(lists)
        cut = rng.randrange(60)
        parts = [
            Batch("c", 10_000, clicks=clicks[cut:]),
            Batch("d", 10_000, lists=lists),
            Batch("c", 10_000, clicks=clicks[:cut], lists=lists[:cut]),
            Batch("c", 10_000, clicks=clicks[:20]),
        ]
        rng.shuffle(parts)
        assert [msgspec.structs.replace(each, closed_at=0) for each in told(*parts, until=60_000)] == expected


def test_memory_given_back_goes_on_alike() -> None:
    first = Batch("c", 10_000, clicks=[click(1_500)], lists=[listed(1_000, ["a"])])
    windows = QualityWindows(SHAPE)
    windows.hear(first)
    users = {name: msgspec.msgpack.decode(msgspec.msgpack.encode(u), type=User) for name, u in windows.users.items()}
    progress = msgspec.msgpack.decode(msgspec.msgpack.encode(windows.progress), type=Progress)
    again = QualityWindows(SHAPE, users, progress)
    again.hear(first)
    windows.hear(Batch("", 30_000))
    again.hear(Batch("", 30_000))
    assert closed(again, 32_000) == closed(windows, 32_000) != []


def test_a_window_waits_for_its_grace_and_what_is_later_is_counted() -> None:
    windows = awake(5_000)
    windows.hear(Batch("c", 5_000, clicks=[click(100)], lists=[listed(10, ["a"])]))
    windows.hear(Batch("", 6_500))
    windows.hear(Batch("c", 7_500, clicks=[click(1_499)]))
    assert windows.closable(7_500) == [], "1 499 is not yet the end and the grace"
    windows.hear(Batch("c", 7_600, clicks=[click(1_500), click(999)]))
    (window,) = closed(windows, 7_600)
    assert (window.window_start, window.clicks, window.late) == (0, 2, 0)
    windows.hear(Batch("c", 7_700, clicks=[click(998), click(3_500)]))
    (window,) = closed(windows, 7_700)
    assert (window.window_start, window.clicks, window.late) == (1_000, 2, 1)


def test_a_partition_that_is_behind_holds_the_windows_back_until_it_is_idle() -> None:
    windows = awake(5_000)
    windows.hear(Batch("c/0", 5_000, clicks=[click(100)]))
    windows.hear(Batch("", 6_500))
    windows.hear(Batch("c/0", 8_000, clicks=[click(5_000)]))
    windows.hear(Batch("c/1", 8_000, clicks=[click(200)]))
    assert windows.closable(8_000) == []
    windows.hear(Batch("c/0", 9_500, clicks=[click(5_000, mark=1)]))
    assert windows.closable(10_001) == [0]


def test_nothing_closes_before_every_partition_had_its_turn_after_a_pause() -> None:
    windows = awake(5_000)
    windows.hear(Batch("c/0", 5_000, clicks=[click(100)]))
    windows.hear(Batch("c/0", 60_000, clicks=[click(50_000)]))
    assert windows.closable(60_000) == []
    windows.hear(Batch("c/1", 60_500, clicks=[click(300)]))
    assert windows.closable(61_900) == []


def test_a_time_ahead_of_its_arrival_does_not_close_windows() -> None:
    windows = awake(5_000)
    windows.hear(Batch("c", 5_000, clicks=[click(100)]))
    windows.hear(Batch("", 6_500))
    windows.hear(Batch("c", 7_500, clicks=[click(99_000, arrived=900)]))
    assert windows.closable(7_500) == []


@pytest.mark.parametrize(("label_ms", "purchases", "told_in"), [(3_000, 1, 5_000), (1_500, 0, 3_000), (500, 0, 2_000)])
def test_a_click_on_an_ad_waits_as_long_as_the_deployment_says(label_ms: int, purchases: int, told_in: int) -> None:
    """Clicked at 2 s, bought at 4 s: told in the window in which the click's own window of `label_ms` ends."""
    windows, found = QualityWindows(replace(SHAPE, label_ms=label_ms)), []
    ads = [AdsListed("u", 1, 1_000, 1_010, 1_000, 1_010, "adapted", ["ad"], [0.25])]
    clicks = [Click("u", 2_000, 2_000, "a", "ad", 1), click(3_500), click(4_500), click(5_500)]
    windows.hear(Batch("c", 6_000, clicks=clicks, purchases=[Purchase("u", 4_000, "a")], ads=ads))
    for now in range(6_000, 20_000, 1_000):
        windows.hear(Batch("", now))
        found += closed(windows, now)
    told = [(window.window_start, arm.ads) for window in found for arm in window.arms if arm.ads is not None]
    assert [(start, of.clicks, of.purchases) for start, of in told] == [(told_in, 1, purchases)]


def test_an_erased_user_is_forgotten_at_once() -> None:
    windows = QualityWindows(SHAPE)
    windows.hear(Batch("c", 5_000, clicks=[click(100)], lists=[listed(10, ["a"])], purchases=[Purchase("u", 20, "a")]))
    windows.take_changes()
    windows.hear(Batch("s", 5_100, forgotten=["u", "stranger"]))
    assert windows.users == {}
    assert windows.take_changes() == {"u"}


def test_memory_is_bounded_and_the_longest_unseen_go_first() -> None:
    windows = QualityWindows(WindowShape(1_000, 500, 2_000, most_users=20))
    for n in range(200):
        windows.hear(Batch("s", 5_000 + n, lists=[listed(n, ["a"], user=f"u{n}")]))
        assert len(windows.users) <= 20
    assert "u199" in windows.users
    windows.hear(Batch("c", 5_300, clicks=[click(5_250, user="u199", mark=-1)]))
    placebo = windows.judge(5_000, 9_000).arms[1]
    assert (placebo.arm, placebo.clicks) == ("placebo", 1), "of those who are still remembered"
    for n in range(1_000):
        windows.hear(Batch("s", 9_000, lists=[listed(n, ["a"])], clicks=[click(1_000, mark=n)]))
    assert len(windows.users["u"].lists) == len(windows.users["u"].clicks) == 256


# --- the placebo


def test_the_placebo_is_the_list_another_adapted_user_had_at_the_click() -> None:
    """Whoever has none, only one that came after the click, or is of the hold-out, is passed over."""
    late = listed(1_000, ["b"], published=3_000, user="late")
    held = msgspec.structs.replace(listed(1_000, ["b"], user="held"), arm="hold_out")
    lists = [listed(1_000, ["a"]), late, held]
    clicks = [click(2_000, "b"), click(2_100, "b", user="listless")]
    (window,) = told(Batch("c", 3_005, clicks=clicks, lists=lists), until=9_000)
    assert [(each.arm, each.clicks) for each in window.arms] == [("adapted", 1)], "nobody else's"
    lists += [listed(1_000, ["b"], user="other"), listed(1_500, ["c", "b"], user="other")]
    (window,) = told(Batch("c", 3_005, clicks=clicks, lists=lists), until=9_000)
    adapted, placebo = window.arms
    assert (adapted.arm, adapted.at[0].hits, placebo.arm, placebo.at[0].mrr) == ("adapted", 0, "placebo", 0.5)
    assert (placebo.users, placebo.clicks, placebo.ads) == (1, 1, None)
    assert (window.clicks, window.without_list, window.lift) == (2, 1, []), "its clicks are counted once"


def test_clicks_that_the_hold_outs_lists_judge_have_no_placebo() -> None:
    held = msgspec.structs.replace(listed(1_000, ["a"]), arm="hold_out")
    batch = Batch("c", 2_005, clicks=[click(2_000)], lists=[held, listed(1_000, ["a"], user="other")])
    (window,) = told(batch, until=9_000)
    assert [each.arm for each in window.arms] == ["hold_out"]


def test_the_placebo_is_the_next_in_the_order_of_a_hash_whoever_came_and_went() -> None:
    """Also when the memory is given back: the user's place is all it depends on."""
    names = [f"u{n}" for n in range(40)]
    lists = [listed(1_000, names[n:] + names[:n], user=name) for n, name in enumerate(names)]
    clicks = [click(2_000, rank, user=name, mark=int(rank[1:])) for name in names for rank in names[:3]]
    windows = QualityWindows(SHAPE)
    windows.hear(Batch("c", 2_005, clicks=clicks, lists=lists))
    windows.hear(Batch("c", 2_006, forgotten=names[10:20]))
    left = sorted(names[:10] + names[20:], key=lambda name: place(name, 20_260_103))
    following = dict(zip(left, left[1:] + left[:1], strict=True))
    by_user = {each.user_id: each for each in lists}
    ranks = [by_user[following[c.user_id]].items.index(c.item_id) for c in clicks if c.user_id in following]
    for each in (windows, QualityWindows(SHAPE, windows.users, windows.progress)):
        placebo = each.judge(2_000, 9_000).arms[1]
        assert [at.hits for at in placebo.at] == [sum(rank < k for rank in ranks) for k in (10, 20)]
        assert placebo.at[1].mrr == pytest.approx(sum(1 / (1 + r) for r in ranks if r < 20) / len(ranks), abs=1e-6)


def test_a_click_looks_at_a_bounded_number_of_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def counted(click: Click, lists: list[Listed]) -> Listed | None:
        looked.append(click)
        return held_against(click, lists)

    monkeypatch.setattr("innerloop.evaluation.quality.windows.held_against", counted)
    windows = QualityWindows(SHAPE)
    lists = [listed(5_000, ["a"], user=f"later{n}") for n in range(1_000)]
    windows.hear(Batch("c", 6_000, clicks=[click(2_000)], lists=[listed(1_000, ["a"]), *lists]))
    assert [each.arm for each in windows.judge(2_000, 9_000).arms] == ["adapted"]
    assert len(looked) == 1 + 64


# --- the interval


def judged(arm: str, hits: int, clicks: int, per_user: int = 1) -> list[JudgedClick]:
    return [JudgedClick(f"{arm}-{n // per_user}", arm, 1, 1 if n < hits else 0) for n in range(clicks)]  # type: ignore[arg-type]


def test_the_interval_of_independent_clicks_is_newcombes() -> None:
    """His own examples (1998, table II, method 10): 56/70 against 48/80, and 10/10 against 0/10."""
    lift = lifts(judged("adapted", 56, 70) + judged("hold_out", 48, 80))[0]
    assert (lift.difference, lift.low, lift.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    lift = lifts(judged("adapted", 10, 10) + judged("hold_out", 0, 10))[0]
    assert (lift.difference, lift.low, lift.high) == pytest.approx((1.0, 0.6075, 1.0), abs=1e-4)


def test_clicks_of_one_user_that_are_alike_count_as_one() -> None:
    hits = np.repeat([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], 5)
    assert effective_clicks(hits, np.repeat(np.arange(8), 5)) == pytest.approx(8, rel=0.15)
    assert effective_clicks(np.ones(40), np.repeat(np.arange(8), 5)) == pytest.approx(8)
    assert effective_clicks(hits, np.arange(40)) == pytest.approx(40)
    assert effective_clicks(hits, np.zeros(40, np.int64)) == 1


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Users who click up to nine times, some of whom like everything: the plain interval would cover far less."""
    rng, covered, runs = random.Random(1), 0, 300
    for _ in range(runs):
        clicks = []
        for arm, rate in (("adapted", 0.3), ("hold_out", 0.15)):
            for user in range(120):
                own = 1.0 if rng.random() < rate / 2 else rate / 2 / (1 - rate / 2)
                for _ in range(rng.randrange(1, 10)):
                    hit = 1 if rng.random() < own else 0
                    clicks.append(JudgedClick(f"{arm}{user}", arm, 1, hit))  # type: ignore[arg-type]
        lift = lifts(clicks)[0]
        covered += lift.low <= 0.15 <= lift.high
    assert 0.92 <= covered / runs <= 0.98


def test_without_one_of_the_arms_there_is_no_lift() -> None:
    assert lifts(judged("adapted", 5, 10)) == []
    assert all(
        math.isfinite(x)
        for each in lifts(judged("adapted", 0, 1) + judged("hold_out", 0, 1))
        for x in (each.low, each.high)
    )
