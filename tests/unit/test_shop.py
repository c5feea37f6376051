import itertools

import numpy as np
import polars as pl

from innerloop.evaluation.prequential import HitRates
from innerloop.evaluation.shop import SCHEMA, Process, Shop, messages


def test_the_same_seed_gives_the_same_events_and_another_seed_others() -> None:
    first, again, other = (Shop(seed, users=100, items=300).history(3_000) for seed in (7, 7, 8))
    assert first.equals(again)
    assert not first.equals(other)


def test_the_stream_goes_on_where_the_history_stops() -> None:
    whole = Shop(1, users=100, items=300).history(4_000)
    shop = Shop(1, users=100, items=300)
    begun = [shop.history(1_234), shop.history(1)]
    rest = itertools.islice(shop.stream(), 5)
    joined = pl.concat([*begun, *rest])
    both = min(whole.height, joined.height)
    assert both > 2_000
    assert joined.head(both).equals(whole.head(both))


def test_events_are_ordered_named_once_and_typed() -> None:
    events = Shop(2, users=100, items=300).history(5_000)
    assert dict(events.schema) == SCHEMA
    assert events["event_time"].is_sorted()
    assert events["event_id"].n_unique() == events.height == 5_000
    required = ["event_id", "event_type", "user_id", "item_id", "event_time", "session_id", "category", "price"]
    assert sum(events.select(required).null_count().row(0)) == 0
    assert set(events["event_type"]) == {"click", "purchase"}


def test_every_purchase_follows_a_click_of_that_user_on_that_item() -> None:
    events = Shop(3, users=100, items=300).history(5_000)
    clicked: set[tuple[str, str]] = set()
    purchases = 0
    for kind, user, item in events.select("event_type", "user_id", "item_id").iter_rows():
        if kind == "click":
            clicked.add((user, item))
        else:
            purchases += 1
            assert (user, item) in clicked
    assert purchases > 100


def test_an_ad_promotes_one_item_and_ads_change() -> None:
    events = Shop(4, users=100, items=300, process=Process(ads=5)).history(20_000).drop_nulls("ad_id")
    assert (
        events.group_by("ad_id").agg(pl.col("item_id").n_unique())["item_id"].to_list()
        == [1] * events["ad_id"].n_unique()
    )
    assert events["ad_id"].n_unique() > 5
    assert set(events["event_type"]) == {"click"}


def test_new_items_and_new_users_come_and_none_before_its_time() -> None:
    shop = Shop(5, users=50, items=300, process=Process(launch_days=5.0))
    events = shop.history(20_000)
    seen = events.join(shop.catalogue(), on="item_id")
    assert (seen["event_time"] >= seen["launched"]).all()
    late = shop.catalogue().filter(pl.col("launched") > events["event_time"][0])["item_id"]
    assert events["item_id"].is_in(late.implode()).sum() > 500
    assert events["user_id"].n_unique() > 150


def test_messages_leave_out_what_is_null() -> None:
    first = next(messages(Shop(6, users=10, items=30).history(10).filter(pl.col("event_type") == "click")))
    assert {"event_id", "user_id", "item_id", "event_time"} <= first.keys()
    assert None not in first.values()
    assert "quantity" not in first


def test_clicks_follow_attraction_and_taste_as_the_text_says() -> None:
    """With no taste in it, the share of each item is the softmax of its attraction."""
    process = Process(focus=0.0, ad_share=0.0, purchase_rate=0.0, launch_days=0.001)
    shop = Shop(9, users=50, items=20, process=process)
    shop.history(2_000)
    events = shop.history(40_000)
    counts = dict(events["item_id"].value_counts().iter_rows())
    expected = np.exp(shop._attraction) / np.exp(shop._attraction).sum()
    shares = np.array([counts.get(i, 0) for i in shop.catalogue()["item_id"]]) / events.height
    np.testing.assert_allclose(shares, expected, atol=0.01)


def test_hit_rates_count_each_arm_and_skip_users_without_a_list() -> None:
    rates = HitRates(seed=0)
    newest = {"u": ["a"], "v": ["b"]}
    rates.observe("w", "a", newest, ["c"])
    rates.observe("u", "a", newest, ["c"])
    rates.observe("u", "b", newest, ["c"])
    rates.observe("v", "c", newest, ["c"])
    assert (rates.without_list, rates.clicks) == (1, 3)
    assert rates.rates() == {"adapted": 1 / 3, "unadapted": 1 / 3, "placebo": 1 / 3}


def test_the_placebo_is_never_the_users_own_list_and_reaches_everyone_else() -> None:
    newest = {str(n): [str(n)] for n in range(5)}
    rates = HitRates(seed=1)
    drawn = [rates._another("3", newest) for _ in range(400)]
    assert set(drawn) == {"0", "1", "2", "4"}
    assert min(drawn.count(name) for name in set(drawn)) > 60
    assert HitRates()._another("x", {"x": []}) is None
