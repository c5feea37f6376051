from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from innerloop.errors import SettingsError
from innerloop.evaluation import taught_heads
from innerloop.evaluation.conversion import baselines
from innerloop.evaluation.conversion import protocol as conversion
from innerloop.evaluation.conversion.heads import Clicks
from innerloop.evaluation.conversion.log import read_log
from innerloop.evaluation.conversion.served import served
from innerloop.evaluation.conversion.statistics import Auc, CalibrationError
from innerloop.evaluation.metrics import auc, calibration_error
from innerloop.evaluation.scoreboard import rows
from innerloop.learning.ads.ad_head import INTENT, OWN_CLICKS
from innerloop.learning.ads.click_log import Histories, content_prior, known_counts, overall_rate, population
from innerloop.learning.ads.pairs import KINDS

_START, _HOUR, _DAY = 1_750_000_000_000, 3_600_000, 86_400_000


def _events(seed: int = 0, clicks: int = 500) -> pl.DataFrame:
    """Seven days of sessions: one click, or three on one item, which then is often bought, in category 1 above all."""
    rng = np.random.default_rng(seed)
    found = []
    for time in np.sort(rng.integers(0, 7 * _DAY, clicks)).tolist():
        user, item = int(rng.integers(20)), int(rng.integers(60))
        row = (user, item, item % 3)
        serious = rng.random() < 0.3
        found += [(*row, "click", _START + time + at * 60_000) for at in range(3 if serious else 1)]
        if rng.random() < 0.1:
            found.append((*row, "cart", _START + time + 30_000))
        if serious and rng.random() < (0.9 if item % 3 == 1 else 0.3):
            found.append((*row, "purchase", _START + time + _HOUR))
    columns = ["user_id", "item_id", "category_id", "event_type", "ts_ms"]
    return pl.DataFrame(found, columns, orient="row").sort("ts_ms", maintain_order=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _events().write_parquet(tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def _tell(_what: str, _share: float) -> None: ...


@pytest.fixture(autouse=True)
def _short_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught_heads, "STEPS", 4)


def test_every_arm_is_judged_on_every_click_after_the_cut(file: Path) -> None:
    found = conversion.run(file, seed=0, tell=_tell)
    assert set(found.arms) >= {"default", "live", "bayes", "shared", "none", "placebo", "stale-1h", "stale-1d"}
    assert set(found.arms) >= {"anil", "cavia", "maml", "fomaml", "reptile"}
    assert found.baselines == {"global-rate", "item-rate", "category-rate", "streaming-counts", "logistic"}
    assert found.labels is not None
    assert found.labels.mean() > 0.05
    for predicted in found.predictions.values():
        assert predicted.shape == found.labels.shape == found.users.shape
        assert ((predicted > 0) & (predicted < 1)).all()
    figures = {(row.arm, row.metric): row.value for row in rows(found, draws=20) if row.slice == "all"}
    assert figures["default", "auc"] > 0.7
    assert figures["default", "auc"] > figures["placebo", "auc"] + 0.05
    assert figures["default", "log-loss"] < figures["global-rate", "log-loss"]
    assert figures["default", "predicted/observed"] == pytest.approx(1, abs=0.4)
    assert sum(found.slices[name].sum() for name in found.slices if name.startswith("day")) == len(found.users)
    assert sum(found.slices[name].sum() for name in found.slices if name.startswith("support")) == len(found.users)


def test_alone_a_user_has_no_placebo(tmp_path: Path) -> None:
    _events().with_columns(user_id=pl.lit(7)).write_parquet(tmp_path / "one.parquet")
    found = conversion.run(tmp_path / "one.parquet", seed=0, tell=_tell)
    assert {"default", "none", "stale-1h"} <= set(found.arms)
    assert "placebo" not in found.arms
    assert found.facts["left out"] == {"placebo": "all clicks that are scored are one user's"}


def test_where_one_user_is_left_what_is_served_has_no_placebo(tmp_path: Path) -> None:
    """Before the cut are others, of whom `live` would have drawn: its placebo is not that of another model."""
    late = pl.col("ts_ms") >= _START + 4.9 * _DAY
    table = _events(clicks=2_500).with_columns(user_id=pl.when(late).then(7).otherwise("user_id"))
    table.write_parquet(tmp_path / "late.parquet")
    found = conversion.run(tmp_path / "late.parquet", seed=0, tell=_tell)
    assert found.facts["default"] == "as adapt publishes it, trained again every day"
    assert {"default", "stale-1h", "stale-1d"} <= set(found.arms)
    assert "placebo" not in found.arms
    assert found.facts["left out"] == {"placebo": "all clicks that are scored are one user's"}
    assert int(str(found.facts["clicks whose window the data ends in"])) <= len(found.users)


def test_the_same_seed_gives_the_same_figures(file: Path) -> None:
    first, again = (conversion.run(file, seed=1, tell=_tell) for _ in range(2))
    for arm in first.arms:
        np.testing.assert_array_equal(first.predictions[arm], again.predictions[arm])


def test_what_comes_later_changes_no_earlier_prediction(tmp_path: Path) -> None:
    """Everything from the middle of the scored part on is replaced, the last time kept: predictions before it stay."""
    whole = _events()
    last = int(whole["ts_ms"].to_numpy().max())
    middle = last - _DAY
    other = _events(seed=9).filter((pl.col("ts_ms") >= middle) & (pl.col("ts_ms") < last))
    changed = pl.concat([whole.filter(pl.col("ts_ms") < middle), other, whole.filter(pl.col("ts_ms") == last)])
    results = []
    for name, table in (("a", whole), ("b", changed)):
        table.write_parquet(tmp_path / f"{name}.parquet")
        results.append(conversion.run(tmp_path / f"{name}.parquet", seed=0, tell=_tell))
    cut = int(results[0].facts["cut_ms"])  # type: ignore[call-overload]
    before = whole.filter(
        (pl.col("event_type") == "click") & (pl.col("ts_ms") >= cut) & (pl.col("ts_ms") < middle)
    ).height
    assert before > 30
    for arm in set(results[0].arms) - {"placebo"}:  # whose strangers are drawn from all that are scored
        ours, theirs = (result.predictions[arm][:before] for result in results)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=arm)


