from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from innerloop.config import LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation import event_table
from innerloop.evaluation.outcome import Outcome
from innerloop.evaluation.sequence.baselines import (
    Ease,
    Ials,
    Popularity,
    Recents,
    Transitions,
    TransitionSettings,
    VSknn,
)
from innerloop.evaluation.sequence.course import HEADS, Course, Options
from innerloop.evaluation.sequence.heads import GAINS, chosen_gain
from innerloop.evaluation.sequence.log_baselines import list_ranks
from innerloop.evaluation.sequence.protocol import BASELINES, _other_users, _served, run
from innerloop.evaluation.sequence.sequences import SequenceFile, Sequences, read_sequences
from innerloop.evaluation.sequence.served import ServedSequences, as_events

QUICK = Options(dimension=8, capacity=10, epochs=2, negatives=64, heads=("bayes",), positions=20_000)


def sequences(*users: list[int], catalogue: int = 6) -> Sequences:
    items = np.array([item for user in users for item in user], np.int64)
    starts = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return Sequences(items, starts, catalogue)


def silent(_what: str, _share: float) -> None: ...


def shop(*, users: int = 150, items: int = 40, seed: int = 3, repeats: bool = False) -> pl.DataFrame:
    """Mostly the next item of a circle follows an item, sometimes a random one."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        own = [int(rng.integers(items))]
        while len(own) < 3 + user % 6:
            following = (own[-1] + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
            if repeats or following not in own:
                own.append(own[-2] if repeats and len(own) > 1 and rng.random() < 0.7 else following)
        rows += [(f"u{user}", position, f"i{item}") for position, item in enumerate(own)]
    table = pl.DataFrame(rows, schema=["user_id", "position", "item_id"], orient="row")
    return table.sample(fraction=1.0, shuffle=True, seed=seed)


def clocked(table: pl.DataFrame, *, step: int = 600_000) -> pl.DataFrame:
    """The shop's events ten minutes apart, from a moment of each user's own within three hours; items of two kinds."""
    number = pl.col("user_id").str.slice(1).cast(pl.Int64)
    return table.with_columns(
        event_time=1_600_000_000_000 + number * 7_919_000 % 10_800_000 + pl.col("position") * step,
        category=pl.when(pl.col("item_id").str.ends_with("1")).then(None).otherwise(pl.col("item_id").str.slice(-1)),
    )


def written(table: pl.DataFrame, path: Path) -> Path:
    table.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    data = written(shop(), tmp_path_factory.mktemp("sequence") / "shop.parquet")
    return run(data, seed=0, tell=silent, options=QUICK)


def test_a_position_that_is_no_number_is_refused_beside_a_clock_too(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": "a", "item_id": ["x", "y"], "event_time": 7, "position": [float("nan"), 1.0]})
    with pytest.raises(SettingsError, match="1 rows without a usable position"):
        read_sequences(written(table, tmp_path / "x.parquet"), seed=0)


@pytest.mark.parametrize("order", ["position", "event_time"])
def test_a_column_of_another_name_is_mapped(order: str, tmp_path: Path) -> None:
    table = pl.DataFrame({"who": ["a", "a", "b"], "sku": ["x", "y", "x"], "when": [2, 1, 1]})
    columns = {"user_id": "who", "item_id": "sku", order: "when"}
    path = written(table, tmp_path / "x.parquet")
    with pytest.raises(SettingsError, match="map one with --column user_id=NAME"):
        read_sequences(path, seed=0)
    found = read_sequences(path, seed=0, columns=columns)
    assert found.clock == (order == "event_time")
    assert not read_sequences(path, seed=0, columns=columns | {"event_time": "when", "position": "when"}).clock
    assert found.sequences.items.tolist() == [1, 0, 0]


def test_items_are_read_in_the_order_of_their_positions(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": [7, 3, 7, 7], "position": [2, 0, 0, 1], "item_id": ["c", "a", "d", "b"]})
    found = read_sequences(written(table, tmp_path / "x.parquet"), seed=0).sequences
    assert found.lengths.tolist() == [1, 3]
    assert found.items.tolist() == [0, 3, 1, 2]
    assert found.catalogue == 4


def test_a_time_serves_where_there_is_no_position_and_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": ["u"] * 3, "ts_ms": [1_600_000_000_000 + n for n in (5, 1, 3)], "item_id": "abc"})
    table = table.with_columns(pl.Series("item_id", ["a", "b", "c"]))
    table.write_csv(tmp_path / "x.csv")
    found = read_sequences(tmp_path, seed=0)
    assert found.sequences.items.tolist() == [1, 2, 0]
    assert found.clock
    assert found.times.tolist() == [1_600_000_000_000 + n for n in (1, 3, 5)]


@pytest.mark.parametrize("name", event_table.TIMES)
def test_whatever_an_event_table_takes_for_a_time_is_a_clock(tmp_path: Path, name: str) -> None:
    table = pl.DataFrame({"user_id": [1, 1], name.upper(): [7_000, 3_000], "item_id": ["a", "b"]})
    found = read_sequences(written(table, tmp_path / "x.parquet"), seed=0)
    assert found.clock
    assert found.sequences.items.tolist() == [1, 0]


def test_a_position_orders_what_is_of_one_time_and_is_no_clock(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": [1] * 4, "position": [3, 1, 2, 0], "item_id": ["a", "b", "c", "d"]})
    alone = read_sequences(written(table, tmp_path / "x.parquet"), seed=0)
    assert alone.sequences.items.tolist() == [3, 1, 2, 0]
    assert not alone.clock
    timed = table.with_columns(ts=pl.Series([5_000, 5_000, 5_000, 9_000]), category=pl.Series(["p", "q", None, "r"]))
    both = read_sequences(written(timed, tmp_path / "y.parquet"), seed=0)
    assert both.sequences.items.tolist() == [1, 2, 0, 3]
    assert both.clock
    assert both.events["category"].to_list() == ["q", None, "p", "r"]


def test_a_folder_has_one_order_for_all_its_files(tmp_path: Path) -> None:
    placed = pl.DataFrame({"user_id": [1, 2], "position": [0, 0], "item_id": [1, 1]})
    timed = placed.with_columns(position=pl.Series([1, 1]), ts=pl.Series([5_000, 5_000]), item_id=pl.Series([0, 2]))
    written(placed, tmp_path / "a.parquet")
    written(timed, tmp_path / "b.parquet")
    found = read_sequences(tmp_path, seed=0)
    assert not found.clock
    assert found.sequences.items.tolist() == [1, 0, 1, 2]
    written(timed.drop("position"), tmp_path / "b.parquet")
    with pytest.raises(SettingsError, match="files with times and files without"):
        read_sequences(tmp_path, seed=0)


def test_items_at_one_position_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": ["u"] * 20, "position": [0] * 20, "item_id": list(range(20))})
    path = written(table, tmp_path / "x.parquet")
    orders = [read_sequences(path, seed=seed).sequences.items.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(20))


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (pl.DataFrame({"user_id": [1], "position": [0]}), "item_id"),
        (pl.DataFrame({"user_id": [1], "item_id": [0]}), "event_time or position: map one with --column .*position"),
        (pl.DataFrame({"user_id": [1], "position": [None], "item_id": [0]}), "1 rows without a usable position"),
        (pl.DataFrame({"user_id": [1], "position": ["first"], "item_id": [0]}), "1 rows without a usable position"),
        (pl.DataFrame({"user_id": [1, 2], "position": [0, 0], "item_id": [1, 1]}), "no user with two items"),
        (pl.DataFrame(schema={"user_id": pl.Int64, "position": pl.Int64, "item_id": pl.Int64}), "is empty"),
        (pl.DataFrame({"user_id": [1, 1], "position": [0, None], "ts": [1, 2], "item_id": [1, 2]}), "usable position"),
        (pl.DataFrame({"user_id": [1, None], "position": [0, 1], "item_id": [1, 2]}), "without a usable user_id"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_a_sentence(
    tmp_path: Path, table: pl.DataFrame, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        read_sequences(written(table, tmp_path / "x.parquet"), seed=0)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a file"):
        read_sequences(tmp_path / "none.parquet", seed=0)
    with pytest.raises(SettingsError, match="holds none of"):
        read_sequences(tmp_path, seed=0)


def test_a_folder_of_several_files_is_all_of_them(tmp_path: Path) -> None:
    whole = shop(users=8).sort("user_id", "position")
    for at, part in enumerate((whole.head(11), whole.slice(11))):
        part.write_csv(tmp_path / f"{at}.csv") if at else written(part, tmp_path / f"{at}.parquet")
    found = read_sequences(tmp_path, seed=0).sequences
    with_one = read_sequences(written(whole, tmp_path / "whole.parquet"), seed=0).sequences
    assert found.items.tolist() == with_one.items.tolist()
    assert found.starts.tolist() == with_one.starts.tolist()


def test_the_last_items_are_cut_off_per_user() -> None:
    cut = sequences([1, 2, 3], [4], [5, 0]).without_last(1)
    assert cut.items.tolist() == [1, 2, 5]
    assert cut.lengths.tolist() == [2, 0, 1]
    assert cut.without_last(5).items.tolist() == []


def test_users_are_taken_in_any_order() -> None:
    taken = sequences([1, 2, 3], [4], [], [5, 0]).take(np.array([3, 2, 0]))
    assert taken.items.tolist() == [5, 0, 1, 2, 3]
    assert taken.lengths.tolist() == [2, 0, 3]


def test_a_repeated_item_counts_where_it_is_newest() -> None:
    assert sequences([1, 2, 1], [3]).matrix(0.5).toarray().tolist() == [[0, 1, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0]]


def test_histories_hold_the_newest_items_and_the_last_one_is_held_out() -> None:
    found = sequences([1, 2, 3], [4], []).histories(2, hold_last=True)
    assert found.items.tolist() == [[2, 3], [4, 0], [0, 0]]
    assert found.lengths.tolist() == [2, 1, 0]
    assert found.held.tolist() == [[False, True], [True, False], [False, False]]


def test_transitions_are_the_sum_over_pairs_by_definition() -> None:
    train = sequences([0, 1, 2, 0], [1, 2], [3], [2, 1])
    settings = TransitionSettings(decay=0.5, backward=0.3, forget=0.6, from_power=0.5, to_power=0.25, window=2)
    expected = np.zeros((6, 6))
    for user in ([0, 1, 2, 0], [1, 2], [3], [2, 1]):
        for first, earlier in enumerate(user):
            for steps, later in enumerate(user[first + 1 : first + 3]):
                expected[earlier, later] += 0.5**steps
                expected[later, earlier] += 0.3 * 0.5**steps
    counts = np.maximum(train.counts, 1)
    expected = expected / counts[:, None] ** 0.5 / counts[None] ** 0.25
    history = np.array([0.6, 0, 1.0, 0, 0, 0])
    found = Transitions.learn(train, settings).scores(sequences([0, 2]))
    np.testing.assert_allclose(found[0], history @ expected, rtol=1e-5)


def test_ease_is_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    train = sequences(*(rng.permutation(6)[: rng.integers(2, 5)].tolist() for _ in range(30)))
    owned = train.matrix().toarray().astype(float)
    inverse = np.linalg.inv(owned.T @ owned + 2.0 * np.eye(6))
    expected = -inverse / np.diag(inverse)
    np.fill_diagonal(expected, 0.0)
    found = Ease.learn(train, regularisation=2.0, forget=1.0)
    assert found is not None
    np.testing.assert_allclose(found.scores(sequences([1, 3])), (expected[1] + expected[3])[None], rtol=1e-3, atol=1e-5)


def test_ease_is_left_out_for_a_catalogue_whose_inverse_would_not_fit() -> None:
    assert Ease.learn(sequences([0, 1], catalogue=1_000_000), regularisation=1.0, forget=1.0) is None


def test_neighbours_and_factors_find_the_group_that_a_history_belongs_to() -> None:
    rng = np.random.default_rng(0)
    users = [[int(item) + 10 * (user % 2) for item in rng.permutation(10)[:5]] for user in range(60)]
    train = sequences(*users, catalogue=20)
    for scorer in (VSknn.learn(train), Ials(train, dimension=4, seed=0)):
        scores = scorer.scores(sequences([2, 5], [12, 15], catalogue=20))
        assert scores[0, :10].mean() > scores[0, 10:].mean() + 1e-3
        assert scores[1, 10:].mean() > scores[1, :10].mean() + 1e-3


def test_an_item_that_many_come_back_to_is_not_taken_for_one_that_everybody_has() -> None:
    train = sequences([0, 1, 0, 1, 0], [0, 1, 0, 1, 0], [0, 2], [3, 4], catalogue=5)
    scores = VSknn.learn(train).scores(sequences([1], catalogue=5))[0]
    assert scores[0] > 0
    assert scores[0] > scores[2:].max()


def test_a_single_user_has_no_placebo(tmp_path: Path) -> None:
    found = run(written(shop(), tmp_path / "x.parquet"), seed=0, tell=silent, options=replace(QUICK, users=1))
    assert "placebo" not in found.means
    assert found.facts["left out"]["placebo"] == "there is no other user"  # type: ignore[index]


def test_popularity_ignores_and_recents_are_the_history() -> None:
    train = sequences([1, 1, 2], [1, 3])
    scores = Popularity.learn(train).scores(sequences([5], []))
    assert scores[0].tolist() == scores[1].tolist()
    assert scores[0].argmax() == 1
    assert Recents().scores(sequences([4, 2, 3]))[0].argsort()[::-1][:3].tolist() == [3, 2, 4]


def test_everybody_is_given_somebody_elses_history() -> None:
    others = _other_users(50, seed=0)
    assert sorted(others) == list(range(50))
    assert not bool((others == np.arange(50)).any())


def test_every_list_that_is_served_lacks_the_users_own_items_and_no_others() -> None:
    """What is known of a user differs from arm to arm; what may be on the list must not."""
    rng = np.random.default_rng(0)
    users = [[int(i) for i in (rng.integers(15) + np.arange(3 + n % 4)) % 15] for n in range(60)]
    course = Course(sequences(*users, catalogue=30), QUICK, 0, silent)
    settings = LearningSettings(dimension=8, sequence="pooled", sequence_positions=2_000)
    served, histories = ServedSequences.learn(course.before, settings, silent), course.before
    assert not course.repeats
    stale = {"stale-1h": histories.without_last(1)}
    found: dict[str, list[list[bool]]] = {}
    for item in range(15):
        for arm, ranks in _served(served, course, histories, np.full(60, item), stale).items():
            found.setdefault(arm, []).append((ranks <= 20).tolist())
    own = histories.matrix().toarray()[:, :15] > 0
    for arm, listed in found.items():
        assert np.array(listed).T.tolist() == (~own).tolist(), arm


def test_every_arm_is_asked_at_every_user(judged: Outcome) -> None:
    untimed = {"popularity-1h", "popularity-in-category", "recents", "carted-recents"}
    assert {"default", "none", "placebo", "bayes", *BASELINES} - untimed == set(judged.arms)
    assert len(judged.users) == 150
    for metrics in judged.means.values():
        assert set(metrics) == {"hr@10", "hr@20", "ndcg@10"}
        assert all(len(values) == 150 and not np.isnan(values).any() for values in metrics.values())


@pytest.mark.parametrize("encoder", ["gru", "pooled"])
def test_sasrec_is_the_same_baseline_whatever_the_heads_are_on(judged: Outcome, tmp_path: Path, encoder: str) -> None:
    found = run(written(shop(), tmp_path / "x.parquet"), seed=0, tell=silent, options=replace(QUICK, encoder=encoder))
    assert set(found.arms) == set(judged.arms)
    assert found.means["sasrec"]["ndcg@10"].tolist() == judged.means["sasrec"]["ndcg@10"].tolist()
    assert str(found.facts["history encoder"]).startswith(encoder)
    assert str(found.facts["sasrec"]).startswith("attention, best after")
    assert judged.facts["sasrec"] == "the history encoder by itself"


def test_the_facts_say_why_an_arm_of_other_protocols_is_not_in_the_table(judged: Outcome) -> None:
    left_out = judged.facts["left out"]
    assert isinstance(left_out, dict)
    elsewhere = {*BASELINES, "stale-1h", "stale-1d", "covisits-1h"}
    assert set(left_out) == elsewhere - set(judged.arms)
    for name in ("stale-1h", "stale-1d", "popularity-1h"):
        assert left_out[name] == "the file has positions and no times"
    assert left_out["popularity-in-category"] == "the file names no categories"
    assert left_out["recents"] == left_out["carted-recents"] == "what a user has had is left out of every list"


def test_with_a_clock_the_arms_that_need_one_are_in_the_table(tmp_path: Path) -> None:
    found = run(written(clocked(shop()), tmp_path / "x.parquet"), seed=0, tell=silent, options=QUICK)
    assert {"stale-1h", "stale-1d", "popularity-1h", "popularity-in-category"} <= set(found.arms)
    assert set(found.facts["left out"]) == {"recents", "carted-recents", "covisits-1h"}  # type: ignore[call-overload]
    counted = found.facts["counted"]
    assert "strictly earlier" in counted["popularity-1h, popularity-in-category"]  # type: ignore[index]
    value = {arm: metrics["ndcg@10"] for arm, metrics in found.means.items()}
    assert value["stale-1d"].tolist() == value["none"].tolist(), "nobody was there a day before"
    short = found.slices["support 3-5"] | found.slices["support 1-2"]
    assert value["stale-1h"][short].tolist() == value["none"][short].tolist(), "nor an hour before, with so few items"
    assert value["stale-1h"][~short].tolist() != value["none"][~short].tolist()
    assert value["stale-1h"].mean() < value["default"].mean() - 0.2


def test_what_is_known_an_hour_before_is_older_than_that() -> None:
    hour = 3_600_000
    times = [0, 5, 5 + hour, 0, 7, 8, 2 * hour]
    events = pl.DataFrame({"event_time": times})
    found = SequenceFile(sequences([1, 2, 3], [4], [0, 1, 2]), events, clock=True).known(hour)
    assert found.items.tolist() == [1, 0, 1]
    assert found.lengths.tolist() == [1, 0, 2]


@pytest.mark.parametrize("own_items", [False, True])
def test_baselines_of_the_clock_count_what_is_strictly_earlier(tmp_path: Path, own_items: bool) -> None:  # noqa: FBT001
    """The ranks are those of counting anew for each user, by definition; last items are never counted."""
    table = clocked(shop(users=80)).with_columns(pl.col("event_time") // 900_000 * 900_000)  # many at one time
    file = read_sequences(written(table, tmp_path / "x.parquet"), seed=0)
    users = np.arange(1, 80)
    found = list_ranks(file, users, own_items=own_items)
    items, starts = file.sequences.items, file.sequences.starts
    categories = np.array(file.events["category"].fill_null("").to_list())
    training = file.sequences.recency > 0
    everywhere = differ = 0
    for place, user in enumerate(users.tolist()):
        last, history = starts[user + 1] - 1, items[starts[user] : starts[user + 1] - 1]
        earlier = training & (file.times < file.times[last])
        hour = np.bincount(items[earlier & (file.times >= file.times[last] - 3_600_000)], minlength=40)
        all_time = np.bincount(items[earlier], minlength=40)
        category = categories[last - 1]
        same = earlier & (categories == category) & (category != "")
        within = np.bincount(items[same], minlength=40) + all_time / 1e6
        for arm, counts in (("popularity-1h", hour), ("popularity-in-category", within)):
            allowed = (counts > 0) & (own_items | ~np.isin(np.arange(40), history))
            target = items[last]
            rank = int((allowed & (counts >= counts[target])).sum()) if allowed[target] else 40
            assert found[arm][place] == rank, (arm, user)
        everywhere += int(category == "")
        differ += int((hour != all_time).any())
    assert everywhere > 2
    assert differ > 10


def test_without_a_clock_a_category_counts_all_that_is_learned_from(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 2, 2, 3, 3],
            "position": [0, 1, 0, 1, 2, 0, 1],
            "item_id": ["a", "b", "b", "c", "a", "b", "c"],
            "category": ["x", "x", "x", "y", "x", "x", "y"],
        }
    )
    found = list_ranks(read_sequences(written(table, tmp_path / "x.parquet"), seed=0), np.arange(3), own_items=False)
    assert set(found) == {"popularity-in-category"}
    # After a: b. After b and c, of y: nothing else is of y, so what is popular: a. After b: a, which is of x, then c.
    assert found["popularity-in-category"].tolist() == [1, 1, 2]


def test_slices_by_support_divide_the_users(judged: Outcome) -> None:
    assert sum(int(chosen.sum()) for chosen in judged.slices.values()) == 150
    assert judged.slices["support 1-2"].sum() == 25


def test_the_default_finds_the_rule_of_the_shop_and_another_users_history_does_not(judged: Outcome) -> None:
    found = {arm: metrics["ndcg@10"].mean() for arm, metrics in judged.means.items()}
    assert found["default"] > 0.5
    assert found["default"] > found["popularity"] + 0.3
    assert found["placebo"] < found["default"] - 0.3


def test_the_popularity_arm_is_what_counting_says(judged: Outcome) -> None:
    table = shop().sort("user_id", "position")
    before = table.filter(pl.col("position") < pl.col("position").max().over("user_id"))
    counts = dict(before.group_by("item_id").len().iter_rows())
    hits = []
    for user in sorted(table["user_id"].unique()):
        own = before.filter(pl.col("user_id") == user)["item_id"].to_list()
        target = table.filter(pl.col("user_id") == user)["item_id"][-1]
        rivals = [item for item in table["item_id"].unique() if item not in own]
        rank = sum(counts.get(item, 0) >= counts.get(target, 0) for item in rivals)
        hits.append(target not in own and rank <= 10)
    assert judged.means["popularity"]["hr@10"].tolist() == [float(hit) for hit in hits]


def test_the_same_seed_gives_the_same_figures(judged: Outcome, tmp_path: Path) -> None:
    again = run(written(shop(), tmp_path / "x.parquet"), seed=0, tell=silent, options=QUICK)
    for arm, metrics in judged.means.items():
        assert again.means[arm]["ndcg@10"].tolist() == metrics["ndcg@10"].tolist(), arm


def test_nothing_is_learned_from_test_targets() -> None:
    """Other last items leave every list after every history as it was."""
    rng = np.random.default_rng(0)
    users = [[int(i) for i in (rng.integers(20) + np.arange(3 + n % 4)) % 20] for n in range(60)]
    changed = [[*user[:-1], (user[-1] + 9) % 20] for user in users]
    settings, lists = LearningSettings(dimension=8, sequence="pooled", sequence_positions=2_000), []
    for version in (users, changed):
        before = sequences(*version, catalogue=20).without_last(1)
        served = ServedSequences.learn(before, settings, silent)
        lists.append(
            [served.ranks(before, np.full(60, item), longest=10, removed=before).tolist() for item in range(20)]
        )
    assert lists[0] == lists[1]


def test_made_up_times_keep_each_users_order_and_end_together() -> None:
    events = as_events(sequences([3, 1, 2], [5], [4, 4]), seed=0)
    assert events["event_time"].is_sorted()
    of_first = events.filter(pl.col("user_id") == "0")
    assert of_first["item_id"].to_list() == ["3", "1", "2"]
    assert of_first["event_time"].diff().drop_nulls().to_list() == [300_000, 300_000]
    ends = events.group_by("user_id").agg(pl.col("event_time").max())["event_time"]
    assert int(ends.max()) - int(ends.min()) < 300_000  # type: ignore[arg-type]


def test_own_items_are_ranked_where_the_shops_users_come_back_to_them(tmp_path: Path) -> None:
    data = written(shop(repeats=True, users=80), tmp_path / "x.parquet")
    outcome = run(data, seed=0, tell=silent, options=QUICK)
    assert outcome.facts["own items"] == "ranked with the others"
    assert outcome.means["recents"]["hr@10"].mean() > 0.3
    assert outcome.means["default"]["hr@10"].mean() > 0.3
    left_out = outcome.facts["left out"]
    assert left_out["carted-recents"] == "the file has no carts and no favorites"  # type: ignore[index]
    assert "recents" not in left_out  # type: ignore[operator]


def test_what_was_carted_comes_before_what_was_only_looked_at(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "user_id": ["u"] * 4 + ["v"] * 3,
            "ts": [1, 2, 3, 4, 1, 2, 3],
            "item_id": ["a", "b", "c", "a", "b", "a", "b"],
            "event": ["cart", "click", "click", "click", "cart", "purchase", "click"],
        }
    )
    file = read_sequences(written(table, tmp_path / "x.parquet"), seed=0)
    assert list_ranks(file, np.arange(2), own_items=True)["carted-recents"].tolist() == [1, 1]
    bought = file.events.with_columns(event_type=pl.Series(["click"] * 7))
    clicked = SequenceFile(file.sequences, bought, clock=True)
    assert "carted-recents" not in list_ranks(clicked, np.arange(2), own_items=True)


def test_every_head_is_an_arm_and_of_many_users_some_are_tested(tmp_path: Path) -> None:
    options = replace(QUICK, heads=HEADS, users=40)
    found = run(written(shop(), tmp_path / "shop.parquet"), seed=0, tell=silent, options=options)
    assert set(found.means) >= {"default", "none", "placebo", *HEADS, "ease", "ials", "vsknn", "item-knn"}
    assert len(np.unique(found.users)) == len(found.users) == 40
    assert found.facts["users with more, drawn for the test"] == "40 of 150"
    for arm, metrics in found.means.items():
        assert all(np.isfinite(values).all() and len(values) == 40 for values in metrics.values()), arm
    assert found.facts["EASE"]["ridge"] in found.facts["EASE"]["chosen from"]  # type: ignore[index]
    assert {"regularization", "alpha"} <= set(found.facts["iALS"])  # type: ignore[call-overload]


def test_who_has_one_item_is_not_tested_and_too_few_events_for_a_release_are_a_sentence(tmp_path: Path) -> None:
    lonely = pl.DataFrame({"user_id": ["z"], "position": [0], "item_id": ["i1"]})
    outcome = run(written(shop(users=60).vstack(lonely), tmp_path / "x.parquet"), seed=0, tell=silent, options=QUICK)
    assert len(outcome.users) == 60
    assert outcome.facts["users with one item, not tested"] == 1
    with pytest.raises(SettingsError, match="training needs 100"):
        run(written(shop(users=3), tmp_path / "x.parquet"), seed=0, tell=silent, options=QUICK)


def test_users_too_short_to_learn_from_are_a_sentence(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": [1, 1, 2, 2], "position": [0, 1, 0, 1], "item_id": [1, 2, 2, 1]})
    with pytest.raises(SettingsError, match="give longer histories"):
        run(written(table, tmp_path / "x.parquet"), seed=0, tell=silent, options=QUICK)


def test_a_gain_that_is_best_by_luck_is_none() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((400, 1))
    lucky = base + np.concatenate([np.zeros((400, 1)), rng.normal(0.01, 1.0, (400, len(GAINS) - 1))], 1)
    lucky[:, -1] += 0.03 - (lucky[:, -1] - lucky[:, 0]).mean()  # best on average, by less than a standard error
    lucky[:, 1:-1] -= 1.0
    assert chosen_gain(lucky) == 0.0
    sure = base + np.concatenate([np.zeros((400, 1)), rng.normal(0.5, 1.0, (400, len(GAINS) - 1))], 1)
    sure[:, 3] += 0.5
    assert chosen_gain(sure) == GAINS[3]
