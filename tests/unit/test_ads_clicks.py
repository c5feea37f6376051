"""Clicks on what is shown: labels against a plain loop, and a release taught by impressions whose chances are known."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.attribution import DAY, HOUR, NEVER
from innerloop.learning.ads.click_head import ClickHead
from innerloop.learning.ads.click_model import ClickModel
from innerloop.learning.ads.click_teaching import learn_clicks
from innerloop.learning.ads.figures import auc, calibration_error
from innerloop.learning.ads.impressions import CLICK_WINDOW, attribute_clicks, attribute_purchases, shown_past
from innerloop.learning.releases import Release, load, save
from innerloop.learning.scorer import Scorer
from innerloop.learning.training import train
from innerloop.support import EXAMPLE, SupportSets, gather

CPU, START = torch.device("cpu"), 1_750_000_000_000
_ITEMS, _CATEGORIES, _USERS = 40, 4, 500
_DAYS, _TRAINED, _CLICKED_AFTER = 9, 7, 20_000
Row = tuple[int, int, int, str]
"""User, item, time, kind."""


def _plain(rows: list[Row]) -> list[tuple[int, int]]:
    """When each impression was clicked and bought, NEVER if not, in their order: the definitions, one by one."""
    found = []
    for user, item, time, kind in rows:
        if kind != "impression":
            continue
        mine = [(t, k) for u, i, t, k in rows if (u, i) == (user, item) and t > time]
        clicks = [t for t, k in mine if k == "click" and t - time <= CLICK_WINDOW]
        again = min((t for t, k in mine if k == "impression"), default=NEVER)
        clicked = min(clicks, default=NEVER)
        clicked = clicked if clicked <= again else NEVER
        bought = min((t for t, k in mine if k == "purchase" and clicked < t <= clicked + DAY), default=NEVER)
        found.append((clicked, bought if clicked < NEVER else NEVER))
    return found


def _labels(rows: list[Row]) -> list[tuple[int, int]]:
    users, items, times = (np.array([row[n] for row in rows], np.int64) for n in range(3))
    kinds = np.array([row[3] for row in rows])
    seen = kinds == "impression"
    clicked = attribute_clicks(users, items, times, seen, kinds == "click")
    bought = attribute_purchases(users, items, clicked, kinds == "purchase")
    return list(zip(clicked.converted_at[seen].tolist(), bought[seen].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_those_of_a_plain_loop(seed: int) -> None:
    """Few users, items and times, so that everything collides: repeats, ties, late clicks, purchases unclicked."""
    rng = random.Random(seed)
    kinds = ("impression",) * 4 + ("click",) * 2 + ("purchase",)
    unit = rng.choice((1, HOUR // 2, DAY // 3))
    rows = [(rng.randrange(3), rng.randrange(3), unit * rng.randrange(12), rng.choice(kinds)) for _ in range(80)]
    assert _labels(rows) == _plain(rows)


def test_the_edges_of_the_windows() -> None:
    shown = (0, 7, 0, "impression")
    for late, clicked in ((0, NEVER), (1, 1), (CLICK_WINDOW, CLICK_WINDOW), (CLICK_WINDOW + 1, NEVER)):
        assert _labels([shown, (0, 7, late, "click")]) == [(clicked, NEVER)]
    for late, bought in ((5, NEVER), (6, 6), (5 + DAY, 5 + DAY), (6 + DAY, NEVER)):
        assert _labels([shown, (0, 7, 5, "click"), (0, 7, late, "purchase")]) == [(5, bought)]
    assert _labels([shown, (1, 7, 5, "click"), (0, 8, 5, "click"), (0, 7, 9, "purchase")]) == [(NEVER, NEVER)]


def test_a_click_answers_for_the_newest_impression_alone() -> None:
    rows = [(0, 7, time, "impression") for time in (0, 10, 20)]
    assert _labels([*rows, (0, 7, 15, "click")]) == [(NEVER, NEVER), (15, NEVER), (NEVER, NEVER)]
    assert _labels([*rows, (0, 7, 20, "click")])[1] == (20, NEVER)  # not the one that came with it
    assert _labels([rows[0], rows[0], (0, 7, 15, "click")]) == [(15, NEVER)] * 2


def test_serving_and_training_attribute_alike() -> None:
    rng = random.Random(1)
    rows = [
        (user, rng.randrange(4), HOUR // 3 * rng.randrange(20), rng.choice(("impression", "impression", "click")))
        for user in range(3)
        for _ in range(15)
    ]
    rows.sort(key=lambda row: (row[0], row[2]))

    def sets(wanted: str, code: int) -> SupportSets:
        mine = [
            [(t, n, i, 1.0, code) for n, (u, i, t, k) in enumerate(rows) if (u, k) == (user, wanted)]
            for user in range(3)
        ]
        return SupportSets(np.cumsum([0, *map(len, mine)]), np.array([row for each in mine for row in each], EXAMPLE))

    shown, did = sets("impression", 5), sets("click", 1)
    items, did_items = (part.examples["item"].astype(np.int64) for part in (shown, did))
    past = shown_past(shown, items, items % 2, did, did_items)
    served = past.converted_at[past.mask].tolist()
    assert served == [clicked for clicked, _ in _plain(rows)]
    unknown = shown_past(shown, np.full(len(items), -1), items, did, np.full(len(did_items), -1))
    assert (unknown.converted_at == NEVER).all()


# --- a shop whose chances are known


def _sigmoid(
    x: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return np.asarray(1 / (1 + np.exp(-x)))


class _Shop:
    """Chances of a click and of a purchase given it, for every user and item; users differ in what they click."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        category = np.arange(_ITEMS) % _CATEGORIES
        quality = rng.normal(0, 0.7, _ITEMS)
        taste = rng.normal(0, 1.2, (_USERS, _CATEGORIES))
        self.click = _sigmoid(-2.0 + quality + taste[:, category])  # [U, I]
        # What is clicked most is bought least: whoever looks at clicked impressions alone sees another mix of items.
        self.purchase = _sigmoid(-0.8 - 1.2 * quality) * np.ones_like(taste[:, category])

    def history(self, impressions: int = 30_000, seed: int = 1) -> pl.DataFrame:
        rng = np.random.default_rng(seed)
        times = START + np.sort(rng.integers(0, _DAYS * DAY, impressions))
        users, items = rng.integers(0, _USERS, impressions), rng.integers(0, _ITEMS, impressions)
        clicked = rng.random(impressions) < self.click[users, items]
        bought = clicked & (rng.random(impressions) < self.purchase[users, items])
        parts = []
        for kind, some, late in (
            ("impression", np.ones(impressions, bool), 0),
            ("click", clicked, _CLICKED_AFTER),
            ("purchase", bought, HOUR // 2),
        ):
            parts.append(
                pl.DataFrame(
                    {
                        "event_type": [kind] * int(some.sum()),
                        "user_id": [f"u{user}" for user in users[some]],
                        "item_id": [f"i{item:02}" for item in items[some]],
                        "event_time": times[some] + late,
                        "category": [f"c{item % _CATEGORIES}" for item in items[some]],
                    }
                )
            )
        table = pl.concat(parts).sort("event_time", maintain_order=True)
        return table.with_columns(pl.format("e{}", pl.int_range(pl.len())).alias("event_id"))


@pytest.fixture(scope="module")
def shop() -> _Shop:
    return _Shop()


@pytest.fixture(scope="module")
def events(shop: _Shop) -> pl.DataFrame:
    return shop.history()


def _trained(events: pl.DataFrame) -> Release:
    settings = LearningSettings(dimension=8, method="none")
    return train(events, settings=settings, weights={}, capacity=32, version=1)


@pytest.fixture(scope="module")
def known(events: pl.DataFrame) -> pl.DataFrame:
    return events.filter(pl.col("event_time") < START + _TRAINED * DAY)


@pytest.fixture(scope="module")
def release(known: pl.DataFrame) -> Release:
    return _trained(known)


@pytest.fixture(scope="module")
def window_shop(known: pl.DataFrame) -> Release:
    """Of the same impressions and clicks, and no purchases."""
    return _trained(known.filter(pl.col("event_type") != "purchase"))


def _scorer(release: Release) -> Scorer:
    scorer = Scorer(release, CPU)
    scorer.catalogue.add([(n, f"i{n:02}", f"c{n % _CATEGORIES}") for n in range(_ITEMS)])
    scorer.catalogue.set_ads([(f"ad{n:02}", n) for n in range(_ITEMS)])
    return scorer


_KINDS = {"click": 1, "purchase": 4, "impression": 5}


def _state(events: pl.DataFrame, capacity: int, kinds: tuple[str, ...]) -> SupportSets:
    """Every user's newest events of these kinds."""
    rows = events.filter(pl.col("event_type").is_in(kinds)).partition_by("user_id", as_dict=True)
    users = [rows.get((f"u{user}",), events.clear()).tail(capacity) for user in range(_USERS)]
    return _sets(users)


def _one(events: pl.DataFrame, capacity: int, kinds: tuple[str, ...]) -> SupportSets:
    return _sets([events.filter(pl.col("event_type").is_in(kinds)).tail(capacity)])


def _sets(users: list[pl.DataFrame]) -> SupportSets:
    examples = [
        (time, n, int(item[1:]), 1.0, _KINDS[kind])
        for user in users
        for n, (time, item, kind) in enumerate(user.select("event_time", "item_id", "event_type").iter_rows())
    ]
    return SupportSets(np.cumsum([0, *(user.height for user in users)]), np.array(examples, EXAMPLE))


@pytest.fixture(scope="module")
def states(known: pl.DataFrame) -> tuple[SupportSets, SupportSets]:
    return _state(known, 64, ("click", "purchase")), _state(known, 32, ("impression",))


def _chances(release: Release, sets: SupportSets, shown: SupportSets) -> tuple[torch.Tensor, torch.Tensor]:
    """Click and purchase given click of every user and item, [U, I]."""
    found = _scorer(release).ad_lists(sets, _ITEMS, shown)
    order = found.numbers.argsort(1)
    assert found.click is not None
    assert found.purchase_given_click is not None
    np.testing.assert_allclose(found.scores, found.click * found.purchase_given_click, rtol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    parts = (found.click, found.purchase_given_click)
    click, purchase = (torch.from_numpy(np.take_along_axis(part, order, 1)).double() for part in parts)
    return click, purchase


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).abs().mean())


