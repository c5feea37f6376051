import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from innerloop.errors import SettingsError
from innerloop.evaluation.conversion.log import read_log
from innerloop.evaluation.event_table import event_times, read_actions, read_events, spanned
from innerloop.evaluation.item_table import read_items
from innerloop.evaluation.stream.log import read_table

MOMENT = 1_514_737_251_000


def _written(directory: Path, name: str, frame: pl.DataFrame) -> Path:
    path = directory / name
    writers: dict[str, Callable[[Path], object]] = {
        ".csv": frame.write_csv,
        ".jsonl": frame.write_ndjson,
        ".parquet": frame.write_parquet,
    }
    writers[path.suffix](path)
    return path


def _events(**columns: list[object]) -> pl.DataFrame:
    usual: dict[str, list[object]] = {"user_id": [1, 2], "item_id": [10, 20], "ts_ms": [MOMENT + 5, MOMENT]}
    return pl.DataFrame(usual | columns)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_three_formats_give_the_same_table(tmp_path: Path, suffix: str) -> None:
    table = read_events(_written(tmp_path, f"events{suffix}", _events(event_type=["pv", "buy"], category_id=[7, None])))
    assert table.drop("event_id").to_dicts() == [
        {"event_type": "purchase", "user_id": "2", "item_id": "20", "event_time": MOMENT, "category": None},
        {"event_type": "click", "user_id": "1", "item_id": "10", "event_time": MOMENT + 5, "category": "7"},
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestamp", MOMENT // 1000),
        ("ts", float(MOMENT)),
        ("time", MOMENT * 1000),
        ("event_time", "2017-12-31T16:20:51Z"),
        ("event_time", "2017-12-31T16:20:51.000+00:00"),
        ("event_time", "2017-12-31T18:20:51+02:00"),
        ("event_time", "2017-12-31 16:20:51 UTC"),
        ("event_time", "2017-12-31 16:20:51"),
        ("event_time", str(MOMENT // 1000)),
    ],
)
def test_times_of_every_kind_become_milliseconds(tmp_path: Path, name: str, value: object) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], name: [value]})
    assert read_events(_written(tmp_path, "e.parquet", frame))["event_time"].to_list() == [MOMENT]


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.String])
def test_days_written_as_numbers_are_days(tmp_path: Path, kind: pl.DataType) -> None:
    """As seconds they would all be of one day of 1970, a month a hundred seconds apart."""
    days = pl.Series([20171231, None, 20180101]).cast(kind)
    times = event_times(days, tmp_path)
    assert times.to_list() == [1_514_678_400_000, None, 1_514_764_800_000]
    assert spanned(times.drop_nulls().to_numpy()) == "2017-12-31T00:00:00Z to 2018-01-01T00:00:00Z"


def test_numbers_that_are_not_all_days_are_none(tmp_path: Path) -> None:
    for numbers in ([20171231, 20171232], [20171231, 20171231.5], [20171231, 1_514_678_400]):
        assert event_times(pl.Series(numbers, strict=False), tmp_path).to_list() == [round(1000 * n) for n in numbers]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("fav", "favorite"),
        ("add_to_cart", "cart"),
        ("add to cart", "cart"),
        ("Add-To-Cart", "cart"),
        ("View_Item", "click"),
        ("buy", "purchase"),
        ("refund", "refund"),
        ("asked-for a refund", "asked-for a refund"),
    ],
)
def test_kinds_of_events_get_our_names(tmp_path: Path, theirs: str, ours: str) -> None:
    table = read_events(_written(tmp_path, "e.csv", _events(event_type=[theirs, theirs])))
    assert table["event_type"].to_list() == [ours, ours]


