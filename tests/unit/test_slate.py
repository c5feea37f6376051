from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from innerloop.errors import SettingsError
from innerloop.evaluation import taught_heads
from innerloop.evaluation.baselines import sasrec
from innerloop.evaluation.scoreboard import rows
from innerloop.evaluation.slate import protocol as slate
from innerloop.evaluation.slate.features import (
    Action,
    Layout,
    Population,
    Slate,
    features,
    price_of,
    price_ranks,
)
from innerloop.evaluation.slate.heads import LISTS, HeadArms, support, teach
from innerloop.evaluation.slate.log import SlateLog, read_log
from innerloop.evaluation.slate.replay import Choice, Replay
from innerloop.learning.ads.choosers import Chooser, Seen

_START = 1_750_000_000_000


def _log(sessions: int = 120, seed: int = 0) -> pl.DataFrame:
    """Users look at one of six shown items, then choose it mostly, else by a price taste of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for session in range(sessions):
        user, time = int(rng.integers(30)), _START + session * 600_000
        shown = rng.permutation(40)[:6]
        prices = rng.integers(20, 200, 6)
        looked = int(shown[rng.integers(6)])
        chosen = looked if rng.random() < 0.6 else int(shown[np.argmin(prices) if user % 2 else np.argmax(prices)])
        common = {"user_id": user, "session_id": session, "platform": "AB"[user % 2], "device": "mobile"}
        found += [
            common | {"ts_ms": time, "step": 1, "action_type": "look", "item_id": looked},
            common | {"ts_ms": time + 1000, "step": 2, "action_type": "filter", "item_id": None},
            common
            | {
                "ts_ms": time + 2000,
                "step": 3,
                "action_type": "clickout item",
                "item_id": chosen,
                "impressions": shown.tolist(),
                "prices": prices.tolist(),
            },
        ]
    return pl.DataFrame(found, infer_schema_length=None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    _log().write_parquet(tmp_path / "actions.parquet")
    return tmp_path / "actions.parquet"


def _tell(_what: str, _share: float) -> None: ...


@pytest.fixture(autouse=True)
def _short_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taught_heads, "STEPS", 4)
    monkeypatch.setattr(sasrec, "_EPOCHS", (1, 3))


def test_every_arm_is_judged_on_the_same_later_choices(file: Path) -> None:
    found = slate.run(file, seed=0, tell=_tell)
    assert set(found.arms) >= {"default", "bayes", "shared", "none", "placebo", "stale-1h", "stale-1d"}
    assert set(found.arms) >= {"anil", "cavia", "maml", "fomaml", "reptile"}
    assert found.baselines <= set(found.arms)
    assert found.baselines >= {"popularity-1h", "vsknn", "ials", "sasrec", "item-knn", "last-interacted", "recents"}
    assert len(found.users) == 60
    for arm in found.arms:
        assert found.means[arm]["mrr"].shape == (60,)
        assert ((found.means[arm]["mrr"] > 0) & (found.means[arm]["mrr"] <= 1)).all()
    figures = {(row.arm, row.metric): row.value for row in rows(found, draws=20) if row.slice == "all"}
    assert figures["default", "mrr"] > figures["shown-order", "mrr"] + 0.2
    assert figures["default", "gauc"] > figures["none", "gauc"]
    assert figures["none", "mrr"] > figures["placebo", "mrr"] - 0.1


def test_there_is_a_placebo_only_once_somebody_else_was_there(tmp_path: Path) -> None:
    """The first choices that are scored come before anybody but their user did anything; or all are one user's."""
    late = _log().with_columns(user_id=pl.when(pl.col("session_id") < 80).then(1).otherwise(pl.col("user_id") + 2))
    late.write_parquet(tmp_path / "late.parquet")
    found = slate.run(tmp_path / "late.parquet", seed=0, tell=_tell)
    for values in (found.means["placebo"]["mrr"], found.predictions["placebo"]):
        others = np.isfinite(values)
        assert not others[:20].any()
        assert others[20:].all()
    for arm in set(found.arms) - {"placebo"}:
        assert np.isfinite(found.means[arm]["mrr"]).all()
    counts = {(row.arm, row.metric): row.n for row in rows(found, draws=20) if row.slice == "all"}
    assert {counts["placebo", metric] for metric in ("mrr", "gauc")} == {others.sum()}
    assert {counts["default", metric] for metric in ("mrr", "gauc")} == {60}
    _log().with_columns(user_id=1).write_parquet(tmp_path / "one.parquet")
    outcome = slate.run(tmp_path / "one.parquet", seed=0, tell=_tell)
    assert np.isnan(outcome.means["placebo"]["mrr"]).all()
    assert not [row for row in rows(outcome, draws=20) if row.arm.startswith("placebo")]


