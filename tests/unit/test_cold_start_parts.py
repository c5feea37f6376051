"""Reading, episodes, decision and baselines of the cold-start protocol."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression

from innerloop.errors import SettingsError
from innerloop.evaluation.cold_start.baselines import Popularity, RatingArm, learn_candidates
from innerloop.evaluation.cold_start.decision import DecisionRule, MedianRule, Prediction
from innerloop.evaluation.cold_start.episodes import draw_episodes, other_users
from innerloop.evaluation.cold_start.ratings import read_rating_data
from innerloop.learning.rating_model import Ratings

RATINGS = pl.DataFrame({"user_id": [2, 2, 10, 10], "item_id": [5, 6, 5, 7], "rating": [1, 2, 3, 4]})


def folder(at: Path, **tables: pl.DataFrame) -> Path:
    given = {
        "items": pl.DataFrame({"item_id": [5, 6, 7], "genre": ["a", "b", "a"]}),
        "users": pl.DataFrame({"user_id": [2, 10], "age": [20, 30]}),
        "meta_training": RATINGS,
        "user_cold_testing": pl.DataFrame({"user_id": [11], "item_id": [5], "rating": [5]}),
    }
    for name, table in (given | tables).items():
        table.write_parquet(at / f"{name}.parquet")
    return at


def test_ratings_are_numbered_by_identifier_whatever_their_type(tmp_path: Path) -> None:
    text = RATINGS.with_columns(pl.col("user_id").cast(pl.Float64), pl.col("item_id").cast(pl.String))
    found = read_rating_data(folder(tmp_path, meta_training=text))
    assert [found.user_ids[at] for at in found.training.users] == ["10", "10", "2", "2"]
    assert [found.item_ids[at] for at in found.training.items] == ["5", "7", "5", "6"]
    assert found.training.values.tolist() == [3, 4, 1, 2]
    assert found.user_ids[found.tests["user_cold"].users[0]] == "11"


def test_csv_is_read_like_parquet(tmp_path: Path) -> None:
    read = read_rating_data(folder(tmp_path))
    for path in tmp_path.glob("*.parquet"):
        pl.read_parquet(path).write_csv(path.with_suffix(".csv"))
        path.unlink()
    again = read_rating_data(tmp_path)
    assert again.training.values.tolist() == read.training.values.tolist()
    assert again.user_ids == read.user_ids
    assert again.items.equals(read.items)
    assert again.users.equals(read.users)


def test_columns_of_other_names_are_mapped_and_the_case_of_letters_is_no_matter(tmp_path: Path) -> None:
    """Items may be described under the usual name though the ratings have them under another."""
    read = read_rating_data(folder(tmp_path))
    for path in tmp_path.glob("*.parquet"):
        table = pl.read_parquet(path)
        if path.stem != "items":
            table = table.rename({"item_id": "movie", "user_id": "User_ID"}, strict=False)
        table.write_parquet(path)
    again = read_rating_data(tmp_path, {"item_id": "movie"})
    assert (again.user_ids, again.item_ids) == (read.user_ids, read.item_ids)
    assert again.items.equals(read.items)
    assert again.training.values.tolist() == read.training.values.tolist()
    with pytest.raises(SettingsError, match="film is no column of a file of ratings: those are user_id,"):
        read_rating_data(tmp_path, {"film": "movie"})


def test_a_second_rating_of_the_same_item_replaces_the_first(tmp_path: Path) -> None:
    twice = pl.concat([RATINGS, pl.DataFrame({"user_id": [2], "item_id": [5], "rating": [4]})])
    found = read_rating_data(folder(tmp_path, meta_training=twice))
    assert found.training.values.tolist() == [3, 4, 4, 2]


def test_tests_come_in_the_protocols_order_and_others_after(tmp_path: Path) -> None:
    more = {f"{name}_testing": RATINGS for name in ("later", "user_and_item_cold", "item_cold")}
    found = read_rating_data(folder(tmp_path, **more))
    assert list(found.tests) == ["user_cold", "item_cold", "user_and_item_cold", "later"]


@pytest.mark.parametrize("name", ["items", "users", "meta_training"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (folder(tmp_path) / f"{name}.parquet").unlink()
    with pytest.raises(SettingsError, match=name):
        read_rating_data(tmp_path)


def test_a_folder_without_test_files_says_how_to_make_them(tmp_path: Path) -> None:
    (folder(tmp_path) / "user_cold_testing.parquet").unlink()
    with pytest.raises(SettingsError, match="hold users and items out of meta_training"):
        read_rating_data(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a folder"):
        read_rating_data(folder(tmp_path) / "items.parquet")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (RATINGS.drop("rating"), "none of which is known as rating: map one with --column rating=NAME"),
        (RATINGS.rename({"user_id": "user"}), "none of which is known as user_id: map one"),
        (RATINGS.clear(), "no rows"),
        (RATINGS.with_columns(rating=pl.Series([1.0, float("nan"), 2.0, 3.0])), "1 rows without"),
        (RATINGS.with_columns(rating=pl.Series(["1", "good", "2", "bad"])), "2 rows without"),
        (RATINGS.with_columns(item_id=pl.Series([5, None, 5, 7])), "1 rows without"),
    ],
)
def test_ratings_that_cannot_be_used_are_refused(tmp_path: Path, table: pl.DataFrame, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_rating_data(folder(tmp_path, meta_training=table))


@pytest.mark.parametrize("name", ["user_id", "item_id", "rating"])
def test_lists_are_refused_by_the_name_of_their_column(tmp_path: Path, name: str) -> None:
    listed = RATINGS.with_columns(pl.concat_list(name).alias(name))
    with pytest.raises(SettingsError, match=f"more than one value in a row of {name}"):
        read_rating_data(folder(tmp_path, meta_training=listed))


def test_lists_are_refused_as_users_too(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="more than one value in a row of user_id"):
        read_rating_data(folder(tmp_path, users=pl.DataFrame({"user_id": [[2], [10]]})))


def test_a_user_without_a_number_is_none(tmp_path: Path) -> None:
    gap = RATINGS.with_columns(user_id=pl.Series([2.0, float("nan"), 10.0, 10.0]))
    with pytest.raises(SettingsError, match="1 rows without"):
        read_rating_data(folder(tmp_path, meta_training=gap))
    found = read_rating_data(folder(tmp_path, users=pl.DataFrame({"user_id": [2.0, float("nan"), 10.0]})))
    assert found.user_ids == ["10", "11", "2"]


def test_numbers_that_turn_into_text_late_are_text(tmp_path: Path) -> None:
    items = [*map(str, range(10_050)), "x50211"]
    folder(tmp_path)
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.csv").write_text("item_id\n" + "".join(f"{item}\n" for item in items))
    assert read_rating_data(tmp_path).item_ids == sorted(items)


def test_an_ending_may_be_in_capitals(tmp_path: Path) -> None:
    for path in folder(tmp_path).iterdir():
        path.rename(path.with_suffix(".PARQUET"))
    assert list(read_rating_data(tmp_path).tests) == ["user_cold"]


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (folder(tmp_path) / "users.parquet").write_bytes(b"nonsense")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_rating_data(tmp_path)


def ratings(seed: int = 0, users: int = 30, items: int = 150) -> Ratings:
    """Users 0.. with 5 to 130 ratings each; a rating says who gave it to what."""
    rng = np.random.default_rng(seed)
    rows = [(user, item) for user in range(users) for item in rng.permutation(items)[: rng.integers(5, 131)]]
    mine, theirs = np.array(rows).T
    return Ratings(mine, theirs, mine * 1000.0 + theirs)


def test_an_episode_has_each_of_the_users_ratings_once() -> None:
    given = ratings()
    episodes = draw_episodes(given, seed=1)
    counts = np.bincount(given.users)
    assert episodes.users.tolist() == np.flatnonzero(counts > 10).tolist()
    for at, user in enumerate(episodes.users):
        count = episodes.counts[at]
        items = episodes.items[at, :count]
        assert episodes.totals[at] == counts[user]
        assert count == min(counts[user], 100)
        assert len(set(items)) == count
        assert set(items) <= set(given.items[given.users == user])
        assert episodes.values[at, :count].tolist() == (user * 1000.0 + items).tolist()


def test_the_queries_are_random_and_others_under_another_seed() -> None:
    given = ratings()
    one, same, other = (draw_episodes(given, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.items, same.items)
    shared = [len(set(a) & set(b)) for a, b in zip(one.items[:, :10], other.items[:, :10], strict=True)]
    assert np.mean(shared) < 5


def test_every_user_is_given_another_users_examples_of_about_as_many() -> None:
    episodes = draw_episodes(ratings(users=200), seed=1)
    donors = other_users(episodes, 5)
    assert sorted(donors) == list(range(len(donors)))
    assert (donors != np.arange(len(donors))).all()
    gaps = np.sort(np.abs(episodes.counts[donors] - episodes.counts))
    assert np.median(gaps) <= 2
    swapped = episodes.with_support_of(donors)
    assert np.array_equal(swapped.items[:, :10], episodes.items[:, :10])
    assert np.array_equal(swapped.items[:, 10:], episodes.items[donors, 10:])


def test_a_user_alone_has_nobody_to_borrow_from() -> None:
    episodes = draw_episodes(ratings(users=1, seed=3), seed=1)
    assert other_users(episodes, 0).tolist() == [-1]


def skewed(seed: int, count: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions that are the mean of the ratings' distribution, which is skewed."""
    rng = np.random.default_rng(seed)
    quality = rng.uniform(0, 1, count)
    levels = 1 + rng.binomial(4, quality**0.5)
    return 1 + 4 * quality**0.5, np.full(count, 0.5), levels.astype(float)


