"""Quality on a real Kafka, run as `innerloop quality` runs it, against a plain computation over the same topics."""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from confluent_kafka import TopicPartition
from pydantic import SecretStr

from innerloop.config import Settings
from innerloop.errors import SettingsError
from innerloop.holdout import place
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.topics import ensure_topics
from innerloop.worker.quality_security import credentials

T = TypeVar("T")
Record = dict[str, Any]

WINDOW_MS, DAY_MS = 60_000, 86_400_000
ITEMS = [f"item-{n}" for n in range(40)]
ADS = [f"ad-{n}" for n in range(8)]
QUALITY = {
    "events_per_second": 10_000_000,
    "window_seconds": 60,
    "grace_seconds": 90,
    "idle_seconds": 2,
    "from_beginning": True,
}
SHORT_SESSION = {"session.timeout.ms": "2500", "heartbeat.interval.ms": "250"}


@pytest.fixture
def quality(settings: Settings) -> Settings:
    changed = settings.model_copy(update={"quality": settings.quality.model_copy(update=QUALITY)})
    ensure_topics(changed)
    return changed


class Shop:
    """Users who click, and lists published for them.

    `now` is when things are put on their topics, a little before now or Kafka would clean them away; events are told
    `behind` that, as a replay has it.
    """

    def __init__(self, settings: Settings, users: int = 60, seed: int = 0) -> None:
        self.settings, self.rng = settings, random.Random(seed)
        self.users = [f"user-{n}" for n in range(users)]
        self.versions = dict.fromkeys(self.users, 0)
        self.began = self.now = (int(time.time()) - 1_800) // 60 * 60_000
        self.behind = 2 * DAY_MS
        self.events: list[Record] = []
        self.producer = clients.producer(settings.kafka)

    def go_on(self, steps: int) -> None:
        """As many clicks, each followed by a list and now and then by a purchase; about two thirds of a second each."""
        rng = self.rng
        for _ in range(steps):
            self.now += rng.randrange(1, 1_400)
            user, ad = rng.choice(self.users), rng.choice([None, *ADS])
            item = f"of {ad}" if ad else rng.choice(ITEMS)
            late = rng.choice([0, 0, 0, 5_000])
            self.event("click", user, item, self.now - late, ad)
            if rng.random() < 0.3:
                self.event("purchase", user, item, self.now + 50)
            if rng.random() < 0.8:
                self.lists(user, self.now - late, self.now + rng.choice([20, 200, 2_000]))
        self.producer.flush(10)

    def event(self, kind: str, user: str, item: str, at: int, ad: str | None = None) -> None:
        event = {
            "event_id": f"e{len(self.events)}",
            "event_type": kind,
            "user_id": user,
            "item_id": item,
            "event_time": at - self.behind,
        }
        if ad:
            event["ad_id"] = ad
        topic = self.settings.topics.purchases if kind == "purchase" else self.settings.topics.clicks
        self.events.append(event)
        self.producer.produce(topic, json.dumps(event), user, timestamp=self.now)

    def lists(self, user: str, event_time: int, published: int) -> None:
        self.versions[user] += 1
        arm = "hold_out" if int(user.split("-")[1]) % 3 == 0 else "adapted"
        head = {
            "user_id": user,
            "model_version": 1 + (self.now - self.began) // 100_000,
            "support_version": self.versions[user],
            "support_size": self.versions[user],
            "event_time": event_time - self.behind,
            "scored_at": published - 5,
            "method": "none" if arm == "hold_out" else "bayes",
            "arm": arm,
        }
        chosen = self.rng.sample(ITEMS, 25)
        items = [{"item_id": item, "score": 1.0} for item in chosen]
        ads = [{"ad_id": ad, "item_id": f"of {ad}", "score": round(self.rng.random(), 3)} for ad in ADS[:6]]
        records = (
            (self.settings.topics.recommendations, {**head, "model": "recommendations", "items": items}),
            (self.settings.topics.ads, {**head, "model": "ads", "ads": ads, "kind": "purchase_given_click"}),
        )
        for topic, record in records:
            self.producer.produce(topic, json.dumps(record), user, timestamp=published)

    def last_window(self) -> int:
        newest: int = max(e["event_time"] for e in self.events if e["event_type"] == "click")
        return newest // WINDOW_MS * WINDOW_MS

    def pass_time(self, seconds: int) -> None:
        """Nothing but one event of one user on each partition, later."""
        self.now += 1_000 * seconds
        event = {"event_type": "cart", "item_id": "x", "event_time": self.now - self.behind}
        for partition in range(4):
            named = {
                **event,
                "event_id": f"pass-{self.now}-{partition}",
                "user_id": "passer-by",
                "event_type": "purchase",
            }
            self.producer.produce(
                self.settings.topics.purchases, json.dumps(named), "passer-by", partition=partition, timestamp=self.now
            )
        self.producer.flush(10)


