"""The bootstrap against scipy and a plain loop; the report as programs read it."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import bootstrap

from innerloop.evaluation.conversion.statistics import CalibrationError
from innerloop.evaluation.metrics import auc, predicted_over_observed
from innerloop.evaluation.outcome import Outcome
from innerloop.evaluation.report import Report, _figures
from innerloop.evaluation.scoreboard import Row, rows


def outcome(seed: int = 0, users: int = 40) -> Outcome:
    """Users with 1 to 9 moments each, whose errors go together."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), rng.integers(1, 10, users)) * 7 + 3
    level = rng.normal(size=users * 7 + 3)[owner]
    arms = {name: level + shift + rng.normal(size=len(owner)) for name, shift in _SHIFTS.items()}
    return Outcome(
        users=owner,
        baselines=frozenset({"weak", "strong"}),
        means={name: {"mae": values, "hit": -values} for name, values in arms.items()},
        slices={"half": rng.random(len(owner)) < 0.5, "nobody": np.zeros(len(owner), bool)},
        smaller_is_better=frozenset({"mae"}),
    )


_SHIFTS = {"default": 0.0, "none": 0.5, "weak": 0.8, "strong": 0.3}


def found(of: Outcome, draws: int = 400, seed: int = 0) -> dict[tuple[str, str, str], Row]:
    return {(row.arm, row.metric, row.slice): row for row in rows(of, draws=draws, seed=seed)}


def test_figures_are_the_means_over_moments_of_each_slice() -> None:
    given = outcome()
    table = found(given)
    for arm in _SHIFTS:
        values = given.means[arm]["mae"]
        assert table[arm, "mae", "all"].value == pytest.approx(values.mean())
        assert table[arm, "mae", "half"].value == pytest.approx(values[given.slices["half"]].mean())
        assert table[arm, "mae", "half"].n == given.slices["half"].sum()


def test_an_empty_slice_has_no_rows() -> None:
    assert not [key for key in found(outcome()) if key[2] == "nobody"]


def test_a_slice_named_all_takes_the_place_of_everything() -> None:
    given = outcome()
    own = Outcome(given.users, given.baselines, given.means, {"all": given.slices["half"]})
    assert found(own)["default", "mae", "all"].n == given.slices["half"].sum()


def test_intervals_are_those_of_scipy_when_every_user_has_one_moment() -> None:
    values = np.random.default_rng(1).exponential(size=300)
    given = Outcome(np.arange(300), frozenset(), {"default": {"mae": values}})
    ours = found(given, draws=4000)["default", "mae", "all"]
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_intervals_are_those_of_a_plain_loop_that_draws_users() -> None:
    given = outcome()
    values = given.means["default"]["mae"]
    owners = [np.flatnonzero(given.users == user) for user in np.unique(given.users)]
    rng = np.random.default_rng(5)
    draws = [
        values[np.concatenate([owners[at] for at in rng.integers(len(owners), size=len(owners))])].mean()
        for _ in range(4000)
    ]
    ours = found(given, draws=4000)["default", "mae", "all"]
    assert [ours.low, ours.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)
    alone = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=2).confidence_interval
    assert ours.high - ours.low > 1.3 * (alone.high - alone.low)  # moments of a user go together


def test_a_difference_is_paired_so_a_constant_one_has_no_width() -> None:
    given = outcome()
    values = given.means["default"]["mae"]
    shifted = Outcome(given.users, frozenset(), {"default": {"mae": values}, "none": {"mae": values + 0.25}})
    row = found(shifted)["default - none", "mae", "all"]
    assert [row.value, row.low, row.high] == pytest.approx([-0.25] * 3)


def test_the_best_baseline_is_best_in_the_sense_of_the_metric() -> None:
    table = found(outcome())
    assert ("default - strong", "mae", "all") in table  # the least error
    assert ("default - strong", "hit", "all") in table  # the most hits
    assert not [key for key in table if key[0] == "default - weak"]
    value = table["default", "mae", "all"].value - table["strong", "mae", "all"].value
    assert table["default - strong", "mae", "all"].value == pytest.approx(value)


