"""Adapt where something is missing: a release that cannot be read, requests that retention has deleted."""

import threading
import time
from collections.abc import MutableMapping, Sequence
from typing import Any

import pytest
from confluent_kafka import OFFSET_END, TopicPartition
from offsets import committed, log_ends
from structlog.testing import capture_logs
from test_adapt import (
    Member,
    World,
    _threads_stop,  # noqa: F401 - a fixture
    running,
    wait_for,
    with_adapt,
    world,  # noqa: F401 - a fixture
)

from innerloop import adapt as adapt_module
from innerloop.config import KafkaSettings
from innerloop.errors import RetryError, StopError
from innerloop.store.database import transaction
from innerloop.streams import clients
from innerloop.streams import publisher as publisher_module
from innerloop.streams.publisher import Publisher, partition_of
from innerloop.streams.watch import OutputWatch
from innerloop.worker import processes
from innerloop.worker.train import register

EXAMPLES = [("i1", 1.0, 5)]


class Accepting(Member):
    """`innerloop adapt --member cpu --accept-gap` in a thread."""

    def run(self) -> None:
        try:
            processes.run_adapt(self.settings, "cpu", 1, accept_gap=True)
        except BaseException as error:  # noqa: BLE001 - whatever it was, the test wants to see it
            self.error = error