def test_the_same_seed_gives_the_same_figures(file: Path) -> None:
    first, again = (slate.run(file, seed=3, tell=_tell) for _ in range(2))
    for arm in first.arms:
        np.testing.assert_array_equal(first.means[arm]["mrr"], again.means[arm]["mrr"])


def test_what_comes_later_changes_no_earlier_figure(tmp_path: Path) -> None:
    """The second half of the scored part may be anything: the ranks before it stay."""
    whole = _log()
    cut = int(whole["ts_ms"].quantile(0.75, "nearest") or 0)
    later = pl.col("ts_ms") > cut
    changed = whole.with_columns(
        pl.when(later & pl.col("impressions").is_null() & pl.col("item_id").is_not_null())
        .then(pl.lit(7))
        .otherwise(pl.col("item_id"))
        .alias("item_id"),
        pl.when(later).then(pl.lit("other")).otherwise(pl.col("action_type")).alias("action_type"),
    )
    results = []
    for name, table in (("a", whole), ("b", changed)):
        table.write_parquet(tmp_path / f"{name}.parquet")
        results.append(slate.run(tmp_path / f"{name}.parquet", seed=0, tell=_tell))
    before = int((whole.filter(pl.col("impressions").is_not_null())["ts_ms"] <= cut).sum()) - 60
    assert before > 10
    for arm in results[0].arms:
        ours, theirs = (result.means[arm]["mrr"][:before] for result in results)
        np.testing.assert_array_equal(ours, theirs)


