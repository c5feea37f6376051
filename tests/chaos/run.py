"""Chaos: everything breaks while events come, and in the end everything must be as if nothing had.

    .venv/bin/python tests/chaos/run.py --minutes N --seed S --report FILE

Starts a Kafka and a PostgreSQL of its own, `innerloop ingest` and `innerloop adapt` as real processes, a seeded
producer and a seeded storm of faults; waits until all has settled and lets the judge compare what is there with a fold
of what was produced. Any seed will do. The report is JSON; `ok` means no finding and every kind of fault seen. Exit
code 0 when ok, else 1. What happens is told on standard error.
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg2
from fleet import Fleet
from settle import settle
from storm import WORKERS, Storm, tell
from traffic import Traffic
from world import connected, impressions, ledger_writes, prepare, random_release

from innerloop.config import (
    AdaptSettings,
    IngestSettings,
    KafkaSettings,
    Settings,
    SupportSettings,
    TopicSettings,
    load_settings,
)
from innerloop.evaluation.judge.evidence import gathered, rules_of
from innerloop.evaluation.judge.verdict import Evidence, Verdict, judge
from innerloop.learning.releases import save
from innerloop.store.database import Database, connect
from innerloop.store.migrate import migrate
from innerloop.streams.partitions import Partition
from innerloop.streams.whole_topic import committed_offsets
from innerloop.worker.servers.kafka import KafkaServer
from innerloop.worker.servers.services import Services, running_services
from innerloop.worker.train import register

ITEMS = 1_000
SESSION_SECONDS = 4.0
"""As short as a busy machine allows: how long a partition of a dead worker stands still."""
_SESSION_MS = str(int(1000 * SESSION_SECONDS))
FENCED = 4
"""The exit code of a worker that found itself superseded."""
_SETTLE_SECONDS = 90.0
_RESERVED_SECONDS = 30.0
_BASE = Settings(
    support=SupportSettings(capacity=32),
    ingest=IngestSettings(batch_size=5_000, cached_users=10_000, max_record_bytes=4_096),
    adapt=AdaptSettings(batch_size=2_048, top=8),
)


def main() -> int:
    """Run, report, and say by the exit code whether all was well."""
    asked = _asked()
    logging.getLogger("librdkafka").addHandler(_handler(asked.logs))
    place = tempfile.TemporaryDirectory(prefix="innerloop-chaos-", ignore_cleanup_errors=True)
    with place as folder, _services(Path(folder)) as running:
        report = _run(running, Path(folder), asked)
    asked.report.write_text(json.dumps(report, indent=1) + "\n")
    tell(f"ok: {report['ok']}, {report['events']} events, {sum(report['faults'].values())} faults")
    return 0 if report["ok"] else 1


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="of the whole run, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("chaos.json"))
    parser.add_argument("--most-per-second", type=float, default=20_000.0, help="events; fewer when ingest is behind")
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this folder")
    protocols = ("classic", "consumer")
    parser.add_argument("--protocol", choices=protocols, default="classic", help="of the consumer groups (KIP-848)")
    parser.add_argument("--ranked", action="store_true", help="lists depend on what everybody does, too")
    return parser.parse_args()


def _handler(logs: Path | None) -> logging.Handler:
    if logs is None:
        return logging.NullHandler()
    logs.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(logs / "run.log")


def _run(services: Services, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    settings = _settings(services, asked.protocol)
    engine = connect(settings.database)
    migrate(engine)
    prepare(settings, engine, folder, item_count=ITEMS, ranked=asked.ranked)
    engine.dispose()  # its connection would not survive the storm
    fleet = Fleet(settings, folder, {"ingest": WORKERS, "adapt": WORKERS}, logs=asked.logs)
    traffic = Traffic(settings, asked.seed, items=ITEMS, most_per_second=asked.most_per_second)
    traffic.backlog = _Backlog(settings, traffic)

    def release(version: int) -> None:
        made = random_release(ITEMS, ranked=asked.ranked, version=version)
        engine = connect(settings.database)
        register(settings, engine, made, save(made, folder))
        engine.dispose()

    storm = Storm(settings, services, fleet, traffic, asked.seed, session_seconds=SESSION_SECONDS, release=release)
    fleet.start()
    traffic.start()
    storm.rage(began + asked.minutes * 60 - _RESERVED_SECONDS)
    traffic.finish()
    tell(f"no more traffic: {traffic.sent} records")
    unsettled = settle(settings, _SETTLE_SECONDS)
    fleet.close()
    tell("judging")
    gc.disable()  # millions of tuples and not one cycle
    verdict = judge(_gathered(settings, engine), rules_of(settings))
    engine.dispose()
    ends = committed_offsets(settings, settings.kafka.ingest_group, list(settings.topics.ingested))
    missing = _sent_and_found(traffic, verdict, {place: end for place, (_, end) in ends.items()})
    findings = [*fleet.findings, *traffic.errors, *unsettled, *missing, *verdict.findings]
    return {
        "seed": asked.seed,
        "seconds": round(time.monotonic() - began, 1),
        "events": verdict.counts["records"],
        "faults": dict(storm.faults),
        "findings": findings,
        "ok": not findings and not storm.missing,
        "counts": dict(verdict.counts),
        "asleep": dict(storm.asleep),
        "fenced": fleet.exits.get(FENCED, 0),
        "exits": {str(code): count for code, count in sorted(fleet.exits.items())},
        "producers_renewed": traffic.renewed,
        "sent_again": traffic.again,
        "most_worker_memory_mb": fleet.most_memory >> 20,
    }


@contextmanager
def _services(folder: Path) -> Iterator[Services]:
    """Servers of our own; how long a session of the new group protocol lasts is the broker's to say."""
    names = ("group.consumer.min.session.timeout.ms", "group.consumer.session.timeout.ms")
    kafka = KafkaServer(folder / "kafka", announce=tell, properties=dict.fromkeys(names, _SESSION_MS))
    kafka.start()
    try:
        settings = load_settings(kafka={"bootstrap_servers": kafka.bootstrap_servers}, database={})
        with running_services(settings, announce=tell) as running:
            yield replace(running, kafka=kafka)
    finally:
        kafka.stop()