def _correlation(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1])


def test_served_chances_are_close_to_the_true_ones(
    release: Release, shop: _Shop, states: tuple[SupportSets, SupportSets]
) -> None:
    """Of every user and item, shown or not: the truth is what the shop draws from, which nothing here has seen."""
    click, purchase = _chances(release, *states)
    true_click, true_purchase = torch.from_numpy(shop.click), torch.from_numpy(shop.purchase)
    true_both = true_click * true_purchase
    assert float(click.mean() / true_click.mean()) == pytest.approx(1, abs=0.15)
    assert float((click * purchase).mean() / true_both.mean()) == pytest.approx(1, abs=0.25)
    assert _correlation(click, true_click) > 0.7
    assert _correlation(purchase, true_purchase) > 0.7
    assert _correlation(click * purchase, true_both) > 0.6
    assert calibration_error(click.flatten(), true_click.flatten()) < 0.03
    assert calibration_error((click * purchase).flatten(), true_both.flatten()) < 0.015


def test_what_a_user_was_shown_and_did_makes_the_chances_better(
    release: Release, shop: _Shop, states: tuple[SupportSets, SupportSets]
) -> None:
    """Against nobody's state, somebody else's, and the own events without the impressions."""
    sets, shown = states
    truth = torch.from_numpy(shop.click)
    own = _correlation(_chances(release, sets, shown)[0], truth)
    others = torch.arange(_USERS).roll(1).numpy()
    assert own > _correlation(_chances(release, SupportSets.empty(_USERS), SupportSets.empty(_USERS))[0], truth) + 0.2
    assert own > _correlation(_chances(release, gather(sets, others), gather(shown, others))[0], truth) + 0.2
    assert own > _correlation(_chances(release, sets, SupportSets.empty(_USERS))[0], truth)