def test_a_csv_with_bars_between_the_impressions_gives_the_same(file: Path, tmp_path: Path) -> None:
    bars = _log().with_columns(
        pl.col("impressions").cast(pl.List(pl.String)).list.join("|"),
        pl.col("prices").cast(pl.List(pl.String)).list.join("|"),
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    bars.write_csv(folder / "actions.csv")
    first, again = (slate.run(path, seed=0, tell=_tell) for path in (file, folder))
    np.testing.assert_array_equal(first.means["default"]["mrr"], again.means["default"]["mrr"])


def test_a_folder_may_have_files_of_several_kinds(file: Path, tmp_path: Path) -> None:
    """A list here, text with bars there; numbers for names here, numbers with gaps there; and looks of their own."""
    table, folder = _log(), tmp_path / "folder"
    folder.mkdir()
    looks, chosen = table.filter(pl.col("step") < 3), table.filter(pl.col("step") == 3)
    looks.drop("impressions", "prices").write_parquet(folder / "looks.parquet")
    chosen.head(40).with_columns(pl.col("user_id").cast(pl.Float64)).write_parquet(folder / "lists.parquet")
    bars = (pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in ("impressions", "prices"))
    chosen.slice(40).with_columns(bars).rename({"ts_ms": "timestamp"}).write_csv(folder / "bars.csv")
    _alike(read_log(file), read_log(folder))


def test_numbers_that_turn_into_text_late_are_text(tmp_path: Path) -> None:
    late = pl.when(pl.col("session_id") == 3_400).then(pl.lit("x50211")).otherwise(pl.col("item_id").cast(pl.String))
    bars = (pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in ("impressions", "prices"))
    _log(3_401).with_columns(*bars, late.alias("item_id")).write_csv(tmp_path / "late.csv")
    assert len(read_log(tmp_path / "late.csv")) == 3 * 3_401


def test_columns_of_other_names_are_mapped_and_the_case_of_letters_is_no_matter(file: Path, tmp_path: Path) -> None:
    names = {"item_id": "reference_no", "prices": "cost", "user_id": "USER_ID", "step": "Step"}
    _log().rename(names).write_parquet(tmp_path / "x.parquet")
    mapped = {"item_id": "reference_no", "prices": "cost"}
    _alike(read_log(tmp_path / "x.parquet", columns=mapped), read_log(file))
    with pytest.raises(SettingsError, match="sku is no column of a log of lists: those are user_id,"):
        read_log(file, columns={"sku": "item_id"})


def test_actions_of_one_time_are_in_no_order_unless_the_file_says_so(tmp_path: Path) -> None:
    table = _log(60).with_columns(ts_ms=pl.col("ts_ms").min())
    table.drop("step").write_parquet(tmp_path / "x.parquet")
    table.write_parquet(tmp_path / "stepped.parquet")
    first, again, other = (read_log(tmp_path / "x.parquet", seed=seed) for seed in (1, 1, 2))
    _alike(first, again)
    written = table["action_type"].to_list()
    orders = [[log.action_names[at] for at in log.actions] for log in (first, other)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(written)
    assert len({tuple(order) for order in (*orders, written)}) == 3
    stepped = read_log(tmp_path / "stepped.parquet")
    steps = table.group_by("step").agg("action_type").sort("step")["action_type"].list.unique()
    assert [{stepped.action_names[at] for at in part} for part in np.split(stepped.actions, len(steps))] == [
        set(names) for names in steps.to_list()
    ]


@pytest.mark.parametrize("between", [",", ";", " "])
def test_prices_with_another_separator_are_refused_with_the_right_one(tmp_path: Path, between: str) -> None:
    bars = pl.col("impressions").cast(pl.List(pl.String)).list.join("|")
    joined = pl.col("prices").cast(pl.List(pl.String)).list.join(between)
    _log(60).with_columns(bars, joined).write_csv(tmp_path / "x.csv")
    with pytest.raises(SettingsError, match=r"60 rows with prices, none of them a number for each item: .* `\|`"):
        read_log(tmp_path / "x.csv")


@pytest.mark.parametrize(
    "nothing",
    [
        pl.lit(None, pl.List(pl.Float64)),
        pl.lit([None, None], pl.List(pl.Float64)),
        pl.lit([float("nan")] * 25, pl.List(pl.Float64)),
        pl.lit("NA|NA|NA"),
        pl.lit("||||"),
    ],
)
def test_a_log_that_tells_no_price_is_read(tmp_path: Path, nothing: pl.Expr) -> None:
    _log(60).with_columns(prices=nothing).write_parquet(tmp_path / "x.parquet")
    assert all(np.isnan(prices).all() for prices in read_log(tmp_path / "x.parquet").prices)


def test_of_two_columns_that_would_do_the_more_exact_is_taken(file: Path, tmp_path: Path) -> None:
    table = _log()
    others = {"event_time": pl.lit("2026-01-01"), "product_id": pl.lit(7), "User_ID": pl.lit(3)}
    table.select(pl.lit(3).alias("User_ID"), *table.columns).with_columns(**others).rename(
        {"item_id": "reference"}
    ).write_parquet(tmp_path / "x.parquet")
    _alike(read_log(tmp_path / "x.parquet"), read_log(file))


def test_a_folder_may_lack_a_mapped_column_in_one_file_and_not_in_all(file: Path, tmp_path: Path) -> None:
    table, folder = _log().rename({"impressions": "shown"}), tmp_path / "folder"
    folder.mkdir()
    table.filter(pl.col("step") < 3).drop("shown", "prices").write_parquet(folder / "looks.parquet")
    table.filter(pl.col("step") == 3).write_parquet(folder / "lists.parquet")
    _alike(read_log(folder, columns={"impressions": "shown"}), read_log(file))
    with pytest.raises(SettingsError, match="none of them listed, which impressions is mapped to"):
        read_log(folder, columns={"impressions": "listed"})


def test_an_action_without_a_readable_step_comes_neither_before_nor_after_those_of_its_time(tmp_path: Path) -> None:
    table = _log(30).with_columns(pl.col("ts_ms") // 10_000 * 10_000)
    table.with_columns(pl.format("{}/3", "step").alias("step")).write_parquet(tmp_path / "x.parquet")
    choices = list(Replay(read_log(tmp_path / "x.parquet"), 0).choices())
    assert [sum(a.session == c.slate.session for a in c.history) for c in choices] == [0] * 30


def _alike(one: SlateLog, other: SlateLog) -> None:
    for column in ("users", "sessions", "times", "actions", "items", "contexts"):
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
    assert [shown.tolist() for shown in one.shown] == [shown.tolist() for shown in other.shown]
    assert [prices.tolist() for prices in one.prices] == [prices.tolist() for prices in other.prices]


@pytest.mark.parametrize("whose", ["user_id", "session_id"])
@pytest.mark.parametrize("gap", [None, float("nan")])
def test_an_action_of_nobody_or_no_session_is_refused(tmp_path: Path, whose: str, gap: float | None) -> None:
    hole = pl.when(pl.col("step") == 2).then(pl.lit(gap, pl.Float64)).otherwise(whose)
    _log(30).with_columns(hole.alias(whose)).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(SettingsError, match=f"30 actions without a {whose}: remove them, or give every action one"):
        read_log(tmp_path / "x.parquet")


@pytest.mark.parametrize("between", [",", " ", ", ", ";"])
def test_impressions_with_another_separator_are_refused_with_the_right_one(tmp_path: Path, between: str) -> None:
    joined = pl.col("impressions").cast(pl.List(pl.String)).list.join(between)
    one = pl.when(pl.col("session_id") % 4 == 0).then(pl.col("item_id").cast(pl.String)).otherwise(joined)
    one = pl.when(pl.col("impressions").is_null()).then(None).otherwise(one)
    for name, text in (("all", joined), ("most", one), ("brackets", pl.format("[{}]", joined))):
        table = _log(120).with_columns(text.alias("impressions")).drop("prices")
        table.write_csv(tmp_path / f"{name}.csv")
        with pytest.raises(SettingsError, match=r"has 120 rows with impressions, and in \d+ the .* `\|` between"):
            read_log(tmp_path / f"{name}.csv")


def test_lists_in_lists_and_lists_for_names_are_refused(tmp_path: Path) -> None:
    deep = _log(30).with_columns(pl.col("impressions").list.eval(pl.concat_list(pl.element())))
    deep.write_parquet(tmp_path / "deep.parquet")
    _log(30).with_columns(pl.concat_list("item_id").alias("item_id")).write_parquet(tmp_path / "item.parquet")
    for file, name in (("deep", "impressions"), ("item", "item_id")):
        with pytest.raises(SettingsError, match=f"more than one value in a row of {name}"):
            read_log(tmp_path / f"{file}.parquet")


def test_only_what_must_be_there_must_be_there(tmp_path: Path) -> None:
    _log().drop("prices", "platform", "device", "step").write_ndjson(tmp_path / "bare.jsonl")
    assert len(slate.run(tmp_path / "bare.jsonl", seed=0, tell=_tell).users) == 60


def _same(tmp_path: Path, changed: pl.DataFrame) -> None:
    _log().write_parquet(tmp_path / "a.parquet")
    changed.write_parquet(tmp_path / "b.parquet")
    first, again = (slate.run(tmp_path / f"{name}.parquet", seed=0, tell=_tell) for name in "ab")
    for arm in first.arms:
        np.testing.assert_array_equal(first.means[arm]["mrr"], again.means[arm]["mrr"], err_msg=arm)


def test_times_of_any_unit_are_the_same_times(tmp_path: Path) -> None:
    _same(tmp_path, _log().with_columns(pl.from_epoch("ts_ms", "ms").dt.strftime("%Y-%m-%dT%H:%M:%SZ")))
    _same(tmp_path, _log().with_columns(pl.col("ts_ms") * 1_000))


def test_lists_of_a_fixed_size_and_numbers_with_gaps_are_the_same_lists(tmp_path: Path) -> None:
    numbers = pl.col("item_id").cast(pl.Float64), pl.col("impressions").cast(pl.Array(pl.Float64, 6))
    _same(tmp_path, _log().with_columns(*numbers, pl.col("prices").cast(pl.Array(pl.Int64, 6))))


def test_a_place_without_an_item_and_odd_prices_are_no_error(tmp_path: Path) -> None:
    table = _log()
    gaps = [None if some is None else [*some[:3], None, *some[3:]] for some in table["impressions"].to_list()]
    odd = [
        None if some is None else [0.0, -1.0, float("inf"), None, float("nan"), 1e12]
        for some in table["prices"].to_list()
    ]
    table = table.with_columns(pl.Series("impressions", gaps), pl.Series("prices", odd, dtype=pl.List(pl.Float64)))
    table.write_parquet(tmp_path / "gaps.parquet")
    found = slate.run(tmp_path / "gaps.parquet", seed=0, tell=_tell)
    assert np.isfinite(found.means["default"]["mrr"]).all()


def test_lists_may_be_of_any_length(tmp_path: Path) -> None:
    """The longest of the training part has a weight for each position; what is behind it shares the last."""
    table = _log()
    last = table["session_id"].max()
    more = [*range(40), *range(100, 260)]
    lists = [
        [*some, *[one for one in more if one not in some]] if some is not None and session == last else some
        for some, session in zip(table["impressions"].to_list(), table["session_id"].to_list(), strict=True)
    ]
    table.with_columns(pl.Series("impressions", lists)).write_parquet(tmp_path / "long.parquet")
    found = slate.run(tmp_path / "long.parquet", seed=0, tell=_tell)
    assert found.facts["positions with a weight"] == 6
    assert np.isfinite(found.means["default"]["mrr"]).all()


def test_choices_of_one_time_are_learned_from_after_all_of_them_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _log(80)
    shared = pl.col("session_id") // 4 * 600_000 + _START + pl.col("step") * 1_000
    table.with_columns(ts_ms=shared.cast(pl.Int64)).write_parquet(tmp_path / "ties.parquet")
    asked: list[tuple[int, int]] = []
    ours = slate._ours

    def spied(
        learner: slate._Learner, choice: Choice, *more: object
    ) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        newest = max(one.time for one in learner.newest[0])
        asked.append((newest, choice.slate.time))
        return ours(learner, choice, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(slate, "_ours", spied)
    slate.run(tmp_path / "ties.parquet", seed=0, tell=_tell)
    assert len(asked) == 40
    assert all(newest < now for newest, now in asked)


def test_of_many_choices_some_are_scored_and_old_lists_are_forgotten(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slate.run(file, seed=0, tell=_tell)
    few = slate.run(file, seed=0, tell=_tell, most=20)
    assert few.users.tolist() == whole.users[::3].tolist()
    for arm in ("default", "last-interacted", "vsknn", "popularity-1h"):
        assert few.means[arm]["mrr"][0] == whole.means[arm]["mrr"][0]
    monkeypatch.setattr(slate, "_MOST_KEPT", 30)
    learner: list[slate._Learner] = []
    learn = slate._Learner.learn

    def spied(self: slate._Learner, *given: object) -> None:
        learner[:] = [self]
        learn(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(slate._Learner, "learn", spied)
    found = slate.run(file, seed=0, tell=_tell)
    assert len(found.users) == 60
    assert sum(map(len, learner[0].by_user.values())) <= len(learner[0].kept) == 30
    assert len(learner[0].newest[0]) == 30


def test_popularity_of_the_hour_forgets_what_is_older() -> None:
    population = Population()
    for time, item in ((0, 1), (1_000, 2), (1_800_000, 1)):
        population.add_look(item, time, [])
    assert population.last_hour([1, 2, 3], 3_600_000).tolist() == [2, 1, 0]
    assert population.last_hour([1, 2, 3], 3_600_500).tolist() == [1, 1, 0]
    assert population.last_hour([1, 2, 3], 9_000_000).tolist() == [0, 0, 0]


@pytest.mark.parametrize("apart", [1_000, 0])
def test_the_streams_scorers_find_what_always_goes_together(tmp_path: Path, apart: int) -> None:
    """Every session looks at an item and then chooses the one after it; also where only the steps say which was first.

    Not so long ago these arms saw no earlier step of the same time, which all others do.
    """
    rng = np.random.default_rng(0)
    found = []
    for session in range(200):
        looked = int(rng.integers(20))
        shown = rng.permutation([(looked + 1) % 20, *rng.choice(np.arange(20, 40), 5, replace=False)]).tolist()
        common = {"user_id": session % 50, "session_id": session, "action_type": "look"}
        time = _START + session * 600_000
        found += [
            common | {"ts_ms": time, "step": 1, "item_id": looked},
            common | {"ts_ms": time + apart, "step": 2, "item_id": (looked + 1) % 20, "impressions": shown},
        ]
    pl.DataFrame(found, infer_schema_length=None).write_parquet(tmp_path / "pairs.parquet")
    outcome = slate.run(tmp_path / "pairs.parquet", seed=0, tell=_tell)
    assert outcome.means["vsknn"]["mrr"].mean() > outcome.means["shown-order"]["mrr"].mean() + 0.2


@pytest.mark.parametrize("missing", ["user_id", "session_id", "event_time", "action_type", "item_id", "impressions"])
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    _log(30).drop("ts_ms" if missing == "event_time" else missing).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(SettingsError, match=f"none of which is known as {missing}: map one with --column {missing}="):
        slate.run(tmp_path / "x.parquet", seed=0, tell=_tell)


def test_what_cannot_be_judged_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name a CSV"):
        slate.run(tmp_path / "absent.parquet", seed=0, tell=_tell)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(SettingsError, match="ends in none of"):
        slate.run(tmp_path / "x.txt", seed=0, tell=_tell)
    (tmp_path / "x.parquet").write_text("a")
    with pytest.raises(SettingsError, match="cannot be read"):
        slate.run(tmp_path / "x.parquet", seed=0, tell=_tell)
    _log(10).write_parquet(tmp_path / "few.parquet")
    with pytest.raises(SettingsError, match="choices to train on"):
        slate.run(tmp_path / "few.parquet", seed=0, tell=_tell)
    _log(30).with_columns(impressions=pl.lit(None).cast(pl.List(pl.Int64))).write_parquet(tmp_path / "none.parquet")
    with pytest.raises(SettingsError, match="no row with impressions"):
        slate.run(tmp_path / "none.parquet", seed=0, tell=_tell)
    _log(30).clear().write_parquet(tmp_path / "empty.parquet")
    with pytest.raises(SettingsError, match="no actions"):
        slate.run(tmp_path / "empty.parquet", seed=0, tell=_tell)
    odd = pl.when(pl.col("step") == 2).then(float("nan")).otherwise("ts_ms").alias("ts_ms")
    _log(30).with_columns(odd).write_parquet(tmp_path / "odd.parquet")
    with pytest.raises(SettingsError, match="some without a time"):
        slate.run(tmp_path / "odd.parquet", seed=0, tell=_tell)
    _log(30).write_parquet(tmp_path / "fine.parquet")
    with pytest.raises(SettingsError, match="between 0 and 1"):
        slate.run(tmp_path / "fine.parquet", seed=0, tell=_tell, train_share=1.0)


def test_actions_of_the_same_time_are_not_known_unless_an_earlier_step(tmp_path: Path) -> None:
    table = _log(30).with_columns(pl.col("ts_ms") // 10_000 * 10_000)
    table.write_parquet(tmp_path / "stepped.parquet")
    table.drop("step").write_parquet(tmp_path / "unordered.parquet")
    sizes = []
    for name in ("stepped", "unordered"):
        choices = list(Replay(read_log(tmp_path / f"{name}.parquet"), 0).choices())
        sizes.append([sum(a.session == c.slate.session for a in c.history) for c in choices])
    assert sizes == [[1] * 30, [0] * 30]


def test_offsets_recency_and_counts_point_at_the_right_candidate() -> None:
    layout = Layout([0, 1], [], 25)
    shown = Slate(10_000, 5, np.array([3, 4, 5, 6]), np.array([10.0, 30.0, 20.0, 40.0]), np.zeros(0, np.int64))
    history = [Action(1_000, 5, 6, 0, chosen=True), Action(5_000, 5, 4, 1, chosen=False)]
    found = features(layout, shown, history, Population())
    assert found.shape == (4, layout.size)
    starts = np.cumsum([0, *(width for _, width in layout.blocks)])
    block = {name: found[:, a : a + w] for (name, w), a in zip(layout.blocks, starts, strict=False)}
    assert block["recency"][:, 0].tolist() == [0, 1, 0, 0]
    assert block["recency"][:, 1].tolist() == [0, 0, 0, 1]
    assert block["last kind"].tolist() == [[0, 0], [0, 1], [0, 0], [0, 0]]
    assert block["offset to the last"].argmax(1).tolist() == [4, 5, 6, 7]
    assert block["offset to the last chosen"].argmax(1).tolist() == [2, 3, 4, 5]
    assert block["price"][:, 1].tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])
    unknown = features(layout, shown, [], Population())
    kept = layout.of_nobody
    np.testing.assert_array_equal(found[:, kept], unknown[:, kept])
    others = np.setdiff1d(np.arange(layout.size), kept)
    assert np.abs(unknown[:, others]).max() == 0


def _price_blocks(prices: list[float], history: list[Action]) -> dict[str, np.ndarray[tuple[int, ...], Any]]:
    layout = Layout([0], [], 25)
    shown = Slate(10_000, 5, np.array([3, 4, 5]), np.array(prices), np.zeros(0, np.int64))
    found = features(layout, shown, history, Population())
    starts = np.cumsum([0, *(width for _, width in layout.blocks)])
    return {name: found[:, a : a + w] for (name, w), a in zip(layout.blocks, starts, strict=False)}


def test_prices_are_compared_with_those_looked_at_and_chosen() -> None:
    """By hand: 5 was looked at first and 3 last, both on this list; 50 and 100 were chosen on lists of other items."""
    bought = [
        Action(1, 1, 90, 0, chosen=True, price=price_of(np.array([50.0, 200.0]), 0)),
        Action(2, 2, 91, 0, chosen=True, price=price_of(np.array([10.0, 100.0, 1000.0]), 1)),
    ]
    looked = [Action(3, 5, 5, 0, chosen=False), Action(4, 5, 3, 0, chosen=False)]
    logs = np.log([100.0, 200.0, 400.0])
    found = _price_blocks([100.0, 200.0, 400.0], [*bought, *looked])
    for block, column, reference in (
        ("price against the looked at", 0, np.log(100)),
        ("price against the looked at", 2, (np.log(100) + np.log(400)) / 2),
        ("price against the chosen", 0, (np.log(50) + np.log(100)) / 2),
        ("price against the chosen", 2, np.log(100)),
    ):
        np.testing.assert_allclose(found[block][:, column], logs - reference, atol=1e-6)
        np.testing.assert_allclose(found[block][:, column + 1], np.abs(logs - reference), atol=1e-6)
    level = (np.log(50) - np.log(100)) / 2  # half of the first's, whose list has the mean log(100); the other's is 0
    away = [np.array([0.0, 0.5, 1.0]) - 0.25, logs - logs.mean() - level]
    for column, expected in zip((0, 2), away, strict=True):
        np.testing.assert_allclose(found["price level of the chosen"][:, column], expected, atol=1e-6)
    np.testing.assert_allclose(found["sorted by price"][:, 1], [1, 0, 0])
    assert not _price_blocks([400.0, 100.0, 200.0], [])["sorted by price"].any()


def test_unknown_prices_compare_with_nothing() -> None:
    assert price_of(np.array([1.0, np.nan]), 0) is None
    bought = [Action(1, 1, 90, 0, chosen=True, price=None), Action(3, 5, 5, 0, chosen=False)]
    for history, prices in ((bought, [100.0, np.nan, 400.0]), (bought[:1], [100.0, 200.0, 400.0])):
        found = _price_blocks(prices, history)
        assert not any(found[name].any() for name in found if name.startswith("price ") and name != "price")


def test_recents_are_all_that_the_user_looked_at_the_newest_first(tmp_path: Path) -> None:
    """Each chooses what they looked at before last, in an earlier session."""
    rng, found = np.random.default_rng(0), []
    for user in range(60):
        shown = rng.permutation(np.arange(40))[:8].tolist()
        first, second, time = shown[4], shown[6], _START + user * 600_000
        common = {"user_id": user, "action_type": "look"}
        found += [
            common | {"session_id": 2 * user, "ts_ms": time, "item_id": first},
            common | {"session_id": 2 * user + 1, "ts_ms": time + 1_000, "item_id": second},
            common | {"session_id": 2 * user + 1, "ts_ms": time + 2_000, "item_id": first, "impressions": shown},
        ]
    pl.DataFrame(found, infer_schema_length=None).write_parquet(tmp_path / "back.parquet")
    outcome = slate.run(tmp_path / "back.parquet", seed=0, tell=_tell)
    assert (outcome.means["recents"]["mrr"] == 0.5).all()
    assert (outcome.means["last-interacted"]["mrr"] < 0.3).all()


def test_unknown_prices_rank_in_the_middle() -> None:
    assert price_ranks(np.array([1.0, np.nan])).tolist() == [0.5, 0.5]
    assert price_ranks(np.array([5.0, 5.0, 1.0])).tolist() == [0.5, 0.5, 0.0]


def test_gauc_weighs_lists_by_size_and_leaves_out_single_items() -> None:
    assert slate.weighted_mean(np.array([2.0, 6.0]), np.array([0.0, 1.0]), np.ones(2)) == 0.75
    assert np.isnan(slate.weighted_mean(np.zeros(1), np.zeros(1), np.ones(1)))


def _seen(rng: np.random.Generator, count: int, size: int = 4) -> list[Seen]:
    widths = rng.integers(2, 7, count)
    return [
        Seen(rng.normal(size=(width, size)).astype(np.float32), int(rng.integers(width)), at)
        for at, width in enumerate(widths)
    ]


def test_a_heads_examples_are_the_newest_lists_candidates_and_both_labels_weigh_the_same() -> None:
    lists = _seen(np.random.default_rng(0), LISTS + 2)
    found = support([lists, []], 4)
    kept = lists[2:]
    assert found.mask.sum(1).tolist() == [sum(len(one.features) for one in kept), 0]
    start = 0
    for one in kept:
        rows = slice(start, start + len(one.features))
        start = rows.stop
        labels, weights = found.labels[0, rows].numpy(), found.weights[0, rows].numpy()
        assert np.flatnonzero(labels).tolist() == [one.chosen]
        assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum())
        np.testing.assert_allclose(found.features[0, rows].numpy(), one.features - one.features.mean(0), rtol=1e-6)


def test_a_head_answers_one_by_one_as_all_at_once_and_without_lists_by_its_prior() -> None:
    rng = np.random.default_rng(1)
    seen, columns = _seen(rng, 60, 6), np.array([1, 3, 4])
    heads = teach(seen, rng.integers(8, size=60).tolist(), np.zeros(6, np.int64), columns, seed=0)
    chooser = Chooser(np.ones(6), np.ones(6), columns, 1.0)
    own = [chooser.own(one) for one in seen]
    together, alone = HeadArms(heads), HeadArms(heads)
    for at in range(7):
        for arms in (together, alone):
            arms.ask(own[at].features, own[20 : 20 + at])
        alone.answer()
    together.answer()
    for name, head in heads.items():
        for ours, theirs in zip(together.scores[name], alone.scores[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
        centred = torch.from_numpy(own[0].features - own[0].features.mean(0))
        prior = head.score(head.prior[None], centred[None])[0].numpy()
        np.testing.assert_allclose(together.scores[name][0], prior, rtol=1e-5, atol=1e-6, err_msg=name)
