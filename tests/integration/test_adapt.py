"""Adapt against a real Kafka and a real PostgreSQL, run as `innerloop adapt` runs it.

Scores are compared with a computation of their own: float64 numpy, straight from the tensors of the release's file.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import torch
from confluent_kafka import Message, TopicPartition, murmur2
from counters import counted, counted_since
from numpy.typing import NDArray
from offsets import committed, log_ends
from safetensors.numpy import load_file
from sqlalchemy import text

from innerloop import metrics
from innerloop.adapt import Adapt
from innerloop.config import AdaptSettings, KafkaSettings, LearningSettings, Settings
from innerloop.errors import RetryError, ServiceError, StopError
from innerloop.evaluation.shop import Process, Shop
from innerloop.holdout import in_hold_out
from innerloop.learning.candidates import PLAIN
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads import BayesHead
from innerloop.learning.ranker import Ranker
from innerloop.learning.releases import Card, DataSummary, Release, save
from innerloop.learning.training import train
from innerloop.scores import AdaptationRequest, AdScores, RecommendationScores
from innerloop.store import activity, items, support_sets
from innerloop.store.database import Database, Transaction, connect, transaction
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.publisher import Headers, Publisher
from innerloop.streams.topics import ensure_topics
from innerloop.streams.watch import OWNER_HEADER
from innerloop.support import EXAMPLE, SupportSets
from innerloop.trends import ACTIVITY
from innerloop.worker import processes
from innerloop.worker.train import register

DIMENSION, ITEMS, TOP = 12, 40, 7
NOISE, HALF_LIFE = 0.5, 3_600.0
NOW = 1_750_000_000_000
SHORT_SESSION = {"session.timeout.ms": "2500", "heartbeat.interval.ms": "250"}

T = TypeVar("T")
Example = tuple[str, float, int]
"""Item, weight, seconds before NOW."""


@dataclass
class World:
    """The outside of adapt: what ingest and train would write, and what a subscriber would read."""

    settings: Settings
    engine: Database
    folder: Path
    given: dict[str, int] = field(default_factory=dict)

    def give(self, user: str, examples: Sequence[Example]) -> int:
        """Store the user's next support set; its version."""
        numbers = items.ItemNumbers(self.engine).intern([item for item, _, _ in examples], {})
        rows = np.zeros(len(examples), EXAMPLE)
        rows["item"], rows["weight"] = numbers, [weight for _, weight, _ in examples]
        rows["time"] = [NOW - 1000 * age for _, _, age in examples]
        rows["hash"], rows["type"] = np.arange(len(examples)), 1
        rows = rows[np.argsort(rows["time"], kind="stable")]
        version = self.given[user] = self.given.get(user, 0) + 1
        with transaction(self.engine) as connection:
            sets = SupportSets(np.array([0, len(rows)]), rows)
            support_sets.write(connection, [user], sets, np.array([version]))
        return version

    def give_many(self, users: Sequence[str], item: str = "i0") -> None:
        """The same for many users at once, one event each."""
        number = items.ItemNumbers(self.engine).intern([item], {})[0]
        rows = np.zeros(len(users), EXAMPLE)
        rows["item"], rows["weight"], rows["time"], rows["type"] = number, 1.0, NOW, 1
        for user in users:
            self.given[user] = self.given.get(user, 0) + 1
        with transaction(self.engine) as connection:
            sets = SupportSets(np.arange(len(users) + 1), rows)
            support_sets.write(connection, list(users), sets, np.array([self.given[user] for user in users]))

    def show_ads(self, ads: dict[str, str]) -> None:
        numbers = items.ItemNumbers(self.engine).intern(list(ads.values()), {})
        with transaction(self.engine) as connection:
            items.see_ads(connection, dict(zip(ads, numbers, strict=True)))

    def ask(self, *users: str) -> None:
        producer = clients.producer(self.settings.kafka)
        for user in users:
            request = AdaptationRequest(user, self.given.get(user, 1), NOW, NOW)
            producer.produce(self.settings.topics.requests, key=user, value=msgspec.json.encode(request))
        assert producer.flush(10) == 0

    def ask_and_read(self, user: str) -> RecommendationScores:
        """Ask, and wait for the record of the user's present version."""
        self.ask(user)
        return wait_for(lambda: next((r for r in self.of(user) if r.support_version == self.given[user]), None))

    def unanswered(self) -> int:
        """How many requests the group has not committed."""
        kafka, topics = self.settings.kafka, self.settings.topics
        done = committed(kafka, kafka.adapt_group, [topics.requests], topics.partitions)
        return sum(log_ends(kafka, [topics.requests], topics.partitions).values()) - sum(done.values())

    def send(self, topic: str, key: str | bytes, value: bytes | None, epoch: str | None) -> None:
        """Write to a score topic by hand, on the partition of the key."""
        partition = murmur2(key if isinstance(key, bytes) else key.encode(), self.settings.topics.partitions)
        headers: Headers | None = None if epoch is None else [(OWNER_HEADER, epoch.encode())]
        producer = clients.producer(self.settings.kafka)
        producer.produce(topic, value, key, partition=partition, headers=headers)
        assert producer.flush(10) == 0

    def log(self, topic: str) -> list[Message]:
        """Everything on a topic, in offset order within each partition."""
        with clients.consumer(self.settings.kafka, "test") as consumer:
            count = self.settings.topics.partitions
            ends = [consumer.get_watermark_offsets(TopicPartition(topic, n), 10)[1] for n in range(count)]
            consumer.assign([TopicPartition(topic, n, 0) for n in range(count)])
            messages: list[Message] = []
            until = time.monotonic() + 20
            while len(messages) < sum(ends):
                assert time.monotonic() < until
                messages += consumer.consume(10_000, 0.1)
        assert not any(message.error() for message in messages)
        return messages

    def of(self, user: str) -> list[RecommendationScores]:
        """The user's lists, oldest first."""
        mine = [m for m in self.log(self.settings.topics.recommendations) if m.key() == user.encode()]
        return [msgspec.json.decode(value, type=RecommendationScores) for m in mine if (value := m.value()) is not None]

    def tombstones(self, user: str) -> list[str]:
        """The topics on which the user's last record is a tombstone."""
        topics = (self.settings.topics.recommendations, self.settings.topics.ads)
        last = {topic: [m.value() for m in self.log(topic) if m.key() == user.encode()][-1:] for topic in topics}
        return [topic for topic, values in last.items() if values == [None]]

    def last(self, topic: str) -> dict[str, tuple[int, int]]:
        """What compaction would leave: each key's last record, as (model_version, support_version)."""
        found: dict[str, tuple[int, int]] = {}
        for message in self.log(topic):
            encoded, user = message.value(), (message.key() or b"").decode()
            if encoded is None:
                found.pop(user, None)
                continue
            value = json.loads(encoded)
            found[user] = (value["model_version"], value["support_version"])
        return found

    def last_is_newest(self, topic: str, model_version: int = 1) -> bool:
        return self.last(topic) == {user: (model_version, version) for user, version in self.given.items()}

    def release(self, version: int, seed: int = 0) -> tuple[Release, Path]:
        """Make a release with random tensors; it and its card's path."""
        draw = torch.Generator().manual_seed(seed)
        vectors = torch.randn(ITEMS, DIMENSION, generator=draw)
        root = torch.randn(DIMENSION, DIMENSION, generator=draw).tril() * 0.3 + torch.eye(DIMENSION)
        head = BayesHead(torch.randn(DIMENSION, generator=draw), root, NOISE, HALF_LIFE)
        encoder = Encoder(
            [f"i{n}" for n in range(ITEMS)], vectors, [], torch.zeros(0, DIMENSION - 2), torch.full((ITEMS,), -1)
        )
        data = DataSummary(events=1, users=1, items=ITEMS, first_event_time=0, last_event_time=1)
        card = Card(version, "2026-01-01T00:00:00Z", "bayes", DIMENSION, data, {}, {}, "0")
        release = Release(card, encoder, head)
        return release, save(release, self.folder)

    def register(self, version: int, seed: int = 0) -> Path:
        release, location = self.release(version, seed)
        register(self.settings, self.engine, release, location)
        return location