def test_the_median_is_less_wrong_than_the_mean_and_than_any_one_level() -> None:
    rule = MedianRule.learn(*skewed(0))
    mean, spread, levels = skewed(1)
    decided = rule.decide(mean, spread)
    error = np.abs(decided - levels).mean()
    assert set(decided) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert error < np.abs(mean - levels).mean()
    assert error < min(np.abs(level - levels).mean() for level in range(1, 6))


def test_the_rule_learns_the_levels_that_are_least_wrong() -> None:
    mean = np.repeat(np.linspace(1, 5, 9), 500)
    levels = np.clip(np.round(mean + np.random.default_rng(0).normal(0, 0.4, len(mean)) + 0.8), 1, 5)
    rule = MedianRule.learn(mean, np.ones_like(mean), levels)
    at = np.linspace(1, 5, 9)
    best = [np.median(levels[mean == value]) for value in at]
    assert np.abs(rule.decide(at, np.ones(9)) - best).max() <= 1.0
    assert (rule.decide(at, np.ones(9)) == best).mean() >= 7 / 9


def test_levels_can_be_perfectly_separated() -> None:
    mean = np.repeat([1.0, 2.0, 3.0], 100)
    rule = MedianRule.learn(mean, np.ones_like(mean), mean)
    assert rule.decide(np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3))).tolist() == [[1.0, 2.0, 3.0]]


