"""Everybody's activity in a real database: every piece once, however its writers' commits fall, and never too much."""

import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from sqlalchemy import text

from innerloop.activity import ActivityLog
from innerloop.config import Settings, TrendsSettings
from innerloop.errors import RetryError
from innerloop.store import activity
from innerloop.store.activity import ActivityReader
from innerloop.store.database import Database, connect, transaction
from innerloop.trends import ACTIVITY, Activity


def _told(first: int, count: int) -> Activity:
    """Events with items first, first + 1, ..."""
    told = np.zeros(count, ACTIVITY)
    told["item"] = np.arange(first, first + count)
    told["time"], told["type"] = 1_750_000_000_000 + np.arange(count), 1
    told["previous"] = told["item"][:, None] - np.arange(1, 4, dtype=np.int32)
    return told


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    engine = connect(settings.database)
    yield engine
    engine.dispose()


@pytest.fixture
def other(settings: Settings) -> Iterator[Database]:
    """Another process's connection."""
    engine = connect(settings.database)
    yield engine
    engine.dispose()


def _append(database: Database, *pieces: Activity) -> None:
    for piece in pieces:
        with transaction(database) as connection:
            activity.append(connection, piece)


def _read(database: Database, reader: ActivityReader) -> list[int]:
    with transaction(database) as connection:
        found: list[int] = reader.read(connection)["item"].tolist()
    return found


def _pieces(database: Database) -> list[int]:
    with database.connect() as connection:
        return [row.events for row in connection.execute(text("SELECT events FROM activity ORDER BY number"))]


def test_what_is_read_is_what_was_written(database: Database) -> None:
    reader = ActivityReader(1_000)
    assert _read(database, reader) == []
    assert reader.newest == 0
    written = _told(3, 5)
    _append(database, written)
    with transaction(database) as connection:
        found = reader.read(connection)
    assert found.dtype == ACTIVITY
    assert found.tobytes() == written.tobytes()
    assert reader.newest == 1


def test_every_piece_is_read_once(database: Database) -> None:
    reader, found = ActivityReader(1_000), []
    for n in range(6):
        _append(database, *(_told(10 * n + m, 1) for m in range(n)))
        found += _read(database, reader)
        found += _read(database, reader)
    assert found == [10 * n + m for n in range(6) for m in range(n)]


def test_a_piece_committed_after_a_higher_number_is_read_once(database: Database, other: Database) -> None:
    reader, second = ActivityReader(1_000), ActivityReader(1_000)
    _append(database, _told(0, 1))
    assert _read(database, reader) == [0]
    with other.connect() as slow:
        with slow.begin():
            activity.append(slow, _told(100, 2))  # its number is drawn, and it isn't committed
            _append(database, _told(200, 1), _told(300, 1))
            assert _read(database, reader) == [200, 300]
            assert _read(database, second) == [0, 200, 300], "one that starts just now"
        assert _read(database, reader) == [100, 101]
        assert _read(database, second) == [100, 101]
    assert _read(database, reader) == _read(database, second) == []
    assert reader.newest == second.newest == 4


def test_a_piece_older_than_all_that_a_starting_reader_sees_is_read_when_it_comes(
    database: Database, other: Database
) -> None:
    reader = ActivityReader(1_000)
    with other.connect() as slow:
        with slow.begin():
            activity.append(slow, _told(100, 2))
            _append(database, _told(200, 1))
            assert _read(database, reader) == [200]
        assert _read(database, reader) == [100, 101]


def test_a_piece_that_is_rolled_back_is_a_gap_and_no_more(database: Database, other: Database) -> None:
    reader = ActivityReader(1_000)
    with other.connect() as slow:
        turn = slow.begin()
        activity.append(slow, _told(100, 2))
        _append(database, _told(200, 1))
        assert _read(database, reader) == [200]
        turn.rollback()
    _append(database, _told(300, 1))
    assert _read(database, reader) == [300]
    assert reader.newest == 3


def test_readers_do_not_take_from_each_other(database: Database) -> None:
    _append(database, _told(0, 2), _told(5, 1))
    assert _read(database, ActivityReader(100)) == _read(database, ActivityReader(100)) == [0, 1, 5]


def test_the_warm_up_is_the_newest_and_what_it_left_out_stays_out(database: Database) -> None:
    _append(database, *(_told(10 * n, 10) for n in range(20)))
    reader = ActivityReader(30)
    assert _read(database, reader) == list(range(170, 200))
    assert _read(database, reader) == []
    _append(database, _told(200, 1))
    assert _read(database, reader) == [200]


