"""Ingest: events that lie in Kafka to support sets committed in Postgres, beside its limits and its peers.

    tests/bench.sh ingest [--events 1000000] [--only innerloop,faust,...] [--json FILE]

The records are those of clicks.py, all of them in `events.clicks` (four partitions) before anything starts; broker and
database share the machine's cores with what is measured, and Postgres writes with fsync on. Every run has an empty
database and a consumer group of its own.

ingest.innerloop            `innerloop ingest --processes 2`, as a user runs it. The clock runs from the first claim of
                            a partition that is visible in Postgres (made when the group assigns it, before any record
                            is read) until a read of the ledger sees the last record's offset; both are looked at every
                            20 ms. Process start is not counted, rebalancing after the first claim is. The rest of the
                            product's work (deduplication, order, adaptation requests, offsets) is in it. The result
                            is compared with an oracle: number of users, number of examples, sum of event times.
ingest.innerloop_1process   the same with one process.
ingest.rss_mb               the largest ingest process's peak resident memory (VmHWM), over all those runs.
ingest.postgres_limit       the product's transactions alone, see ingest_limits.py: one connection, and two.
ingest.kafka_limit          one confluent-kafka consumer that reads and does nothing.
ingest.faust, .quix,        per-user arrays by batched upserts into the same Postgres, see peers/: the same number of
  .pathway                  processes, the clock from the group's first assignment to the last commit, cut off after
                            --peer-seconds. Their result is reported, not compared: they don't deduplicate.
"""

import argparse
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from clicks import Clicks, Stored, send
from cluster import Cluster, command, ledger, running_cluster, seen
from costs import Costs, costs
from ingest_limits import kafka_limit, postgres_limit, stored
from ingest_peers import SCRIPTS, measure
from machine import CONSOLE, Report, describe, options
from peer_environment import PeerError

from innerloop.config import load_settings

_UNIT = "events/s"
_PARTS = ("innerloop", "limits", *SCRIPTS)


@dataclass(frozen=True)
class Run:
    """One run of the product.

    Events per second, processor time of it, peak memory in MB, how many processes owned the topic at the end, what was
    stored.
    """

    rate: float
    used: Costs
    rss_mb: float
    owners: int
    stored: Stored


def main() -> int:
    """Measure what was asked for."""
    asked = _options()
    clicks = Clicks.draw(asked.events)
    with running_cluster() as cluster:
        report = Report(describe(cluster.kafka_version(), cluster.postgres_version()))
        with cluster.database() as database:
            settings = cluster.settings(database)
            send(settings, clicks)
            if "limits" in asked.only:
                _limits(report, cluster, clicks, asked.repeats)
                rates = [kafka_limit(settings, len(clicks)) for _ in range(asked.repeats)]
                report.add_median("ingest.kafka_limit", rates, _UNIT, "one consumer, no work")
        if "innerloop" in asked.only:
            _innerloop(report, cluster, clicks, asked)
        for peer in SCRIPTS:
            if peer in asked.only:
                _peer(report, cluster, clicks, peer, asked)
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2, help="of the product and of each peer")
    parser.add_argument("--repeats", type=int, default=3, help="of product and limits; the median counts")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="a peer is cut off after this long")
    parser.add_argument("--only", type=_parts, default=_PARTS, help=f"of {','.join(_PARTS)}")
    return parser.parse_args()


def _parts(text: str) -> Sequence[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(_PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}")
    return parts


def _limits(report: Report, cluster: Cluster, clicks: Clicks, repeats: int) -> None:
    expected = clicks.expected(load_settings().support.capacity)
    for connections, suffix in ((1, ""), (2, "_2connections")):
        runs = [postgres_limit(cluster, clicks, connections) for _ in range(repeats)]
        name = f"ingest.postgres_limit{suffix}"
        if wrong := _wrong([result for _, result in runs], expected):
            report.missing(name, _UNIT, wrong)
        else:
            report.add_median(name, [rate for rate, _ in runs], _UNIT, "COPY, merge, ledger of finished bytes")


def _innerloop(report: Report, cluster: Cluster, clicks: Clicks, asked: argparse.Namespace) -> None:
    expected = clicks.expected(load_settings().support.capacity)
    peak = 0.0
    for processes, suffix in ((asked.processes, ""), (1, "_1process")):
        runs = [run(cluster, clicks, processes) for _ in range(asked.repeats)]
        peak = max(peak, *(run.rss_mb for run in runs))
        name = f"ingest.innerloop{suffix}"
        if wrong := _wrong([run.stored for run in runs], expected):
            report.missing(name, _UNIT, wrong)
        else:
            owners = "/".join(str(run.owners) for run in runs)
            right = f"{expected.examples:,} examples of {expected.users:,} users, as the oracle"
            note = f"processes: {processes}, of which owned clicks at the end: {owners}; {right}"
            report.add_median(name, [run.rate for run in runs], _UNIT, note)
    report.add("ingest.rss_mb", peak, "MB", "largest process of all runs")


def _wrong(found: Sequence[Stored], expected: Stored) -> str:
    """What is wrong with the results; empty when nothing is."""
    return next((f"stored {each}, the oracle says {expected}" for each in found if each != expected), "")


def run(cluster: Cluster, clicks: Clicks, processes: int) -> Run:
    """One run over all records, from an empty database; see the module for what is timed."""
    name = f"innerloop-{uuid.uuid4().hex[:8]}"
    log = cluster.folder / f"{name}.log"
    with cluster.database() as database:
        settings = cluster.settings(database, ingest_group=name)
        # As the README advises for more than one process on Kafka 4.
        protocol = "consumer" if processes > 1 else "classic"
        environment = cluster.environment(
            database, INNERLOOP_KAFKA__INGEST_GROUP=name, INNERLOOP_KAFKA__GROUP_PROTOCOL=protocol
        )
        topic = settings.topics.clicks
        connection = database.open()
        cursor = connection.cursor()
        with command(["ingest", "--processes", str(processes)], environment, log) as process:
            began, before = seen(process, log, lambda: ledger(cursor, topic, "count(*)") > 0), costs(process.pid)
            ended = seen(process, log, lambda: ledger(cursor, topic, "coalesce(sum(next_offset), 0)") >= len(clicks))
            used = costs(process.pid) - before
            owners, peak = ledger(cursor, topic, "count(DISTINCT owner)"), _peak_mb(process)
        connection.close()
        return Run(len(clicks) / (ended - began), used, peak, owners, stored(settings))


def _peak_mb(process: "subprocess.Popen[bytes]") -> float:
    """The peak resident memory of the largest of the process and its children, in MB (2^20 bytes)."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    return max(_high_water_kb(pid) for pid in family) / 1024


def _high_water_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _peer(report: Report, cluster: Cluster, clicks: Clicks, peer: str, asked: argparse.Namespace) -> None:
    CONSOLE.print(f"Running {peer}.")
    name, topic = f"ingest.{peer}", load_settings().topics.clicks
    try:
        measured = measure(peer, cluster, clicks, topic=topic, processes=asked.processes, limit=asked.peer_seconds)
    except PeerError as error:
        report.missing(name, _UNIT, str(error))
        return
    done = f"{measured.events:,} events in {measured.seconds:.1f} s, {asked.processes} processes"
    seen = f"first record after {measured.first:.1f} s, {measured.examples:,} examples stored"
    report.add(name, measured.rate, _UNIT, f"{done}; {seen}")


if __name__ == "__main__":
    sys.exit(main())