def test_a_few_wild_predictions_do_not_bend_the_rule() -> None:
    mean, spread, levels = skewed(0)
    wild = mean.copy()
    wild[::50] *= 1e6
    wild[::75] *= -1.0
    bent, straight = MedianRule.learn(wild, spread, levels), MedianRule.learn(mean, spread, levels)
    mean, spread, levels = skewed(1)
    errors = [np.abs(rule.decide(mean, spread) - levels).mean() for rule in (bent, straight)]
    assert errors[0] < errors[1] + 0.02


def test_the_rule_is_scikit_learns_logistic_regression() -> None:
    mean, _, levels = skewed(0)
    spread = np.random.default_rng(0).uniform(0.5, 1.5, len(mean))
    rule = MedianRule.learn(mean, spread, levels)
    features = np.stack([mean, spread, mean * spread], 1)
    for level, weights in zip(rule.levels, rule.weights, strict=False):
        theirs = LogisticRegression(C=1e6, max_iter=10_000).fit(features, levels <= level)
        ours = features @ weights[1:] + weights[0]
        agree = (ours > 0) == theirs.predict(features)
        assert agree.mean() > 0.98


def test_ratings_without_levels_are_clipped_to_their_scale() -> None:
    values = np.random.default_rng(0).uniform(2, 8, 1000)
    rule = MedianRule.learn(values, np.ones(1000), values)
    assert rule.decide(np.array([0.0, 5.3, 9.0]), np.ones(3)) == pytest.approx([values.min(), 5.3, values.max()])


def test_one_level_is_always_right() -> None:
    rule = MedianRule.learn(np.linspace(1, 5, 50), np.ones(50), np.full(50, 4.0))
    assert rule.decide(np.array([1.0, 9.0]), np.ones(2)).tolist() == [4.0, 4.0]


