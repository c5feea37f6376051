"""Impressions on a real broker and database: kept once, apart from the support sets, and in the scores of ads."""

import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from confluent_kafka import Message, TopicPartition
from sqlalchemy import text

from innerloop import metrics
from innerloop.config import AdaptSettings, IngestSettings, KafkaSettings, LearningSettings, Settings, SupportSettings
from innerloop.holdout import in_hold_out
from innerloop.learning.releases import Release
from innerloop.scores import AdScores
from innerloop.store import support_sets
from innerloop.store.database import Database, connect, transaction
from innerloop.store.history import read_history
from innerloop.streams import clients
from innerloop.streams.topics import ensure_topics
from innerloop.worker import processes
from innerloop.worker.train import train_release

SECONDS = 30.0
NOW = int(time.time() * 1000)
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
CAPACITY, KEPT = 6, 4
Sent = dict[str, Any]


class Thread(threading.Thread):
    """`innerloop ingest` or `innerloop adapt`, in a thread."""

    def __init__(self, settings: Settings, what: str) -> None:
        super().__init__(daemon=True)
        self.settings, self.what = settings, what
        self.asked = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            if self.what == "ingest":
                processes.run_ingest(self.settings)
            else:
                processes.run_adapt(self.settings, "cpu", 1)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


@dataclass
class World:
    """A shop, and what is found in the database and on the topics."""

    settings: Settings
    engine: Database

    def send(self, events: Sequence[Sent]) -> None:
        topics, producer = self.settings.topics, clients.producer(self.settings.kafka)
        own = {"purchase": topics.purchases, "impression": topics.impressions}
        for event in events:
            producer.produce(own.get(event["event_type"], topics.clicks), json.dumps(event).encode(), event["user_id"])
        assert producer.flush(SECONDS) == 0

    def rows(self, table: str) -> dict[str, list[tuple[int, int, int]]]:
        """(time, hash, type) of everything stored, by user."""
        with self.engine.connect() as connection:
            found = connection.execute(text(f"SELECT user_id, event_times, event_hashes, event_types FROM {table}"))
            return {user: list(zip(*columns, strict=True)) for user, *columns in found}

    def versions(self, table: str) -> dict[str, int]:
        with self.engine.connect() as connection:
            return {
                row.user_id: row.version for row in connection.execute(text(f"SELECT user_id, version FROM {table}"))
            }

    def log(self, topic: str) -> list[Message]:
        messages: list[Message] = []
        with clients.consumer(self.settings.kafka, "test") as consumer:
            places = [TopicPartition(topic, n, 0) for n in range(self.settings.topics.partitions)]
            ends = sum(consumer.get_watermark_offsets(place, 10)[1] for place in places)
            consumer.assign(places)
            until = time.monotonic() + SECONDS
            while len(messages) < ends:
                assert time.monotonic() < until
                messages += consumer.consume(10_000, 0.1)
        return messages

    def asked(self) -> set[str]:
        return {(message.key() or b"").decode() for message in self.log(self.settings.topics.requests)}

    def ads(self, user: str) -> AdScores | None:
        mine = [m.value() for m in self.log(self.settings.topics.ads) if m.key() == user.encode()]
        return msgspec.json.decode(mine[-1], type=AdScores) if mine and mine[-1] else None

    def behind(self) -> bool:
        """Whether ingest has records left, by the ledger."""
        query = text("SELECT topic, coalesce(sum(next_offset), 0) AS at FROM partition_ledger GROUP BY topic")
        with self.engine.connect() as connection:
            at = {row.topic: row.at for row in connection.execute(query)}
        return any(at.get(topic, 0) < len(self.log(topic)) for topic in self.settings.topics.ingested)

    @contextmanager
    def running(self, *whats: str) -> Iterator[None]:
        threads = [Thread(self.settings, what) for what in whats]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.asked.set()
            for thread in threads:
                thread.join(SECONDS)
        assert [thread.error for thread in threads] == [None] * len(threads)

    def ingest(self, events: Sequence[Sent] = ()) -> None:
        """Send, and run ingest until everything is in."""
        self.send(events)
        with self.running("ingest"):
            until(lambda: not self.behind(), "ingested")

    def rewind(self) -> None:
        """All offsets that the broker knows of ingest go back to 0; the ledger stays."""
        topics = self.settings.topics
        places = [TopicPartition(topic, n, 0) for topic in topics.ingested for n in range(topics.partitions)]
        with clients.consumer(self.settings.kafka, self.settings.kafka.ingest_group) as consumer:
            consumer.commit(offsets=places, asynchronous=False)