def test_click_times_purchase_orders_shown_ads_better_than_purchase_given_click(
    release: Release, shop: _Shop, states: tuple[SupportSets, SupportSets]
) -> None:
    """What is clicked most is bought least here, so that the chance given a click is the wrong thing to sort by."""
    assert release.ads is not None
    truth = torch.from_numpy(shop.click * shop.purchase)
    click, purchase = _chances(release, *states)
    found = _scorer(replace(release, ads=replace(release.ads, clicks=None))).ad_lists(states[0], _ITEMS)
    assert found.click is None
    alone = torch.from_numpy(np.take_along_axis(found.scores, found.numbers.argsort(1), 1)).double()
    assert _correlation(click * purchase, truth) > _correlation(alone, truth) + 0.2


def test_the_card_tells_how_good_both_chances_were(release: Release) -> None:
    figures = release.card.metrics
    assert figures["ads_click_auc"] > 0.68
    assert figures["ads_ctcvr_auc"] > 0.62
    assert figures["ads_click_calibration_error"] < 0.04
    assert figures["ads_ctcvr_calibration_error"] < 0.02
    assert figures["ads_impressions"] > figures["ads_click_positives"] > figures["ads_ctcvr_positives"] > 50


def test_held_out_impressions_are_foretold_as_well_as_the_card_says(release: Release, events: pl.DataFrame) -> None:
    """Later impressions, which the release has not seen, each asked about after what its user had done before it."""
    later = events.filter((pl.col("event_time") >= START + _TRAINED * DAY) & (pl.col("event_type") == "impression"))
    asked = later.filter(pl.col("event_time") < START + (_DAYS - 1) * DAY).sample(300, seed=0)
    clicks = set(events.filter(pl.col("event_type") == "click").select("user_id", "item_id", "event_time").rows())
    scorer, predicted, clicked = _scorer(release), [], []
    for user, item, time in asked.select("user_id", "item_id", "event_time").iter_rows():
        mine = events.filter((pl.col("user_id") == user) & (pl.col("event_time") < time))
        sets, shown = (_one(mine, *wanted) for wanted in ((64, ("click", "purchase")), (32, ("impression",))))
        found = scorer.ad_lists(sets, _ITEMS, shown)
        assert found.click is not None
        predicted.append(float(found.click[0][list(found.numbers[0]).index(int(item[1:]))]))
        clicked.append((user, item, time + _CLICKED_AFTER) in clicks)
    p, y = torch.tensor(predicted, dtype=torch.float64), torch.tensor(clicked, dtype=torch.float64)
    assert auc(p, y) > 0.65
    assert float(p.sum() / y.sum()) == pytest.approx(1, abs=0.35)


