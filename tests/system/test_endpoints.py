"""What the processes show on their ports, against what the broker and the database say."""

import json
import random
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from confluent_kafka import TopicPartition
from shell import Shell

from innerloop.config import KafkaSettings, Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import group_lag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers.kafka import KafkaServer
from innerloop.worker.servers.watched_process import free_ports, require_free

Wait = Callable[..., None]
EVENT = '{{"event_id":"e{0}","event_type":"click","user_id":"u{1}","item_id":"i","event_time":1750000000000}}'


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text; (0, "") when nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def sample(text: str, name: str, **labels: str) -> float | None:
    """The value of a metric with these labels; None where it is not shown."""
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    found = re.search(rf"^{re.escape(name + (f'{{{wanted}}}' if wanted else ''))} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def send(settings: Settings, first: int, count: int) -> None:
    producer = EventProducer(settings)
    for number in range(first, first + count):
        user = f"u{number % 50}"
        producer.send(user, "click", EVENT.format(number, number % 50).encode())
    producer.finish()


def pair_of_ports() -> int:
    """A free port whose next one is free too, as two members of a pool take them.

    From below those that the system gives to connections: one of these is often taken, and for a minute after its end.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(ServiceError):
            require_free("A pool", [port, port + 1])
            return port


def test_a_stuck_loop_turns_red_tells_its_stacks_and_recovers(shell: Shell, settings: Settings, wait_for: Wait) -> None:
    ensure_topics(settings)
    (port,) = free_ports(1)
    ingest = shell.start("ingest", INNERLOOP_HTTP__PORT=str(port), INNERLOOP_HTTP__STUCK_AFTER_SECONDS="8")
    wait_for(lambda: get(port, "/readyz")[0] == 200)
    send(settings, 0, 100)
    wait_for(lambda: sample(get(port, "/metrics")[1], "innerloop_events_total", outcome="stored") == 100)
    with psycopg2.connect(settings.database.url.get_secret_value().replace("+psycopg2", "")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE support_sets IN ACCESS EXCLUSIVE MODE")
        send(settings, 100, 10)
        wait_for(lambda: get(port, "/livez")[0] == 503)
        assert get(port, "/readyz")[0] == 503
        wait_for(lambda: "ingest.py" in shell.errors(ingest))
    connection.close()
    wait_for(lambda: get(port, "/livez")[0] == 200)
    wait_for(lambda: sample(get(port, "/metrics")[1], "innerloop_events_total", outcome="stored") == 110)
    assert shell.errors(ingest).count("Current thread") == 1, "once"


def test_who_was_stopped_by_the_breaker_shows_it_for_a_while_and_leaves_at_once_when_told_to(
    shell: Shell, settings: Settings, wait_for: Wait
) -> None:
    ensure_topics(settings)
    producer = EventProducer(settings)
    for number in range(40):
        producer.send(f"u{number}", "click", b"a producer gone wrong")
    producer.finish()
    variables = {"INNERLOOP_INGEST__BREAKER_WINDOW": "10"}
    (port,) = free_ports(1)
    lingering = shell.start("ingest", INNERLOOP_HTTP__PORT=str(port), **variables, INNERLOOP_HTTP__LINGER_SECONDS="600")
    wait_for(lambda: sample(get(port, "/metrics")[1], "innerloop_breaker_stops_total") == 1)
    wait_for(lambda: "are bad, the first is" in get(port, "/livez")[1])
    code, why = get(port, "/readyz")
    assert (code, get(port, "/livez")) == (503, (200, why)), "it lives on purpose: nobody is to kill it"
    wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.ingest_group) == 0)  # it has left its group
    lingering.terminate()
    left = shell.finish(lingering, 15)
    assert left.code == 1
    assert "are bad, the first is" in left.err.splitlines()[-1]
    unseen = shell.finish(shell.start("ingest", **variables, INNERLOOP_HTTP__LINGER_SECONDS="600"))
    assert unseen.code == 1, "without a listener there is nothing to stay for"


def test_the_members_of_a_pool_show_the_lag_that_the_broker_tells(
    shell: Shell, settings: Settings, wait_for: Wait
) -> None:
    ensure_topics(settings)
    port = pair_of_ports()
    shell.start("ingest", "--processes", "2", INNERLOOP_HTTP__PORT=str(port))
    for member in (port, port + 1):
        wait_for(lambda member=member: get(member, "/readyz")[0] == 200, 90)

    def shown() -> dict[tuple[str, int], float]:
        texts = [get(member, "/metrics")[1] for member in (port, port + 1)]
        found = {}
        for topic in settings.topics.events:
            for partition in range(settings.topics.partitions):
                where = {"group": settings.kafka.ingest_group, "topic": topic, "partition": str(partition)}
                values = [sample(text, "innerloop_lag_offsets", **where) for text in texts]
                known = [value for value in values if value is not None]
                if len(known) == 1:  # exactly its owner shows it
                    found[topic, partition] = known[0]
        return found

    everything = settings.topics.partitions * len(settings.topics.events)
    wait_for(lambda: len(shown()) == everything)
    with psycopg2.connect(settings.database.url.get_secret_value().replace("+psycopg2", "")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE support_sets IN ACCESS EXCLUSIVE MODE")
        send(settings, 0, 400)
        told = {
            (lag.topic, lag.partition): float(lag.offsets)
            for lag in group_lag(settings, settings.kafka.ingest_group, settings.topics.events)
        }
        assert sum(told.values()) == 400
        wait_for(lambda: shown() == told)
    connection.close()
    wait_for(lambda: sum(shown().values()) == 0)


@pytest.mark.timeout(300)
def test_a_pool_ends_and_starts_again_a_member_whose_loop_is_stuck(
    shell: Shell, settings: Settings, wait_for: Wait
) -> None:
    ensure_topics(settings)
    port = pair_of_ports()
    variables = {"INNERLOOP_HTTP__PORT": str(port), "INNERLOOP_HTTP__STUCK_AFTER_SECONDS": "8"}
    pool = shell.start("ingest", "--processes", "2", **variables)
    for member in (port, port + 1):
        wait_for(lambda member=member: get(member, "/readyz")[0] == 200, 90)
    before = {each.pid for each in psutil.Process(pool.pid).children()}

    def told(what: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in shell.errors(pool).splitlines() if what in line]

    with psycopg2.connect(settings.database.url.get_secret_value().replace("+psycopg2", "")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE support_sets IN ACCESS EXCLUSIVE MODE")
        producer = EventProducer(settings)
        producer.send("one user", "click", EVENT.format(0, 0).encode())
        producer.finish()
        wait_for(lambda: told("starts again"), 60)
    connection.close()
    [stuck] = told("process is stuck")
    [ended] = told("starts again")
    assert "has not turned for" in stuck["why"]
    assert (ended["pid"], ended["why"]) == (stuck["pid"], "killed by SIGKILL"), "it can't hear a SIGTERM"
    wait_for(lambda: len(psutil.Process(pool.pid).children()) == 2)
    after = {each.pid for each in psutil.Process(pool.pid).children()}
    assert before - after == {stuck["pid"]}, "the other one is not stuck"
    group, topics = settings.kafka.ingest_group, settings.topics.events
    wait_for(lambda: not sum(lag.offsets for lag in group_lag(settings, group, topics)), 60)
    assert psutil.pid_exists(pool.pid)


def test_a_gap_in_time_is_not_hidden_by_a_log_that_starts_late(settings: Settings) -> None:
    """Lag is clamped to what the log still holds: deleted records are no work that is left."""
    ensure_topics(settings)
    send(settings, 0, 200)
    topic = settings.topics.clicks
    admin = clients.admin(settings.kafka)
    ends = {lag.partition: lag.end for lag in group_lag(settings, "nobody", [topic])}
    gone = [TopicPartition(topic, partition, end) for partition, end in ends.items()]
    for future in admin.delete_records(gone).values():
        future.result(10)
    assert sum(lag.offsets for lag in group_lag(settings, "nobody", [topic])) == 0


@pytest.mark.timeout(300)
def test_quality_leaves_when_it_is_told_to_though_its_broker_is_gone(
    bare_shell: Shell, tmp_path: Path, wait_for: Wait
) -> None:
    broker = KafkaServer(tmp_path / "kafka", temporary=True, announce=lambda _line: None)
    broker.start()
    try:
        there = Settings(kafka=KafkaSettings(bootstrap_servers=broker.bootstrap_servers))
        ensure_topics(there)
        quality = bare_shell.start("quality", INNERLOOP_KAFKA__BOOTSTRAP_SERVERS=broker.bootstrap_servers)
        wait_for(lambda: members_with_partitions(there.kafka, there.kafka.quality_group), 120)
    finally:
        broker.stop()
    quality.terminate()
    assert bare_shell.finish(quality, 120).code == 0


_HANGS = """
import asyncio
from innerloop.config import load_settings
from innerloop.worker.quality import app as quality

async def hangs(self, stopping):
    print("runs", flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

quality.Quality.run = hangs
quality._FINISH_SECONDS = quality._STOP_SECONDS = 0.5
quality.run_quality(load_settings())
"""


def test_quality_leaves_though_faust_does_not(shell: Shell) -> None:
    """Seen once: its servers were killed while it started, and it was still there half an hour later."""
    assert shell.run("topics").code == 0
    command = [sys.executable, "-c", _HANGS]
    with subprocess.Popen(command, env=shell.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "runs" in process.stdout.readline()
        process.terminate()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