def test_what_is_not_known_stays_unknown() -> None:
    rule = MedianRule.learn(*skewed(0))
    assert np.isnan(rule.decide(np.array([np.nan, 3.0]), np.ones(2))).tolist() == [True, False]


def test_each_kind_of_case_has_a_rule_of_its_own() -> None:
    mean = np.tile(np.repeat([2.0, 3.0, 4.0], 400), (2, 1))
    kind = np.repeat([[0], [1]], 1200, axis=1).reshape(2, 1200)
    asked = mean + kind  # of the second kind everything is one better than foretold
    rule = DecisionRule.learn(Prediction(mean, np.ones_like(mean), kind), asked)
    assert np.array_equal(rule.decide(Prediction(mean, np.ones_like(mean), kind)), asked)
    strange = rule.decide(Prediction(mean, np.ones_like(mean), kind + 7))
    assert np.isin(strange, [2.0, 3.0, 4.0, 5.0]).all()


def arms() -> dict[str, RatingArm]:
    rng = np.random.default_rng(0)
    given = ratings(users=60)
    values = 3.0 + 0.5 * rng.normal(size=60)[given.users] + 0.7 * rng.normal(size=150)[given.items]
    given = replace(given, values=values + 0.1 * rng.normal(size=len(values)))
    found = learn_candidates(given, 160, 0)
    return {name: of[0] for name, of in found.items()} | {"popularity": Popularity.learn(given, 160)}


ARMS = arms()


@pytest.mark.parametrize("name", list(ARMS))
def test_no_baseline_sees_what_it_is_asked_or_examples_beyond_the_shots(name: str) -> None:
    episodes = draw_episodes(ratings(seed=9), seed=0)
    shots = np.random.default_rng(0).integers(0, 8, len(episodes.users))
    blind = episodes.values.copy()
    blind[:, :10] = 99.0
    for row, count in enumerate(shots):
        blind[row, 10 + count :] = -99.0
    hidden = replace(episodes, values=blind)
    assert np.array_equal(ARMS[name].predict(episodes, shots).mean, ARMS[name].predict(hidden, shots).mean)


@pytest.mark.parametrize("name", ["user-mean", "item-user-bias", "item-knn", "biased-mf"])
def test_baselines_that_know_the_user_get_better_with_examples(name: str) -> None:
    rng = np.random.default_rng(1)
    given = ratings(seed=9, users=80)
    values = 3.0 + 1.0 * rng.normal(size=80)[given.users] + 0.1 * rng.normal(size=len(given.users))
    episodes = draw_episodes(replace(given, values=values), seed=0)
    errors = [
        np.abs(ARMS[name].predict(episodes, np.full(len(episodes.users), shots)).mean - episodes.asked).mean()
        for shots in (0, 2, 20)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_item_and_user_biases_solve_their_ridge_regression() -> None:
    given = ratings(users=12, items=140)
    values = np.random.default_rng(0).normal(3, 1, len(given.users))
    given = replace(given, values=values)
    found = learn_candidates(given, 140, 0)["item-user-bias"][0]
    design = np.zeros((len(values), 152))
    design[np.arange(len(values)), given.users] = 1
    design[np.arange(len(values)), 12 + given.items] = 1
    ridge = np.diag([2.0] * 12 + [2.0] * 140)
    exact = np.linalg.solve(design.T @ design + ridge, design.T @ (values - values.mean()))
    assert_allclose(found.items, exact[12:], atol=0.01)  # type: ignore[attr-defined]


def test_item_neighbours_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    given = ratings(users=25, items=140)
    given = replace(given, values=rng.normal(3, 1, len(given.users)))
    arm = learn_candidates(given, 140, 0)["item-knn"][1]
    biases = arm.biases  # type: ignore[attr-defined]
    left = given.values - biases.mean - biases.items[given.items]
    own = np.bincount(given.users, left) / (np.bincount(given.users) + biases.user_ridge)
    table = np.full((25, 140), np.nan)
    table[given.users, given.items] = left - own[given.users]
    for one, other in rng.integers(0, 140, (40, 2)):
        both = ~np.isnan(table[:, one]) & ~np.isnan(table[:, other])
        a, b = table[both, one], table[both, other]
        expected = max(0.0, a @ b / np.sqrt(max(a @ a * (b @ b), 1e-6))) * both.sum() / (both.sum() + 100)
        assert arm.similarity[one, other] == pytest.approx(expected, abs=1e-4)  # type: ignore[attr-defined]