def test_the_same_seed_gives_the_same_rows_and_another_seed_other_intervals() -> None:
    assert found(outcome()) == found(outcome())
    one, other = found(outcome(), seed=0), found(outcome(), seed=1)
    key = ("default", "mae", "all")
    assert one[key].value == other[key].value
    assert one[key].low != other[key].low


def test_moments_an_arm_was_not_asked_at_do_not_count() -> None:
    given = outcome()
    some = given.means["default"]["mae"].copy()
    some[::3] = np.nan
    partial = Outcome(given.users, frozenset(), {"default": {"mae": some}, "none": given.means["none"]})
    table = found(partial)
    assert table["default", "mae", "all"].value == pytest.approx(np.nanmean(some))
    assert table["default", "mae", "all"].n == (~np.isnan(some)).sum()
    difference = table["default - none", "mae", "all"]  # of the moments at which both were asked
    assert difference.value == pytest.approx(np.nanmean(some - given.means["none"]["mae"]))
    assert difference.n == (~np.isnan(some)).sum()


def test_an_arm_that_was_asked_less_often_is_compared_at_the_same_moments() -> None:
    """Where it was asked it is better by a constant, so that the difference has no width."""
    given = outcome()
    values = given.means["default"]["mae"]
    some = np.where(np.arange(len(values)) % 3 == 0, np.nan, values - 0.25)
    heads = Outcome(
        given.users,
        frozenset({"strong"}),
        {"default": {"mae": values}, "head": {"mae": some}, "none": {"mae": values}, "strong": {"mae": values}},
        smaller_is_better=frozenset({"mae"}),
    )
    table = found(heads)
    for name in ("head - none", "head - strong"):
        row = table[name, "mae", "all"]
        assert [row.value, row.low, row.high] == pytest.approx([-0.25] * 3)
        assert row.n == (~np.isnan(some)).sum()


def test_every_arm_of_ours_is_compared_with_none_and_the_best_baseline_and_the_placebo_with_none() -> None:
    given = outcome()
    more = {"bayes": given.means["default"], "placebo": given.means["weak"], **given.means}
    ours = Outcome(
        given.users,
        given.baselines,
        more,
        smaller_is_better=given.smaller_is_better,
        differences=(("default", "placebo"),),
    )
    names = {arm for arm, metric, _ in found(ours) if " - " in arm and metric == "mae"}
    assert names == {
        *("default - none", "default - strong", "bayes - none", "bayes - strong"),
        *("placebo - none", "default - placebo"),
    }


def test_a_pooled_statistic_gets_each_users_moments_as_often_as_the_user_was_drawn() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 300).astype(float)
    predicted = labels + rng.normal(size=300)
    given = Outcome(users, frozenset({"other"}), labels=labels, predictions={"default": predicted}, pooled={"auc": auc})
    row = found(given, draws=1500)["default", "auc", "all"]
    draws = []
    for _ in range(1500):
        chosen = (rng.integers(60, size=60)[:, None] * 5 + np.arange(5)).ravel()
        draws.append(auc(labels[chosen], predicted[chosen], np.ones(300)))
    assert row.value == pytest.approx(auc(labels, predicted, np.ones(300)))
    assert [row.low, row.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)