@pytest.mark.parametrize("whose", ["user_id", "item_id", "category_id", "event_type", "price"])
@pytest.mark.parametrize("values", [[["a", "b"], ["c"]], [{"of": 1}, {"of": 2}]])
def test_lists_and_structs_are_refused_by_the_name_of_their_column(
    tmp_path: Path, whose: str, values: list[object]
) -> None:
    path = _written(tmp_path, "e.parquet", _events(**{whose: values}))
    with pytest.raises(SettingsError, match=f"more than one value in a row of {whose}: give text or a number"):
        read_events(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_numbers_that_turn_into_text_late_are_text(tmp_path: Path, suffix: str) -> None:
    items = [*map(str, range(10_050)), "x50211"]
    path = _written(tmp_path, f"late{suffix}", pl.DataFrame({"user_id": 1, "item_id": items, "ts_ms": MOMENT}))
    path.write_text(re.sub(r'"(\d+)"', r"\1", path.read_text()))  # numbers as such
    assert read_events(path)["item_id"].to_list() == items


def test_a_number_that_is_none_is_no_identifier(tmp_path: Path) -> None:
    path = _written(tmp_path, "e.parquet", _events(user_id=[12.0, float("nan")]))
    with pytest.raises(SettingsError, match="1 rows without a usable user_id"):
        read_events(path)
    path = _written(tmp_path, "e.parquet", _events(ad_id=[12.0, float("nan")], category=[1e300, 2.5]))
    table = read_events(path)
    assert table["ad_id"].to_list() == [None, "12"]
    assert [float(name) for name in table["category"]] == [2.5, 1e300]


def test_a_day_is_its_midnight(tmp_path: Path) -> None:
    path = _written(tmp_path, "e.csv", _events(ts_ms=["2017-12-31", "2017-12-31T00:00:01Z"]))
    midnight = MOMENT - MOMENT % 86_400_000
    assert read_events(path)["event_time"].to_list() == [midnight, midnight + 1000]


def test_without_a_kind_events_are_clicks(tmp_path: Path) -> None:
    assert read_events(_written(tmp_path, "e.csv", _events()))["event_type"].to_list() == ["click", "click"]


def test_generated_names_differ_and_do_not_depend_on_the_file(tmp_path: Path) -> None:
    frame = _events(user_id=[1, 1], item_id=[2, 2], ts_ms=[MOMENT, MOMENT])
    first, second = (
        read_events(_written(tmp_path, name, frame))["event_id"].to_list() for name in ("a.csv", "b.jsonl")
    )
    assert first == second
    assert len(set(first)) == 2


def test_equal_times_keep_their_order(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["u"] * 50, "item_id": list(range(50)), "ts": [MOMENT] * 50})
    table = read_events(_written(tmp_path, "e.csv", frame))
    assert table["item_id"].to_list() == [str(n) for n in range(50)]


def test_columns_are_mapped_by_name(tmp_path: Path) -> None:
    path = _written(tmp_path, "e.csv", _events(sku=["a", "b"]))
    assert read_events(path, columns={"item_id": "sku"})["item_id"].to_list() == ["b", "a"]


def test_whole_numbers_with_gaps_are_names_without_a_fraction(tmp_path: Path) -> None:
    path = _written(tmp_path, "e.parquet", _events(ad_id=[12.0, None]))
    assert read_events(path)["ad_id"].to_list() == [None, "12"]


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("gone.csv", {}, "is not a file"),
        ("e.xlsx", {}, "ends in none of .csv, .jsonl, .ndjson, .parquet"),
        ("broken.parquet", {}, "cannot be read as .parquet"),
        ("short.csv", {}, "has the columns who, item_id, ts_ms, none of which is known as user_id"),
        ("e.csv", {"item_id": "sku"}, "none of them sku"),
        ("e.csv", {"itm": "item_id"}, "itm is no column of the event table"),
        ("times.csv", {}, "not RFC 3339, such as 'yesterday'"),
        ("empty.csv", {}, "1 rows without a usable user_id"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, name: str, columns: dict[str, str], says: str) -> None:
    _written(tmp_path, "e.csv", _events())
    _written(tmp_path, "short.csv", _events().rename({"user_id": "who"}))
    _written(tmp_path, "times.csv", _events(ts_ms=["yesterday", "2017-12-31"]))
    _written(tmp_path, "empty.csv", _events(user_id=[None, 1]))
    (tmp_path / "e.xlsx").write_text("")
    (tmp_path / "broken.parquet").write_text("user_id")
    with pytest.raises(SettingsError) as error:
        read_events(tmp_path / name, columns=columns)
    assert says in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e300, None])
@pytest.mark.parametrize("now", [MOMENT / 1000, float(MOMENT)])
def test_a_time_that_is_no_number_is_as_unusable_as_none(
    tmp_path: Path, suffix: str, odd: float | None, now: float
) -> None:
    path = _written(tmp_path, f"e{suffix}", _events(event_time=[odd, now]).drop("ts_ms"))
    with pytest.raises(SettingsError, match=r"has 1 rows without a usable event_time: remove them"):
        read_events(path)