def wait_for(look: Callable[[], T | None], seconds: float = 25.0) -> T:
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return found


class Member(threading.Thread):
    """`innerloop adapt --member cpu` in a thread."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.settings, self.asked = settings, threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            processes.run_adapt(self.settings, "cpu", 1)
        except BaseException as error:  # noqa: BLE001 - whatever it was, the test wants to see it
            self.error = error

    def stop(self) -> None:
        self.asked.set()
        self.join(20)
        assert not self.is_alive()


@contextmanager
def running(settings: Settings, members: int = 1) -> Iterator[Member]:
    """One more member, which has partitions, of a group that then has `members`."""
    member = Member(settings)
    member.start()
    try:
        wait_for(lambda: member.error or members_with_partitions(settings.kafka, settings.kafka.adapt_group) >= members)
        yield member
    finally:
        member.stop()
    if member.error is not None:
        raise member.error


def process(settings: Settings) -> "subprocess.Popen[bytes]":
    """The same as a process of its own, which can be killed."""
    kafka = {**settings.kafka.model_dump(), "properties": SHORT_SESSION}
    environment = {
        "INNERLOOP_KAFKA": json.dumps(kafka),
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_DATABASE__URL": settings.database.url.get_secret_value(),
    }
    command = [sys.executable, "-m", "innerloop.worker", "adapt", "--member", "cpu", "--threads", "1"]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)


@pytest.fixture(autouse=True)
def _threads_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Callable[[], bool]:
        member = threading.current_thread()
        assert isinstance(member, Member)
        return member.asked.is_set

    monkeypatch.setattr(processes, "stop_on_signals", asked)


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Iterator[World]:
    settings = with_adapt(settings, top=TOP, refresh_seconds=0.2)
    ensure_topics(settings)
    engine = connect(settings.database)
    made = World(settings, engine, tmp_path)
    made.register(1)
    yield made
    engine.dispose()


def with_adapt(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update={"adapt": AdaptSettings(**{**settings.adapt.model_dump(), **values})})


def with_properties(settings: Settings, **values: str) -> Settings:
    kafka = KafkaSettings.model_validate({**settings.kafka.model_dump(), "properties": values})
    return settings.model_copy(update={"kafka": kafka})


# --- what is counted


def test_a_batch_that_is_tried_again_counts_once_and_its_latency_runs_from_the_event(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"u{number}" for number in range(20)]
    for user in users:
        world.give(user, [("i1", 1.0, 5)])
    world.show_ads({"ad-1": "i1"})
    producer, appended = clients.producer(world.settings.kafka), int(time.time() * 1000) - 40_000
    for user in [*users, *users[:5]]:
        request = AdaptationRequest(user, 1, NOW, NOW, appended)
        producer.produce(world.settings.topics.requests, msgspec.json.encode(request), user, partition=0)
    assert producer.flush(10) == 0
    flush, failed = Publisher.flush, threading.Event()

    def fails_once(publisher: Publisher, seconds: float) -> None:
        flush(publisher, seconds)
        if seconds > 0 and not failed.is_set():
            failed.set()
            raise RetryError("says the test")

    monkeypatch.setattr(Publisher, "flush", fails_once)
    before = counted()
    with running(world.settings) as member:
        wait_for(lambda: member.error or counted_since(before)["innerloop_event_to_score_seconds_count"] == 25)
    found = counted_since(before)
    wanted = {
        "innerloop_batch_records_sum": 25,
        "innerloop_requests_total step=polled": 25,
        "innerloop_requests_total step=coalesced": 5,
        "innerloop_tasks_adapted_total": 20,
        "innerloop_scores_total model=recommendations": 20,
        "innerloop_scores_total model=ads": 20,
    }
    assert failed.is_set()
    assert {name: found[name] for name in wanted} == wanted
    assert 40 <= found["innerloop_event_to_score_seconds_sum"] / 25 < 80
    assert found["innerloop_event_to_score_seconds_bucket le=30.0"] == 0
    for step in ("poll", "read", "trends", "solve", "score", "encode", "publish", "wait"):
        assert found[f"innerloop_step_seconds_count step={step}"] > 0, step


# --- what is computed


def expected_scores(card: Path, examples: Sequence[Example]) -> dict[str, float]:
    """Score of every item of the release, and of those examples that it lacks: ridge regression around the prior."""
    tensors = load_file(card.with_suffix(".safetensors"))
    mean, root = tensors["head.mean"].astype(float), tensors["head.root"].astype(float)
    vectors = dict(zip(json.loads(tensors["item_ids"].tobytes()), tensors["item_vectors"].astype(float), strict=True))
    for item, _, _ in examples:
        vectors.setdefault(item, fallback(item))
    x = np.stack([vectors[item] for item, _, _ in examples])
    youngest = min(age for _, _, age in examples)
    w = np.array([weight * 2.0 ** (-(age - youngest) / HALF_LIFE) / NOISE for _, weight, age in examples])
    precision = np.linalg.inv(root @ root.T) + x.T @ (w[:, None] * x)
    parameters = mean + np.linalg.solve(precision, x.T @ (w * (1.0 - x @ mean)))
    return {item: float(vector @ parameters) for item, vector in vectors.items()}


def fallback(item: str) -> NDArray[np.float64]:
    """An item that no release knows: a direction made from its identifier, no popularity, one."""
    size = DIMENSION - 2
    digest = hashlib.shake_128(item.encode()).digest((size + 7) // 8)
    bits = [int(bit) for byte in digest for bit in f"{byte:08b}"][:size]
    return np.array([*((2 * bit - 1) / size**0.5 for bit in bits), 0.0, 1.0])


def best(scores: dict[str, float], top: int) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda pair: -pair[1])[:top]


def same(found: Sequence[tuple[str, float]], wanted: Sequence[tuple[str, float]]) -> bool:
    scores = [score for _, score in wanted]
    assert np.diff(scores).max(initial=-1.0) < -1e-4, "the data leave no doubt about the order"
    return [item for item, _ in found] == [item for item, _ in wanted] and np.allclose(
        [score for _, score in found], scores, rtol=1e-4, atol=1e-4
    )


def test_scores_equal_a_computation_of_their_own(world: World) -> None:
    card, topics = world.folder / "release-1.json", world.settings.topics
    draw = np.random.default_rng(1)
    users: dict[str, list[Example]] = {
        f"u{size}": [
            (f"i{draw.integers(ITEMS)}", float(draw.integers(1, 5)), int(draw.integers(9_999))) for _ in range(size)
        ]
        for size in (1, 2, 5, 30, 64)
    }
    users["ü/new"] = [("i3", 1.0, 60), ("unheard of", 4.0, 0)]
    for user, examples in users.items():
        world.give(user, examples)
    world.show_ads({"ad-1": "i1", "ad-2": "i2", "ad-2b": "unheard of"})
    with running(world.settings):
        world.ask(*users)
        wait_for(lambda: len(world.log(topics.ads)) == len(users))
        with world.engine.connect() as connection:
            ledger = connection.exec_driver_sql("SELECT partition, owner_epoch FROM partition_ledger").all()
    epochs = {row.partition: row.owner_epoch for row in ledger}
    lists, shown = world.log(topics.recommendations), world.log(topics.ads)
    assert {m.key() for m in lists} == {m.key() for m in shown} == {user.encode() for user in users}
    assert len(lists) == len(shown) == len(users)
    for message in lists + shown:
        user = (message.key() or b"").decode()
        assert message.partition() == murmur2(user.encode(), topics.partitions), "where its requests are"
        assert message.headers() == [(OWNER_HEADER, str(epochs[message.partition() or 0]).encode())]
        scores = expected_scores(card, users[user]) | {
            "unheard of": expected_scores(card, [*users[user], ("unheard of", 0.0, 9_999)])["unheard of"]
        }
        kind: type[RecommendationScores | AdScores] = (
            RecommendationScores if message.topic() == topics.recommendations else AdScores
        )
        record = msgspec.json.decode(message.value() or b"", type=kind)
        if isinstance(record, AdScores):
            assert {ad.ad_id: ad.item_id for ad in record.ads} == {"ad-1": "i1", "ad-2": "i2", "ad-2b": "unheard of"}
            three = {item: scores[item] for item in ("i1", "i2", "unheard of")}
            assert same([(ad.item_id, ad.score) for ad in record.ads], best(three, 3))
        else:
            assert same([(each.item_id, each.score) for each in record.items], best(scores, TOP))
        assert (record.user_id, record.model_version, record.method) == (user, 1, "bayes")
        assert (record.support_version, record.support_size) == (1, len(users[user]))
        assert record.event_time == NOW - 1000 * min(age for _, _, age in users[user])
        assert abs(record.scored_at / 1000 - time.time()) < 60


def test_requests_of_one_user_in_one_poll_are_one_record(world: World) -> None:
    world.give("u", [("i1", 1.0, 0)])
    world.give("v", [("i2", 1.0, 0)])
    world.ask("w", "v", *["u"] * 100, "v")
    with running(with_adapt(world.settings, poll_seconds=2.0)):
        wait_for(lambda: world.last(world.settings.topics.recommendations).keys() == {"u", "v"})
        time.sleep(1.0)
    assert len(world.of("u")) == len(world.of("v")) == 1
    assert world.of("w") == [], "nobody has heard of w"
    assert len(world.tombstones("w")) == 2


def test_what_has_been_seen_can_be_left_out(world: World) -> None:
    examples: list[Example] = [("i1", 4.0, 0), ("i2", 4.0, 0), ("i1", 4.0, 10)]
    world.give("u", examples)
    with running(with_adapt(world.settings, exclude_seen=True, top=1000)):
        record = world.ask_and_read("u")
    scores = expected_scores(world.folder / "release-1.json", examples)
    assert {each.item_id for each in record.items} == scores.keys() - {"i1", "i2"}


def test_new_items_and_releases_come_in_without_a_restart(world: World) -> None:
    world.give("u", [("i1", 1.0, 0)])
    with running(with_adapt(world.settings, top=1000)):
        assert len(world.ask_and_read("u").items) == ITEMS
        items.ItemNumbers(world.engine).intern(["new"], {})
        examples: list[Example] = [("i1", 1.0, 0), ("i2", 1.0, 0)]
        record = _listed(world, lambda record: "new" in _names(record), examples)
        assert set(_names(record)) == {f"i{n}" for n in range(ITEMS)} | {"new"}

        second = world.register(2, seed=1)
        record = _listed(world, lambda record: record.model_version == 2, examples)
        found = [(each.item_id, each.score) for each in record.items if each.item_id != "new"]
        assert same(found, best(expected_scores(second, examples), ITEMS))

        damaged, location = world.release(3, seed=2)
        tensors = location.with_suffix(".safetensors")
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
        register(world.settings, world.engine, damaged, location)
        time.sleep(1.5)
        world.give("u", examples)
        assert msgspec.structs.replace(world.ask_and_read("u"), scored_at=0, support_version=0) == (
            msgspec.structs.replace(record, scored_at=0, support_version=0)
        ), "the damaged release is refused, the old one stays"

        world.register(4, seed=1)
        assert _listed(world, lambda record: record.model_version == 4, examples)


def _tell(world: World, names: Sequence[str], before: Sequence[str] = ()) -> None:
    """What ingest would tell of events with these items, each after the items `before` it."""
    numbers = items.ItemNumbers(world.engine).intern([*names, *before], {})
    piece = np.zeros(len(names), ACTIVITY)
    piece["item"], piece["time"], piece["type"], piece["previous"] = numbers[: len(names)], NOW, 1, -1
    for step, number in enumerate(numbers[len(names) :]):
        piece["previous"][:, step] = number
    with transaction(world.engine) as connection:
        activity.append(connection, piece)


def _by_popularity() -> Ranker:
    """A ranker that goes by the live share of events alone."""
    ranker = Ranker.new(torch.zeros(PLAIN), torch.ones(PLAIN))
    with torch.no_grad():
        for layer in ranker.network:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.zero_()
                layer.weight[0, 0] = 1.0
                layer.bias.fill_(20.0)  # logarithms are negative: kept above where the units are cut off
    ranker.network.requires_grad_(requires_grad=False)
    return ranker


def _register_ranked(world: World, version: int, seed: int = 0) -> None:
    release, _ = world.release(version, seed)
    release = replace(release, ranker=_by_popularity())
    register(world.settings, world.engine, release, save(release, world.folder))


def _listed(
    world: World, until: Callable[[RecommendationScores], bool], examples: Sequence[Example] = (("i1", 1.0, 0),)
) -> RecommendationScores:
    """The user's list as soon as it is so: refreshes come by themselves."""

    def look() -> RecommendationScores | None:
        world.give("u", examples)
        record = world.ask_and_read("u")
        return record if until(record) else None

    return wait_for(look)