def test_where_a_release_has_an_ad_model_the_default_is_what_it_publishes(tmp_path: Path) -> None:
    _events(clicks=2_500).write_parquet(tmp_path / "events.parquet")
    found = conversion.run(tmp_path / "events.parquet", seed=0, tell=_tell)
    assert found.facts["default"] == "as adapt publishes it, trained again every day"
    figures = {(row.arm, row.metric): row.value for row in rows(found, draws=20) if row.slice == "all"}
    for without in ("placebo", "stale-1h", "none"):
        assert figures["default", "auc"] > figures[without, "auc"] + 0.03
    assert figures["default", "predicted/observed"] == pytest.approx(1, abs=0.4)
    assert (found.predictions["default"] != found.predictions["live"]).any()


def test_few_events_teach_no_ad_model_and_the_default_is_live(file: Path) -> None:
    found = conversion.run(file, seed=0, tell=_tell)
    assert str(found.facts["default"]).startswith("`live`")
    np.testing.assert_array_equal(found.predictions["default"], found.predictions["live"])
    assert (found.predictions["default"] != found.predictions["placebo"]).any()


def test_what_is_served_was_learned_before_its_day_and_knows_nothing_of_others_since(tmp_path: Path) -> None:
    """What others do on a day changes nothing on it and a lot on the next, when a release has learned of it."""
    whole, cut = _events(clicks=2_500), _START + 5 * _DAY
    user = 7
    number = sorted(map(str, range(20))).index(str(user))  # all 20 users are there
    alone = whole.filter((pl.col("ts_ms") < cut) | (pl.col("user_id") == user))
    found, first_day = [], np.zeros(0, bool)
    for name, table in (("a", whole), ("b", alone)):
        table.write_parquet(tmp_path / f"{name}.parquet")
        log = read_log(tmp_path / f"{name}.parquet", window=_DAY)
        at = log.clicks[log.times[log.clicks] >= cut]
        asked = {"mine": (log.users[at], log.times[at]), "before": (log.users[at], log.times[at] - _HOUR)}
        chances = served(log, at, asked, cut, window=_DAY, seed=0)
        assert all(((of > 0) & (of < 1)).all() for of in chances.values())
        sold = (log.attribution.converted_at[at] <= log.times[-1]).astype(float)
        first_day = log.times[at[log.users[at] == number]] < cut + _DAY
        found.append(chances["mine"][log.users[at] == number])
        if name == "a":
            everybody = np.ones(len(at))
            assert auc(sold, chances["mine"], everybody) > 0.65
            assert auc(sold, chances["mine"], everybody) > auc(sold, chances["before"], everybody)
    assert len(found[0]) == len(found[1]) > 10
    np.testing.assert_allclose(found[0][first_day], found[1][first_day], rtol=1e-9)
    assert (found[0][~first_day] != found[1][~first_day]).any()


