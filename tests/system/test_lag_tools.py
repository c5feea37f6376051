"""Our lag against Kafka's own tool, while ingest works."""

import itertools
import os
import pty
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from shell import INNERLOOP, Shell

from innerloop.config import Settings
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import LagReader, PartitionLag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers.kafka import KafkaServer, find_java
from innerloop.worker.servers.kafka_jars import cache_folder, chosen_version, fetch_jar, maven, provide_jars

Wait = Callable[..., None]
Partition = tuple[str, int]
EVENT = '{{"event_id":"e{0}","event_type":"click","user_id":"u{1}","item_id":"i","event_time":1750000000000}}'
MAIN = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
DESCRIBE = ["--describe", "--timeout", "50000"]


def described_by_kafka(settings: Settings) -> dict[Partition, tuple[int, int]]:
    """(committed, end) of each partition that the group has committed, as `kafka-consumer-groups --describe` prints."""
    version = chosen_version()
    tool = fetch_jar(maven(cache_folder(version)), f"org.apache.kafka:kafka-tools:{version}")
    path = os.pathsep.join(map(str, [tool, *provide_jars(version, lambda _line: None)]))
    where = ["--bootstrap-server", settings.kafka.bootstrap_servers, "--group", settings.kafka.ingest_group]
    command = [str(find_java().path), "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", path, MAIN, *where, *DESCRIBE]
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


class Terminal:
    """A command on a terminal of its own, as a person sees it."""

    def __init__(self, shell: Shell, *arguments: str) -> None:
        self._end, inside = pty.openpty()
        environment = {**shell.environment, "TERM": "xterm", "COLUMNS": "200", "LINES": "200"}
        command = [str(INNERLOOP), *arguments]
        self.process = subprocess.Popen(
            command, cwd=shell.folder, env=environment, stdin=inside, stdout=inside, stderr=inside
        )
        os.close(inside)
        self.screen = ""

    def shows(self, text: str) -> bool:
        """Whether it has shown this since it began."""
        while select.select([self._end], [], [], 0.0)[0]:
            try:
                self.screen += os.read(self._end, 65_536).decode(errors="replace")
            except OSError:  # it has left
                break
        return text in self.screen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def watching(shell: Shell, settings: Settings) -> Iterator[Terminal]:
    ensure_topics(settings)
    terminal = Terminal(shell, "lag", "--watch")
    yield terminal
    terminal.close()


def test_watch_shows_lag_again_and_again_until_ctrl_c_and_leaves_quietly(
    watching: Terminal, settings: Settings, wait_for: Wait
) -> None:
    wait_for(lambda: watching.shows("ok: nothing waits."), 60)
    producer = EventProducer(settings)
    producer.send("u1", "click", EVENT.format(1, 1).encode())
    producer.finish()
    wait_for(lambda: watching.shows("stopped: 1 records wait, the oldest for"), 60)
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(30) in {0, 130}
    for loud in ("Traceback", "Aborted", "innerloop: "):
        assert not watching.shows(loud), watching.screen[-2_000:]


def test_a_broker_that_never_had_a_group_is_told_of_too(bare_shell: Shell) -> None:
    """Its first coordinator is only starting when it is asked: no reason to crash."""
    kafka = KafkaServer(bare_shell.folder / "kafka", temporary=True, announce=lambda _line: None)
    kafka.start()
    try:
        where = {"INNERLOOP_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
        assert bare_shell.run("topics", **where).code == 0
        shown = bare_shell.run("lag", **where)
    finally:
        kafka.stop()
    assert shown.code == 0, (shown.code, shown.err)
    assert shown.out.count("ok: nothing waits.") == 2
