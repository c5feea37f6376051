"""Training reads what the shop says of its items from a real topic."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from structlog.testing import capture_logs

from innerloop.config import Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.evaluation.shop import Process, Shop
from innerloop.learning.described import COLUMNS
from innerloop.learning.releases import load
from innerloop.shop_items import Item
from innerloop.store.database import connect, transaction
from innerloop.store.items import ItemNumbers
from innerloop.store.releases import newest_few
from innerloop.store.support_sets import write
from innerloop.streams import clients
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.support import EXAMPLE, SupportSets
from innerloop.worker import train as train_module
from innerloop.worker.demo.names import publish_items
from innerloop.worker.train import Source, run_train
from innerloop.worker.train_items import items_on_topic


@pytest.fixture
def told(settings: Settings, tmp_path: Path) -> Settings:
    ensure_topics(settings, {"items": catalogue()["items"]})
    learning = settings.learning.model_copy(update={"releases_dir": tmp_path / "releases"})
    return settings.model_copy(update={"learning": learning})


def bounded(settings: Settings, most: int) -> Settings:
    learning = settings.learning.model_copy(update={"described_items": most})
    return settings.model_copy(update={"learning": learning})


def send(settings: Settings, key: bytes, value: bytes | None) -> None:
    publisher = Publisher(settings.kafka)
    publisher.send(settings.topics.items, key, value)
    publisher.flush(10.0)


def test_the_newest_record_of_an_item_holds_and_a_tombstone_takes_it_away(told: Settings) -> None:
    publish_items(told, [Item("a", "Old name"), Item("b", "Jacket", "coats", 9.5), Item("c", "Gone")])
    time.sleep(0.01)  # times are in milliseconds
    publish_items(told, [Item("a", "New name", price=2.0)])
    send(told, b"c", None)
    found = items_on_topic(told, set())
    assert dict(found.schema) == COLUMNS
    assert found.rows() == [("a", None, 2.0, "New name"), ("b", "coats", 9.5, "Jacket")]


def test_what_is_no_item_is_skipped_and_counted(told: Settings) -> None:
    publish_items(told, [Item("a", "A")])
    for key, value in ((b"a", b"no JSON"), (b"b", b'{"item_id": "a", "name": "of another key"}'), (b"\xff", None)):
        send(told, key, value)
    with capture_logs() as said:
        found = items_on_topic(told, set())
    assert found.rows() == [("a", None, None, "A")]
    assert [entry["skipped"] for entry in said if entry["event"] == "no items"] == [2]


def test_those_that_were_met_are_all_taken_and_of_the_others_the_newest(told: Settings) -> None:
    met = {"met", "also met"}
    publish_items(told, [Item("met", "M"), Item("also met", "N"), Item("dead stock", "D")])
    for number in range(6):
        time.sleep(0.01)
        publish_items(told, [Item(f"launch {number}", "L")])
    with capture_logs() as said:
        found = items_on_topic(bounded(told, 2), met)
    assert found["item_id"].to_list() == ["also met", "met", "launch 5", "launch 4"]
    assert [entry["most"] for entry in said if entry.get("setting") == "learning.described_items"] == [2], "told once"
    time.sleep(0.01)
    publish_items(told, [Item("dead stock", "On sale again")])
    assert items_on_topic(bounded(told, 2), met)["item_id"].to_list()[2:] == ["dead stock", "launch 5"]


def test_without_a_topic_or_anything_on_it_there_is_nothing_to_say(settings: Settings) -> None:
    with capture_logs() as said:
        assert items_on_topic(settings, set()).is_empty()
    assert any("innerloop topics" in entry.get("why", "") for entry in said)
    assert settings.topics.items not in clients.admin(settings.kafka).list_topics(timeout=10).topics
    ensure_topics(settings, {"items": catalogue()["items"]})
    assert items_on_topic(settings, set()).is_empty()


def test_a_file_of_other_identifiers_is_refused(settings: Settings, tmp_path: Path) -> None:
    ensure_topics(settings)
    Shop(0, users=50, items=100).history(500).write_parquet(tmp_path / "events.parquet")
    (tmp_path / "items.csv").write_text("item_id,name\n00001,Shoe\n")
    with pytest.raises(SettingsError, match=r"describes no item that anybody met \(00001 there and item-.*compare"):
        run_train(settings, Source(tmp_path / "events.parquet", items=tmp_path / "items.csv"))


def test_a_training_that_another_has_overtaken_leaves_the_other_s_release_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would write the same files, and neither card would be of what lies there."""
    ensure_topics(settings)
    Shop(0, users=60, items=100).history(1_000).write_parquet(tmp_path / "events.parquet")
    Shop(1, users=60, items=100).history(1_500).write_parquet(tmp_path / "others.parquet")
    trained = train_module._trained

    def slow(*arguments: Any) -> Any:
        made = trained(*arguments)
        monkeypatch.setattr(train_module, "_trained", trained)
        run_train(settings, Source(tmp_path / "others.parquet"))
        return made

    monkeypatch.setattr(train_module, "_trained", slow)
    with pytest.raises(ServiceError, match=r"^Another training has registered release 1 meanwhile"):
        run_train(settings, Source(tmp_path / "events.parquet"))
    with transaction(connect(settings.database)) as connection:
        (newest,) = newest_few(connection, 2)
    assert load(newest.location, newest.card).card.data.events == 1_500
    run_train(settings, Source(tmp_path / "events.parquet"))
    with transaction(connect(settings.database)) as connection:
        assert [each.version for each in newest_few(connection, 2)] == [2, 1]