def until(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not look():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _threads_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Callable[[], bool]:
        member = threading.current_thread()
        assert isinstance(member, Thread)
        return member.asked.is_set

    monkeypatch.setattr(processes, "stop_on_signals", asked)


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Iterator[World]:
    kafka = KafkaSettings(**{**dict(settings.kafka), "properties": {"heartbeat.interval.ms": "200"}})
    changed = {
        "kafka": kafka,
        "support": SupportSettings(capacity=CAPACITY, impressions=KEPT),
        "ingest": IngestSettings(batch_size=50, cached_users=100),
        "adapt": AdaptSettings(top=20, refresh_seconds=0.1),
        "learning": LearningSettings(dimension=8, method="none", releases_dir=tmp_path),
    }
    settings = settings.model_copy(update=changed)
    ensure_topics(settings)
    engine = connect(settings.database)
    yield World(settings, engine)
    engine.dispose()


def event(n: int, kind: str, user: str, item: str, at: int) -> Sent:
    return {"event_id": f"e{n}", "event_type": kind, "user_id": user, "item_id": item, "event_time": at}


def mixed(count: int = 400, users: int = 12, seed: int = 0) -> list[Sent]:
    """Many impressions, some clicks and purchases, out of order, every tenth sent twice, some times equal."""
    rng = random.Random(seed)
    kinds = ("impression",) * 8 + ("click", "purchase")
    events = [
        event(n, rng.choice(kinds), f"u{rng.randrange(users)}", f"i{rng.randrange(9)}", NOW - HOUR + 1_000 * (n // 3))
        for n in range(count)
    ]
    events += rng.sample(events, count // 10)
    rng.shuffle(events)
    return events


def plain(events: Sequence[Sent], capacity: int, *, shown: bool) -> dict[str, list[tuple[int, int, int]]]:
    """What is to be stored of what was shown, or of the rest: the newest, once each."""
    codes = {"click": 1, "purchase": 4, "impression": 5}
    found: defaultdict[str, set[tuple[int, int, int]]] = defaultdict(set)
    for each in events:
        if (each["event_type"] == "impression") == shown:
            hashed = xxhash.xxh3_64_intdigest(each["event_id"].encode())
            signed = hashed - 2**64 if hashed >= 2**63 else hashed
            found[each["user_id"]].add((each["event_time"], signed, codes[each["event_type"]]))
    return {user: sorted(rows)[-capacity:] for user, rows in found.items()}


def test_impressions_are_kept_apart_and_push_nothing_out(world: World) -> None:
    """Of one stream of everything: both tables are what a plain computation says, whatever came between."""
    events = mixed()
    world.ingest(events)
    assert world.rows("support_sets") == plain(events, CAPACITY, shown=False)
    assert world.rows("impressions") == plain(events, KEPT, shown=True)
    assert world.asked() == {each["user_id"] for each in events if each["event_type"] != "impression"}


@pytest.mark.parametrize("forgotten", ["the broker's offsets", "the ledger, too"])
def test_a_replay_changes_nothing_and_asks_for_nobody_who_only_saw(world: World, forgotten: str) -> None:
    events = [*mixed(), *(event(10_000 + n, "impression", "looks", f"i{n}", NOW - n) for n in range(9))]
    world.ingest(events)
    before = {table: (world.rows(table), world.versions(table)) for table in ("support_sets", "impressions")}
    world.rewind()
    if forgotten == "the ledger, too":
        with world.engine.begin() as connection:
            connection.execute(text("DELETE FROM partition_ledger"))
        world.ingest()
    else:
        told = metrics.EVENTS.labels("replayed")._value.get()
        with world.running("ingest"):
            until(lambda: metrics.EVENTS.labels("replayed")._value.get() - told >= len(events), "replayed")
    assert {table: (world.rows(table), world.versions(table)) for table in before} == before
    assert len(world.rows("impressions")["looks"]) == KEPT
    assert "looks" not in world.asked()


def test_impressions_on_the_topic_of_clicks_count_alike(world: World) -> None:
    events = mixed(100)
    topics = world.settings.topics.model_copy(update={"impressions": world.settings.topics.clicks})
    World(world.settings.model_copy(update={"topics": topics}), world.engine).send(events)
    world.ingest()
    assert world.rows("support_sets") == plain(events, CAPACITY, shown=False)
    assert world.rows("impressions") == plain(events, KEPT, shown=True)


def test_with_a_capacity_of_0_impressions_are_read_and_dropped(world: World) -> None:
    events, dropped = mixed(100), metrics.EVENTS.labels("dropped")._value.get()
    none = world.settings.support.model_copy(update={"impressions": 0})
    World(world.settings.model_copy(update={"support": none}), world.engine).ingest(events)
    assert world.rows("impressions") == {}
    assert world.rows("support_sets") == plain(events, CAPACITY, shown=False)
    seen = sum(each["event_type"] == "impression" for each in events)
    assert metrics.EVENTS.labels("dropped")._value.get() - dropped == seen


def test_another_writer_of_the_same_impressions_costs_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else writes the user's impressions between our reading and our writing: all are there in the end."""
    world.ingest([event(0, "impression", "u", "i0", NOW - 10), event(1, "click", "u", "i0", NOW - 9)])
    interfered: list[bool] = []
    write = support_sets.write

    def late(connection: Any, users: Any, sets: Any, versions: Any, **rest: Any) -> None:
        if rest.get("table") == "impressions" and not interfered:
            interfered.append(True)
            with transaction(world.engine) as other:
                found = support_sets.read(other, ["u"], table="impressions")
                mine = found[1].examples.copy()
                mine["hash"] += 1
                both = np.sort(np.concatenate([found[1].examples, mine]), order=["time", "hash"])
                write(other, ["u"], type(sets)(np.array([0, 2]), both), found[2] + 1, table="impressions")
        write(connection, users, sets, versions, **rest)

    monkeypatch.setattr(support_sets, "write", late)
    world.ingest([event(2, "impression", "u", "i1", NOW), event(3, "click", "u", "i1", NOW)])
    assert interfered
    assert len(world.rows("impressions")["u"]) == 3
    assert len(world.rows("support_sets")["u"]) == 2


# --- from impressions to scores


def shop(sold: float = 0.34, users: int = 250, each: int = 30, items: int = 12, days: int = 7) -> list[Sent]:
    """Half the users click nearly only even items, the others odd ones; the share `sold` of the clicks is bought."""
    rng = random.Random(1)
    events: list[Sent] = []
    for user in range(users):
        for _ in range(each):
            at, item = NOW - rng.randrange(HOUR, days * DAY), rng.randrange(items)
            chance = 0.5 if item % 2 == user % 2 else 0.04
            about = {"ad_id": f"ad{item}", "category": f"c{item % 2}"}
            clicked = rng.random() < chance
            kinds = ["impression"] + clicked * ["click"] + (clicked and rng.random() < sold) * ["purchase"]
            for late, kind in enumerate(kinds):
                events.append(event(len(events), kind, f"u{user}", f"i{item}", at + late * MINUTE) | about)
    return sorted(events, key=lambda each: each["event_time"])


def roomy(world: World) -> World:
    """Room for all that a user of `shop` does."""
    support = SupportSettings(capacity=64, impressions=32)
    ingest = IngestSettings(batch_size=5_000, cached_users=10_000)
    return World(world.settings.model_copy(update={"support": support, "ingest": ingest}), world.engine)


def scores_after(world: World, events: Sequence[Sent], clicks: Sequence[Sent]) -> tuple[Release, dict[str, AdScores]]:
    """In through Kafka, trained from the database, out through Kafka: the release, and the clicking users' lists."""
    world.ingest(events)
    with transaction(world.engine) as connection:
        history = read_history(connection)
    assert set(history["event_type"]) == {each["event_type"] for each in events}
    release, _ = train_release(world.settings, world.engine, history)
    found: dict[str, AdScores] = {}

    def scored() -> bool:
        users = [each["user_id"] for each in clicks]
        found.update({user: each for user in users if (each := world.ads(user)) and each.event_time == NOW})
        return len(found) == len(users)

    with world.running("ingest", "adapt"):
        world.send(clicks)
        until(scored, "everybody's scores")
    return release, found


def test_from_impressions_to_scores_by_click_and_purchase(world: World) -> None:
    """The newest click's list knows the user."""
    clicks = [event(10**6 + n, "click", f"u{n}", f"i{n}", NOW) | {"ad_id": f"ad{n}"} for n in range(2)]
    release, found = scores_after(roomy(world), shop(), clicks)
    assert release.card.metrics["ads_click_auc"] > 0.75
    assert release.ads is not None
    assert release.ads.clicks is not None
    for number, user in enumerate(("u0", "u1")):
        record = found[user]
        assert record.kind == "click_and_purchase"
        assert len(record.ads) == 12
        assert [ad.score for ad in record.ads] == sorted((ad.score for ad in record.ads), reverse=True)
        for ad in record.ads:
            assert ad.click is not None
            assert ad.purchase_given_click is not None
            assert ad.score == pytest.approx(ad.click * ad.purchase_given_click, rel=1e-3, abs=1e-6)
        chances = {
            parity: [ad.click or 0 for ad in record.ads if int(ad.item_id[1:]) % 2 == parity] for parity in (0, 1)
        }
        assert np.mean(chances[number]) == pytest.approx(0.5, abs=0.2)
        assert np.mean(chances[1 - number]) < 0.2


def test_from_impressions_without_purchases_to_scores_by_click(world: World) -> None:
    """A shop window: the same way, and the hold-out gets what everybody of whom nothing is known would click."""
    world = roomy(world)
    held = [n for n in range(250) if in_hold_out(f"u{n}", world.settings.quality.hold_out)][:2]
    adapted = [n for n in range(20) if n not in held][:2]
    clicks = [event(10**6 + n, "click", f"u{n}", f"i{n % 12}", NOW) | {"ad_id": f"ad{n % 12}"} for n in held + adapted]
    release, found = scores_after(world, shop(sold=0.0), clicks)
    assert release.card.metrics["ads_click_auc"] > 0.75
    for record in found.values():
        assert record.kind == "click"
        assert len(record.ads) == 12
        assert [ad.score for ad in record.ads] == sorted((ad.score for ad in record.ads), reverse=True)
        assert {(ad.click, ad.purchase_given_click) for ad in record.ads} == {(None, None)}
    for n in adapted:
        own, others = (
            [ad.score for ad in found[f"u{n}"].ads if int(ad.item_id[1:]) % 2 == p] for p in (n % 2, 1 - n % 2)
        )
        assert np.mean(own) == pytest.approx(0.5, abs=0.2)
        assert np.mean(others) < 0.2
    first, second = (found[f"u{n}"] for n in held)
    assert (first.arm, second.arm) == ("hold_out", "hold_out")
    assert first.ads == second.ads
    assert all(ad.score == pytest.approx(0.27, abs=0.1) for ad in first.ads)
