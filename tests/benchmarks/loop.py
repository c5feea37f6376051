"""The whole loop: an event is produced, and the user's new scores are readable by a subscriber.

    tests/bench.sh loop [--rates 500,2000,5000] [--seconds 60] [--json FILE]

`innerloop ingest` and `innerloop adapt --processes 2 --devices cpu` run as a user runs them, with default settings;
10,000 items, 20,000 users drawn evenly, a random release (d = 64), clicks only. Shop and subscriber are this process
(see loop_traffic.py), on the same cores as everything else. At each rate --warm-up seconds (5) go first and don't
count; then events of --seconds count, each until the first list that takes it into account has been read. Support sets
grow over the run: they are empty before the first rate, and keep what the rates before have sent. Verified: every list
holds as many items as are asked for.

loop.<rate>.p50_ms, .p99_ms         from handing the event to the Kafka client to its list in the subscriber's hands
loop.<rate>.sent_per_s              what the shop really sent: below the rate, the machine could not keep the pace
loop.<rate>.adapted_per_s           lists read per second while the events were sent; fewer than events is coalescing
loop.<rate>.unanswered              events without a list --drain seconds after the last one was sent; should be 0
loop.<rate>.hop.<hop>_p50_ms, _p99_ms   where the time goes. Hops' medians need not add up to the median of the whole
    produce_to_ingest               to the poll of ingest that brought the oldest event of its batch: the request's
                                    ingested_at. At most a few ms too short, for the events polled last
    ingest_to_request               decode, merge, transaction: to the request's record timestamp
    request_to_scored               to scored_at, which is stamped when the list is about to be encoded
    ingest_to_scored                the two together
    scored_to_read                  encoding, producing, reading, decoding
loop.highest_rate                   the highest rate at which the backlog did not grow in --step seconds, found by
                                    doubling and bisecting. Backlog: events sent and not yet answered. Grown: over the
                                    last quarter of the step it was on average larger than over the second, by more than
                                    2% of what was sent in between. A shop that could not send 98% of the rate fails too
The hops' times are stamped by several processes with the machine's clock in whole milliseconds, the total is not.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from cluster import Cluster, Database, command, require_running, running_cluster
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from loop_traffic import Shop, Subscriber, answered
from machine import CONSOLE, Report, describe, options
from random_release import random_release, with_ranker

from innerloop.config import Settings
from innerloop.learning.releases import save
from innerloop.scores import AdaptationRequest
from innerloop.store import releases
from innerloop.store.database import connect, transaction
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions

_READY_SECONDS = 120.0
_SWITCH_SECONDS = 0.0005
_PACE_KEPT = 0.98
_GROWTH = 0.02
_AT_ONCE = 50_000
_BISECTIONS = 3
_HOPS = ("produce_to_ingest", "ingest_to_request", "request_to_scored", "ingest_to_scored", "scored_to_read")


@dataclass(frozen=True)
class Stretch:
    """What happened to the events of one stretch of constant rate.

    `events` has the columns of `loop_traffic`, one row for each event sent, with nulls where no list came; `lists` is
    the number of lists read while they were sent.
    """

    events: pl.DataFrame
    lists: int
    seconds: float

    @property
    def sent_per_s(self) -> float:
        return len(self.events) / self.seconds

    @property
    def unanswered(self) -> int:
        return self.events["read"].null_count()

    def latencies_ms(self) -> np.ndarray:
        """Of the answered events."""
        return ((self.events["read"] - self.events["sent"]).drop_nulls() * 1000).to_numpy()

    def backlog(self, from_share: float, to_share: float) -> float:
        """The mean number of events sent and not answered, over a part of the stretch."""
        sent = np.sort(self.events["sent"].to_numpy())
        read = np.sort(self.events["read"].drop_nulls().to_numpy())
        start = sent[0]
        at = start + np.linspace(from_share, to_share, 200) * self.seconds
        return float((np.searchsorted(sent, at) - np.searchsorted(read, at)).mean())

    def is_held(self, rate: float) -> bool:
        """Whether the pace was kept and the backlog did not grow; see the module."""
        grown = self.backlog(0.75, 1.0) - self.backlog(0.25, 0.5)
        return self.sent_per_s >= _PACE_KEPT * rate and grown <= _GROWTH * rate * self.seconds / 2


class Bench:
    """The running loop, with a shop before and a subscriber behind it."""

    def __init__(self, settings: Settings, shop: Shop, subscriber: Subscriber, check: Callable[[], None]) -> None:
        self.settings, self._shop, self._subscriber, self._check = settings, shop, subscriber, check

    def run(self, rate: float, seconds: float, *, warm_up: float, drain: float) -> Stretch:
        """Send at this rate; the stretch begins after the warm-up. Waits up to `drain` seconds for the answers."""
        self._shop.run(rate, warm_up)
        self._shop.taken()
        before = len(self._subscriber)
        began = time.monotonic()
        self._shop.run(rate, seconds)
        took, lists = time.monotonic() - began, len(self._subscriber) - before
        self._check()
        stretch = Stretch(self._answers(self._shop.taken(), drain), lists, took)
        if lists and self._subscriber.shortest < self.settings.adapt.top:
            raise SystemExit(f"A list held {self._subscriber.shortest} items of {self.settings.adapt.top}.")
        return stretch

    def _answers(self, events: pl.DataFrame, drain: float) -> pl.DataFrame:
        """Wait until nothing more has come for a second, or the time is up."""
        until, seen, changed = time.monotonic() + drain, -1, time.monotonic()
        while time.monotonic() < min(until, changed + 1.0):
            if len(self._subscriber) != seen:
                seen, changed = len(self._subscriber), time.monotonic()
            time.sleep(0.02)
        return answered(events, self._subscriber.taken())


def main() -> int:
    """Measure each rate, then search for the highest."""
    asked = _options()
    # The shop's and the subscriber's threads share one interpreter: the default, 5 ms, would be in every latency.
    sys.setswitchinterval(_SWITCH_SECONDS)
    with running_cluster() as cluster, cluster.database() as database:
        report = Report(describe(cluster.kafka_version(), cluster.postgres_version()))
        with _running_loop(cluster, database, asked) as bench:
            stretches = {rate: _measure(report, bench, rate, asked) for rate in asked.rates}
            requests = _requests(bench.settings)
            for rate, stretch in stretches.items():
                _hops(report, rate, stretch, requests)
            if asked.step:
                _search(report, bench, asked)
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--rates", type=_rates, default=[500, 2_000, 5_000], help="events/s, with commas between")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--drain", type=float, default=20.0, help="longest wait for the last answers")
    parser.add_argument("--step", type=float, default=8.0, help="of the search for the highest rate; 0 leaves it out")
    parser.add_argument("--highest", type=int, default=64_000, help="the search goes no further")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2, help="adapt processes")
    return parser.parse_args()


def _rates(text: str) -> list[int]:
    return [int(rate) for rate in text.split(",")]


@contextmanager
def _running_loop(cluster: Cluster, database: Database, asked: argparse.Namespace) -> Iterator[Bench]:
    """Register a release, start the commands, and wait until their groups have members with partitions."""
    settings = cluster.settings(database)
    _register(settings, asked.items, cluster.folder)
    environment = cluster.environment(database)
    logs = cluster.folder / "ingest.log", cluster.folder / "adapt.log"
    adapt = ["adapt", "--processes", str(asked.workers), "--devices", "cpu"]
    with command(["ingest"], environment, logs[0]) as ingesting, command(adapt, environment, logs[1]) as adapting:

        def check() -> None:
            require_running(ingesting, logs[0])
            require_running(adapting, logs[1])

        _wait_for(settings.kafka.ingest_group, 1, settings, check)
        _wait_for(settings.kafka.adapt_group, asked.workers, settings, check)
        subscriber = Subscriber(settings)
        subscriber.start()
        try:
            yield Bench(settings, Shop(settings, asked.users, asked.items), subscriber, check)
        finally:
            subscriber.close()


def _register(settings: Settings, items: int, folder: Path) -> None:
    release = with_ranker(random_release(items, settings.learning.dimension))
    location = save(release, folder)
    engine = connect(settings.database)
    with transaction(engine) as connection:
        releases.register(connection, release.version, msgspec.json.decode(location.read_bytes()), str(location))
    engine.dispose()


def _wait_for(group: str, members: int, settings: Settings, check: Callable[[], None]) -> None:
    until = time.monotonic() + _READY_SECONDS
    while members_with_partitions(settings.kafka, group) < members:
        check()
        if time.monotonic() > until:
            raise SystemExit(f"Group {group} has not {members} members with partitions after {_READY_SECONDS:.0f} s.")
        time.sleep(0.2)


def _measure(report: Report, bench: Bench, rate: int, asked: argparse.Namespace) -> Stretch:
    CONSOLE.print(f"{rate} events/s for {asked.seconds:g} s, after {asked.warm_up:g} s of warm-up")
    stretch = bench.run(rate, asked.seconds, warm_up=asked.warm_up, drain=asked.drain)
    p50, p99 = np.percentile(stretch.latencies_ms(), [50, 99]) if stretch.unanswered < len(stretch.events) else (0, 0)
    name = f"loop.{rate}"
    if not p50:
        report.missing(f"{name}.p50_ms", "ms", "no event was answered")
        return stretch
    report.add(f"{name}.p50_ms", p50, "ms", f"{len(stretch.events):,} events")
    report.add(f"{name}.p99_ms", p99, "ms")
    report.add(f"{name}.sent_per_s", stretch.sent_per_s, "events/s")
    report.add(f"{name}.adapted_per_s", stretch.lists / stretch.seconds, "users/s")
    report.add(f"{name}.unanswered", stretch.unanswered, "events")
    return stretch


def _hops(report: Report, rate: int, stretch: Stretch, requests: pl.DataFrame) -> None:
    """Each event's way, by the request and the list that answered it."""
    # What the monotonic clock says, as the clock that the stamps were made with; both are this machine's.
    behind = time.time() - time.monotonic()
    found = answered(stretch.events.drop_nulls("read"), requests)
    produced, read = (found["sent"] + behind) * 1000, (found["read"] + behind) * 1000
    ingested, requested, scored = found["ingested_at"], found["requested_at"], found["scored_at"]
    # A request can be overtaken: a newer event's set was read for it before its own request was even sent.
    spans = (ingested - produced, requested - ingested, scored - requested, scored - ingested, read - scored)
    for hop, span in zip(_HOPS, spans, strict=True):
        values = span.drop_nulls().to_numpy()
        for which in (50, 99):
            report.add(f"loop.{rate}.hop.{hop}_p{which}_ms", float(np.percentile(values, which)), "ms")


