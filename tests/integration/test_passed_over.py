"""Jumps of offsets on a real broker: a client that passes over records, and logs that lack some themselves."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import pytest
from confluent_kafka import Message, Producer, TopicPartition
from structlog.testing import capture_logs
from test_ingest import Member, check, events_of, send, shrunk, until

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import RetryError


@pytest.fixture
def small(settings: Settings) -> Settings:
    return shrunk(settings)


class Forgetful:
    """A consumer that now and then drops a record on the way, each once."""

    def __init__(self, consumer: Any, dropping: Callable[[], bool]) -> None:
        self._consumer, self._dropping = consumer, dropping
        self.dropped: set[tuple[str | None, int | None, int | None]] = set()
        self.epochs: set[int | None] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def seek(self, place: TopicPartition) -> None:
        self.epochs.add(place.leader_epoch)
        self._consumer.seek(place)

    def poll(self, seconds: float) -> Message | None:
        found = self._kept([message] if (message := self._consumer.poll(seconds)) is not None else [])
        return found[0] if found else None

    def consume(self, most: int, seconds: float) -> list[Message]:
        return self._kept(self._consumer.consume(most, seconds))

    def _kept(self, messages: list[Message]) -> list[Message]:
        return [message for message in messages if message.error() is not None or not self._drops(message)]

    def _drops(self, message: Message) -> bool:
        place = message.topic(), message.partition(), message.offset()
        if place in self.dropped or not self._dropping():
            return False
        self.dropped.add(place)
        return True


@pytest.mark.parametrize("seed", range(3))
def test_what_the_client_passes_over_is_read_all_the_same(small: Settings, seed: int) -> None:
    """Also in the midst of pauses, in which it may be the record that is put back."""
    events = events_of(1_500, seed=seed)
    rng = random.Random(seed)
    forgetful: list[Forgetful] = []

    def prepared(member: Member) -> None:
        forgetful.append(Forgetful(member.loop._consumer, lambda: rng.random() < 0.02))
        member.loop._consumer = forgetful[0]  # type: ignore[assignment]
        advance, calls = member.ledger.advance, itertools.count()

        def unreliable(*arguments: Any) -> None:
            if (call := next(calls)) % 10 == 3 and call < 50:
                raise RetryError("the database is away, says the test")
            advance(*arguments)

        member.ledger.advance = unreliable  # type: ignore[method-assign, assignment]

    before = metrics.PASSED_OVER._value.get()
    send(small, events[:700])
    with Member(small, prepared) as member:
        member.joined()
        send(small, events[700:])
        member.has_handled(1_200)
        forgetful[0]._dropping = lambda: False
        # The last record of a partition may be among the dropped: only the next one tells.
        last = [{**event, "event_id": f"last-{event['event_id']}"} for event in events_of(80, kinds=("click",))]
        for topic in small.topics.events:
            for number in range(small.topics.partitions):
                send(small, last[-5:], number, topic)
                events += last[-5:]
                last = last[:-5]
        member.caught_up()
    check(small, events, ordered=False)
    assert len(forgetful[0].dropped) > 10
    assert forgetful[0].epochs == {None}, "of a record before, it would say that the log has ended with that epoch"
    assert metrics.PASSED_OVER._value.get() > before + 5


class Transactional:
    """Sends events in transactions of twenty, every fifth of which is aborted."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.topics.clicks
        broker = {"bootstrap.servers": settings.kafka.bootstrap_servers, "partitioner": "murmur2_random"}
        self._producer = Producer({**broker, "transactional.id": "shop"})
        self._producer.init_transactions(30)

    def send(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that were not aborted."""
        kept = []
        for first in range(0, len(events), 20):
            self._producer.begin_transaction()
            for event in events[first : first + 20]:
                self._producer.produce(self._topic, json.dumps(event).encode(), event["user_id"])
            if first % 100:
                self._producer.commit_transaction(30)
                kept += events[first : first + 20]
            else:
                self._producer.flush(30)
                self._producer.abort_transaction(30)
        return kept


def _looks(lines: Sequence[MutableMapping[str, Any]]) -> Counter[str]:
    """How many jumps of each partition were looked at."""
    return Counter(line["partition"] for line in lines if line["event"] == "offsets jump, read again")


def test_a_log_written_in_transactions_is_stored_without_what_was_aborted(small: Settings) -> None:
    """Every transaction leaves a place without a record, an aborted one many: three of each partition are looked at."""
    kept = Transactional(small).send(events_of(600, kinds=("click",)))
    before = metrics.PASSED_OVER._value.get()
    with capture_logs() as lines, Member(small) as member:
        until(lambda: member.error is not None or member.handled >= len(kept), "not all is handled")
    check(small, kept)
    looks = _looks(lines)
    assert looks
    assert max(looks.values()) <= 3
    assert metrics.PASSED_OVER._value.get() == before


def test_behind_an_outage_jumps_are_looked_at_again(small: Settings) -> None:
    """What was fetched before the pause was put back and is read again: there a client could pass over something."""
    events = events_of(1_200, kinds=("click",))
    shop, failures = Transactional(small), list[RetryError]()

    def prepared(member: Member) -> None:
        advance = member.ledger.advance

        def unreliable(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            advance(*arguments)

        member.ledger.advance = unreliable  # type: ignore[method-assign, assignment]

    kept = shop.send(events[:600])
    with capture_logs() as lines, Member(small, prepared) as member:
        until(lambda: member.error is not None or member.handled >= len(kept), "not all is handled")
        believed = _looks(lines)
        assert 3 in believed.values(), "the test can tell: a partition is believed by now"
        failures.append(RetryError("the database is away, says the test"))
        kept += shop.send(events[600:])
        until(lambda: member.error is not None or member.handled >= len(kept), "not all is handled")
    check(small, kept)
    assert max(_looks(lines).values()) > 3