@pytest.mark.parametrize("hours", [12.0, 600_000.0])
def test_what_a_file_dates_ahead_is_left_out(settings: Settings, tmp_path: Path, hours: float) -> None:
    """One event would make all others old, whether ingest would take it or not, and clicks that wait not bought."""
    ensure_topics(settings)
    shop = Shop(0, users=60, items=100).history(1_000)
    wrong = shop.tail(2).with_columns(event_time=int((time.time() + hours * 3600) * 1000), item_id=pl.lit("wrong"))
    pl.concat([shop, wrong]).write_parquet(tmp_path / "events.parquet")
    run_train(settings, Source(tmp_path / "events.parquet"))
    with transaction(connect(settings.database)) as connection:
        (newest,) = newest_few(connection, 1)
    release = load(newest.location)
    assert release.card.data.events == 1_000
    assert release.card.data.last_event_time == shop["event_time"].max()
    assert "wrong" not in release.item_ids


def test_what_ingest_would_not_name_is_left_out_of_a_file(settings: Settings, tmp_path: Path) -> None:
    """Else lists had items that no event can name, and that no reader who goes by the schema takes."""
    ensure_topics(settings)
    shop = Shop(0, users=60, items=100).history(1_000)
    fits = shop.tail(2).with_columns(item_id=pl.lit("é" * 128))
    wrong = [shop.tail(2).with_columns(item_id=pl.lit(text)) for text in ("é" * 128 + "e", "a\0b")]
    wrong.append(shop.tail(2).with_columns(user_id=pl.lit("u" * 257), item_id=pl.lit("only by that user")))
    pl.concat([shop, fits, *wrong]).write_parquet(tmp_path / "events.parquet")
    run_train(settings, Source(tmp_path / "events.parquet"))
    with transaction(connect(settings.database)) as connection:
        (newest,) = newest_few(connection, 1)
    assert set(load(newest.location).item_ids) == {*shop["item_id"], "é" * 128}


def test_of_the_database_what_is_dated_ahead_is_left_out(settings: Settings) -> None:
    """Ingest takes a day ahead; a release learns of it when its time has come."""
    ensure_topics(settings)
    engine = connect(settings.database)
    hour, now = 3_600_000, int(time.time() * 1000)
    names = ["shoe", "hat", "bag", "ahead"]
    numbers = ItemNumbers(engine).intern(names, {})
    rows = np.zeros(121, EXAMPLE)
    rows["item"], rows["weight"], rows["type"], rows["hash"] = [*numbers[:3] * 40, numbers[3]], 1.0, 1, np.arange(121)
    rows["time"] = [*(now - hour - 1000 * np.arange(120)[::-1]), now + 12 * hour]
    sets = SupportSets(np.array([*range(0, 121, 3), 121]), rows)
    with transaction(engine) as connection:
        write(connection, [f"u{n}" for n in range(41)], sets, np.ones(41, np.int64))
    run_train(settings, Source())
    with transaction(engine) as connection:
        (newest,) = newest_few(connection, 1)
    assert sorted(load(newest.location).item_ids) == sorted(names[:3])


def test_a_release_knows_an_item_that_only_the_catalogue_names(
    told: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From topic and file alike, by `innerloop train`'s own function."""
    ensure_topics(told)
    shop = Shop(0, users=200, items=400, process=Process(categories=10))
    events = shop.history(4_000)
    file = tmp_path_factory.mktemp("events") / "events.parquet"
    events.drop("category").write_parquet(file)  # so that what the shop says of its items is all there is
    table = shop.catalogue()
    publish_items(
        told, [Item(i, f"{c} thing", c, p) for i, c, p in table.select("item_id", "category", "price").rows()]
    )
    unmet = sorted(set(table["item_id"]) - set(events["item_id"]))
    run_train(told, Source(events=file))
    items = file.with_name("items.parquet")
    table.with_columns(text=table["category"] + " thing").drop("launched").write_parquet(items)
    run_train(told, Source(events=file, items=items))
    with transaction(connect(told.database)) as connection:
        by_file, by_topic = (load(release.location) for release in newest_few(connection, 2))
    for release in (by_topic, by_file):
        assert sorted(release.encoder.described_ids) == unmet
        assert release.card.metrics["content_explains"] > 0.1
    asked: list[str | None] = [None] * len(unmet)
    torch.testing.assert_close(by_topic.vectors_for(unmet, asked), by_file.vectors_for(unmet, asked))