def test_the_order_of_rows_says_nothing_and_the_seed_shuffles_what_is_of_one_time(tmp_path: Path) -> None:
    table = _events().with_columns(pl.col("ts_ms") // _DAY * _DAY)
    table.write_parquet(tmp_path / "a.parquet")
    table.sample(fraction=1.0, shuffle=True, seed=5).write_parquet(tmp_path / "b.parquet")
    first, again, other = (
        read_log(tmp_path / f"{name}.parquet", window=_DAY, seed=seed) for name, seed in (("a", 1), ("b", 1), ("a", 2))
    )
    for column in ("users", "items", "categories", "kinds", "times"):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))
    np.testing.assert_array_equal(first.times, other.times)
    assert (first.items != other.items).any()
    assert (np.diff(first.users[first.times == first.times[0]]) < 0).any()  # not as they are sorted


def test_what_comes_later_changes_nothing_of_the_order_before_it(tmp_path: Path) -> None:
    table = _events().with_columns(pl.col("ts_ms") // _DAY * _DAY)
    table.write_parquet(tmp_path / "a.parquet")
    table.filter(pl.col("ts_ms") < pl.col("ts_ms").max()).write_parquet(tmp_path / "b.parquet")
    whole, early = (read_log(tmp_path / f"{name}.parquet", window=_DAY) for name in "ab")
    assert 0 < len(early.items) < len(whole.items)
    np.testing.assert_array_equal(whole.items[: len(early.items)], early.items)


def test_what_is_known_of_an_item_is_what_a_loop_over_strictly_earlier_events_finds(file: Path) -> None:
    log = read_log(file, window=_DAY)
    at = log.clicks[::37]
    found = known_counts(log, log.items, at)
    for row, n in enumerate(at.tolist()):
        now, trials, sold = int(log.times[n]), 0, 0
        for m in log.clicks.tolist():
            if log.items[m] == log.items[n]:
                bought = log.attribution.converted_at[m] < now
                sold += bought
                trials += bought or log.times[m] + _HOUR < now
        assert (found.trials[row], found.successes[row]) == (trials, sold)


def test_what_is_done_per_click_is_what_a_loop_over_strictly_earlier_events_finds(file: Path) -> None:
    log = read_log(file, window=_DAY)
    at = log.clicks[::53]
    found = population(log, at, content_prior(log, _START + 4 * _DAY)).columns[:, -len(INTENT) :]
    for row, n in enumerate(at.tolist()):
        before = log.times < log.times[n]
        for scope, keys in (("category", log.categories), ("item", log.items)):
            same = before & (keys == keys[n])
            for kind in (1, 2, 3):
                rate = (1 + (before & (log.kinds == kind)).sum()) / (1 + (before & (log.kinds == 0)).sum())
                shrunk = ((same & (log.kinds == kind)).sum() + 20 * rate) / ((same & (log.kinds == 0)).sum() + 20)
                expected = np.log(shrunk / rate) if (log.kinds == kind).any() else 0.0
                name = f"{scope}: {KINDS[kind]}s per click"
                assert found[row, INTENT.index(name)] == pytest.approx(expected, abs=1e-9)


def test_histories_are_the_newest_strictly_earlier_events(file: Path) -> None:
    log = read_log(file, window=_DAY)
    at = log.clicks[::41]
    windows = Histories(log).before(log.users[at], log.times[at])
    for row, n in enumerate(at.tolist()):
        expected = [m for m in range(len(log.users)) if log.users[m] == log.users[n] and log.times[m] < log.times[n]]
        assert windows.places[row][windows.mask[row]].tolist() == expected[::-1][:64]


def test_an_item_nobody_clicked_has_its_categorys_rate(file: Path) -> None:
    log = read_log(file, window=_DAY)
    everybody = population(log, log.clicks, content_prior(log, _START + 4 * _DAY))
    first = np.unique(log.items[log.clicks], return_index=True)[1]
    own = everybody.columns[first, 3]  # log of the item's rate over its category's
    np.testing.assert_allclose(own, 0, atol=1e-12)


def test_without_categories_and_with_text_for_names_it_runs_too(tmp_path: Path) -> None:
    bare = _events().drop("category_id").with_columns(pl.format("u-{}", "user_id").alias("user_id"))
    bare.write_csv(tmp_path / "events.csv")
    found = conversion.run(tmp_path / "events.csv", seed=0, tell=_tell).predictions
    assert "default" in found
    assert "category-rate" not in found


def test_baselines_are_calibrated_as_the_arms_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else log-loss and calibration error would compare a scaled arm with a raw baseline."""
    monkeypatch.setattr(conversion, "_calibrated", lambda _case, logits: np.full(len(logits), 0.5))
    for arm, predicted in conversion.run(file, seed=0, tell=_tell).predictions.items():
        assert (predicted == 0.5).all(), arm


def test_the_rate_of_a_category_is_its_own_shrunk_to_everybodys(file: Path) -> None:
    log = read_log(file, window=_DAY)
    prior = content_prior(log, _START + 4 * _DAY)
    at, known = log.clicks, known_counts(log, log.categories, log.clicks)
    found, overall = baselines.category_rate(log, at, prior), overall_rate(log, at)
    strength = prior.category_strength
    expected = (known.successes + strength * overall) / (known.trials + strength)
    np.testing.assert_allclose(found, expected)
    last = at[-100:]
    rates = [found[-100:][log.categories[last] == category].mean() for category in range(3)]
    assert rates[1] > max(rates[0], rates[2])  # what is bought above all


def test_a_window_decides_which_purchases_count(file: Path) -> None:
    long, short = (conversion.run(file, seed=0, tell=_tell, window_hours=hours).labels for hours in (24.0, 0.97))
    assert long is not None
    assert short is not None
    assert short.sum() < long.sum()


def test_what_cannot_be_judged_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def refused(table: pl.DataFrame, message: str, **options: float) -> None:
        table.write_parquet(tmp_path / "x.parquet")
        with pytest.raises(SettingsError, match=message):
            conversion.run(tmp_path / "x.parquet", seed=0, tell=_tell, **options)  # type: ignore[arg-type]

    refused(_events().filter(pl.col("event_type") != "purchase"), "no event of type purchase")
    refused(_events().filter(pl.col("event_type") == "purchase"), "no event of type click")
    refused(_events(clicks=40), "clicks to train on")
    refused(_events(), "training share", train_share=0.0)
    for hours in (0.0, -1.0, float("nan"), float("inf"), 1e-7, 1e7):
        refused(_events(), "attribution window", window_hours=hours)
    refused(_events().drop("user_id"), "user_id")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="holds no file of events"):
        conversion.run(tmp_path / "empty", seed=0, tell=_tell)


def test_statistics_sorted_once_are_those_sorted_each_time() -> None:
    rng = np.random.default_rng(0)
    ours = Auc(), CalibrationError()
    for predicted in (rng.random(200), rng.random(200).round(1), rng.random(50)):
        labels = (rng.random(len(predicted)) < predicted).astype(float)
        for _ in range(3):
            given = labels, predicted, rng.integers(0, 3, len(predicted)).astype(float)
            assert ours[0](*given) == pytest.approx(auc(*given), abs=1e-12)
            assert ours[1](*given) == pytest.approx(calibration_error(*given), abs=1e-12)


def test_a_heads_examples_are_the_users_newest_clicks_with_the_labels_known_strictly_before(file: Path) -> None:
    log = read_log(file, window=_DAY)
    clicks = Clicks(log, Histories(log), torch.zeros(len(log.clicks), 1))
    names = torch.arange(len(log.clicks)).float().unsqueeze(1)  # a feature that tells which click it is
    asked = np.arange(5, len(log.clicks), 7)
    found = clicks.support(names, asked)
    assert 0 < found.labels[found.mask].mean() < 1
    for row, click in enumerate(asked):
        at = log.clicks[click]
        now, expected = log.times[at], []
        for number, place in enumerate(log.clicks):
            bought = log.attribution.converted_at[place] < now
            if log.users[place] == log.users[at] and log.times[place] < now:
                expected += [(number, bought)] if bought or log.times[place] + _HOUR < now else []
        there = found.mask[row]
        pairs = zip(found.features[row, there, 0].tolist(), found.labels[row, there].tolist(), strict=True)
        assert [(int(n), bool(y)) for n, y in pairs] == expected[::-1][:OWN_CLICKS]