def _gathered(settings: Settings, engine: Database) -> Evidence:
    return gathered(settings, engine, writes=ledger_writes(settings), shown=impressions(settings))


def _settings(services: Services, protocol: str) -> Settings:
    session = {"session.timeout.ms": _SESSION_MS, "heartbeat.interval.ms": "500"} if protocol == "classic" else {}
    properties = {**session, "reconnect.backoff.max.ms": "500"}
    kafka = KafkaSettings(bootstrap_servers=services.bootstrap_servers, properties=properties, group_protocol=protocol)
    return _BASE.model_copy(
        update={
            "kafka": kafka,
            "topics": TopicSettings(partitions=4),
            "database": load_settings(database={"url": services.database_url}).database,
        }
    )


class _Backlog:
    """How many records are sent and not stored yet; None while the database is away."""

    def __init__(self, settings: Settings, traffic: Traffic) -> None:
        self._settings, self._traffic = settings, traffic

    def __call__(self) -> int | None:
        try:
            with connected(self._settings) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT coalesce(sum(next_offset), 0) FROM partition_ledger")
                (stored,) = cursor.fetchone() or (0,)
                return self._traffic.sent - int(stored)
        except psycopg2.Error:
            return None


def _sent_and_found(traffic: Traffic, verdict: Verdict, ends: Mapping[Partition, int]) -> list[str]:
    """The topics, which end at `ends`, hold what was sent: else the judge would judge something else."""
    found = verdict.counts["records"]
    if traffic.sent <= found <= traffic.sent + traffic.again:
        return []
    told = [f"{traffic.sent} records were sent, {traffic.again} of them twice, and {found} are on the topics."]
    for (topic, partition), arrived in sorted(traffic.arrived.items()):
        end = ends.get((topic, partition), 0)
        if arrived.count > end or arrived.highest >= end:
            told.append(
                f"The broker lost what it had confirmed: of {topic}[{partition}] {arrived}, its log ends at {end}."
            )
    return told


if __name__ == "__main__":
    sys.exit(main())