def _names(record: RecommendationScores) -> list[str]:
    return [each.item_id for each in record.items]


def test_what_everybody_does_comes_in_at_every_refresh_and_outlives_a_release(world: World) -> None:
    _register_ranked(world, 2)
    _tell(world, ["i30"] * 5 + ["i31"] * 3)  # before the start: read as a warm-up
    with running(with_adapt(world.settings, top=3)):
        record = _listed(world, lambda _record: True)
        assert (record.model_version, record.method, record.trends_version) == (2, "bayes+ranker", 1)
        assert _names(record)[:2] == ["i30", "i31"]
        assert sum(each.score for each in record.items) <= 1.0
        _tell(world, ["i31"] * 10 + ["never heard of"] * 6)
        record = _listed(world, lambda record: record.trends_version == 2)
        assert _names(record) == ["i31", "never heard of", "i30"]
        _register_ranked(world, 3, seed=1)
        record = _listed(world, lambda record: record.model_version == 3)
        assert record.trends_version == 2
        assert _names(record) == ["i31", "never heard of", "i30"], "counts and places go on under another release"
        _tell(world, ["i30"] * 20)
        record = _listed(world, lambda record: record.trends_version == 3)
        assert _names(record) == ["i30", "i31", "never heard of"]


def test_an_item_that_comes_in_the_middle_of_a_refresh_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its activity was once read after the items, of which it was none yet, and dropped."""
    _register_ranked(world, 2)
    with running(with_adapt(world.settings, top=3)):
        _listed(world, lambda _record: True)
        active_ads, came = items.active_ads, threading.Event()

        def then_it_comes(connection: Transaction, days: float) -> list[tuple[str, int]]:
            if not came.is_set():
                _tell(world, ["just come"] * 6)
                came.set()
            return active_ads(connection, days)

        monkeypatch.setattr(items, "active_ads", then_it_comes)
        wait_for(came.is_set)
        record = _listed(world, lambda record: record.trends_version == 1)
        assert _names(record)[0] == "just come"


def test_an_item_whose_writer_was_slow_counts_however_many_came_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number lies further back than a refresh looks."""
    monkeypatch.setattr("innerloop.adapt._NUMBERS_BACK", 4)
    _register_ranked(world, 2)
    with running(with_adapt(world.settings, top=3)), world.engine.connect() as slow:
        with slow.begin():
            slow.execute(text("INSERT INTO items (item_id) VALUES ('late')"))
            _tell(world, [f"n{n}" for n in range(10)])
            _listed(world, lambda record: record.trends_version == 1)
        world.show_ads({"ad": "late"})
        _tell(world, ["late"] * 6)
        record = _listed(world, lambda record: record.trends_version == 2)
        assert _names(record)[0] == "late"
        newest = wait_for(lambda: world.log(world.settings.topics.ads))[-1].value()
        assert [ad.item_id for ad in msgspec.json.decode(newest or b"", type=AdScores).ads] == ["late"]


