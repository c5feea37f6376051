"""Adapt where something is missing: a release that cannot be read, requests that retention has deleted."""

import time
from collections.abc import MutableMapping, Sequence
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from structlog.testing import capture_logs
from test_adapt import (
    Member,
    World,
    _threads_stop,  # noqa: F401 - a fixture
    running,
    wait_for,
    world,  # noqa: F401 - a fixture
)

from innerloop.errors import StopError
from innerloop.store.database import transaction
from innerloop.streams import clients
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


def test_a_gap_in_the_requests_is_passed_only_when_told(world: World) -> None:  # noqa: F811
    topic, settings = world.settings.topics.requests, world.settings
    world.give("u", EXAMPLES)
    with running(settings):
        world.ask_and_read("u")
    for _ in range(5):
        world.give("u", EXAMPLES)
        world.ask("u")
    with clients.consumer(settings.kafka, settings.kafka.adapt_group) as consumer:
        found = consumer.committed([TopicPartition(topic, n) for n in range(settings.topics.partitions)], timeout=10)
        [place] = [each for each in found if each.offset > 0]
    first = place.offset + 4
    admin = clients.admin(settings.kafka)
    [deleted] = admin.delete_records([TopicPartition(topic, place.partition, first)]).values()
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
    assert [tuple(gap) for gap in gaps] == [(topic, place.partition, place.offset, first)]
