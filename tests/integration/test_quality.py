"""Quality on a real Kafka, run as `innerloop quality` runs it, against a plain computation over the same topics."""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import pytest
from confluent_kafka import TopicPartition
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from quality_shop import DAY_MS, WINDOW_MS, Record, Shop

from innerloop.config import Settings
from innerloop.errors import SettingsError
from innerloop.holdout import SAMPLE_SEED, place
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import group_lag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.quality.app import Quality
from innerloop.worker.quality.sample import Reader
from innerloop.worker.quality.sample import Record as QualityRecord
from innerloop.worker.quality.security import credentials
from innerloop.worker.servers.watched_process import free_ports

T = TypeVar("T")
QUALITY = {
    "events_per_second": 10_000_000,
    "window_seconds": 60,
    "grace_seconds": 90,
    "idle_seconds": 5,
    "from_beginning": True,
}
SHORT_SESSION = {"session.timeout.ms": "2500", "heartbeat.interval.ms": "250"}


@pytest.fixture
def quality(settings: Settings) -> Settings:
    changed = settings.model_copy(update={"quality": settings.quality.model_copy(update=QUALITY)})
    ensure_topics(changed)
    return changed


def process(settings: Settings, **more: str) -> "subprocess.Popen[bytes]":
    environment = {
        **more,
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": SHORT_SESSION}),
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_QUALITY": settings.quality.model_dump_json(),
    }
    return subprocess.Popen([sys.executable, "-m", "innerloop.worker", "quality"], env={**os.environ, **environment})


@contextmanager
def running(settings: Settings, count: int = 1, **more: str) -> Iterator[list["subprocess.Popen[bytes]"]]:
    members = [process(settings, **more) for _ in range(count)]
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            member.wait()


def wait_for(look: Callable[[], T | None], seconds: float = 90.0) -> T:
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
        assert member.wait(60) == 0
    found = judge_of(windows(quality))
    assert_equal(quality, found)
    assert sum(len(window["arms"]) for window in found.values()) > 10
    assert sum(group["clicks"] for w in found.values() for group in w["arms"] if group["arm"] == "placebo") > 100
    assert sum((group["ads"] or {"purchases": 0})["purchases"] for w in found.values() for group in w["arms"]) > 10


def test_what_faust_commits_past_in_the_sample_is_read_again(quality: Settings) -> None:
    """As in a rebalance, now and then: the sample has it, nobody judged it, and the group stands behind it."""
    shop, group = Shop(quality), quality.kafka.quality_group
    clicks, sample = quality.topics.clicks, f"{group}-sample"
    shop.go_on(300)
    with running(quality) as (first,):
        wait_for(lambda: windows(quality) and not sum(each.offsets for each in group_lag(quality, group, [clicks])))
        first.terminate()
        assert first.wait(60) == 0
    with clients.consumer(quality.kafka, group) as consumer:
        begun = consumer.committed([TopicPartition(clicks, n) for n in range(4)], timeout=10)
        shop.go_on(200)
        consumer.assign(begun)
        found: dict[int, list[QualityRecord]] = {}
        for message in consumer.consume(200, 30.0):
            record = QualityRecord(message.key(), message.value(), message.timestamp()[1])
            found.setdefault(message.partition() or 0, []).append(record)
        assert sum(map(len, found.values())) == 200
        for number, records in found.items():
            batch = Reader(quality).batch(clicks, number, records, int(time.time() * 1000))
            shop.producer.produce(sample, msgspec.msgpack.encode(batch), partition=0)
        assert shop.producer.flush(10) == 0
        places = [*(TopicPartition(clicks, n) for n in range(4)), TopicPartition(sample, 0)]
        ends = [TopicPartition(at.topic, at.partition, consumer.get_watermark_offsets(at, 10)[1]) for at in places]
        consumer.commit(offsets=ends, asynchronous=False)
    last = shop.last_window()
    shop.pass_time(240)
    with running(quality):
        wait_for(lambda: last in judge_of(windows(quality)))
    # Some may be late: the partitions are silent for long, and come to speak one after the other.
    heard = sum(window["clicks"] + window["late"] for window in judge_of(windows(quality)).values())
    assert heard == sum(event["event_type"] == "click" for event in shop.events)


@pytest.mark.timeout(300)
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
    # Minutes of the shop are sent at once here: after a pause of `idle_seconds`, while a process starts, the first
    # partition to be read may close windows that the others' clicks are of. Those are told as late, and so is what is
    # read again of a closed window.
    counted = sum(window["clicks"] for window in found.values())
    late = sum({window["window_start"]: window["late"] for window in windows(quality)}.values())
    assert counted + late >= 0.98 * sum(clicks.values())
    assert sum(window["without_list"] for window in found.values()) < 1.2 * sum(
        window["without_list"] for window in expected.values()
    ), "what was remembered of the users came through"