def _requests(settings: Settings) -> pl.DataFrame:
    """All requests: user, event_time, ingested_at and the record's own time, requested_at, in epoch milliseconds."""
    consumer = clients.consumer(settings.kafka, "innerloop-bench-requests")
    topic, rows = settings.topics.requests, []
    decode = msgspec.json.Decoder(AdaptationRequest).decode
    for partition in range(settings.topics.partitions):
        for value, stamp in _records(consumer, topic, partition):
            request = decode(value)
            rows.append((int(request.user_id[5:]), request.event_time, request.ingested_at, stamp))
    consumer.close()
    names = ("user", "event_time", "ingested_at", "requested_at")
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")


def _records(consumer: Consumer, topic: str, partition: int) -> Iterator[tuple[bytes, int]]:
    """Value and timestamp of every record that is in the partition now."""
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10.0)
    if low == high:
        return
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
    at = low
    while at < high:
        for message in consumer.consume(_AT_ONCE, 0.1):
            if message.error() is None:
                yield message.value() or b"", message.timestamp()[1]
                at = (message.offset() or 0) + 1


def _search(report: Report, bench: Bench, asked: argparse.Namespace) -> None:
    """Double until a rate is not held, then bisect; the highest that was."""
    held, failed, rate = 0, 0, 1_000
    while not failed and rate <= asked.highest:
        held, failed = (rate, 0) if _try(bench, rate, asked) else (held, rate)
        rate *= 2
    for _ in range(_BISECTIONS if failed and held else 0):
        middle = (held + failed) // 2
        held, failed = (middle, failed) if _try(bench, middle, asked) else (held, middle)
    if not held:
        report.missing("loop.highest_rate", "events/s", "not even 1,000 events/s were held")
        return
    limit = f"{failed:,} was not held" if failed else "the search went no further"
    report.add("loop.highest_rate", held, "events/s", f"{asked.step:g} s without growing backlog; {limit}")


def _try(bench: Bench, rate: int, asked: argparse.Namespace) -> bool:
    stretch = bench.run(rate, asked.step, warm_up=2.0, drain=60.0)
    is_held = stretch.is_held(rate)
    latency = float(np.median(stretch.latencies_ms())) if stretch.unanswered < len(stretch.events) else float("nan")
    CONSOLE.print(
        f"  {rate} events/s: sent {stretch.sent_per_s:.0f}, backlog {stretch.backlog(0.25, 0.5):.0f} then "
        f"{stretch.backlog(0.75, 1.0):.0f}, median {latency:.0f} ms, {stretch.unanswered} unanswered: "
        f"{'held' if is_held else 'not held'}",
        highlight=False,
    )
    return is_held


if __name__ == "__main__":
    sys.exit(main())