def process(settings: Settings) -> "subprocess.Popen[bytes]":
    environment = {
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": SHORT_SESSION}),
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_QUALITY": settings.quality.model_dump_json(),
    }
    return subprocess.Popen([sys.executable, "-m", "innerloop.worker", "quality"], env={**os.environ, **environment})


@contextmanager
def running(settings: Settings, count: int = 1) -> Iterator[list["subprocess.Popen[bytes]"]]:
    members = [process(settings) for _ in range(count)]
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            member.wait()


def wait_for(look: Callable[[], T | None], seconds: float = 40.0) -> T:
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return found


def windows(settings: Settings) -> list[Record]:
    """Every record on quality.windows, in order."""
    topic = settings.topics.quality_windows
    with clients.consumer(settings.kafka, "test") as consumer:
        end = consumer.get_watermark_offsets(TopicPartition(topic, 0), 10)[1]
        consumer.assign([TopicPartition(topic, 0, 0)])
        found: list[Record] = []
        while len(found) < end:
            found += [json.loads(message.value() or b"") for message in consumer.consume(1_000, 1.0)]
    return found


# --- the plain computation


def everything(settings: Settings, topic: str) -> list[tuple[int, Record]]:
    """Every record of a topic with its timestamp."""
    with clients.consumer(settings.kafka, "test") as consumer:
        ends = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), 10)[1] for n in range(4)}
        consumer.assign([TopicPartition(topic, n, 0) for n in ends])
        found: list[tuple[int, Record]] = []
        while len(found) < sum(ends.values()):
            batch = consumer.consume(10_000, 0.2)
            found += [(message.timestamp()[1], json.loads(message.value() or b"")) for message in batch]
    return found


def plain(settings: Settings) -> dict[int, Record]:
    """What each window with clicks must say, by its start, from the topics alone and in the plainest way."""
    topics = settings.topics
    clicks = {event["event_id"]: (at, event) for at, event in everything(settings, topics.clicks)}
    bought = [event for _, event in everything(settings, topics.purchases)]
    lists, ads = everything(settings, topics.recommendations), everything(settings, topics.ads)
    found: dict[int, Record] = {}
    due = []
    for at, click in clicks.values():
        start = click["event_time"] // WINDOW_MS * WINDOW_MS
        window = found.setdefault(start, {"without_list": 0, "judged": [], "placebo": [], "ads": []})
        judge = _newest_before(at, click, lists)
        if judge is None:
            window["without_list"] += 1
        else:
            window["judged"].append((judge["arm"], *_judged(click, judge)))
            if judge["arm"] == "adapted" and (other := _of_another(at, click, lists)):
                window["placebo"].append(("placebo", *_judged(click, other)))
        shown = _newest_before(at, click, ads) if "ad_id" in click else None
        chance = {ad["ad_id"]: ad["score"] for ad in shown["ads"]}.get(click["ad_id"]) if shown else None
        if shown and chance is not None:
            label = any(
                (buy["user_id"], buy["item_id"]) == (click["user_id"], click["item_id"])
                and 0 < buy["event_time"] - click["event_time"] <= DAY_MS
                for buy in bought
            )
            due.append((click["event_time"] + DAY_MS, shown["arm"], shown["model_version"], chance, label))
    for when, *ad in due:  # with the first window that ends after the day has
        later = [start for start in found if start + WINDOW_MS > when]
        if later:
            found[min(later)]["ads"].append(tuple(ad))
    return found


def _judged(click: Record, judge: Record) -> tuple[int, str, float]:
    names = [each["item_id"] for each in judge["items"]][:20]
    rank = names.index(click["item_id"]) + 1 if click["item_id"] in names else math.inf
    return judge["model_version"], click["user_id"], rank


def _of_another(at: int, click: Record, lists: list[tuple[int, Record]]) -> Record | None:
    """What the next adapted user by the hash had, from the clicking one on and around."""
    places = {user: place(user, 20_260_103) for user in {record["user_id"] for _, record in lists}}
    own = places.pop(click["user_id"])
    for user in sorted(places, key=lambda user: (places[user] - own) % 1.0):
        found = _newest_before(at, {**click, "user_id": user}, lists)
        if found and found["arm"] == "adapted":
            return found
    return None


def _newest_before(at: int, click: Record, records: list[tuple[int, Record]]) -> Record | None:
    before = [
        (record["model_version"], record["support_version"], record["scored_at"], n)
        for n, (published, record) in enumerate(records)
        if record["user_id"] == click["user_id"] and published < at and record["event_time"] < click["event_time"]
    ]
    return records[max(before)[3]][1] if before else None


def _group(window: Record, arm: str, version: int | None) -> Record | None:
    mine = [
        (user, rank)
        for a, v, user, rank in [*window["judged"], *window["placebo"]]
        if a == arm and version in {None, v}
    ]
    ads = [(chance, label) for a, v, chance, label in window["ads"] if a == arm and version in {None, v}]
    if not mine and not ads:
        return None
    at = []
    for k in (10, 20) if mine else ():
        hits = [rank for _, rank in mine if rank <= k]
        mrr = sum(1 / rank for rank in hits) / len(mine)
        at.append({"k": k, "hits": len(hits), "hit_rate": near(len(hits) / len(mine)), "mrr": near(mrr)})
    users = len({user for user, _ in mine})
    return {
        "arm": arm, "model_version": version, "users": users, "clicks": len(mine), "at": at, "ads": _ads(ads)
    }  # fmt: skip