def test_a_pooled_statistic_is_of_the_moments_an_arm_was_asked_at_and_a_difference_of_those_of_both() -> None:
    """Where the arm was asked it predicts what `none` does, which elsewhere is no better than chance."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 300).astype(float)
    asked = (np.arange(300) % 3 > 0) & (users > 5)  # some users at no moment
    none = np.where(asked, labels, 0.0) + rng.normal(size=300)
    given = Outcome(
        users,
        frozenset(),
        labels=labels,
        predictions={"none": none, "placebo": np.where(asked, none, np.nan), "nobody": np.full(300, np.nan)},
        pooled={"auc": auc},
    )
    table = found(given)
    row, everywhere = table["placebo", "auc", "all"], table["none", "auc", "all"]
    assert row.value == pytest.approx(auc(labels[asked], none[asked], np.ones(asked.sum())))
    assert row.value > everywhere.value + 0.03
    assert row.low < row.value < row.high
    assert (row.n, everywhere.n) == (asked.sum(), 300)
    difference = table["placebo - none", "auc", "all"]
    assert [difference.value, difference.low, difference.high, difference.n] == [0.0, 0.0, 0.0, asked.sum()]
    assert not [key for key in table if "nobody" in key[0]]


def test_a_draw_without_anybody_who_was_asked_has_no_figure() -> None:
    users, values = np.arange(4), np.array([0.5, 0.5, np.nan, np.nan])
    weighted = {"mean": lambda _y, p, w: float(w @ p / w.sum())}
    row = found(Outcome(users, frozenset(), labels=np.ones(4), predictions={"a": values}, pooled=weighted))
    assert [row["a", "mean", "all"].low, row["a", "mean", "all"].high] == [0.5, 0.5]


def test_of_one_user_there_is_a_figure_and_no_interval(tmp_path: Path) -> None:
    """Whether its moments are all alike or not: nothing is known of other users."""
    users, means = np.array([3, 3, 5]), {"a": {"hit": np.array([0.0, 1.0, 1.0])}, "none": {"hit": np.zeros(3)}}
    slices, predictions = {"one": users == 3}, {"a": np.array([0.2, 0.9, 0.8])}
    labels = np.array([0.0, 1.0, 0.0])
    given = Outcome(users, frozenset(), means, slices, labels, predictions, {"auc": auc})
    table = found(given)
    for arm, metric, value in (("a", "hit", 0.5), ("a - none", "hit", 0.5), ("a", "auc", 1.0)):
        row = table[arm, metric, "one"]
        assert row.value == value
        assert np.isnan([row.low, row.high]).all()
    assert table["a", "hit", "all"].low < table["a", "hit", "all"].high
    Report("p", "d", "", 1.0, list(table.values()), {}).write(tmp_path)
    read = {(r["arm"], r["metric"], r["slice"]): r for r in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert read["a", "hit", "one"]["low"] is None
    assert "0.5000 [one user]" in (tmp_path / "report.html").read_text()


def test_a_metric_that_is_best_at_one_has_no_differences() -> None:
    predictions, labels = {"default": np.full(4, 0.4), "weak": np.full(4, 0.9)}, np.array([0.0, 1.0, 0.0, 1.0])
    ratio = {"predicted/observed": predicted_over_observed, "auc": auc}
    given = Outcome(np.arange(4), frozenset({"weak"}), labels=labels, predictions=predictions, pooled=ratio)
    assert ("default - weak", "predicted/observed", "all") in found(given)
    table = found(replace(given, undirected=frozenset({"predicted/observed"})))
    assert [key for key in table if " - " in key[0]] == [("default - weak", "auc", "all")]
    assert ("default", "predicted/observed", "all") in table


def test_what_is_not_finite_was_not_asked() -> None:
    values = np.array([1.0, np.inf, 3.0, -np.inf, np.nan])
    row = found(Outcome(np.arange(5), frozenset(), {"a": {"m": values}}))["a", "m", "all"]
    assert [row.value, row.n] == [2.0, 2]
    assert np.isfinite([row.low, row.high]).all()


def test_draws_without_a_positive_do_not_spoil_the_interval() -> None:
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    given = Outcome(np.arange(4), frozenset(), labels=labels, predictions={"default": labels}, pooled={"auc": auc})
    row = found(given)["default", "auc", "all"]
    assert [row.value, row.low, row.high] == [1.0, 1.0, 1.0]


def test_what_does_not_exist_in_a_slice_has_no_row_there() -> None:
    labels = np.array([0.0, 1.0] * 50 + [0.0] * 20)
    given = Outcome(
        users=np.arange(120) // 4,
        baselines=frozenset(),
        labels=labels,
        predictions={arm: np.random.default_rng(seed).random(120) for seed, arm in enumerate(("default", "none"))},
        pooled={"auc": auc},
        slices={"unsold": np.arange(120) >= 100},
    )
    assert {key[2] for key in found(given)} == {"all"}
    assert all(np.isfinite([row.value, row.low, row.high]).all() for row in rows(given, draws=50))


def test_an_interval_holds_its_figure() -> None:
    """A calibration error near 0 is larger of users that are drawn again, whoever they are."""
    given = Outcome(
        users=np.arange(2_000),
        baselines=frozenset(),
        labels=np.asarray(np.arange(2_000) % 4 == 0, float),
        predictions={"default": np.full(2_000, 0.25)},
        pooled={"calibration-error": CalibrationError()},
    )
    row = found(given)["default", "calibration-error", "all"]
    assert row.low == row.value
    assert row.high > row.value


def test_a_baseline_without_a_figure_is_never_the_best() -> None:
    users = np.arange(6)
    labels = np.array([1.0, 0, 1, 0, 1, 0])
    undefined = {"auc": lambda y, p, w: float("nan") if p[0] > 5 else auc(y, p, w)}
    given = Outcome(
        users,
        frozenset({"broken", "fair"}),
        labels=labels,
        predictions={"default": labels, "broken": labels + 9, "fair": 1 - labels},
        pooled=undefined,
    )
    assert ("default - fair", "auc", "all") in found(given)


def report(folder: Path, facts: dict[str, object]) -> dict[str, object]:
    given = [Row("default", "mae", "all", 0.5, float("nan"), 0.6, 3), Row("a<b", "mae", "all", 0.7, 0.6, 0.8, 3)]
    made = Report("cold-start", "data", "", 1.2345, given, facts)
    made.write(folder / "new" / "folder")
    loaded: dict[str, object] = json.loads((folder / "new" / "folder" / "report.json").read_text())
    return loaded


def test_the_report_has_what_programs_read(tmp_path: Path) -> None:
    loaded = report(tmp_path, {"note": "x"})
    assert list(loaded) == ["protocol", "data", "release", "seconds", "rows", "facts"]
    first = {"arm": "default", "metric": "mae", "slice": "all", "value": 0.5, "low": None, "high": 0.6, "n": 3}
    assert loaded["rows"][0] == first  # type: ignore[index]


def test_facts_that_json_has_no_word_for_are_written_all_the_same(tmp_path: Path) -> None:
    facts = {"a": {"half_life": float("inf"), 3: np.int64(4)}, "b": (np.float32(0.5), float("nan")), "c": Path("x")}
    loaded = report(tmp_path, facts)
    assert loaded["facts"] == {"a": {"half_life": None, "3": 4}, "b": [0.5, None], "c": "x"}


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    report(tmp_path, {"<script>": "</pre><script>"})
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert "a&lt;b" in page
    assert "</pre><script>" not in page


def test_days_have_a_plot_of_their_own_and_so_have_each_targets_days() -> None:
    slices = ("all", "2017-11-25", "2017-11-26", "purchase, 2017-11-25", "day 1", "purchase", "support 1-2")
    given = [Row("default", "auc", name, 0.5, 0.4, 0.6, 3) for name in slices]
    titles = [figure.layout.title.text for figure in _figures(given, "auc")]
    assert titles == ["auc", "auc by day", "auc by day, purchase"]


def test_the_table_of_many_metrics_leaves_out_the_intervals() -> None:
    def shown(metrics: int) -> str:
        given = [Row("default", f"m{at}", "all", 0.5, 0.25, 0.75, 3) for at in range(metrics)]
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(Report("p", "d", "", 1.0, given, {}).table())
        return console.export_text()

    assert "0.2500" in shown(4)
    assert "0.2500" not in shown(5)
    assert "0.5000" in shown(5)