def test_impressions_change_nothing_but_the_click_head(release: Release, known: pl.DataFrame, tmp_path: Path) -> None:
    """A release of the same events without the impressions: all tensors that both have are equal, bit for bit."""
    without = _trained(known.filter(pl.col("event_type") != "impression"))
    for made, where in ((release, "with"), (without, "without")):
        save(made, tmp_path / where)
    tensors = [load_file(tmp_path / where / "release-1.safetensors") for where in ("with", "without")]
    ours = {name for name in tensors[0] if name.startswith("ads.clicks.")}
    assert ours
    assert set(tensors[0]) - ours == set(tensors[1])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    assert _scorer(without).ads_kind == "purchase_given_click"


def test_a_release_with_a_click_head_comes_back_whole(
    release: Release, states: tuple[SupportSets, SupportSets], tmp_path: Path
) -> None:
    again = load(save(release, tmp_path))
    assert again.ads is not None
    assert again.ads.clicks is not None
    first, second = (_scorer(each).ad_lists(states[0], 5, states[1]) for each in (release, again))
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.numbers, second.numbers)
    damaged = replace(again.ads.clicks, rate=1.5)
    with pytest.raises(SettingsError, match="click-through rate"):
        load(save(replace(again, ads=replace(again.ads, clicks=damaged)), tmp_path / "damaged"))
    short = replace(again.ads.clicks, items=again.ads.clicks.items[:-1])
    with pytest.raises(SettingsError, match="items of its click head"):
        load(save(replace(again, ads=replace(again.ads, clicks=short)), tmp_path / "short"))