def _refusals(lines: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [line for line in lines if "release refused" in line["event"]]


def test_a_refused_release_is_told_once_and_the_watch_is_closed(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watches: list[OutputWatch] = []
    start = OutputWatch.start

    def noted(watch: OutputWatch, numbers: Sequence[int]) -> None:
        watches.append(watch)
        start(watch, numbers)

    monkeypatch.setattr(OutputWatch, "start", noted)
    world.give("u", EXAMPLES)
    with capture_logs() as lines, running(world.settings):
        release, card = world.release(2)
        [tensors] = [each for each in card.parent.iterdir() if "2" in each.name and each.suffix == ".safetensors"]
        tensors.write_bytes(tensors.read_bytes()[:-8])
        register(world.settings, world.engine, release, card)
        wait_for(lambda: _refusals(lines))
        time.sleep(1.5)  # it is tried again five times a second
        assert len(_refusals(lines)) == 1
        assert world.ask_and_read("u").model_version == 1
    with pytest.raises(RuntimeError, match="closed"):
        watches[0]._consumer.assignment()


def test_a_strangers_answer_that_cannot_be_sent_is_queued_once(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the broker takes nothing, trying again must not fill the queue with the same lists."""
    away, tried, sent = threading.Event(), list[float](), list[object]()
    flush, send = Publisher.flush, Publisher.send

    def failing(publisher: Publisher, seconds: float) -> None:
        if away.is_set():
            tried.append(seconds)
            raise RetryError("the broker takes nothing, says the test")
        flush(publisher, seconds)

    def counted(*arguments: Any, **named: Any) -> None:
        if away.is_set():
            sent.append(arguments)
        send(*arguments, **named)

    monkeypatch.setattr(Publisher, "flush", failing)
    monkeypatch.setattr(Publisher, "send", counted)
    world.give("u", EXAMPLES)
    with running(world.settings):
        world.ask_and_read("u")
        away.set()
        world.send(world.settings.topics.recommendations, "u", b"{}", "0")
        wait_for(lambda: len(tried) > 4)
        assert len(sent) <= 1
        away.clear()
        wait_for(lambda: world.log(world.settings.topics.recommendations)[-1].value() != b"{}")


def test_a_queue_that_stays_full_is_tried_again_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which polls between two tries: a send that waited for good would lose the process its partitions."""
    monkeypatch.setattr(publisher_module, "_ROOM_SECONDS", 0.3)
    nobody = Publisher(KafkaSettings(bootstrap_servers="127.0.0.1:1"), queue_buffering_max_messages=3)
    for _ in range(3):
        nobody.send("topic", "u", b"")
    with pytest.raises(RetryError, match="no room"):
        nobody.send("topic", "u", b"")


def _uses(world: World, users: Sequence[str], model: int) -> bool:  # noqa: F811
    """Whether some of the users have lists of this model; they are asked for."""
    world.ask(*users)
    return any(version == model for version, _ in world.last(world.settings.topics.recommendations).values())


def _half_use(world: World, users: list[str], model: int) -> bool:  # noqa: F811
    """The same of every user of two partitions of the four, which are another member's, and of none of the others."""
    _uses(world, users, model)
    found: dict[int, set[bool]] = {}
    for user, (version, _) in world.last(world.settings.topics.recommendations).items():
        found.setdefault(partition_of(user, 4), set()).add(version == model)
    return sorted(map(sorted, found.values())) == [[False], [False], [True], [True]]


def test_who_takes_over_uses_no_older_release_than_who_had_it(world: World) -> None:  # noqa: F811
    """Readers keep what was made with the higher release, so an older one behind it would be stale for good."""
    topic, users = world.settings.topics.recommendations, [f"u{n}" for n in range(40)]
    world.give_many(users)
    with running(with_adapt(world.settings, refresh_seconds=3_600)):
        with running(world.settings, members=2):
            world.register(2)
            wait_for(lambda: _uses(world, users, 2))
        world.give_many(users)
        world.ask(*users)
        wait_for(lambda: world.last_is_newest(topic, 2))


def test_who_cannot_read_the_newest_release_takes_nothing_over(world: World) -> None:  # noqa: F811
    topic, users = world.settings.topics.recommendations, [f"u{n}" for n in range(40)]
    world.give_many(users)
    with capture_logs() as lines, running(with_adapt(world.settings, refresh_seconds=3_600)):
        with running(world.settings, members=2):
            card = world.register(2)
            wait_for(lambda: _half_use(world, users, 2))
            tensors = card.with_suffix(".safetensors")
            whole = tensors.read_bytes()
            tensors.write_bytes(whole[:-8])
        wait_for(lambda: [line for line in lines if line["event"] == "not claimed"])
        [line] = [line for line in lines if line["event"] == "not claimed"][:1]
        assert "Release 2 cannot be read here" in line["why"]
        before = world.last(topic)
        world.give_many(users)
        world.ask(*users)
        theirs = {user: versions for user, versions in before.items() if versions[0] == 2}
        own = before.keys() - theirs
        wait_for(lambda: {world.last(topic)[user][1] for user in own} == {2})
        assert world.last(topic).items() >= theirs.items()
        tensors.write_bytes(whole)
        wait_for(lambda: world.last(topic).items() >= {(user, (2, 2)) for user in theirs})


def _is_watched(world: World) -> bool:  # noqa: F811
    """Whether the watch has committed what it has seen."""
    topics, kafka = world.settings.topics, world.settings.kafka
    of_scores = [topics.recommendations], topics.partitions
    ends = log_ends(kafka, *of_scores)
    return bool(ends) and committed(kafka, kafka.adapt_group + "-watch", *of_scores) == ends


def _with_unanswered(world: World) -> list[str]:  # noqa: F811
    """Users on all partitions whose last requests are gone before anybody has read them."""
    topic, settings, users = world.settings.topics.requests, world.settings, [f"u{n}" for n in range(30)]
    world.give_many(users)
    with running(settings):
        world.ask(*users)
        wait_for(lambda: world.last_is_newest(settings.topics.recommendations))
        wait_for(lambda: _is_watched(world))  # or the next owner would look through these lists
    world.give_many(users)
    world.ask(*users)
    admin = clients.admin(settings.kafka)
    ends = [TopicPartition(topic, number, OFFSET_END) for number in range(settings.topics.partitions)]
    for deleted in admin.delete_records(ends).values():
        deleted.result(30)
    return users


def test_behind_a_gap_every_user_of_the_partition_is_adapted_again(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapt_module, "_USERS_AT_ONCE", 7)
    _with_unanswered(world)
    going = Accepting(world.settings)
    going.start()
    wait_for(lambda: going.error or world.last_is_newest(world.settings.topics.recommendations))
    going.stop()
    assert going.error is None


def test_where_the_broker_forgot_the_group_every_user_is_adapted_again(world: World) -> None:  # noqa: F811
    """What of the requests was answered nobody knows, and those that retention took cannot be read again."""
    _with_unanswered(world)
    admin = clients.admin(world.settings.kafka)
    [forgotten] = admin.delete_consumer_groups([world.settings.kafka.adapt_group]).values()
    forgotten.result(30)
    with running(world.settings):
        wait_for(lambda: world.last_is_newest(world.settings.topics.recommendations))


def test_a_gap_in_the_requests_is_passed_only_when_told(world: World) -> None:  # noqa: F811
    topic, settings = world.settings.topics.requests, world.settings
    world.give("u", EXAMPLES)
    with running(settings):
        world.ask_and_read("u")
    for _ in range(5):
        world.give("u", EXAMPLES)
        world.ask("u")
    done = committed(settings.kafka, settings.kafka.adapt_group, [topic], settings.topics.partitions)
    [((_, partition), offset)] = done.items()
    first = offset + 4
    admin = clients.admin(settings.kafka)
    [deleted] = admin.delete_records([TopicPartition(topic, partition, first)]).values()
    deleted.result()
    stopped = Member(settings)
    stopped.start()
    wait_for(lambda: stopped.error)
    assert isinstance(stopped.error, StopError)
    assert "--accept-gap" in str(stopped.error)
    going = Accepting(settings)
    going.start()
    wait_for(lambda: going.error or [each for each in world.of("u") if each.support_version == world.given["u"]])
    going.stop()
    assert going.error is None
    with transaction(world.engine) as connection:
        gaps = connection.exec_driver_sql("SELECT topic, partition, from_offset, to_offset FROM partition_gaps").all()
    assert [tuple(gap) for gap in gaps] == [(topic, partition, offset, first)]
