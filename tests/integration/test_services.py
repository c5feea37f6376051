"""The embedded Kafka and PostgreSQL, for real: they start, they keep data, they never outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from innerloop.config import DatabaseSettings, KafkaSettings, Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.worker.servers import kafka_jars, postgres, services
from innerloop.worker.servers.kafka import KafkaServer
from innerloop.worker.servers.postgres import PostgresServer
from innerloop.worker.servers.services import Services, running_services

OURS = Settings(kafka=KafkaSettings(bootstrap_servers=""), database=DatabaseSettings())
OWN_PARENT = """
import os, sys, time
from innerloop.config import DatabaseSettings, KafkaSettings, Settings
from innerloop.worker.servers.services import running_services

with running_services(Settings(kafka=KafkaSettings(), database=DatabaseSettings()), announce=lambda _: None) as both:
    if os.fork() == 0:  # a worker that lives on must not keep the servers alive
        time.sleep(60)
        os._exit(0)
    print(both.kafka.pid, both.postgres.pid, both.kafka.folder.parent, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for each in (folder, *folder.parents[:3]):
        if each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o011)  # PostgreSQL leaves root behind and must get in
    return folder


@pytest.fixture(scope="module")
def both(data: Path) -> Iterator[Services]:
    with running_services(OURS, data) as running:
        yield running


def _ask(url: str, statement: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def _topics(bootstrap_servers: str) -> set[str]:
    return set(AdminClient({"bootstrap.servers": bootstrap_servers}).list_topics(timeout=10).topics)


def _add_topic(bootstrap_servers: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    admin.create_topics([NewTopic(name, 1)])[name].result(10)


def test_both_start_and_answer(both: Services) -> None:
    assert _topics(both.bootstrap_servers) == set()
    assert _ask(both.database_url, "SELECT 1") == [(1,)]
    assert _ask(both.database_url, "SHOW fsync") == [("on",)]
    assert _ask(both.database_url, "SHOW server_encoding") == [("UTF8",)]
    assert _ask(both.database_url, "SHOW timezone") == [("UTC",)]


def test_data_survives_a_stop_and_a_crash_of_each_server(both: Services) -> None:
    assert both.kafka
    assert both.postgres
    _add_topic(both.bootstrap_servers, "kept")
    _ask(both.database_url, "CREATE TABLE kept AS SELECT 7 AS number")
    pids = both.kafka.pid, both.postgres.pid
    both.postgres.stop("immediate")
    with pytest.raises(psycopg2.OperationalError):
        _ask(both.database_url, "SELECT 1")
    both.kafka.kill()
    assert (both.kafka.pid, both.postgres.pid) == (0, 0)
    both.postgres.start()
    both.kafka.start()
    assert pids != (both.kafka.pid, both.postgres.pid)
    assert "kept" in _topics(both.bootstrap_servers)
    assert _ask(both.database_url, "SELECT number FROM kept") == [(7,)]


def test_a_given_folder_is_found_again(both: Services, data: Path) -> None:
    _add_topic(both.bootstrap_servers, "found")
    _ask(both.database_url, "CREATE TABLE found AS SELECT 8 AS number")
    assert both.kafka
    assert both.postgres
    both.kafka.stop()
    both.postgres.stop()
    with running_services(OURS, data) as again:
        assert "found" in _topics(again.bootstrap_servers)
        assert _ask(again.database_url, "SELECT number FROM found") == [(8,)]


def test_a_killed_parent_takes_both_with_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", OWN_PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    kafka, postgres, folder = parent.stdout.readline().split()
    children = [psutil.Process(int(pid)) for pid in (kafka, postgres)]
    forked = [each for each in psutil.Process(parent.pid).children() if each.cmdline()[1:2] == ["-c"]]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    for worker in forked:
        worker.kill()
    parent.stdout.close()
    assert forked
    assert not alive
    deadline = time.monotonic() + 30
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()


def test_what_is_set_is_used_and_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = Settings.model_validate(
        {"kafka": {"bootstrap_servers": "broker:9092"}, "database": {"url": "postgresql+psycopg2://db/shop"}}
    )
    said: list[str] = []
    services.up(outside, None, said.append)
    assert said == ["# Both are set already: nothing was started."], "an address may hold somebody's password"
    monkeypatch.setattr(KafkaServer, "start", lambda _: pytest.fail("an outside broker is set"))
    half = Settings(kafka=KafkaSettings(bootstrap_servers="broker:9092"), database=DatabaseSettings())
    with running_services(half) as running:
        assert running.kafka is None
        assert _ask(running.database_url, "SELECT 1") == [(1,)]


def test_a_tampered_jar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_jars, "cache_folder", lambda _: tmp_path)
    (tmp_path / "jars").mkdir()
    for jar in kafka_jars.read_lock(kafka_jars.DEFAULT_VERSION):
        (tmp_path / "jars" / jar.filename).write_bytes(b"not the jar")
    with pytest.raises(SettingsError, match="SHA-256 differs"):
        kafka_jars.provide_jars(kafka_jars.DEFAULT_VERSION, print)


def test_a_version_without_a_lock_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"locks for 3\.9\.1, 4\.3\.0 only"):
        KafkaServer(Path("unused"), version="0.8.2").start()


def test_a_taken_port_and_a_broken_folder_are_said(both: Services, tmp_path: Path) -> None:
    assert both.kafka
    other = KafkaServer(tmp_path / "kafka")
    (tmp_path / "kafka" / "data").mkdir(parents=True)
    (tmp_path / "kafka" / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=x\n")
    with pytest.raises(ServiceError, match=r"stopped while starting.*kafka\.log"):
        other.start()
    both.kafka.start()
    other.port = both.kafka.port
    with pytest.raises(ServiceError, match="something else does"):
        other.start()


def test_up_runs_until_sigterm() -> None:
    code = (
        "from innerloop.config import DatabaseSettings, KafkaSettings, Settings\n"
        "from innerloop.worker.servers.services import up\n"
        "up(Settings(kafka=KafkaSettings(), database=DatabaseSettings()), None, lambda line: print(line, flush=True))\n"
    )
    lines = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.strip())
            if "Ctrl-C" in line:
                process.terminate()
        assert process.wait(20) == 0
    exported = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
    assert set(exported) == {"INNERLOOP_KAFKA__BOOTSTRAP_SERVERS", "INNERLOOP_DATABASE__URL"}
    with pytest.raises(psycopg2.OperationalError):
        _ask(exported["INNERLOOP_DATABASE__URL"], "SELECT 1")


def test_programs_that_postgres_cannot_reach_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user can reach its own programs")
    wheel = postgres.wheel_folder()
    monkeypatch.setattr(postgres, "closed_to_others", lambda path: path if path == wheel else None)
    for each in (tmp_path, *tmp_path.parents[:2]):
        each.chmod(0o711)
    server = PostgresServer(tmp_path / "postgres")
    server.start()
    try:
        assert psutil.Process(server.pid).exe().startswith(str(tmp_path))
    finally:
        server.stop()


def test_a_folder_that_postgres_cannot_enter_is_said(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user can enter its own folders")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ServiceError, match="give a data folder elsewhere"):
        PostgresServer(closed / "postgres").start()