def test_a_list_does_not_depend_on_who_else_is_scored(
    release: Release, states: tuple[SupportSets, SupportSets]
) -> None:
    few = np.array([3, 0, 77])
    whole, some = _scorer(release).ad_lists(states[0], 7, states[1]), gather(states[0], few)
    part = _scorer(release).ad_lists(some, 7, gather(states[1], few))
    np.testing.assert_allclose(part.scores, whole.scores[few], rtol=1e-5)


# --- a shop window: clicks, and no purchases


def _clicks(release: Release, sets: SupportSets, shown: SupportSets) -> torch.Tensor:
    """The chance of a click of every user and item, [U, I]."""
    scorer = _scorer(release)
    found = scorer.ad_lists(sets, _ITEMS, shown)
    assert (scorer.ads_kind, scorer.ads_by_click) == ("click", True)
    assert (found.click, found.purchase_given_click) == (None, None)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert ((found.scores > 0) & (found.scores < 1)).all()
    return torch.from_numpy(np.take_along_axis(found.scores, found.numbers.argsort(1), 1)).double()


def test_without_purchases_clicks_are_foretold_alone(
    window_shop: Release, release: Release, shop: _Shop, states: tuple[SupportSets, SupportSets], events: pl.DataFrame
) -> None:
    """Close to what the shop draws from, and to what the same clicks teach beside purchases."""
    sets, shown = _state(events.filter(pl.col("event_time") < START + _TRAINED * DAY), 64, ("click",)), states[1]
    found, truth = _clicks(window_shop, sets, shown), torch.from_numpy(shop.click)
    assert float(found.mean() / truth.mean()) == pytest.approx(1, abs=0.15)
    assert _correlation(found, truth) > 0.7
    assert calibration_error(found.flatten(), truth.flatten()) < 0.03
    assert _error(found, truth) < _error(_chances(release, *states)[0], truth) + 0.01
    nobody = _clicks(window_shop, SupportSets.empty(_USERS), SupportSets.empty(_USERS))
    assert _correlation(found, truth) > _correlation(nobody, truth) + 0.2


def test_the_card_tells_how_good_clicks_alone_were(window_shop: Release) -> None:
    figures = window_shop.card.metrics
    assert figures["ads_click_auc"] > 0.68
    assert figures["ads_click_calibration_error"] < 0.04
    assert figures["ads_click_predicted_over_observed"] == pytest.approx(1, abs=0.2)
    assert {"ads_click_log_loss", "ads_click_positives", "ads_impressions"} <= set(figures)
    assert not {name for name in figures if name.startswith("ads_") and not name.startswith(("ads_click_", "ads_imp"))}


def test_clicks_alone_do_not_depend_on_who_else_is_scored(
    window_shop: Release, states: tuple[SupportSets, SupportSets]
) -> None:
    few = np.array([3, 0, 77])
    part = _clicks(window_shop, gather(states[0], few), gather(states[1], few))
    torch.testing.assert_close(part, _clicks(window_shop, *states)[few], rtol=1e-5, atol=0)


def test_of_a_user_of_whom_nothing_is_known_everybodys_clicks_tell(window_shop: Release, shop: _Shop) -> None:
    nobody = _clicks(window_shop, SupportSets.empty(1), SupportSets.empty(1))[0]
    truth = torch.from_numpy(shop.click.mean(0))
    assert _correlation(nobody, truth) > 0.9
    assert _error(nobody, truth) < 0.04