def test_a_piece_whose_writer_was_slow_counts_once(world: World) -> None:
    _register_ranked(world, 2)
    with running(with_adapt(world.settings, top=2)), world.engine.connect() as slow:
        numbers = items.ItemNumbers(world.engine).intern(["i20", "i21"], {})
        piece = np.zeros(3, ACTIVITY)
        piece["item"], piece["time"], piece["previous"] = numbers[0], NOW, -1
        with slow.begin():
            activity.append(slow, piece)
            _tell(world, ["i21"] * 5)
            record = _listed(world, lambda record: record.trends_version == 2)
            assert _names(record)[0] == "i21"
        assert _names(_listed(world, lambda record: "i20" in _names(record))) == ["i21", "i20"]
        for version in range(3, 5):  # every refresh looks back: three of i20 would become more than five
            _tell(world, ["i1"])
            _listed(world, lambda record: record.trends_version == version)  # noqa: B023
        assert _names(_listed(world, lambda _record: True)) == ["i21", "i20"]


def test_an_item_met_early_does_not_hide_those_numbered_below_it(world: World) -> None:
    made: list[Adapt] = []
    member = Member(world.settings)
    member.asked.set()
    original = Adapt.__init__

    def noted(self: Adapt, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapt, "__init__", noted)
        member.start()
        member.stop()
    assert member.error is None
    names = [f"n{number:05}" for number in range(5_000)]
    numbers = items.ItemNumbers(world.engine).intern(names, {})
    world.give("u", [(names[int(np.argmax(numbers))], 1.0, 0)])
    made[0]._adapt({"u": 0})
    made[0]._refresh()
    assert len(made[0]._scorer.catalogue) == ITEMS + len(names)


