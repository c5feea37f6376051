"""Who has which partition, and that those who keep one never notice that others come and go."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from structlog.testing import capture_logs
from test_ingest import Member, check, committed, ends, events_of, ledger, send, shrunk, until

from innerloop.config import Settings
from innerloop.errors import StopError
from innerloop.store.database import connect
from innerloop.streams.batch import Batch
from innerloop.streams.loop import Loop
from innerloop.streams.partitions import Partition
from innerloop.worker import pool, processes
from innerloop.worker.health import Health


@pytest.fixture
def small(settings: Settings) -> Settings:
    return shrunk(settings)


class Observed:
    """A member, what it was told of partitions, and what it handled."""

    def __init__(self, settings: Settings, instance: str | None = None) -> None:
        self.told: list[tuple[str, set[Partition]]] = []
        self.handled: list[Partition] = []
        self._instance = instance
        self.member = Member(settings, self._prepare)

    def _prepare(self, member: Member) -> None:
        if self._instance is not None:
            member.loop = Loop(
                member.settings.kafka,
                group=member.settings.kafka.ingest_group,
                topics=member.settings.topics.events,
                processor=member.ingest,
                batch_size=member.settings.ingest.batch_size,
                poll_seconds=member.settings.ingest.poll_seconds,
                stopping=member.halt.is_set,
                instance=self._instance,
            )
        for kind in ("assign", "revoke", "lost"):
            setattr(member.loop, f"_on_{kind}", self._listening(kind, getattr(member.loop, f"_on_{kind}")))
        handle = member.ingest.handle

        def seen(batch: Batch) -> None:
            handle(batch)
            self.handled += batch.partitions

        member.ingest.handle = seen  # type: ignore[method-assign]

    def _listening(self, kind: str, original: Callable[..., None]) -> Callable[..., None]:
        def listener(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            self.told.append((kind, {(p.topic, p.partition) for p in partitions}))
            original(consumer, partitions)

        return listener


def _with_protocol(settings: Settings, protocol: str) -> Settings:
    own = {} if protocol == "consumer" else settings.kafka.properties
    return settings.model_copy(
        update={"kafka": settings.kafka.model_copy(update={"group_protocol": protocol, "properties": own})}
    )


def _shares(members: list[Observed]) -> list[int]:
    return sorted(len(each.member.owned) for each in members)


@pytest.fixture
def events() -> Iterator[dict[str, Any]]:
    return iter(events_of(4_000))


@pytest.fixture(params=["classic", "consumer"])
def both_ways(small: Settings, request: pytest.FixtureRequest) -> Settings:
    """With each of the two protocols, the second where the broker has it."""
    if request.param == "consumer":
        request.getfixturevalue("kip_848")
    return _with_protocol(small, request.param)


def test_partitions_that_stay_are_handled_all_through_a_rebalance(
    both_ways: Settings, events: Iterator[dict[str, Any]]
) -> None:
    settings = both_ways
    sent: list[dict[str, Any]] = []
    rounds = 0
    first, second, third = (Observed(settings) for _ in range(3))

    def feed_until(condition: Callable[[], bool], what: str) -> None:
        """One record to every partition, again and again; all of it is handled by somebody."""
        nonlocal rounds
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, what
            for topic in settings.topics.events:
                for number in range(4):
                    event = next(events)
                    sent.append(event)
                    send(settings, [event], number, topic)
            rounds += 1
            time.sleep(0.05)

    with first.member, second.member:
        until(lambda: _shares([first, second]) == [4, 4], "each has its share")
        feed_until(lambda: all(set(each.member.owned) <= set(each.handled) for each in (first, second)), "both read")
        before = {each: (set(each.member.owned), len(each.told), len(each.handled)) for each in (first, second)}
        with third.member:
            since = rounds
            feed_until(
                lambda: (
                    len(third.member.owned) >= 2 and sum(_shares([first, second, third])) == 8 and rounds >= since + 40
                ),
                "shared",
            )
            fed, meanwhile = rounds - since, {each: each.handled[handled:] for each, (_, _, handled) in before.items()}
        feed_until(lambda: _shares([first, second]) == [4, 4], "taken back")
        first.member.caught_up()
        stay: set[Partition] = set()
        for each, (owned, told, handled) in before.items():
            moved = {partition for _, partitions in each.told[told:] for partition in partitions}
            kept = owned - moved
            stay |= kept
            assert kept <= set(each.member.owned)
            for partition in kept:
                assert meanwhile[each].count(partition) >= fed // 2, "went on meanwhile"
                assert each.handled[handled:].count(partition) >= 5
        assert stay, "some do not move"
        stayed = set.union(*(before[each][0] for each in (first, second))) & set(third.handled)
        assert stayed <= {p for each in (first, second) for _, told in each.told for p in told}
    check(settings, sent, ordered=False)


def test_a_claim_that_somebody_holds_up_holds_up_nobody_else(small: Settings) -> None:
    """As a frozen process would, with a row of the ledger locked: the others' partitions go on, and two lines tell."""
    events = events_of(200, kinds=("click",))
    for number in range(4):
        send(small, events[10 * number : 10 * number + 10], number)
    with Member(small) as member:
        member.caught_up()
        until(lambda: committed(small) == ends(small), "committed")
    stuck, engine = (small.topics.clicks, 1), connect(small.database)
    with capture_logs() as lines, Member(small) as member:
        with engine.begin() as owner:
            held = "SELECT * FROM partition_ledger WHERE topic = %s AND partition = 1 FOR UPDATE"
            owner.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            owner.exec_driver_sql(held, (small.topics.clicks,))
            member.joined()
            for number in range(4):
                for at in range(4):  # one after the other
                    first = 40 + 40 * number + 10 * at
                    send(small, events[first : first + 10], number)
                    wanted = 10 + 10 * (at + 1)
                    if number != stuck[1]:
                        until(lambda: ledger(small)[small.topics.clicks, number] == wanted, "others go on")  # noqa: B023
            time.sleep(2.0)
            assert not member.loop.joined
            ready = Health(member.loop, 60.0, unclaimed=lambda: member.loop.unclaimed).ready
            assert not ready.good
            assert ready.why.startswith(f"Not claimed yet: {small.topics.clicks}[1] (A row stays locked: ")
            assert ledger(small)[stuck] == 10
        member.caught_up()
        assert member.loop.joined
        assert member.loop.unclaimed is None
    engine.dispose()
    check(small, events)
    assert [line["event"] for line in lines if line["event"].startswith("paused")] == []
    told = [line["event"] for line in lines if line["event"].startswith("not claimed")]
    assert 1 <= len(told) <= 4, told