@pytest.mark.parametrize("odd", ["NaN", "inf", "1e300"])
def test_nor_is_a_text_that_reads_as_no_number_a_time(tmp_path: Path, odd: str) -> None:
    with pytest.raises(SettingsError, match=r"has 1 rows without a usable event_time"):
        read_events(_written(tmp_path, "e.jsonl", _events(ts_ms=[odd, str(MOMENT)])))


@pytest.mark.parametrize("kind", [pl.Time(), pl.Duration("ms")])
def test_an_hour_of_the_day_or_a_span_is_no_time(tmp_path: Path, kind: pl.DataType) -> None:
    frame = _events().with_columns(pl.col("ts_ms").cast(kind, strict=False))
    with pytest.raises(SettingsError, match=r"has times of type .*: give epoch numbers or RFC 3339 text"):
        read_events(_written(tmp_path, "e.parquet", frame))


@pytest.mark.parametrize("column", ["user_id", "event_type"])
def test_bytes_that_are_no_text_are_a_sentence(tmp_path: Path, column: str) -> None:
    table = {"event_type": ["click"], "user_id": ["u"], "item_id": ["i"], "event_time": [1]}
    pl.DataFrame(table | {column: [b"\xff\xfe"]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(SettingsError, match=f"{column} is no text"):
        read_events(tmp_path / "events.parquet")


def test_impressions_are_nothing_that_anybody_did(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,event_time,event_type\nu,a,1,click\nu,b,2,view_promotion\nu,c,3,buy\n")
    assert read_events(path)["event_type"].to_list() == ["click", "impression", "purchase"]
    assert read_actions(path)["event_type"].to_list() == ["click", "purchase"]
    assert read_table(path).events["event_type"].to_list() == ["click", "purchase"]
    assert len(read_log(path, window=1).times) == 2


def test_identifiers_of_a_csv_are_as_they_are_written(tmp_path: Path) -> None:
    """007 is not 7, which the service would be told of; nor is category 1.10 the same as 1.1."""
    path = tmp_path / "events.csv"
    path.write_text(
        "user_id,item_id,event_time,category,ad_id,session_id,quantity,price\n"
        f'0042,"007",{MOMENT},1.10,1e5,12.0,2.0,9.90\n'
        f"42,7,{MOMENT + 1},1.1,2e3,,03,010\n"
    )
    first, second = read_events(path).drop("event_id", "event_type").to_dicts()
    assert first == {
        "user_id": "0042", "item_id": "007", "event_time": MOMENT, "category": "1.10", "ad_id": "1e5",
        "session_id": "12", "quantity": 2, "price": 9.9,
    }  # fmt: skip
    assert second == {
        "user_id": "42", "item_id": "7", "event_time": MOMENT + 1, "category": "1.1", "ad_id": "2e3",
        "session_id": None, "quantity": 3, "price": 10.0,
    }  # fmt: skip
    items = tmp_path / "items.csv"
    items.write_text("sku,category,price\n007,1.10,5.50\n7,1.1,6\n")
    assert read_items(items).rows() == [("007", "1.10", 5.5, None), ("7", "1.1", 6.0, None)]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["12.0", "", "13.0"], ["12", None, "13"]),
        (["12.0", "NaN", "13.0"], ["12", None, "13"]),
        (["12", "nan", "13"], ["12", None, "13"]),
        (["12.0", "12", "-7.0"], ["12", "12", "-7"]),
        (["NaN", "NaN", ""], ["NaN", "NaN", None]),  # a name, for all we know
        (["1.0", "1.5", "NaN"], ["1.0", "1.5", "NaN"]),
    ],
)
def test_whole_numbers_of_a_csv_are_whole_whatever_stands_for_a_gap(
    tmp_path: Path, written: list[str], read: list[str | None]
) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,event_time,ad_id\n" + "".join(f"u,i,{MOMENT},{one}\n" for one in written))
    assert read_events(path)["ad_id"].to_list() == read


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("factor", [1, 1_000, 1_000_000])
def test_text_of_a_time_is_exact(tmp_path: Path, suffix: str, factor: int) -> None:
    moments = [MOMENT + at for at in range(200)]  # in nanoseconds, floats of these are 256 apart
    frame = pl.DataFrame({"user_id": "u", "item_id": "i", "time": [str(moment * factor) for moment in moments]})
    assert read_events(_written(tmp_path, f"e{suffix}", frame))["event_time"].to_list() == moments
