"""A deep lag, and a user who floods: what they cost in memory, in throughput, and for everybody else.

    tests/bench.sh backlog [--events 5000000] [--adapt-seconds 60] [--json FILE]

backlog.p99_others        event produced to list read, of the users of a steady shop (--rate), one ingest and one adapt
                          process, for --seconds.
backlog.p99_others.*      the same while one bot, a process of its own, sends --bot events: `steady` over all that time,
                          `flood` as fast as the broker takes them; `flood_elsewhere` is the same flood on a topic that
                          nobody reads, which is what the bot and the broker cost the others by their work alone.
                          The flood's also of those who share the bot's partition, and of the rest.
backlog.live[.*].*        events per request, and requests per adaptation (the coalescing factor), of those.
backlog.ingest.part<n>    then nobody runs while --events are put on the topic; one ingest process takes them, and this
                          is its throughput over each fifth of them, by the ledger, looked at every 0.2 s. The note has
                          its resident memory at the end of that fifth.
backlog.ingest.rss_mb     its peak (VmHWM).
backlog.adapt.*           one adapt process on the requests that came of it, for at most --adapt-seconds: requests taken
                          a second, events per request, requests per adaptation, peak memory.

Events are of --users users, drawn by rank^-0.8.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import polars as pl
import psutil
from cluster import Cluster, Database, command, ledger, require_running, running_cluster
from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic
from loop_traffic import Shop, Subscriber, answered
from machine import CONSOLE, Report, describe, options
from random_release import random_release

from innerloop.config import Settings
from innerloop.learning.releases import save
from innerloop.store.database import connect
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import group_lag
from innerloop.streams.offsets import end_offsets
from innerloop.streams.publisher import partition_of
from innerloop.worker.train import register

_PARTS = 5
_LOOK_SECONDS = 0.2
_CHUNK = 200_000
_BOT = 10**9
_LIMIT_SECONDS = 1_800.0


def main() -> int:
    """Take all figures."""
    asked = _options()
    with running_cluster() as cluster, cluster.database() as database:
        report = Report(describe(cluster.kafka_version(), cluster.postgres_version()))
        settings = cluster.settings(database)
        release = random_release(asked.items, settings.learning.dimension)
        register(settings, connect(settings.database), release, save(release, cluster.folder))
        with _running(cluster, database, settings) as processes:
            _others(report, settings, processes, asked)
        before = end_offsets(settings, settings.topics.events)[settings.topics.clicks]
        _fill(settings, asked)
        _ingest(report, cluster, database, before, asked)
        _adapt(report, cluster, database, asked)
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=300.0, help="events/s of the steady shop")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the steady shop, with and without the bot")
    parser.add_argument("--bot", type=int, default=100_000, help="events of the bot")
    parser.add_argument("--adapt-seconds", type=float, default=60.0)
    return parser.parse_args()


# --- others


@contextmanager
def _running(cluster: Cluster, database: Database, settings: Settings) -> Iterator[list[psutil.Process]]:
    """One process of each kind, with their partitions."""
    environment = cluster.environment(database)
    logs = cluster.folder / "ingest.log", cluster.folder / "adapt.log"
    adapt = ["adapt", "--processes", "1", "--devices", "cpu"]
    with command(["ingest"], environment, logs[0]) as first, command(adapt, environment, logs[1]) as second:
        for group, process, log in zip(
            (settings.kafka.ingest_group, settings.kafka.adapt_group), (first, second), logs, strict=True
        ):
            while not members_with_partitions(settings.kafka, group):
                require_running(process, log)
                time.sleep(_LOOK_SECONDS)
        yield [psutil.Process(process.pid) for process in (first, second)]


def _others(report: Report, settings: Settings, processes: list[psutil.Process], asked: argparse.Namespace) -> None:
    shop, subscriber = Shop(settings, asked.users, asked.items), Subscriber(settings)
    subscriber.start()
    shop.run(asked.rate, 20.0)  # until Java has compiled what the broker does all the time
    time.sleep(2.0)
    shop.taken()
    partitions = settings.topics.partitions
    elsewhere = f"{settings.topics.clicks}.nobody-reads"
    admin = clients.admin(settings.kafka)
    admin.create_topics([NewTopic(elsewhere, partitions)])[elsewhere].result(30)
    bots = {
        "": None,
        ".steady": _Bot(_BOT, settings.topics.clicks, asked.bot, asked.seconds),
        ".flood_elsewhere": _Bot(_BOT + 1, elsewhere, asked.bot),
        ".flood": _Bot(_BOT + 2, settings.topics.clicks, asked.bot),
    }
    for name, bot in bots.items():
        counted = _counts(settings)
        with _at_work(settings, bot):
            shop.run(asked.rate, asked.seconds)
        _settled(settings)
        found = answered(shop.taken(), subscriber.taken())
        _waits(report, f"backlog.p99_others{name}", found)
        if bot is not None and name == ".flood":
            its = partition_of(f"user-{bot.user}", partitions)
            beside = [partition_of(f"user-{user}", partitions) == its for user in found["user"]]
            _waits(report, f"backlog.p99_others{name}.same_partition", found.filter(beside))
            _waits(report, f"backlog.p99_others{name}.other_partitions", found.filter(~np.array(beside)))
        _factors(report, f"backlog.live{name}", counted, _counts(settings))
    subscriber.close()
    for process in processes:
        CONSOLE.print(f"  {process.pid}: {_peak(process):.0f} MB at most", highlight=False)


def _waits(report: Report, name: str, found: pl.DataFrame) -> None:
    waits = ((found["read"] - found["sent"]).drop_nulls() * 1000).to_numpy()
    note = f"p50 {np.median(waits):.0f} ms; {found['read'].null_count()} of {len(found)} unanswered"
    report.add(name, float(np.percentile(waits, 99)), "ms", note)


@dataclass(frozen=True)
class _Bot:
    """Sends `count` events of one user to a topic, spread over so many seconds, or at once."""

    user: int
    topic: str
    count: int
    seconds: float = 0.0

    def run(self, settings: Settings, ready: Event, go: Event) -> None:
        """In a process of its own, with everything made before it is told to go."""
        made = _records(self.count, np.full(self.count, self.user), f"bot-{self.user}", items=1_000)
        records, parts = [record for some in made for record in some], 200
        producer = clients.producer(settings.kafka, linger_ms=20)
        producer.list_topics(self.topic, 30.0)
        ready.set()
        go.wait()
        began = time.monotonic()
        for part in range(parts):
            time.sleep(max(0.0, began + self.seconds * part / parts - time.monotonic()))
            _send(producer, self.topic, records[part * self.count // parts : (part + 1) * self.count // parts])
        _flush(producer)
        CONSOLE.print(f"  {self.count:,} events sent in {time.monotonic() - began:.2f} s", highlight=False)


@contextmanager
def _at_work(settings: Settings, bot: _Bot | None) -> Iterator[None]:
    """While the bot, if there is one, sends; until it has."""
    if bot is None:
        yield
        return
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=bot.run, args=(settings, ready, go), daemon=True)
    process.start()
    if not ready.wait(60.0):
        raise SystemExit("The bot did not start.")
    go.set()
    yield
    process.join(60.0)
    if process.exitcode != 0:
        raise SystemExit(f"The bot did not do its work: exit code {process.exitcode}.")


def _settled(settings: Settings) -> None:
    """Until nobody lags."""
    until = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < until:
        lags = [
            *group_lag(settings, settings.kafka.ingest_group, settings.topics.events),
            *group_lag(settings, settings.kafka.adapt_group, [settings.topics.requests]),
        ]
        if not sum(each.offsets for each in lags):
            return
        time.sleep(_LOOK_SECONDS)


# --- a deep lag


def _fill(settings: Settings, asked: argparse.Namespace) -> None:
    producer = clients.producer(settings.kafka, linger_ms=20)
    share = np.arange(1, asked.users + 1) ** -0.8
    users = np.random.default_rng(1).choice(asked.users, asked.events, p=share / share.sum())
    for values in _records(asked.events, users, "lag", items=asked.items):
        _send(producer, settings.topics.clicks, values)
    _flush(producer)
    CONSOLE.print(f"  {asked.events:,} events wait", highlight=False)


def _records(count: int, users: np.ndarray, name: str, *, items: int) -> Iterator[list[tuple[str, bytes]]]:
    """(key, value) of every event, in pieces; each user's times are all different."""
    rng, start = np.random.default_rng(2), int(time.time() * 1000) - count // 10
    for first in range(0, count, _CHUNK):
        some = users[first : first + _CHUNK].tolist()
        bought = rng.integers(0, items, len(some)).tolist()
        yield [
            (
                f"user-{user}",
                b'{"event_id":"%s-%09d","event_type":"click","user_id":"user-%d","item_id":"item-%d","event_time":%d}'
                % (name.encode(), first + at, user, item, start + (first + at) // 10),
            )
            for at, (user, item) in enumerate(zip(some, bought, strict=True))
        ]


def _send(producer: Producer, topic: str, records: list[tuple[str, bytes]]) -> None:
    for key, value in records:
        while True:
            try:
                producer.produce(topic, value, key)
            except BufferError:
                producer.poll(0.05)
            else:
                break


def _flush(producer: Producer) -> None:
    if producer.flush(120.0):
        raise SystemExit("The broker did not take the events.")


def _ingest(report: Report, cluster: Cluster, database: Database, before: int, asked: argparse.Namespace) -> None:
    settings, log = cluster.settings(database), cluster.folder / "behind.log"
    places, memory, marks = [before], [0.0], [0.0]
    goals = [before + asked.events * part // _PARTS for part in range(_PARTS + 1)]
    with (
        database.open() as connection,
        connection.cursor() as cursor,
        command(["ingest"], cluster.environment(database), log) as process,
    ):
        watched, until = psutil.Process(process.pid), time.monotonic() + _LIMIT_SECONDS
        while len(places) <= _PARTS:
            require_running(process, log)
            if time.monotonic() > until:
                report.missing("backlog.ingest", "events/s", f"not done in {_LIMIT_SECONDS:.0f} s")
                return
            stands = ledger(cursor, settings.topics.clicks, "coalesce(sum(next_offset), 0)")
            if marks[0] == 0.0 and stands > before:
                places[0], marks[0] = stands, time.monotonic()
            while len(places) <= _PARTS and stands >= goals[len(places)]:
                places.append(stands)
                marks.append(time.monotonic())
                memory.append(watched.memory_info().rss / 2**20)
            time.sleep(_LOOK_SECONDS)
        for part in range(1, _PARTS + 1):
            rate = (places[part] - places[part - 1]) / max(marks[part] - marks[part - 1], _LOOK_SECONDS)
            report.add(f"backlog.ingest.part{part}", rate, "events/s", f"{memory[part]:.0f} MB at its end")
        report.add("backlog.ingest.rss_mb", _peak(watched), "MB", "peak")


def _adapt(report: Report, cluster: Cluster, database: Database, asked: argparse.Namespace) -> None:
    settings, log = cluster.settings(database), cluster.folder / "adapt-behind.log"
    counted = _counts(settings)
    lists, requests = counted["lists"], counted["handled"]
    arguments = ["adapt", "--member", "cpu", "--threads", "1"]
    with command(arguments, cluster.environment(database), log) as process:
        while _counts(settings)["handled"] == requests:
            require_running(process, log)
            time.sleep(_LOOK_SECONDS)
        began, first = time.monotonic(), _counts(settings)
        while time.monotonic() - began < asked.adapt_seconds and first["handled"] < first["requests"]:
            require_running(process, log)
            time.sleep(_LOOK_SECONDS)
            if (now := _counts(settings))["handled"] == now["requests"]:
                break
        last, took = _counts(settings), time.monotonic() - began
        rate, waited = (last["handled"] - first["handled"]) / took, first["requests"] - requests
        report.add("backlog.adapt.requests_per_s", rate, "requests/s", f"over {took:.0f} s; {waited:,} waited")
        report.add("backlog.adapt.rss_mb", _peak(psutil.Process(process.pid)), "MB", "peak")
        factor = (last["handled"] - requests) / max(1, last["lists"] - lists)
        report.add("backlog.adapt.coalescing", factor, "requests per adaptation")
        report.add("backlog.adapt.events_per_request", asked.events / waited, "events per request")


# --- what is counted


def _counts(settings: Settings) -> dict[str, int]:
    topics = settings.topics
    ends = end_offsets(settings, [topics.clicks, topics.requests, topics.recommendations])
    lags = group_lag(settings, settings.kafka.adapt_group, [topics.requests])
    return {
        "events": ends[topics.clicks],
        "requests": ends[topics.requests],
        "lists": ends[topics.recommendations],
        "handled": sum(each.committed or 0 for each in lags),
    }


def _factors(report: Report, name: str, before: dict[str, int], after: dict[str, int]) -> None:
    new = {what: after[what] - before[what] for what in after}
    report.add(f"{name}.events_per_request", new["events"] / new["requests"], "events per request")
    report.add(f"{name}.coalescing", new["requests"] / new["lists"], "requests per adaptation")


def _peak(process: psutil.Process) -> float:
    """Peak resident memory in MB, of a process or of the largest of its children."""
    pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return max(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    sys.exit(main())
