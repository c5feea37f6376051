"""Scale: ingest and adapt with 1, 2 and 4 processes here, and what their measured costs say of more cores.

    tests/bench.sh scale [--processes 1 2 4] [--events 1000000] [--users 40000] [--items 50000] [--json FILE]

scale.ingest.<n>           events/s of n ingest processes, timed as in ingest.py
scale.adapt.<n>            users/s of n adapt processes which share the cores: a request for each of --users waits in
                           Kafka, each with 32 examples and a ranked list of 50; from the first lists to the last
scale.<step>.cpu.<part>    microseconds of processor time an event, or a user: of the workers, of PostgreSQL and of the
                           broker, in the run with one process
scale.ingest.wal_bytes     of PostgreSQL's log, an event
scale.<step>.model.<n>     events/s or users/s of n processes, calculated

The calculation, for 8 to 64 processes of one core each: each is as fast as the one that ran alone here, and no faster
than its core; PostgreSQL and the broker have the cores that their cost asks for. The note says how many, and how fast
PostgreSQL must write its log. That assumes that an event costs as much with many processes as with one. What the runs
with 2 and 4 say of that is the processor time in their notes. Nothing beyond this machine's cores was run.
"""

import argparse
import sys
import time
import uuid

import ingest
import msgspec
import numpy as np
from adapt import fill, random_sets
from clicks import Clicks, send
from cluster import Cluster, Database, command, require_running, running_cluster
from costs import Costs, costs
from machine import Report, describe, options
from random_release import random_release, with_ranker

from innerloop.config import Settings
from innerloop.scores import AdaptationRequest
from innerloop.store.database import connect
from innerloop.streams import clients
from innerloop.streams.offsets import LogEnds
from innerloop.streams.topics import ensure_topics

_MODEL = (8, 16, 32, 64)
_EXAMPLES = 32
_LOOK_SECONDS = 0.05
_LIMIT_SECONDS = 300.0


def main() -> int:
    """Measure both steps, then calculate."""
    asked = _options()
    with running_cluster() as cluster:
        report = Report(describe(cluster.kafka_version(), cluster.postgres_version()))
        _ingest(report, cluster, asked)
        _adapt(report, cluster, asked)
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--items", type=int, default=50_000)
    return parser.parse_args()


# --- ingest


def _ingest(report: Report, cluster: Cluster, asked: argparse.Namespace) -> None:
    clicks = Clicks.draw(asked.events)
    with cluster.database() as database:
        settings = cluster.settings(database)
        send(settings, clicks)
    expected = clicks.expected(settings.support.capacity)
    for processes in asked.processes:
        before = cluster.log_position()
        run = ingest.run(cluster, clicks, processes)
        log_bytes = (cluster.log_position() - before) / len(clicks)
        name = f"scale.ingest.{processes}"
        if run.stored != expected:
            report.missing(name, "events/s", f"stored {run.stored}, the oracle says {expected}")
            continue
        used = run.used.each(len(clicks))
        report.add(name, run.rate, "events/s", f"{run.owners} owned partitions at the end; {_told(used, 'event')}")
        if processes == 1:
            report.add("scale.ingest.wal_bytes", log_bytes, "bytes/event")
            _model(report, "ingest", run.rate, used, log_bytes)


# --- adapt


def _adapt(report: Report, cluster: Cluster, asked: argparse.Namespace) -> None:
    users = [f"user-{number}" for number in range(asked.users)]
    for processes in asked.processes:
        with cluster.database() as database:
            settings, variables = _own(cluster, database)
            release = with_ranker(random_release(asked.items, settings.learning.dimension))
            fill(
                connect(settings.database),
                users,
                random_sets(len(users), _EXAMPLES, asked.items),
                release,
                cluster.folder,
            )
            _ask(settings, users)
            rate, each = _adapted(cluster, database, settings, variables, processes)
        report.add(f"scale.adapt.{processes}", rate, "users/s", _told(each, "user"))
        if processes == 1:
            _model(report, "adapt", rate, each)


def _own(cluster: Cluster, database: Database) -> tuple[Settings, dict[str, str]]:
    """Topics and a group of one run, and the variables that say so."""
    mark = uuid.uuid4().hex[:8]
    settings = cluster.settings(database, adapt_group=f"scale-{mark}")
    topics = {name: f"{getattr(settings.topics, name)}.{mark}" for name in ("requests", "recommendations", "ads")}
    settings = settings.model_copy(update={"topics": settings.topics.model_copy(update=topics)})
    ensure_topics(settings)
    variables = {f"INNERLOOP_TOPICS__{name.upper()}": topic for name, topic in topics.items()}
    return settings, {**variables, "INNERLOOP_KAFKA__ADAPT_GROUP": f"scale-{mark}"}


def _ask(settings: Settings, users: list[str]) -> None:
    producer, encode, now = clients.producer(settings.kafka, linger_ms=20), msgspec.json.encode, int(time.time() * 1000)
    for user in users:
        producer.produce(settings.topics.requests, encode(AdaptationRequest(user, 1, now, now)), user)
        producer.poll(0)
    if producer.flush(60.0):
        raise SystemExit("The broker did not take the requests.")


def _adapted(
    cluster: Cluster, database: Database, settings: Settings, variables: dict[str, str], processes: int
) -> tuple[float, Costs]:
    """Users per second from the first lists to the last, and the processor time of each user, in microseconds."""
    log = cluster.folder / f"adapt-{processes}.log"
    arguments = ["adapt", "--processes", str(processes), "--devices", "cpu"]
    wanted, lists = settings.topics.requests, settings.topics.recommendations
    ends = LogEnds(settings, [wanted, lists])
    users = ends.read()[wanted]
    with command(arguments, cluster.environment(database, **variables), log) as process:

        def until(enough: int) -> tuple[float, int, Costs]:
            limit = time.monotonic() + _LIMIT_SECONDS
            while (there := ends.read()[lists]) < enough:
                require_running(process, log)
                if time.monotonic() > limit:
                    raise SystemExit(f"{there} of {users} lists after {_LIMIT_SECONDS:.0f} s.")
                time.sleep(_LOOK_SECONDS)
            return time.monotonic(), there, costs(process.pid)

        began, first, before = until(1)
        ended, last, after = until(users)
        return (last - first) / (ended - began), (after - before).each(last - first)


# --- what it costs


def _told(used: Costs, what: str) -> str:
    parts = f"{used.worker:.1f} us of workers, {used.postgres:.1f} of PostgreSQL, {used.kafka:.1f} of the broker"
    return f"{parts} for each {what}"


def _model(report: Report, step: str, alone: float, used: Costs, log_bytes: float = 0.0) -> None:
    """The costs of the process that ran alone as rows, and what they come to for many."""
    what = "event" if step == "ingest" else "user"
    for part in ("worker", "postgres", "kafka"):
        report.add(f"scale.{step}.cpu.{part}", getattr(used, part), f"us/{what}")
    for processes in _MODEL:
        rate = processes * min(alone, 1e6 / used.worker)
        cores = [int(np.ceil(rate * each / 1e6)) for each in (used.postgres, used.kafka)]
        note = f"cores: {processes} for workers, {cores[0]} for PostgreSQL, {cores[1]} for the broker"
        note += f"; log {rate * log_bytes / 1e6:,.0f} MB/s" if log_bytes else ""
        report.add(f"scale.{step}.model.{processes}", rate, f"{what}s/s", note)


if __name__ == "__main__":
    sys.exit(main())
