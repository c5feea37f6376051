"""Our lag against Kafka's own tool, while ingest works."""

import itertools
import os
import subprocess
import threading
from collections.abc import Callable

from shell import Shell

from innerloop.config import Settings
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import LagReader, PartitionLag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.kafka_jars import cache_folder, chosen_version, fetch_jar, maven, provide_jars
from innerloop.worker.kafka_server import find_java

Wait = Callable[..., None]
Partition = tuple[str, int]
EVENT = '{{"event_id":"e{0}","event_type":"click","user_id":"u{1}","item_id":"i","event_time":1750000000000}}'
MAIN = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"


def described_by_kafka(settings: Settings) -> dict[Partition, tuple[int, int]]:
    """(committed, end) of each partition that the group has committed, as `kafka-consumer-groups --describe` prints."""
    version = chosen_version()
    tool = fetch_jar(maven(cache_folder(version)), f"org.apache.kafka:kafka-tools:{version}")
    path = os.pathsep.join(map(str, [tool, *provide_jars(version, lambda _line: None)]))
    where = ["--bootstrap-server", settings.kafka.bootstrap_servers, "--group", settings.kafka.ingest_group]
    command = [str(find_java().path), "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", path, MAIN, *where, "--describe"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(settings.kafka.ingest_group)]
    assert rows, done.stdout + done.stderr
    found = {}
    for _, topic, partition, committed, end, lag, *_ in rows:
        if committed != "-":
            assert int(lag) == int(end) - int(committed)
            found[topic, int(partition)] = (int(committed), int(end))
    return found


def by_partition(lags: list[PartitionLag]) -> dict[Partition, PartitionLag]:
    return {(lag.topic, lag.partition): lag for lag in lags}


def test_our_lag_is_what_kafka_s_own_tool_says_under_load(shell: Shell, settings: Settings, wait_for: Wait) -> None:
    ensure_topics(settings)
    ingest = shell.start("ingest", INNERLOOP_INGEST__BATCH_SIZE="200")
    wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.ingest_group) == 1)
    enough = threading.Event()

    def produce() -> None:
        producer, numbers = EventProducer(settings), itertools.count()
        while not enough.wait(0.01):
            for number in itertools.islice(numbers, 100):
                producer.send(f"u{number % 997}", "click", EVENT.format(number, number % 997).encode())
        producer.finish()

    load = threading.Thread(target=produce)
    load.start()
    try:
        with LagReader(settings) as reader:
            clicks = [settings.topics.clicks]
            group = settings.kafka.ingest_group
            wait_for(lambda: all(lag.committed for lag in reader.read(group, clicks)))
            before = by_partition(reader.read(group, clicks))
            theirs = described_by_kafka(settings)
            after = by_partition(reader.read(group, clicks))
    finally:
        enough.set()
        load.join()
    assert before.keys() <= theirs.keys()
    moved = 0
    for partition, first in before.items():
        (committed, end), then = theirs[partition], after[partition]
        assert (first.committed or 0) <= committed <= (then.committed or 0)
        assert first.end <= end <= then.end
        moved += then.end - first.end
    assert moved > 0, "there was no load"
    ingest.terminate()
    assert shell.finish(ingest, 20).code == 0
    with LagReader(settings) as reader:
        ours = {place: (lag.committed, lag.end) for place, lag in by_partition(reader.read(group, clicks)).items()}
    theirs = described_by_kafka(settings)
    assert {place: theirs[place] for place in ours} == ours, "and at rest to the offset"
