"""Quality: what one `innerloop quality` process holds, of records that it reads and drops and of those that it judges.

    tests/bench.sh quality [--records 200000] [--json FILE]

quality.sampled.<n>      records/s that one process reads when about n a second may be judged (the default), the others
                         being read and dropped undecoded
quality.sampled.all      the same when all are judged
quality.sampled.<>.cpu   its own processor time for each of these records, in microseconds: on a machine with other work
                         this says more

The topics are filled first, so that the process is never short of records. Two of three are clicks, one is a list of
fifty items. The clock runs from the first commit of offsets to the one that leaves nothing, of the sample included.
Then time is made to pass, and the clicks of the closed windows are counted: where all are judged it must be all, each
once, those that came late included.
"""

import argparse
import json
import sys
import time
import uuid
from dataclasses import dataclass

import msgspec
from cluster import Cluster, Database, command, require_running, running_cluster, seen
from costs import costs
from machine import Report, describe, options

from innerloop.config import Settings
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.streams import clients
from innerloop.streams.lag import LagReader
from innerloop.streams.tail import Tail
from innerloop.streams.topics import ensure_topics, partition_counts

_USERS = 20_000
_ALL = 10_000_000
_TICKS = 10  # one a second goes on, commits come every few seconds
_LOOK_SECONDS = 0.1
_PASS_SECONDS = 0.5
_KEPT = 1_000  # windows


@dataclass(frozen=True)
class Run:
    """Records per second, microseconds of processor time for each, and clicks that windows told of."""

    rate: float
    cpu: float
    told: int


def main() -> int:
    """Fill, measure and verify, at the default rate and at none."""
    asked = _options()
    with running_cluster() as cluster:
        report = Report(describe(cluster.kafka_version(), "-"))
        for name, per_second in ((str(Settings().quality.events_per_second), None), ("all", _ALL)):
            with cluster.database() as database:
                settings = _own(cluster, database, per_second)
                clicks = _fill(settings, asked.records)
                run = _measure(cluster, database, settings, asked.records, clicks if per_second else 1)
            row = f"quality.sampled.{name}"
            if (per_second and run.told != clicks) or not 0 < run.told <= clicks:
                report.missing(row, "records/s", f"windows tell of {run.told} of {clicks} clicks")
                continue
            report.add(row, run.rate, "records/s", f"windows tell of all {clicks:,} clicks" if per_second else "")
            report.add(f"{row}.cpu", run.cpu, "us/record")
        return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    return parser.parse_args()


def _own(cluster: Cluster, database: Database, per_second: int | None) -> Settings:
    """Topics and a group of one run."""
    mark, settings = uuid.uuid4().hex[:6], cluster.settings(database)
    names = {name: f"{value}.{mark}" for name, value in settings.topics.model_dump().items() if isinstance(value, str)}
    quality = {"from_beginning": True} | ({} if per_second is None else {"events_per_second": per_second})
    made = settings.model_copy(
        update={
            "topics": settings.topics.model_copy(update=names),
            "kafka": settings.kafka.model_copy(update={"quality_group": f"quality-{mark}"}),
            "quality": settings.quality.model_copy(update=quality),
        }
    )
    ensure_topics(made)
    return made


def _fill(settings: Settings, records: int) -> int:
    """Put the records on their topics; gives the number of clicks."""
    producer, began = clients.producer(settings.kafka), int(time.time() * 1000) - 600_000
    items, clicks = [{"item_id": f"item-{n}", "score": 0.123456} for n in range(50)], 0
    for n in range(records):
        at, user = began + n * 500_000 // records, f"user-{n * 7_919 % _USERS}"
        if n % 3 == 2:
            head = {"model_version": 1, "support_version": n, "support_size": 9, "event_time": at, "scored_at": at}
            record = {"user_id": user, "model": "recommendations", "method": "bayes", "items": items, **head}
            topic = settings.topics.recommendations
        else:
            topic, record = settings.topics.clicks, _event(f"e{n}", "click", user, f"item-{n % 90}", at)
            clicks += 1
        producer.produce(topic, json.dumps(record), user, timestamp=at)
        producer.poll(0)
    if producer.flush(60.0):
        raise SystemExit("The broker did not take the records.")
    return clicks


def _event(event_id: str, kind: str, user: str, item: str, at: int) -> dict[str, object]:
    return {"event_id": event_id, "event_type": kind, "user_id": user, "item_id": item, "event_time": at}


def _measure(cluster: Cluster, database: Database, settings: Settings, records: int, enough: int) -> Run:
    """One process, until nothing is left and windows have told of `enough` clicks."""
    variables = {
        "INNERLOOP_KAFKA__QUALITY_GROUP": settings.kafka.quality_group,
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_QUALITY": settings.quality.model_dump_json(),
    }
    log, group = cluster.folder / f"{settings.kafka.quality_group}.log", settings.kafka.quality_group
    read = [settings.topics.clicks, settings.topics.recommendations]
    with (
        command(["quality"], cluster.environment(database, **variables), log) as process,
        LagReader(settings) as reader,
    ):

        def left(*topics: str) -> int:
            require_running(process, log)
            time.sleep(_LOOK_SECONDS)
            return sum(each.offsets for each in reader.read(group, topics))

        while (first := left(*read)) == records:
            pass
        if not first:
            raise SystemExit("All was read before the first commit: ask for more --records.")
        began, before = time.monotonic(), costs(process.pid).worker
        while left(*read):
            pass
        while left(f"{group}-sample") > _TICKS:
            pass
        seconds, used = time.monotonic() - began, costs(process.pid).worker - before
        windows = _Windows(settings)
        seen(process, log, lambda: windows.told() >= enough)
        return Run(first / seconds, used * 1e6 / first, windows.told())


class _Windows:
    """Lets time pass, and counts the clicks of the windows that are closed by it; a window that comes twice is one."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._tail = settings, Tail(settings, settings.topics.quality_windows, last=_KEPT)
        self._producer, self._purchases = clients.producer(settings.kafka), settings.topics.purchases
        self._partitions = partition_counts(settings, [self._purchases])[self._purchases]
        self._told: dict[int, int] = {}

    def told(self) -> int:
        time.sleep(_PASS_SECONDS)
        now = int(time.time() * 1000)
        for partition in range(self._partitions):
            event = json.dumps(_event(f"{now}-{partition}", "purchase", "passer-by", "item", now))
            self._producer.produce(self._purchases, event, "passer-by", partition=partition)
        self._producer.flush(10.0)
        for record in self._tail.new(_KEPT):
            window = msgspec.json.decode(record.value or b"", type=QualityWindow)
            self._told[window.window_start] = window.clicks + window.late
        return sum(self._told.values())


if __name__ == "__main__":
    sys.exit(main())