def test_many_requests_of_few_users_cost_few_adaptations(world: World) -> None:
    """The newest of each user is kept over all that waits on a partition, not over a poll's few thousand."""
    partitions = world.settings.topics.partitions
    users = [user for n in range(4_000) if murmur2((user := f"u{n}").encode(), partitions) == 0][:500]
    world.give_many(users)
    world.ask(*users * 40)
    before = metrics.ADAPTED._value.get()
    with running(with_adapt(world.settings, poll_seconds=2.0)):
        wait_for(lambda: world.last_is_newest(world.settings.topics.recommendations), 60)
        wait_for(lambda: world.unanswered() == 0, 60)
    assert metrics.ADAPTED._value.get() - before <= 1_000


def test_a_batch_is_bounded_by_its_users(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be done long before the group takes the partitions away."""
    users, sizes, original = [f"u{n}" for n in range(2_000)], list[int](), Adapt._adapt

    def noted(self: Adapt, partitions: Any, *args: Any) -> None:
        sizes.append(len(partitions))
        original(self, partitions, *args)

    monkeypatch.setattr(Adapt, "_adapt", noted)
    world.give_many(users)
    world.ask(*users)
    with running(with_adapt(world.settings, poll_seconds=1.0, batch_users=100)):
        wait_for(lambda: world.last_is_newest(world.settings.topics.recommendations), 60)
    assert sum(sizes) == len(users)
    assert max(sizes) <= 126


def test_who_is_read_ahead_is_answered_also_where_the_read_fails_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pieces of a batch are read by another thread than computes them: with who has no set, and a new item."""
    users, threads, original = [f"u{n}" for n in range(3_500)], list[str](), Adapt._read

    def failing(self: Adapt, some: list[str]) -> Any:
        threads.append(threading.current_thread().name)
        if threads.count("read-ahead_0") == 2 and threads[-1] == "read-ahead_0":
            raise RetryError("The database is away")
        return original(self, some)

    monkeypatch.setattr(Adapt, "_read", failing)
    world.give_many(users)
    newest = world.give("last", [("new item", 1.0, 0)])
    world.ask(*users, "nobody", "last")
    with running(with_adapt(world.settings, poll_seconds=2.0)):
        wait_for(lambda: world.last_is_newest(world.settings.topics.recommendations), 60)
        wait_for(lambda: world.unanswered() == 0, 60)
    assert threads.count("read-ahead_0") > 2
    assert world.tombstones("nobody") == [world.settings.topics.recommendations, world.settings.topics.ads]
    assert [record.support_version for record in world.of("last")][-1] == newest


# --- what stops it


def stopped(settings: Settings) -> BaseException | None:
    member = Member(settings)
    member.start()
    member.join(30)
    assert not member.is_alive()
    return member.error


def test_without_a_release_it_says_what_to_do(settings: Settings) -> None:
    ensure_topics(settings)
    error = stopped(settings)
    assert isinstance(error, ServiceError)
    assert "innerloop train" in str(error)


def test_unequal_partitions_are_refused(world: World) -> None:
    few = world.settings.topics.model_copy(update={"ads": world.settings.topics.ads + ".few", "partitions": 3})
    settings = world.settings.model_copy(update={"topics": few})
    ensure_topics(settings)
    error = stopped(settings)
    assert isinstance(error, ServiceError)
    assert "equally many partitions" in str(error)


def test_a_request_that_is_none_stops_it(world: World) -> None:
    world.send(world.settings.topics.requests, "u", b"{}", None)
    error = stopped(world.settings)
    assert isinstance(error, StopError)
    assert "is no request" in str(error)


# --- the zombie cure: the last record of a key is the newest, whoever wrote to the log


def older(user: str, model: str = "recommendations") -> bytes:
    """A list that was computed from nothing, long ago."""
    facts = {"model_version": 1, "support_version": 0, "support_size": 0, "event_time": 0, "scored_at": 0}
    content: dict[str, object] = {"items": []} if model == "recommendations" else {"ads": []}
    return json.dumps({"user_id": user, "model": model, "method": "bayes", **facts, **content}).encode()


def test_a_strangers_older_record_does_not_stay_the_last(world: World) -> None:
    topics, before = world.settings.topics, metrics.REPAIRS._value.get()
    for user in ("u", "v", "w"):
        world.give(user, [("i1", 1.0, 0)])
    world.show_ads({"ad": "i1"})
    with running(world.settings):
        world.ask("u", "v", "w")
        wait_for(lambda: world.last_is_newest(topics.ads))
        world.send(topics.recommendations, "u", older("u"), "0")
        world.send(topics.recommendations, "v", older("v"), None)
        world.send(topics.ads, "w", older("w", "ads"), "999")
        wait_for(lambda: world.last_is_newest(topics.recommendations) and world.last_is_newest(topics.ads))
        world.send(topics.recommendations, "u", older("u"), "0")
        wait_for(lambda: world.last_is_newest(topics.recommendations))
        time.sleep(1.5)
        assert len(world.of("v")) == 3, "a record, the stranger's, the answer: it does not answer itself"
        assert metrics.REPAIRS._value.get() == before + 4


def test_a_former_owners_list_of_the_newest_state_stands(world: World) -> None:
    """After a takeover most are: to write each of them again would double what a crash costs."""
    topics, before = world.settings.topics, metrics.REPAIRS._value.get()
    world.give("u", [("i1", 1.0, 0)])
    with running(world.settings):
        world.ask_and_read("u")
    with running(world.settings):  # claims with the next epoch
        current = json.dumps({**json.loads(older("u")), "support_version": 1}).encode()
        world.send(topics.recommendations, "u", current, "1")
        time.sleep(1.5)
        assert metrics.REPAIRS._value.get() == before
        world.send(topics.recommendations, "u", current, "999")  # nobody's
        wait_for(lambda: metrics.REPAIRS._value.get() == before + 1)
        world.give("u", [("i1", 1.0, 0), ("i2", 1.0, 0)])
        world.send(topics.recommendations, "u", current, "1")  # not of the newest state any more
        wait_for(lambda: metrics.REPAIRS._value.get() == before + 2)
        wait_for(lambda: world.last_is_newest(topics.recommendations))
        release = json.dumps({**json.loads(current), "model_version": 2, "support_version": 2}).encode()
        world.send(topics.recommendations, "u", release, "1")
        wait_for(lambda: metrics.REPAIRS._value.get() == before + 3)


def test_strangers_with_impossible_keys_harm_nothing(world: World) -> None:
    world.give("u", [("i1", 1.0, 0)])
    with running(world.settings) as member:
        world.ask_and_read("u")
        for key in (b"\xff", b"nul\0", b"", b"nobody"):
            world.send(world.settings.topics.recommendations, key, b"?", "0")
        world.send(world.settings.topics.recommendations, "u", older("u"), "0")
        wait_for(lambda: member.error or len(world.of("u")) == 3)
        assert world.of("u")[-1].support_version == 1


def test_what_an_owner_could_not_answer_its_successor_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = world.settings.topics.recommendations
    world.give("u", [("i1", 1.0, 0)])
    tried = threading.Event()

    def away(_self: Adapt, _users: object) -> None:
        tried.set()
        raise RetryError("the database is away")

    with monkeypatch.context() as patch, running(world.settings):  # the database is away until the owner is gone
        world.ask_and_read("u")
        patch.setattr(Adapt, "_adapt", away)
        world.send(topic, "u", older("u"), "0")
        assert tried.wait(10)
        time.sleep(2.5)  # its watch commits each second what has been answered
    assert not world.last_is_newest(topic)
    with running(world.settings):
        wait_for(lambda: world.last_is_newest(topic))


def test_an_owner_killed_before_its_answer_is_followed_by_one_that_answers(world: World) -> None:
    topic = world.settings.topics.recommendations
    world.give("u", [("i1", 1.0, 0)])
    owner = process(world.settings)
    try:
        wait_for(lambda: members_with_partitions(world.settings.kafka, world.settings.kafka.adapt_group) == 1, 60)
        world.ask_and_read("u")
        owner.send_signal(signal.SIGSTOP)  # or it would be quicker than this test
        world.send(topic, "u", older("u"), "0")
        assert not world.last_is_newest(topic)
    finally:
        owner.kill()
        owner.wait()
    with running(with_properties(world.settings, **SHORT_SESSION)):
        wait_for(lambda: world.last_is_newest(topic))


def test_a_worker_that_computes_past_its_time_is_answered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic: the zombie holds a finished list, its successor publishes a newer one, then the zombie sends."""
    topic = world.settings.topics.recommendations
    settings = with_properties(world.settings, **SHORT_SESSION, **{"max.poll.interval.ms": "6500"})
    world.give("u", [("i1", 1.0, 0)])
    asleep, awake, original = threading.Event(), threading.Event(), Adapt._publish
    zombies: list[threading.Thread] = []

    def sleepy(self: Adapt, *args: Any, **named: Any) -> int:
        if threading.current_thread() in zombies:
            asleep.set()
            assert awake.wait(60)
            zombies.clear()
        return original(self, *args, **named)

    monkeypatch.setattr(Adapt, "_publish", sleepy)
    with running(settings) as zombie:
        zombies.append(zombie)
        world.ask("u")
        assert asleep.wait(20)
        with running(settings):
            world.give("u", [("i1", 1.0, 0), ("i2", 1.0, 0)])
            wait_for(lambda: world.of("u"))  # the request was not committed: the successor repeats it
            assert [each.support_version for each in world.of("u")] == [2]
            awake.set()
            wait_for(lambda: [each.support_version for each in world.of("u")][:2] == [2, 1])
            wait_for(lambda: world.last_is_newest(topic))
            time.sleep(2.0)
            assert world.last_is_newest(topic)


def test_a_worker_stopped_past_its_session_leaves_nothing_older_behind(world: World) -> None:
    """As it happens: two processes under load, one is stopped for longer than its session and goes on."""
    settings, users = with_properties(world.settings, **SHORT_SESSION), [f"u{n}" for n in range(300)]
    members = [process(settings), process(settings)]
    try:
        # Beside other work two processes were seen to load torch for half a minute.
        wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.adapt_group) == 2, 60)

        def load(until: Callable[[], bool]) -> None:
            while not until():
                world.give_many(users)
                world.ask(*users)

        began = time.monotonic()
        load(lambda: time.monotonic() - began > 2)
        members[0].send_signal(signal.SIGSTOP)
        load(lambda: members_with_partitions(settings.kafka, settings.kafka.adapt_group) == 1)
        continued = time.monotonic()
        load(lambda: time.monotonic() - continued > 1)
        members[0].send_signal(signal.SIGCONT)
        load(lambda: time.monotonic() - continued > 3)
        wait_for(lambda: world.last_is_newest(settings.topics.recommendations))
        time.sleep(2.0)
        assert world.last_is_newest(settings.topics.recommendations)
        assert [member.poll() for member in members] == [None, None]
    finally:
        for member in members:
            member.kill()
            member.wait()


def test_ads_carry_the_chance_that_a_click_is_followed_by_a_purchase(world: World) -> None:
    history = Shop(1, users=100, items=ITEMS, process=Process(sessions_per_hour=10, purchase_rate=0.2)).history(6_000)
    learned = train(history, settings=LearningSettings(dimension=8, method="none"), weights={}, capacity=16, version=2)
    register(world.settings, world.engine, learned, save(learned, world.folder))
    names = learned.item_ids[:5]
    world.show_ads({f"ad for {item}": item for item in [*names, "unheard of"]})
    world.give("u", examples := [(names[0], 1.0, 60), (names[1], 1.0, 0)])
    topic = world.settings.topics.ads
    with running(world.settings):
        world.ask("u")
        wait_for(lambda: world.last_is_newest(topic, 2))
        world.give("u", [(names[0], 1.0, 90), *examples])
        world.ask("u")
        wait_for(lambda: world.last_is_newest(topic, 2))
    first, second = (msgspec.json.decode(message.value() or b"", type=AdScores) for message in world.log(topic))
    for record in (first, second):
        assert record.kind == "purchase_given_click"
        assert {ad.item_id for ad in record.ads} == {*names, "unheard of"}
        scores = [ad.score for ad in record.ads]
        assert scores == sorted(scores, reverse=True)
        assert 0.0 < scores[-1] <= scores[0] < 1.0
    assert first.ads != second.ads


def test_when_the_last_ad_has_expired_an_empty_list_takes_its_place(world: World) -> None:
    """The topic is compacted: what is not replaced stays."""
    topic = world.settings.topics.ads
    world.give("u", [("i1", 1.0, 0)])
    with running(world.settings):
        world.ask_and_read("u")
        assert not world.log(topic), "a shop without ads has no lists of them"
        world.show_ads({"ad": "i1"})

        def last() -> AdScores | None:
            world.give("u", [("i1", 1.0, 0)])
            world.ask_and_read("u")
            values = [message.value() or b"" for message in world.log(topic)]
            return msgspec.json.decode(values[-1], type=AdScores) if values else None

        wait_for(lambda: (found := last()) and [ad.ad_id for ad in found.ads] == ["ad"])
        with transaction(world.engine) as connection:
            connection.execute(text("UPDATE ads SET last_seen = now() - interval '8 days'"))
        wait_for(lambda: (found := last()) and found.ads == [] and found.support_version == world.given["u"])


@pytest.mark.parametrize(("method", "sequence"), [("maml", "off"), ("bayes", "pooled")])
def test_a_batch_of_erased_users_alone_does_not_end_it(world: World, method: str, sequence: str) -> None:
    """Nobody is scored then, which a network head and a sequence model were once not made for."""
    history = Shop(1, users=40, items=ITEMS).history(2_000)
    recipe = LearningSettings(dimension=8, method=method, sequence=sequence, sequence_positions=2_000)
    learned = train(history, settings=recipe, weights={}, capacity=16, version=2)
    assert (learned.sequence is not None) == (sequence != "off")
    register(world.settings, world.engine, learned, save(learned, world.folder))
    world.show_ads({"ad": "i1"})
    with running(world.settings) as member:
        world.ask("gone")
        wait_for(lambda: member.error or len(world.tombstones("gone")) == 2)
        world.give("u", [("i1", 1.0, 0)])
        assert world.ask_and_read("u").model_version == 2


# --- the hold-out


def prior_scores(card: Path) -> dict[str, float]:
    """Score of every item of the release for a user of whom nothing is known."""
    tensors = load_file(card.with_suffix(".safetensors"))
    names, vectors = json.loads(tensors["item_ids"].tobytes()), tensors["item_vectors"].astype(float)
    return dict(zip(names, (vectors @ tensors["head.mean"].astype(float)).tolist(), strict=True))


@pytest.mark.parametrize("seen_left_out", [False, True])
def test_the_hold_out_gets_the_unadapted_list_as_fresh_as_anyone(world: World, *, seen_left_out: bool) -> None:
    users = [f"user-{n}" for n in range(40)]
    quality = world.settings.quality.model_copy(update={"hold_out": 0.3})
    settings = with_adapt(world.settings, exclude_seen=seen_left_out, top=5).model_copy(update={"quality": quality})
    favourites = [item for item, _ in best(prior_scores(world.folder / "release-1.json"), 6)]
    examples: list[Example] = [(favourites[0], 4.0, 0), (favourites[2], 4.0, 10)]
    world.show_ads({"ad": "i1", "other": "i2"})
    arms: dict[str, set[str]] = {user: set() for user in users}
    with running(settings):
        for version in (1, 2):
            if version == 2:
                world.register(2, seed=5)
                _listed(world, lambda each: each.model_version == 2)
            for user in users:
                world.give(user, examples[: 3 - version])
            world.ask(*users)
            wait_for(lambda: world.last(settings.topics.ads).items() >= {(u, (version, version)) for u in users})  # noqa: B023
            card = world.folder / f"release-{version}.json"
            own = {item for item, _, _ in examples[: 3 - version]} if seen_left_out else set()
            everybodys = best({i: score for i, score in prior_scores(card).items() if i not in own}, 5)
            adapted = best({i: s for i, s in expected_scores(card, examples[: 3 - version]).items() if i not in own}, 5)
            topics = settings.topics
            for topic, kind in ((topics.recommendations, RecommendationScores), (topics.ads, AdScores)):
                records = [msgspec.json.decode(message.value() or b"", type=kind) for message in world.log(topic)]
                newest = {record.user_id: record for record in records}
                for user in users:
                    arms[user].add(newest[user].arm)
                    assert newest[user].method == ("none" if newest[user].arm == "hold_out" else "bayes")
                    assert newest[user].support_size == 3 - version
                    if isinstance(found := newest[user], RecommendationScores):
                        listed = [(each.item_id, each.score) for each in found.items]
                        assert same(listed, everybodys if found.arm == "hold_out" else adapted)
    assert {user for user, seen in arms.items() if seen == {"hold_out"}} == {u for u in users if in_hold_out(u, 0.3)}
    assert all(len(seen) == 1 for seen in arms.values()), "nobody changes arms, whatever the release"
