"""The names of items that the console shows, from a real topic."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from innerloop.config import ConsoleSettings, Settings
from innerloop.errors import ServiceError
from innerloop.shop_items import Item
from innerloop.store.item_names import ItemNames
from innerloop.streams import clients
from innerloop.streams.publisher import Publisher
from innerloop.streams.tail import Tail
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.streams.whole_topic import whole_topic
from innerloop.worker.console import names as console_names
from innerloop.worker.console.names import Names
from innerloop.worker.demo.names import publish_items

GARBAGE: dict[str, tuple[str | bytes, bytes]] = {
    "no JSON": ("a", b"not an item"),
    "empty": ("a", b""),
    "no object": ("a", b"[]"),
    "no UTF-8": ("a", b'{"item_id": "a", "name": "\xff"}'),
    "half a character": ("a", b'{"item_id": "a", "name": "\\ud800"}'),
    "half a character as its id": ("a", b'{"item_id": "\\ud800", "name": "half"}'),
    "no name": ("a", b'{"item_id": "a"}'),
    "a name that is a number": ("a", b'{"item_id": "a", "name": 7}'),
    "another item's key": ("b", b'{"item_id": "a", "name": "of another key"}'),
    "a key that is no text": (b"\xff\xfe", b'{"item_id": "a", "name": "under another"}'),
    "deep": ("a", b"[" * 100_000),
}


@pytest.fixture
def names(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """Of which a test takes each turn itself."""
    monkeypatch.setattr(console_names, "_AGAIN_SECONDS", 0.0)
    made = Names(settings)
    yield made
    made.close()


def topic(settings: Settings) -> None:
    ensure_topics(settings, {"items": catalogue()["items"]})


def send(settings: Settings, key: str | bytes | None, value: bytes | None) -> None:
    publisher = Publisher(settings.kafka)
    publisher.send(settings.topics.items, key, value)
    publisher.flush(10.0)


def tell(settings: Settings, **items: str) -> None:
    publish_items(settings, [Item(item, name) for item, name in items.items()])


def until(names: Names, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, f"in vain: {names.notice}"
        names.read()
        time.sleep(0.01)


def test_a_name_appears_an_update_replaces_it_and_a_tombstone_takes_it_away(settings: Settings, names: Names) -> None:
    topic(settings)
    assert "are being read" in names.notice
    tell(settings, a="Trail running shoe", b="Rain jacket")
    until(names, lambda: names.of("abc") == {"a": "Trail running shoe", "b": "Rain jacket"})
    until(names, lambda: names.notice == "")
    tell(settings, a="Trail running shoe, blue")
    until(names, lambda: names.of("abc") == {"a": "Trail running shoe, blue", "b": "Rain jacket"})
    send(settings, "b", None)
    until(names, lambda: names.of("abc") == {"a": "Trail running shoe, blue"})
    send(settings, "b", json.dumps({"item_id": "b", "name": "Back again", "price": None, "brand": "any"}).encode())
    until(names, lambda: names.of("abc") == {"a": "Trail running shoe, blue", "b": "Back again"})
    assert names.notice == ""


def test_what_is_no_item_is_counted_and_skipped(settings: Settings, names: Names) -> None:
    topic(settings)
    tell(settings, a="Before")
    for key, value in GARBAGE.values():
        send(settings, key, value)
    tell(settings, b="After")
    send(settings, b"\xff", None)
    until(names, lambda: names.of("ab") == {"a": "Before", "b": "After"} and f" {len(GARBAGE)} (" in names.notice)
    assert f"Skipped on topic {settings.topics.items}, since they are no items" in names.notice


def test_without_the_topic_ids_are_all_there_is_and_it_is_said_how_to_get_names(
    settings: Settings, names: Names
) -> None:
    names.read()
    assert names.of(["a"]) == {}
    for said in (
        "does not exist",
        "innerloop topics",
        settings.topics.items,
        "shown by their ids",
        "schemas/README.md",
    ):
        assert said in names.notice
    topic(settings)
    until(names, lambda: "holds no names" in names.notice)
    tell(settings, a="At last")
    until(names, lambda: names.of("a") == {"a": "At last"} and names.notice == "")


def unreadable(*_: object) -> None:
    raise ServiceError("It cannot be read.")


def test_a_topic_made_anew_is_read_anew(settings: Settings, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    topic(settings)
    tell(settings, a="Of the first", b="Of the first")
    until(names, lambda: len(names.of("ab")) == 2)
    admin, name = clients.admin(settings.kafka), settings.topics.items
    admin.delete_topics([name])[name].result()
    until(names, lambda: name not in admin.list_topics(timeout=5).topics)
    with monkeypatch.context() as patched:  # librdkafka looks for it for half a minute before it says so
        patched.setattr(Tail, "new", unreadable)
        until(names, lambda: "does not exist" in names.notice)
    assert len(names.of("ab")) == 2, "as they were"
    assert "Names are as they were" in names.notice
    topic(settings)
    tell(settings, b="Of the second")
    until(names, lambda: names.of("ab") == {"b": "Of the second"})


def test_more_items_than_may_be_kept_are_told(settings: Settings) -> None:
    topic(settings)
    tell(settings, a="1", b="2", c="3")
    few = Names(settings.model_copy(update={"console": ConsoleSettings(named_items=2)}))
    until(few, lambda: "console.named_items allows (2)" in few.notice)
    assert len(few.of("abc")) == 2
    few.close()


def test_a_disk_that_is_full_costs_names_alone_and_is_told(
    settings: Settings, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic(settings)
    tell(settings, a="Before")
    until(names, lambda: names.of("a") == {"a": "Before"} and names.notice == "")
    tell(settings, b="After")
    with monkeypatch.context() as patched:
        patched.setattr(ItemNames, "put", no_room)
        until(names, lambda: "Names cannot be read (OperationalError)" in names.notice)
        names.read()
        assert "OperationalError" in names.notice
    until(names, lambda: names.of("ab") == {"a": "Before", "b": "After"} and names.notice == "")


def no_room(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_it_follows_by_itself_in_no_group_and_stops(settings: Settings) -> None:
    topic(settings)
    names = Names(settings)
    names.start()
    tell(settings, a="By itself")
    deadline = time.monotonic() + 30
    while names.of("a") != {"a": "By itself"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    groups = clients.admin(settings.kafka).list_consumer_groups().result().valid
    assert "innerloop-tail" not in {group.group_id for group in groups}
    names.stop()


def test_a_tail_is_current_behind_what_compaction_has_removed(settings: Settings) -> None:
    """The end of a partition may lie behind its last record that is left."""
    quick = {"segment.ms": "500", "min.cleanable.dirty.ratio": "0.0", "max.compaction.lag.ms": "100"}
    name, of_brokers = settings.topics.items, catalogue()["items"]
    config = {**of_brokers.config, **quick, "delete.retention.ms": "0"}
    ensure_topics(settings, {"items": msgspec.structs.replace(of_brokers, config=config, partitions=1)})
    tell(settings, a="Gone", b="Stays")
    send(settings, "a", None)
    time.sleep(1.0)
    tail, seen = Tail(settings, name), []
    deadline = time.monotonic() + 30
    while not tail.current:
        assert time.monotonic() < deadline
        seen += tail.new(100, 0.2)
    assert b"b" in {record.key for record in seen}
    tail.close()


def test_a_tail_without_its_topic_says_so(settings: Settings) -> None:
    with pytest.raises(ServiceError, match=f"Topic {settings.topics.items} does not exist"):
        Tail(settings, settings.topics.items)


def test_the_demo_s_items_are_on_the_topic_as_the_contract_has_them(settings: Settings) -> None:
    topic(settings)
    publish_items(settings, [Item("a", "Trail running shoe 1", "category-00", 12.5), Item("b", "Bare")])
    found = {record.key: json.loads(record.value or b"") for record in whole_topic(settings, settings.topics.items)}
    assert found == {
        b"a": {"item_id": "a", "name": "Trail running shoe 1", "category": "category-00", "price": 12.5},
        b"b": {"item_id": "b", "name": "Bare"},
    }