@pytest.mark.parametrize("bought", [True, False])
def test_an_ad_that_nobody_was_shown_has_its_categorys_chance_of_a_click(
    window_shop: Release, release: Release, shop: _Shop, *, bought: bool
) -> None:
    """All items of the training were shown from the first day on: what a new one is given must not be guessed from how
    seldom one had been shown.
    """
    scorer = Scorer(release if bought else window_shop, CPU)
    scorer.catalogue.add([(n, f"new{n}", f"c{n}") for n in range(_CATEGORIES)] + [(9, "strange", "unheard of")])
    scorer.catalogue.set_ads([(f"ad{n}", n) for n in range(_CATEGORIES)] + [("strange", 9)])
    found = scorer.ad_lists(SupportSets.empty(1), 9)
    names = [scorer.catalogue.ad_ids[number] for number in found.numbers[0]]
    clicks = found.scores if found.click is None else found.click
    chances = dict(zip(names, clicks[0].tolist(), strict=True))
    truth = [float(shop.click[:, np.arange(_ITEMS) % _CATEGORIES == n].mean()) for n in range(_CATEGORIES)]
    assert [chances[f"ad{n}"] for n in range(_CATEGORIES)] == pytest.approx(truth, rel=0.35)
    assert chances["strange"] == pytest.approx(shop.click.mean(), rel=0.5)


def test_a_release_of_clicks_alone_comes_back_whole(
    window_shop: Release, release: Release, states: tuple[SupportSets, SupportSets], tmp_path: Path
) -> None:
    again = load(save(window_shop, tmp_path))
    assert torch.equal(_clicks(again, *states), _clicks(window_shop, *states))
    tensors = load_file(tmp_path / "release-1.safetensors")
    assert not {name for name in tensors if name.startswith("ads.head.") or "purchase" in name}
    assert release.ads is not None
    assert release.ads.clicks is not None
    assert again.ads is not None
    assert again.ads.clicks is not None
    for number, (ads, says) in enumerate(
        [
            (replace(again.ads, clicks=None), "neither a purchase head nor a click head"),
            (replace(again.ads, head=release.ads.head), "only one of its two purchase heads"),
            (replace(release.ads, head=None), "only one of its two purchase heads"),
            (replace(again.ads, clicks=replace(again.ads.clicks, rate=0.0)), "a click-through rate"),
            (_without_click_weight(again.ads), "click weights of its click head"),
        ]
    ):
        with pytest.raises(SettingsError, match=f"has an ad model with {says}.*: train it again"):
            load(save(replace(window_shop, ads=ads), tmp_path / str(number)))


def _without_click_weight(ads: AdModel) -> AdModel:
    assert ads.clicks is not None
    head = replace(ads.clicks.head, click=ads.clicks.head.click[1:])
    return replace(ads, clicks=replace(ads.clicks, head=head))


def test_calibrations_are_those_of_the_heads_there_are(window_shop: Release, release: Release) -> None:
    for made in (window_shop, release):
        assert made.ads is not None
        assert made.ads.clicks is not None
        state = made.ads.clicks.head.state()
        for wrong in (state["calibrations"][:0], torch.cat([state["calibrations"]] * 2)):
            with pytest.raises(RuntimeError):
                ClickHead.restore(state | {"calibrations": wrong})


def test_few_purchases_teach_clicks_alone(known: pl.DataFrame) -> None:
    """Fewer than a purchase head needs: they are events like others, and no reason to foretell no clicks."""
    kind = pl.col("event_type")
    few = known.filter(kind == "purchase").sample(12, seed=0)
    table = pl.concat([known.filter(kind != "purchase"), few]).sort("event_time", maintain_order=True)
    scorer = _scorer(_trained(table))
    assert scorer.ads_kind == "click"


