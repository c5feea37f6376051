"""The log of a stream: who did what strictly before which event, however times coincide."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.errors import SettingsError
from innerloop.evaluation.stream.log import read_table
from innerloop.events import CODES
from innerloop.learning.stream_log import StreamLog, stream_of

BEGIN = 1_700_000_000_000
Event = tuple[int, int, int]  # user, item, time
EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=40)


def _table(events: Sequence[Event], **columns: list[str | None]) -> pl.DataFrame:
    events = sorted(events, key=lambda event: event[2])
    return pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(len(events))],
            "event_type": ["click"] * len(events),
            "user_id": [f"u{user}" for user, _, _ in events],
            "item_id": [f"i{item}" for _, item, _ in events],
            "event_time": [BEGIN + time for _, _, time in events],
            **columns,
        }
    )


def _log(events: Sequence[Event], seed: int = 0) -> StreamLog:
    return stream_of(_table(events), seed=seed)


def _earlier(log: StreamLog, row: int, *, by_more_than: int = 0) -> list[int]:
    """What the user had done before a row, by comparing with every other event."""
    return [
        n for n in range(len(log)) if log.users[n] == log.users[row] and log.times[n] < log.times[row] - by_more_than
    ]


@given(EVENTS, st.integers(0, 3))
def test_a_log_has_the_tables_events_in_order_of_time(events: list[Event], seed: int) -> None:
    log = _log(events, seed)
    told = [
        (int(log.user_ids[u][1:]), int(log.item_ids[i][1:]), int(t) - BEGIN)
        for u, i, t in zip(log.users, log.items, log.times, strict=True)
    ]
    assert sorted(told) == sorted(events)
    assert (np.diff(log.times) >= 0).all()


@given(EVENTS)
def test_every_row_stands_once_in_its_users_part_and_in_order_of_time(events: list[Event]) -> None:
    log = _log(events)
    assert sorted(log.by_user.tolist()) == list(range(len(log)))
    assert (log.by_user[log.place] == np.arange(len(log))).all()
    for user in range(len(log.user_ids)):
        own = [row for row in log.by_user.tolist() if log.users[row] == user]
        assert own == sorted(own)
        assert (log.by_user[log.first[own] + np.arange(len(own))] == own).all()


@given(EVENTS, st.integers(1, 6), st.integers(0, 12))
def test_before_gives_the_newest_strictly_earlier_events(events: list[Event], capacity: int, delay: int) -> None:
    log = _log(events)
    rows, there = log.before(np.arange(len(log)), capacity, delay_ms=delay)
    assert ((rows >= 0) == there).all()
    for row in range(len(log)):
        expected = _earlier(log, row, by_more_than=delay)
        found = rows[row][there[row]].tolist()
        assert len(found) == min(capacity, len(expected))
        assert set(found) <= set(expected)
        assert [log.times[n] for n in found] == sorted((log.times[n] for n in expected), reverse=True)[:capacity]
        assert found == sorted(found, reverse=True)


@given(EVENTS)
def test_events_of_one_user_in_one_millisecond_do_not_know_of_each_other(events: list[Event]) -> None:
    log = _log(events)
    for row, before in enumerate(log.before(np.arange(len(log)), 100)[0].tolist()):
        assert all(log.times[n] < log.times[row] for n in before if n >= 0)


@given(EVENTS)
def test_support_sizes_count_what_is_strictly_earlier(events: list[Event]) -> None:
    log = _log(events)
    assert log.support_sizes(np.arange(len(log))).tolist() == [len(_earlier(log, row)) for row in range(len(log))]


@given(EVENTS)
def test_seen_before_means_an_event_with_the_item_strictly_earlier(events: list[Event]) -> None:
    log = _log(events)
    expected = [any(log.items[n] == log.items[row] for n in _earlier(log, row)) for row in range(len(log))]
    assert log.seen_before(np.arange(len(log))).tolist() == expected


def test_events_of_equal_time_are_shuffled_by_the_seed_alone() -> None:
    events = [(0, item, 5) for item in range(50)]
    first, again, other = (_log(events, seed).items.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == list(range(50))
    assert first != list(range(50))


def test_events_of_different_time_stay_where_they_are_under_any_seed() -> None:
    events = [(0, item, 49 - item) for item in range(50)]
    assert all(_log(events, seed).times.tolist() == sorted(BEGIN + t for _, _, t in events) for seed in range(3))


@given(EVENTS, st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 7))
def test_a_block_is_shown_what_is_before_it_and_nothing_of_it(
    events: list[Event], moments: list[int], span: int
) -> None:
    log = _log(events)
    times = np.array(moments) + log.times[0]
    asked: list[int] = []
    ends = -1
    for upto, some in log.blocks(times, span / 1000):
        begin = log.times[0] + (times[some] - log.times[0]) // span * span
        assert len(set(begin.tolist())) == 1
        assert upto == (log.times < begin[0]).sum()
        assert begin[0] > ends
        ends = begin[0]
        asked += some.tolist()
    assert sorted(asked) == list(range(len(moments)))


@given(EVENTS, st.integers(1, 7))
def test_no_block_of_lists_knows_an_item_before_the_list_that_has_to_foresee_it(events: list[Event], span: int) -> None:
    log = _log(events)
    rows = np.arange(len(log))
    made = log.answered(rows)
    whole = list(log.blocks(made, span / 1000))
    parts = list(log.lists(rows, span / 1000))
    assert np.concatenate([some for _, some in parts]).tolist() == np.concatenate([some for _, some in whole]).tolist()
    assert {upto for upto, _ in parts} == {upto for upto, _ in whole}
    met: set[int] = set()
    for upto, some in parts:
        support, there = log.before(some, len(log))
        met |= set(log.items[:upto].tolist()) | set(log.items[support[there]].tolist())
        for row in some.tolist():
            appears = log.times[log.items == log.items[row]].min()
            assert appears <= made[row] or int(log.items[row]) not in met


def test_lists_are_made_together_where_nothing_new_is_foreseen() -> None:
    log = _log([(0, 0, 0), (1, 1, 0), (0, 1, 5), (1, 0, 6), (0, 0, 7), (0, 2, 8), (0, 2, 9)])
    assert [some.tolist() for _, some in log.lists(np.arange(2, 7), 1.0)] == [[0, 1, 2, 3], [4]]


def test_types_sessions_and_categories_are_numbered_and_minus_one_where_missing() -> None:
    table = _table([(0, 0, 0), (0, 1, 1), (1, 0, 2)], session_id=["b", None, "a"], category=[None, "x", "x"])
    log = stream_of(table.with_columns(pl.Series("event_type", ["purchase", "impression", "favorite"])))
    assert log.sessions.tolist() == [1, -1, 0]
    assert log.categories.tolist() == [-1, 0, 0]
    assert log.kinds[0] == CODES["purchase"]
    assert log.kinds[1] not in CODES.values()
    assert log.kinds[2] == CODES["favorite"]
    bare = _log([(0, 0, 0), (0, 1, 1)])
    assert bare.sessions.tolist() == bare.categories.tolist() == [-1, -1]


def _write(path: Path, events: Sequence[Event]) -> Path:
    _table(events).drop("event_id").write_parquet(path)
    return path


def test_a_folders_files_are_one_stream(tmp_path: Path) -> None:
    _write(tmp_path / "b.parquet", [(0, 0, 1), (1, 1, 4)])
    _write(tmp_path / "a.parquet", [(0, 2, 2), (2, 3, 3)])
    (tmp_path / "notes.txt").write_text("not events")
    log = stream_of(read_table(tmp_path).events)
    assert (log.times - log.times[0]).tolist() == [0, 1, 2, 3]
    assert [log.item_ids[item] for item in log.items] == ["i0", "i2", "i3", "i1"]


@given(EVENTS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_and_files_says_nothing(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], seed: int, random: Random
) -> None:
    shuffled = random.sample(events, len(events))
    folder = tmp_path_factory.mktemp("shuffled")
    cut = len(shuffled) // 2
    for name, some in (("a", shuffled[cut:]), ("b", shuffled[:cut])):
        if some:
            _write(folder / f"{name}.parquet", some)
    whole = _write(tmp_path_factory.mktemp("whole") / "x.parquet", events)
    first, again = (stream_of(read_table(path).events, seed=seed) for path in (whole, folder))
    for column in ("users", "items", "kinds", "times"):
        assert getattr(first, column).tolist() == getattr(again, column).tolist()


def test_history_gives_only_what_is_before_the_data(tmp_path: Path) -> None:
    data = _write(tmp_path / "data.parquet", [(0, 0, 5), (0, 1, 7)])
    history = _write(tmp_path / "history.parquet", [(0, 2, 3), (0, 3, 5), (1, 4, 6), (1, 4, 1)])
    table = read_table(data, history=history)
    assert table.own_from == 2
    assert table.events["item_id"].to_list() == ["i4", "i2", "i0", "i1"]


def test_a_folder_without_events_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds none of .*parquet.* put the events there"):
        read_table(tmp_path)


def test_a_file_without_rows_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    _table([(0, 0, 0)]).clear().write_parquet(empty)
    with pytest.raises(SettingsError, match="has no events"):
        read_table(empty)