def test_what_lay_there_before_a_new_group_is_no_lag(quality: Settings) -> None:
    """It begins at the end: an idle partition with a past, on which it never commits, is no alert."""
    topic, (port,) = quality.topics.clicks, free_ports(1)
    settings = quality.model_copy(update={"quality": quality.quality.model_copy(update={"from_beginning": False})})
    put(settings, topic, "past", partition=0)
    with running(settings, INNERLOOP_HTTP__PORT=str(port)):
        wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.quality_group) or None)

        def lags() -> dict[str, float]:
            """By partition of the topic, once one of them is shown; what comes before it is there is not seen."""
            put(settings, topic, "now", partition=1)
            return lag_of(port, topic)

        found = wait_for(lags)
    assert "1" in found
    assert "0" not in found


def test_who_is_erased_is_forgotten_also_when_no_longer_in_the_sample(quality: Settings) -> None:
    few = quality.quality.model_copy(update={"events_per_second": 40, "users": 1_000})
    settings, topics = quality.model_copy(update={"quality": few}), quality.topics
    user = next(name for n in range(1_000) if place(name := f"erased-{n}", SAMPLE_SEED) > 0.95)
    shop = Shop(settings)
    shop.users.append(user)
    shop.versions[user] = 0
    shop.lists(user, shop.now - 1_000, shop.now)
    shop.producer.flush(10)
    with running(settings):
        wait_for(lambda: remembered(settings, user))
        for n in range(20_000):
            shop.event("click", f"user-{n % 60}", "item-1", shop.now + n)
            shop.producer.poll(0)
        shop.producer.flush(10)
        wait_for(lambda: not sum(each.offsets for each in group_lag(settings, group_of(settings), [topics.clicks])))
        shop.producer.produce(topics.recommendations, None, user)
        shop.producer.flush(10)
        wait_for(lambda: remembered(settings, user) is False)


def remembered(settings: Settings, user: str) -> bool | None:
    """Whether the newest record of this user in the changelog holds something; None without one."""
    topic, found = f"{group_of(settings)}-memory-changelog", None
    with clients.consumer(settings.kafka, "test") as consumer:
        if topic not in consumer.list_topics(timeout=10).topics:
            return None
        end = consumer.get_watermark_offsets(TopicPartition(topic, 0), 10)[1]
        consumer.assign([TopicPartition(topic, 0, 0)])
        while end and (message := consumer.poll(5.0)) is not None:  # one without a value is falsy
            if message.key() == user.encode():
                found = message.value() is not None
            if (message.offset() or 0) + 1 >= end:
                break
    return found


def group_of(settings: Settings) -> str:
    return settings.kafka.quality_group


def put(settings: Settings, topic: str, user: str, partition: int) -> None:
    producer = clients.producer(settings.kafka)
    producer.produce(topic, b"no event", user, partition=partition)
    producer.flush(10)


def lag_of(port: int, topic: str) -> dict[str, float]:
    """What /metrics says of the lag of a topic, by partition."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError:
        return {}
    samples = [each for family in families if family.name == "innerloop_lag_offsets" for each in family.samples]
    return {each.labels["partition"]: each.value for each in samples if each.labels["topic"] == topic}


class Hangs(Quality):
    """One of its parts hangs; what the others do goes on."""

    def __init__(self, settings: Settings, sources: dict[str, int], part: str) -> None:
        super().__init__(settings, sources)
        self.hung = 0
        if part:
            setattr(self, part, self._hang)

    async def _hang(self, *_: object) -> None:
        self.hung += 1
        await asyncio.Event().wait()


@pytest.mark.parametrize("part", ["", "_take", "_forward"])
def test_an_agent_that_hangs_is_seen_though_the_timer_goes_on(quality: Settings, part: str) -> None:
    """`""`: nothing hangs, and nothing comes: it turns all the same."""
    topics = quality.topics
    put(quality, topics.clicks, "somebody", partition=0)
    tested = Hangs(quality, dict.fromkeys([topics.clicks, topics.recommendations], 4), part)
    done = asyncio.Event()

    async def until(look: Callable[[], object]) -> None:
        while not look() and not done.is_set():  # noqa: ASYNC110 - clocks and threads change what is looked at
            await asyncio.sleep(0.05)

    async def look() -> None:
        async with asyncio.timeout(60):
            await until(lambda: tested.joined and (tested.hung or not part))
            began = tested.turned_at
            await until(lambda: tested._ticked_at > tested.turned_at + 3 if part else tested.turned_at > began + 3)

    async def both() -> None:
        looking = asyncio.ensure_future(look())
        looking.add_done_callback(lambda _: done.set())
        await tested.run(done.is_set)
        await looking

    asyncio.run(both())


def test_a_password_that_aiokafka_cannot_use_is_one_sentence(quality: Settings) -> None:
    strange = {"ssl.keystore.location": SecretStr("/k.p12")}
    settings = quality.model_copy(update={"kafka": quality.kafka.model_copy(update={"properties": strange})})
    with pytest.raises(SettingsError, match=r"cannot use kafka\.properties ssl\.keystore\.location"):
        credentials(settings.kafka)
