"""The cold-start protocol from files to rows, on a small world of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose
from scipy.sparse import csr_matrix

from innerloop.errors import SettingsError
from innerloop.evaluation.cold_start import protocol as cold_start
from innerloop.evaluation.cold_start.baselines import Biases, PopularityInCategory
from innerloop.evaluation.cold_start.episodes import Episodes, draw_episodes
from innerloop.evaluation.cold_start.histories import Histories, WithHistory
from innerloop.evaluation.cold_start.ratings import read_rating_data
from innerloop.evaluation.cold_start.validation import Chosen, choose, contents_of, item_categories, learn_arms, split
from innerloop.evaluation.outcome import Outcome
from innerloop.evaluation.scoreboard import rows
from innerloop.learning.heads import Recipe

USERS, ITEMS = 160, 90
STEPS = 8
RECIPE = Recipe(seed=0, steps=STEPS)
COLD_USERS, COLD_ITEMS = 40, 30


def world(seed: int = 0) -> dict[str, pl.DataFrame]:
    """Users who like or dislike the items' genres; the last users and items are cold."""
    rng = np.random.default_rng(seed)
    genre, grade = rng.integers(0, 3, ITEMS), rng.integers(0, 2, ITEMS)
    taste = rng.normal(0, 0.9, (USERS, 3)) + rng.normal(0, 0.5, (USERS, 1))
    truth = 3.3 + taste[:, genre] + 0.6 * grade + 0.3 * rng.normal(size=ITEMS)
    given = np.clip(np.round(truth + 0.4 * rng.normal(size=truth.shape)), 1, 5).astype(int)
    users, items = np.nonzero(rng.random(truth.shape) < 0.5)
    table = pl.DataFrame({"user_id": users, "item_id": items, "rating": given[users, items]})
    new_user, new_item = pl.col("user_id") >= USERS - COLD_USERS, pl.col("item_id") >= ITEMS - COLD_ITEMS
    return {
        "items": pl.DataFrame(
            {"item_id": range(ITEMS), "genre": [f"g{g}, g{g}x" for g in genre], "grade": [f"x{g}" for g in grade]}
        ),
        "users": pl.DataFrame({"user_id": range(USERS), "gender": ["F", "M"] * (USERS // 2)}),
        "meta_training": table.filter(~new_user & ~new_item),
        "user_cold_testing": table.filter(new_user & ~new_item),
        "item_cold_testing": table.filter(~new_user & new_item),
        "user_and_item_cold_testing": table.filter(new_user & new_item),
    }


def write(at: Path, tables: dict[str, pl.DataFrame]) -> Path:
    at.mkdir(exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(at / f"{name}.parquet")
    return at


def quiet(what: str, share: float) -> None:
    assert what
    assert 0 <= share <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cold") / "data", world())


@pytest.fixture(scope="module")
def outcome(data: Path) -> Outcome:
    return cold_start.run(data, seed=0, tell=quiet, steps=STEPS)


@pytest.fixture(scope="module")
def chosen(data: Path) -> Chosen:
    return choose(read_rating_data(data), RECIPE, quiet)


def figure(outcome: Outcome, arm: str, metric: str, where: str) -> float:
    return float(np.nanmean(outcome.means[arm][metric][outcome.slices[where]]))


def test_every_arm_and_baseline_is_there(outcome: Outcome) -> None:
    ours = {"default", "bayes", "anil", "cavia", "maml", "reptile", "none", "placebo"}
    baselines = {"global-mean", "item-mean", "user-mean", "item-user-bias", "item-knn", "biased-mf", "popularity"}
    baselines |= {"popularity-in-category"}
    assert set(outcome.arms) == ours | baselines
    assert outcome.baselines == baselines


def test_popularity_in_category_counts_among_what_is_like_the_users_examples() -> None:
    counts, genres = np.array([9.0, 5.0, 7.0, 1.0]), csr_matrix(np.array([[1.0, 0], [0, 1], [1, 1], [0, 1]]))
    arm = PopularityInCategory(counts, genres)
    items, values = np.array([[0, 1, 2, 3, 1]]), np.ones((1, 5))
    episodes = Episodes(np.array([0]), items, values, np.array([5]), np.array([5]), queries=3)
    order = [np.argsort(-arm.predict(episodes, np.array([shots])).mean[0]).tolist() for shots in (0, 2)]
    assert order[0] == [0, 2, 1]  # by popularity
    assert order[1] == [2, 1, 0]  # items 3 and 1 were rated, which are of the second genre


def test_without_a_column_of_categories_there_is_no_popularity_in_them(tmp_path: Path) -> None:
    tables = world()
    plain = tables | {"items": tables["items"].drop("genre")}
    for name, given, there in (("with", tables, True), ("without", plain, False)):
        data = read_rating_data(write(tmp_path / name, given))
        found = item_categories(data)
        assert (found is not None) == there


def test_every_metric_and_slice_is_there(outcome: Outcome) -> None:
    assert set(outcome.means["default"]) == {
        "mae", "mae-of-mean", "ndcg@1", "ndcg@3", "ndcg@5", "ndcg-exp@1", "ndcg-exp@3", "ndcg-exp@5",
    }  # fmt: skip
    files = ("user_cold", "item_cold", "user_and_item_cold")
    curve = {f"{name} k={shots}" for name in files for shots in (0, 1, 2, 3, 5, 10, 20, 50)}
    assert set(outcome.slices) == {"all", *files} | curve


def test_all_is_the_main_protocol_and_no_shot_curve(outcome: Outcome) -> None:
    main = outcome.slices["user_cold"] | outcome.slices["item_cold"] | outcome.slices["user_and_item_cold"]
    assert np.array_equal(outcome.slices["all"], main)
    assert main.sum() < len(main)


def test_the_main_protocol_is_about_users_with_thirteen_to_a_hundred_ratings(outcome: Outcome, data: Path) -> None:
    for name in ("user_cold", "item_cold"):
        counts = pl.read_parquet(data / f"{name}_testing.parquet").group_by("user_id").len()["len"].to_numpy()
        assert outcome.slices[name].sum() == 5 * ((counts >= 13) & (counts <= 100)).sum()
        assert outcome.slices[f"{name} k=3"].sum() == 5 * (counts > 10).sum()


def test_without_examples_default_is_none_bit_for_bit_where_users_are_new(outcome: Outcome) -> None:
    for where in ("user_cold k=0", "user_and_item_cold k=0"):
        at = outcome.slices[where]
        for metric in ("mae-of-mean", "ndcg@3", "ndcg-exp@5"):
            values = [outcome.means[arm][metric][at] for arm in ("bayes", "none", "placebo", "default")]
            assert all(np.array_equal(values[0], other) for other in values[1:])
        assert np.array_equal(outcome.means["bayes"]["mae"][at], outcome.means["none"]["mae"][at])


def test_adapting_helps_and_more_examples_help_more(outcome: Outcome) -> None:
    curve = [figure(outcome, "default", "mae-of-mean", f"user_cold k={shots}") for shots in (0, 1, 5, 20)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.8 * curve[0]
    assert figure(outcome, "default", "mae", "all") < 0.9 * figure(outcome, "none", "mae", "all")


def test_another_users_examples_do_not_help(outcome: Outcome) -> None:
    for where in ("user_cold", "item_cold", "user_cold k=5"):
        assert figure(outcome, "placebo", "mae-of-mean", where) > figure(outcome, "none", "mae-of-mean", where)


def test_content_tells_new_items_apart(outcome: Outcome) -> None:
    assert figure(outcome, "none", "ndcg@3", "item_cold") > figure(outcome, "global-mean", "ndcg@3", "item_cold") + 0.1
    best = figure(outcome, "biased-mf", "mae", "item_cold")
    assert figure(outcome, "bayes", "mae", "item_cold") < best


def test_a_known_users_training_ratings_help_with_new_items(outcome: Outcome) -> None:
    assert figure(outcome, "default", "mae", "item_cold k=0") < 0.95 * figure(outcome, "bayes", "mae", "item_cold k=0")


def test_popularity_has_an_order_but_foretells_no_ratings(outcome: Outcome) -> None:
    assert set(outcome.means["popularity"]) == {m for m in outcome.means["default"] if m.startswith("ndcg")}


def test_the_scoreboard_takes_it(outcome: Outcome) -> None:
    table = {(row.arm, row.metric, row.slice): row for row in rows(outcome, draws=50)}
    row = table["default", "mae", "user_cold"]
    assert row.low < row.value < row.high
    assert ("default - none", "mae", "user_cold k=1") in table
    assert table["default - none", "mae", "all"].high < 0


def test_the_same_seed_gives_the_same_figures_and_order_of_rows_does_not_matter(
    outcome: Outcome, tmp_path: Path
) -> None:
    mixed = {name: table.sample(fraction=1.0, shuffle=True, seed=7) for name, table in world().items()}
    again = cold_start.run(write(tmp_path / "mixed", mixed), seed=0, tell=quiet, steps=STEPS)
    for arm, metrics in outcome.means.items():
        for metric, values in metrics.items():
            assert np.array_equal(values, again.means[arm][metric], equal_nan=True), (arm, metric)


def test_no_arm_sees_what_it_is_asked_or_examples_beyond_the_shots(data: Path, chosen: Chosen) -> None:
    found = read_rating_data(data)
    arms = learn_arms(found, chosen, RECIPE, quiet)
    for test in found.tests.values():
        episodes = draw_episodes(test, seed=0)
        shots = np.random.default_rng(0).integers(0, 5, len(episodes.users))
        values = episodes.values.copy()
        values[:, :10] = 1e6
        for row, count in enumerate(shots):
            values[row, 10 + count :] = -1e6
        hidden = replace(episodes, values=values)
        for name, arm in arms.items():
            one, other = arm.predict(episodes, shots), arm.predict(hidden, shots)
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), name


def test_nothing_is_learned_from_the_test_files(chosen: Chosen, tmp_path: Path) -> None:
    other = {
        name: table.with_columns(rating=6 - pl.col("rating")) if name.endswith("_testing") else table
        for name, table in world().items()
    }
    again = choose(read_rating_data(write(tmp_path / "turned", other)), RECIPE, quiet)
    assert again.model == chosen.model
    assert again.baselines == chosen.baselines
    assert again.facts == chosen.facts
    rule, same = chosen.rules["bayes"], again.rules["bayes"]
    assert np.array_equal(rule.otherwise.weights, same.otherwise.weights)


def test_validation_holds_users_and_items_out(data: Path) -> None:
    found = read_rating_data(data)
    part, (users, items, both) = split(found.training, 3)
    assert sum(len(p.users) for p in (part, users, items, both)) == len(found.training.users)
    assert not set(part.users) & set(users.users)
    assert not set(part.items) & set(items.items)
    assert not set(part.users) & set(both.users)
    assert not set(part.items) & set(both.items)
    assert set(users.items) <= set(part.items)


def test_content_is_learned_from_training_rows_alone(data: Path) -> None:
    found = read_rating_data(data)
    strange = found.items.with_columns(
        genre=pl.when(pl.col("item_id").cast(pl.Int64) >= ITEMS - COLD_ITEMS).then(pl.lit("new")).otherwise("genre")
    )
    width = contents_of(found)[1].features.shape[1]
    assert contents_of(replace(found, items=strange))[1].features.shape[1] <= width


def test_too_few_ratings_are_refused_in_a_sentence(tmp_path: Path) -> None:
    few = {name: table.head(6) if name == "meta_training" else table for name, table in world().items()}
    with pytest.raises(SettingsError, match="meta_training"):
        cold_start.run(write(tmp_path / "few", few), seed=0, tell=quiet, steps=STEPS)


def test_test_users_with_too_few_ratings_are_refused_in_a_sentence_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cold_start, "choose")
    few = {name: table.head(8) if name.endswith("_testing") else table for name, table in world().items()}
    with pytest.raises(SettingsError, match="more than ten ratings"):
        cold_start.run(write(tmp_path / "short", few), seed=0, tell=quiet, steps=1)


def test_a_longer_scale_changes_nothing_but_the_unit(outcome: Outcome, tmp_path: Path) -> None:
    """The model and the baselines' ridges were right for five stars alone. Of powers of two all bits are the same."""
    longer = {
        name: table.with_columns(rating=pl.col("rating") * 16) if "rating" in table.columns else table
        for name, table in world().items()
    }
    again = cold_start.run(write(tmp_path / "longer", longer), seed=0, tell=quiet, steps=STEPS)
    for arm, metrics in outcome.means.items():
        for metric in metrics.keys() & {"mae", "mae-of-mean", "ndcg@3"}:
            factor = 1 if metric == "ndcg@3" else 16
            assert_allclose(again.means[arm][metric], factor * metrics[metric], rtol=1e-12, err_msg=f"{arm}, {metric}")
    assert not [metric for metric in again.means["default"] if metric.startswith("ndcg-exp")]
    assert "ndcg-exp" in again.facts["left out"]  # type: ignore[operator]


def test_dislikes_below_zero_are_no_negative_gains(tmp_path: Path) -> None:
    below = {
        name: table.with_columns(rating=pl.col("rating") - 5) if "rating" in table.columns else table
        for name, table in world().items()
    }
    found = cold_start.run(write(tmp_path / "below", below), seed=0, tell=quiet, steps=1)
    for arm in ("default", "biased-mf", "popularity"):
        values = found.means[arm]["ndcg@5"]
        assert (values >= 0).all()
        assert (values <= 1 + 1e-12).all()
        assert values.mean() > 0.3


def test_ratings_that_are_all_the_same_are_refused_in_a_sentence(tmp_path: Path) -> None:
    same = {
        name: table.with_columns(rating=pl.lit(4)) if name == "meta_training" else table
        for name, table in world().items()
    }
    with pytest.raises(SettingsError, match="no two different ratings"):
        cold_start.run(write(tmp_path / "same", same), seed=0, tell=quiet, steps=1)


def test_what_is_asked_is_not_told_in_training(tmp_path: Path) -> None:
    tables = world()
    some = tables["user_cold_testing"].sample(fraction=0.6, seed=1)
    told = tables | {"meta_training": pl.concat([tables["meta_training"], some])}
    found, clean = (read_rating_data(write(tmp_path / n, t)) for n, t in (("told", told), ("clean", tables)))
    assert (found.repeated, clean.repeated) == (some.height, 0)
    for column in ("users", "items", "values"):
        assert np.array_equal(getattr(found.training, column), getattr(clean.training, column))


def test_without_users_of_thirteen_to_a_hundred_ratings_the_table_is_of_those_there_are(tmp_path: Path) -> None:
    tables = world()
    few = pl.col("item_id").cum_count().over("user_id") <= 12
    short = {name: table.filter(few) if name.endswith("_testing") else table for name, table in tables.items()}
    found = cold_start.run(write(tmp_path / "short", short), seed=0, tell=quiet, steps=1)
    assert found.slices["all"].any()
    assert "11 to 12 ratings" in str(found.facts["all"])


def test_baselines_know_a_known_users_training_ratings(data: Path, outcome: Outcome) -> None:
    """What `default` is told, they are told as well: at k=0 too, and to users without any it changes nothing."""
    for arm in ("user-mean", "item-user-bias", "biased-mf"):
        known, new = (figure(outcome, arm, "mae-of-mean", f"{of}_cold k=0") for of in ("item", "user_and_item"))
        assert known < 0.93 * new, arm
    found = read_rating_data(data)
    histories = Histories.of(found.training)
    plain = Biases.learn(found.training, len(found.item_ids), item_ridge=2.0, user_ridge=4.0)
    asked = draw_episodes(found.tests["item_cold"], seed=0)
    shots = np.arange(len(asked.users)) % 4
    informed = WithHistory(plain, histories).predict(asked, shots).mean
    for row in (0, 1, 7, len(asked.users) - 1):
        mine = found.training.where(found.training.users == asked.users[row])
        examples = slice(10, 10 + min(int(shots[row]), int(asked.support[row])))
        items = np.concatenate([mine.items, asked.items[row, examples]])
        left = np.concatenate([mine.values, asked.values[row, examples]]) - plain.mean - plain.items[items]
        expected = plain.mean + plain.items[asked.items[row, :10]] + left.sum() / (len(left) + 4.0)
        assert_allclose(informed[row], expected)
    strangers = draw_episodes(found.tests["user_cold"], seed=0)
    one, other = (
        arm.predict(strangers, np.full(len(strangers.users), 3)) for arm in (plain, WithHistory(plain, histories))
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_half_stars_and_files_without_content_work(tmp_path: Path) -> None:
    tables = world(1)
    half = {
        name: table.with_columns(rating=pl.col("rating") / 2.0) if "rating" in table.columns else table.select(key)
        for name, table in tables.items()
        for key in [table.columns[0]]
    }
    del half["item_cold_testing"], half["user_and_item_cold_testing"]
    found = cold_start.run(write(tmp_path / "half", half), seed=1, tell=quiet, steps=STEPS)
    assert figure(found, "default", "mae", "user_cold") < figure(found, "none", "mae", "user_cold")
    assert set(found.slices) == {"all", "user_cold", *(f"user_cold k={k}" for k in (0, 1, 2, 3, 5, 10, 20, 50))}