def test_an_ad_that_was_shown_often_and_never_clicked_is_not_taken_for_a_new_one(
    release: Release, known: pl.DataFrame
) -> None:
    shown = known.filter((pl.col("event_type") == "impression") & (pl.col("item_id") == "i00"))
    dull = shown.with_columns(pl.lit("dull").alias("item_id"), pl.format("d{}", "event_id").alias("event_id"))
    model, _ = _taught(release, pl.concat([known, dull]).sort("event_time", maintain_order=True))
    assert release.ads is not None
    scorer = Scorer(replace(release, ads=replace(release.ads, clicks=model)), CPU)
    scorer.catalogue.add([(0, "dull", "c0"), (1, "new", "c0"), (2, "i00", "c0")])
    scorer.catalogue.set_ads([("dull", 0), ("new", 1), ("i00", 2)])
    found = scorer.ad_lists(SupportSets.empty(1), 3)
    assert found.click is not None
    chances = {scorer.catalogue.ad_ids[n]: chance for n, chance in zip(found.numbers[0], found.click[0], strict=True)}
    assert chances["dull"] < 0.5 * chances["new"]


def test_too_few_impressions_teach_no_click_head(release: Release, known: pl.DataFrame) -> None:
    kind = pl.col("event_type")
    for few in (0, 100):
        shown = known.filter(kind == "impression").head(few)
        table = pl.concat([known.filter(kind != "impression"), shown]).sort("event_time", maintain_order=True)
        assert _taught(release, table) == (None, {})


def test_without_purchases_or_clicks_of_impressions_there_is_no_click_head(
    release: Release, known: pl.DataFrame
) -> None:
    kind = pl.col("event_type")
    assert _taught(release, known.filter(kind != "purchase")) == (None, {})
    early = pl.when(kind == "click").then(pl.col("event_time") - DAY).otherwise(pl.col("event_time"))
    unrelated = known.filter(kind != "purchase").with_columns(early.alias("event_time")).sort("event_time")
    assert _taught(release, unrelated) == (None, {})
    assert _taught(release, unrelated, purchases=False) == (None, {})
    assert _taught(release, known.filter(kind != "click"), purchases=False) == (None, {})


def test_a_click_window_counts_in_learning_and_in_serving(
    release: Release, known: pl.DataFrame, states: tuple[SupportSets, SupportSets]
) -> None:
    assert _taught(release, known, click_window=_CLICKED_AFTER - 1) == (None, {})  # none of the clicks belongs
    wide, _ = _taught(release, known, click_window=5 * HOUR)
    assert wide is not None
    assert wide.window == 5 * HOUR
    assert ClickModel.restore(wide.state()).window == 5 * HOUR
    assert release.ads is not None
    assert release.ads.clicks is not None
    assert release.ads.clicks.window == CLICK_WINDOW
    assert ClickModel.restore({k: v for k, v in wide.state().items() if k != "window"}).window == CLICK_WINDOW
    narrow = replace(release, ads=replace(release.ads, clicks=replace(release.ads.clicks, window=1)))
    first, second = (_chances(each, *states)[0] for each in (release, narrow))
    assert float(second.mean()) < float(first.mean())  # served by the narrow one, nothing shown was ever clicked


def test_settings_name_both_windows(known: pl.DataFrame) -> None:
    settings = LearningSettings(dimension=8, method="none", attribution_hours=30.0, click_hours=2.0)
    ads = train(known, settings=settings, weights={}, capacity=32, version=1).ads
    assert ads is not None
    assert ads.clicks is not None
    assert (ads.window, ads.clicks.window) == (30 * HOUR, 2 * HOUR)


def _taught(
    release: Release, events: pl.DataFrame, *, click_window: int = CLICK_WINDOW, purchases: bool = True
) -> tuple[ClickModel | None, dict[str, float]]:
    kind = pl.col("event_type")
    history, shown = events.filter(kind != "impression"), events.filter(kind == "impression")
    windows, both = (DAY, click_window), (32, 32)
    return learn_clicks(history, shown, release.encoder, capacities=both, seed=0, windows=windows, purchases=purchases)