def test_a_static_member_that_is_back_within_its_session_moves_nothing(small: Settings) -> None:
    events = events_of(300)
    send(small, events[:100])
    first, second = Observed(small, "pod-0"), Observed(small, "pod-1")
    with second.member:
        with first.member:
            until(lambda: _shares([first, second]) == [4, 4], "each has its share")
            first.member.caught_up()
            theirs = first.member.owned
            told = list(second.told)
        send(small, events[100:200])
        again = Observed(small, "pod-0")
        with again.member:
            again.member.joined(4)
            assert again.member.owned == theirs
            send(small, events[200:])
            again.member.caught_up()
            until(lambda: committed(small) == ends(small), "committed")
            assert second.told == told, "nobody else was told of anything"
    check(small, events, ordered=False)


def test_each_process_of_a_pool_is_another_static_member(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    named = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"static_membership": "pod-7"})})
    assert processes._instance(settings) is None
    assert processes._instance(named) == "pod-7-0"
    monkeypatch.setenv(pool.MEMBER, "3")
    assert processes._instance(named) == "pod-7-3"


def test_of_two_with_one_name_one_stops_with_a_sentence(both_ways: Settings, events: Iterator[dict[str, Any]]) -> None:
    older, newer = (Observed(both_ways, "ingest-3") for _ in range(2))
    with older.member:
        older.member.joined()
        with newer.member:
            until(lambda: any(each.member.error is not None for each in (older, newer)), "both go on")
            stopped = older if older.member.error is not None else newer
            assert isinstance(stopped.member.has_left(), StopError)
            sent = [next(events) for _ in range(100)]
            send(both_ways, sent)
            (newer if stopped is older else older).member.caught_up()
    check(both_ways, sent)