def test_a_piece_larger_than_the_warm_up_is_read_and_no_other(database: Database) -> None:
    _append(database, *(_told(100 * n, 100) for n in range(5)))
    reader = ActivityReader(30)
    assert _read(database, reader) == list(range(400, 500))
    assert _read(database, reader) == []


def test_many_pieces_later_nothing_is_read_twice(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "_LOOK_BACK", 4)
    reader, found = ActivityReader(1_000), []
    for n in range(0, 30, 3):
        _append(database, *(_told(n + m, 1) for m in range(3)))
        found += _read(database, reader)
    assert found == list(range(30))
    assert len(reader._seen) <= 2 * 4, "what is remembered is bounded"


def test_trim_keeps_the_newest_pieces_with_so_many_events(database: Database) -> None:
    _append(database, *(_told(10 * n, size) for n, size in enumerate([10, 20, 30, 5, 5])))
    for events, left in ((1_000, [10, 20, 30, 5, 5]), (70, [10, 20, 30, 5, 5]), (60, [20, 30, 5, 5]), (40, [30, 5, 5])):
        with transaction(database) as connection:
            activity.trim(connection, events)
        assert _pieces(database) == left
    for events, left in ((10, [5, 5]), (1, [5]), (1, [5])):
        with transaction(database) as connection:
            activity.trim(connection, events)
        assert _pieces(database) == left, "a piece larger than what is kept is kept: it is all there is"


def test_a_reader_that_was_away_reads_what_was_not_trimmed(database: Database) -> None:
    reader = ActivityReader(1_000)
    _append(database, _told(0, 1))
    assert _read(database, reader) == [0]
    _append(database, *(_told(n, 1) for n in range(1, 10)))
    with transaction(database) as connection:
        activity.trim(connection, 3)
    assert _read(database, reader) == [7, 8, 9]


# --- what ingest writes of it


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


def _write(log: ActivityLog, database: Database) -> None:
    with transaction(database) as connection:
        log.write(connection)
    log.written()


def test_a_log_is_due_every_so_often_and_only_with_something_to_tell(database: Database, clock: _Clock) -> None:
    log = ActivityLog(TrendsSettings(every_seconds=2.0))
    clock.now += 10
    assert not log.due
    log.add(_told(0, 0))
    assert not log.due, "nothing is nothing to tell"
    log.add(_told(0, 3))
    assert log.due
    _write(log, database)
    log.add(_told(3, 3))
    assert not log.due
    clock.now += 2
    log.add(_told(6, 1))
    assert log.due
    _write(log, database)
    assert _pieces(database) == [3, 4]
    assert _read(database, ActivityReader(100)) == list(range(7))


def test_more_than_the_rate_is_sampled_without_order_or_repeats(database: Database, clock: _Clock) -> None:
    log = ActivityLog(TrendsSettings(every_seconds=1.0, events_per_second=100))
    for n in range(10):
        log.add(_told(1_000 * n, 1_000))
    clock.now += 1
    _write(log, database)
    found = _read(database, ActivityReader(10_000))
    assert len(found) == 100
    assert found == sorted(set(found)), "in order of time, each once"
    assert min(found) < 3_000
    assert max(found) > 7_000
    clock.now += 3
    log.add(_told(0, 10_000))
    _write(log, database)
    assert _pieces(database) == [100, 300], "the rate is kept over a longer time too"


def test_what_was_rolled_back_is_told_once_by_the_next_write(database: Database, clock: _Clock) -> None:
    log = ActivityLog(TrendsSettings(every_seconds=1.0))
    log.add(_told(0, 5))
    clock.now += 1
    with suppress(RetryError), transaction(database) as connection:
        log.write(connection)
        raise RetryError("the batch did not commit")
    assert log.due
    assert _pieces(database) == []
    log.add(_told(5, 2))
    _write(log, database)
    assert _read(database, ActivityReader(100)) == list(range(7))
    clock.now += 1
    assert not log.due


def test_now_and_then_what_is_old_is_trimmed(database: Database, clock: _Clock) -> None:
    log = ActivityLog(TrendsSettings(every_seconds=1.0, kept_events=25))
    for n in range(70):
        clock.now += 1
        log.add(_told(10 * n, 10))
        _write(log, database)
        assert sum(_pieces(database)) <= 25 + 61 * 10
    assert sum(_pieces(database)) < 150
    assert _read(database, ActivityReader(10))[-1] == 699
