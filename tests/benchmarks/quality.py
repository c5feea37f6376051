"""What one `innerloop quality` process holds: records/s that it reads and drops, and that it reads and judges.

    innerloop up                                                 # in another terminal; take over the two lines
    .venv/bin/python tests/benchmarks/quality_rate.py --records 200000

The topics are filled first, so the process is never short of records. One of three records is a list of fifty items.
Time is counted from the first commit of offsets to the one that leaves next to nothing, of the sample included; on a
machine with other work the records per second of the process's own CPU time say more.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import uuid

import psutil

from innerloop.config import Settings, load_settings
from innerloop.streams import clients
from innerloop.streams.lag import LagReader
from innerloop.streams.topics import ensure_topics

_USERS = 20_000
_TICKS = 10  # one a second goes on, commits come every few seconds


def _settings(per_second: int) -> Settings:
    mark, settings = uuid.uuid4().hex[:6], load_settings()
    names = {name: f"{value}.{mark}" for name, value in settings.topics.model_dump().items() if isinstance(value, str)}
    quality = {"events_per_second": per_second, "from_beginning": True, "window_seconds": 60, "grace_seconds": 30}
    return settings.model_copy(
        update={
            "topics": settings.topics.model_copy(update=names),
            "kafka": settings.kafka.model_copy(update={"quality_group": f"quality.{mark}"}),
            "quality": settings.quality.model_copy(update=quality),
        }
    )


def _fill(settings: Settings, records: int) -> None:
    producer, began = clients.producer(settings.kafka), int(time.time() * 1000) - 600_000
    items = [{"item_id": f"item-{n}", "score": 0.123456} for n in range(50)]
    for n in range(records):
        at, user = began + n * 500_000 // records, f"user-{n * 7_919 % _USERS}"
        if n % 3 == 2:
            head = {"model_version": 1, "support_version": n, "support_size": 9, "event_time": at, "scored_at": at}
            record = {"user_id": user, "model": "recommendations", "method": "bayes", "items": items, **head}
            topic = settings.topics.recommendations
        else:
            kind = {"event_id": f"e{n}", "event_type": "click", "item_id": f"item-{n % 90}", "event_time": at}
            topic, record = settings.topics.clicks, {"user_id": user, **kind}
        producer.produce(topic, json.dumps(record), user, timestamp=at)
        producer.poll(0)
    producer.flush(60)


def _measure(settings: Settings, records: int) -> tuple[float, float]:
    """Records of one process per second, and per second of its CPU time."""
    environment = {
        "INNERLOOP_KAFKA__QUALITY_GROUP": settings.kafka.quality_group,
        "INNERLOOP_TOPICS": settings.topics.model_dump_json(),
        "INNERLOOP_QUALITY": settings.quality.model_dump_json(),
    }
    member = subprocess.Popen([sys.executable, "-m", "innerloop.worker", "quality"], env={**os.environ, **environment})
    group = settings.kafka.quality_group
    topics = [settings.topics.clicks, settings.topics.recommendations]
    try:
        with LagReader(settings) as reader:
            first: tuple[float, float, int] | None = None
            while left := sum(each.offsets for each in reader.read(group, topics)):
                if first is None and left < records:
                    first = (time.monotonic(), _cpu(member.pid), left)
                time.sleep(0.1)
            while sum(each.offsets for each in reader.read(group, [f"{group}-sample"])) > _TICKS:
                time.sleep(0.1)
        assert first is not None
        return first[2] / (time.monotonic() - first[0]), first[2] / (_cpu(member.pid) - first[1])
    finally:
        member.terminate()
        member.wait(60)


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=200_000)
    records = parser.parse_args().records
    for name, per_second in (("default rate", Settings().quality.events_per_second), ("everything judged", 10_000_000)):
        settings = _settings(per_second)
        ensure_topics(settings)
        _fill(settings, records)
        rate, by_cpu = _measure(settings, records)
        print(f"{name} ({per_second}/s): {rate:,.0f} records/s, {by_cpu:,.0f} per CPU second", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
