"""The bounded store of names, in a file of its own."""

import sqlite3
import threading
from collections.abc import Iterator

import psutil
import pytest

from innerloop.store.item_names import ItemNames


@pytest.fixture
def names() -> Iterator[ItemNames]:
    made = ItemNames(3)
    yield made
    made.close()


def test_the_last_name_holds_and_what_is_gone_has_none(names: ItemNames) -> None:
    names.put({"a": "first", "b": "second", "c": None})
    names.put({"a": "renamed", "b": None})
    assert names.of(["a", "b", "c", "a"]) == {"a": "renamed"}
    assert len(names) == 1
    assert names.of([]) == {}


def test_as_many_as_allowed_are_kept_and_the_rest_is_told(names: ItemNames) -> None:
    names.put({"a": "1", "b": "2", "c": "3"})
    assert not names.full
    names.put({"d": "4", "a": "renamed"})
    assert names.full
    assert names.of("abcd") == {"a": "renamed", "b": "2", "c": "3"}
    names.put({"b": None})
    names.put({"d": "4"})
    assert names.of("abcd") == {"a": "renamed", "c": "3", "d": "4"}
    names.clear()
    assert (len(names), names.full, names.of("abcd")) == (0, False, {})


def test_without_room_for_all_of_them_there_is_none_of_them() -> None:
    names = ItemNames(1_000_000)
    names.put({"a": "before"})
    names._file.execute("PRAGMA max_page_count = 20")  # as a disk that is full
    with pytest.raises(sqlite3.OperationalError, match="full"):
        names.put({"a": "after", **{f"{item}": "x" * 100 for item in range(10_000)}})
    assert (names.of(["a", "0"]), len(names)) == ({"a": "before"}, 1)
    names.put({"a": "after all"})
    assert names.of(["a"]) == {"a": "after all"}
    names.close()


def test_a_name_is_text_and_no_statement(names: ItemNames) -> None:
    names.put({"'; DROP TABLE item; --": "Robert'); DROP TABLE item; --"})
    assert names.of(["'; DROP TABLE item; --"]) == {"'; DROP TABLE item; --": "Robert'); DROP TABLE item; --"}


def test_a_large_catalogue_lies_in_the_file_and_not_in_memory() -> None:
    count, at_once = 300_000, 1_000
    names, before = ItemNames(count), psutil.Process().memory_info().rss
    for first in range(0, count, at_once):
        names.put(
            {f"item-{n:07d}": f"A name of about forty characters, {n:07d}" for n in range(first, first + at_once)}
        )
    grown = psutil.Process().memory_info().rss - before
    assert len(names) == count
    assert names.of(["item-0299999"]) == {"item-0299999": "A name of about forty characters, 0299999"}
    names.close()
    assert grown < 16 * 2**20, "8 MB of cache; in a dict it would be some 50"


def test_it_is_read_while_it_is_written() -> None:
    names, stop = ItemNames(1_000), threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            names.put({f"{item}": f"{turn}" for item in range(500)})

    names.put({f"{item}": "0" for item in range(500)})
    writer = threading.Thread(target=write)
    writer.start()
    seen = [names.of(f"{item}" for item in range(500)) for _ in range(50)]
    stop.set()
    writer.join()
    names.close()
    assert all(len(each) == 500 and len(set(each.values())) == 1 for each in seen), "a batch counts as a whole"