def _ads(ads: list[tuple[float, bool]]) -> Record | None:
    if not ads:
        return None
    right, wrong = [c for c, label in ads if label], [c for c, label in ads if not label]
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    predicted = sum(c for c, _ in ads)
    return {
        "clicks": len(ads),
        "purchases": len(right),
        "predicted": near(predicted),
        "auc": near(sum(pairs) / len(pairs)) if pairs else None,
        "predicted_over_observed": near(predicted / len(right)) if right else None,
    }


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-6)


def judge_of(windows: list[Record]) -> dict[int, Record]:
    """The last record of each window: one may come twice."""
    return {window["window_start"]: window for window in windows}


def assert_equal(settings: Settings, found: dict[int, Record]) -> None:
    expected = plain(settings)
    assert set(found) == set(expected)
    for start, window in expected.items():
        record = found[start]
        assert record["window_end"] == start + WINDOW_MS
        assert record["late"] == 0
        assert record["without_list"] == window["without_list"], start
        assert record["clicks"] == window["without_list"] + len(window["judged"])
        arms = [_group(window, arm, None) for arm in ("adapted", "hold_out", "placebo")]
        assert record["arms"] == [group for group in arms if group]
        told = {(a, v) for a, v, *_ in [*window["judged"], *window["placebo"], *window["ads"]]}
        assert record["versions"] == [_group(window, arm, version) for arm, version in sorted(told)]
        both = {arm for arm, *_ in window["judged"]} == {"adapted", "hold_out"}
        assert len(record["lift"]) == (2 if both else 0)
        for lift in record["lift"]:
            rates = [{at["k"]: at["hit_rate"] for at in arm["at"]}[lift["k"]] for arm in record["arms"][:2]]
            assert lift["difference"] == pytest.approx(rates[0] - rates[1], abs=2e-6)
            assert lift["low"] < lift["difference"] < lift["high"]


# --- the tests


def test_windows_equal_a_plain_computation(quality: Settings) -> None:
    shop = Shop(quality)
    shop.go_on(400)
    shop.behind -= DAY_MS  # what was clicked on ads has its labels then
    shop.go_on(200)
    last = shop.last_window()
    shop.pass_time(240)
    with running(quality) as (member,):
        wait_for(lambda: last in judge_of(windows(quality)))
        member.terminate()
        assert member.wait(20) == 0
    found = judge_of(windows(quality))
    assert_equal(quality, found)
    assert sum(len(window["arms"]) for window in found.values()) > 10
    assert sum(group["clicks"] for w in found.values() for group in w["arms"] if group["arm"] == "placebo") > 100
    assert sum((group["ads"] or {"purchases": 0})["purchases"] for w in found.values() for group in w["arms"]) > 10


def test_kills_stops_and_rebalances_in_mid_window_cost_little_and_count_nothing_twice(quality: Settings) -> None:
    """Faust may lose a record where a process dies or partitions move; what is left must be right."""
    shop, group = Shop(quality, seed=1), quality.kafka.quality_group
    shop.go_on(300)
    with running(quality) as (first,):
        wait_for(lambda: windows(quality))
        shop.go_on(100)
        time.sleep(1.0)
        first.kill()
        first.wait()
        with running(quality, 2) as (second, third):
            wait_for(lambda: members_with_partitions(quality.kafka, group) == 2)
            shop.go_on(200)
            time.sleep(1.0)
            second.terminate()
            assert second.wait(30) == 0
            shop.go_on(200)
            last = shop.last_window()
            shop.pass_time(300)
            wait_for(lambda: last in judge_of(windows(quality)))
            assert third.poll() is None
    found, expected = judge_of(windows(quality)), plain(quality)
    assert set(found) == set(expected)
    clicks = {start: window["without_list"] + len(window["judged"]) for start, window in expected.items()}
    assert all(found[start]["clicks"] <= clicks[start] for start in found)
    assert sum(window["clicks"] for window in found.values()) >= 0.98 * sum(clicks.values())
    assert sum(window["without_list"] for window in found.values()) < 1.2 * sum(
        window["without_list"] for window in expected.values()
    ), "what was remembered of the users came through"


def test_a_password_that_aiokafka_cannot_use_is_one_sentence(quality: Settings) -> None:
    strange = {"ssl.keystore.location": SecretStr("/k.p12")}
    settings = quality.model_copy(update={"kafka": quality.kafka.model_copy(update={"properties": strange})})
    with pytest.raises(SettingsError, match=r"cannot use kafka\.properties ssl\.keystore\.location"):
        credentials(settings.kafka)
