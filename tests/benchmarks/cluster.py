"""The services a benchmark runs against, and a clean database for each of its runs.

Kafka and PostgreSQL are started as `innerloop up` starts them, on this machine and with fsync on, so that a benchmark
shares its cores with both. Where INNERLOOP_KAFKA__BOOTSTRAP_SERVERS or INNERLOOP_DATABASE__URL is set, that one is
used; its event topics must be empty and its user must be allowed to make databases.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psycopg2
from confluent_kafka import TopicPartition
from machine import CONSOLE
from psycopg2.extensions import connection as Connection  # noqa: N812 - it is a class
from psycopg2.extensions import cursor as Cursor  # noqa: N812
from sqlalchemy.engine import URL, make_url

from innerloop.config import Settings, load_settings
from innerloop.store.database import connect
from innerloop.store.migrate import migrate
from innerloop.streams import clients
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers.kafka import find_java
from innerloop.worker.servers.kafka_jars import cache_folder, chosen_version
from innerloop.worker.servers.postgres import PostgresServer
from innerloop.worker.servers.services import running_services

_IMAGE_SECONDS = 120.0
_STOP_SECONDS = 15.0
_LOOK_SECONDS = 0.02
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Database:
    """One empty database of its own with our tables."""

    url: str

    @property
    def dsn(self) -> str:
        """The address as libpq has it."""
        return _libpq(make_url(self.url))

    def open(self) -> Connection:
        """A connection in which every statement is its own transaction."""
        connection = psycopg2.connect(self.dsn)
        connection.autocommit = True
        return connection


@dataclass(frozen=True)
class Cluster:
    """A broker with our topics, and a server that makes databases."""

    bootstrap_servers: str
    server_url: str
    folder: Path
    """For logs and releases of this benchmark; gone at its end."""

    def environment(self, database: Database, **more: str) -> dict[str, str]:
        """The variables under which a command of ours works here."""
        ours = {
            "INNERLOOP_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "INNERLOOP_DATABASE__URL": database.url,
            "INNERLOOP_LOG_FORMAT": "json",
        }
        return {**os.environ, **ours, **more}

    def settings(self, database: Database, **kafka: str) -> Settings:
        """The same as settings of this process; `kafka` overrides group names."""
        base = load_settings()
        return load_settings(
            kafka=base.kafka.model_copy(update={"bootstrap_servers": self.bootstrap_servers, **kafka}),
            database={"url": database.url},
        )

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Make a database with our tables, after a checkpoint so that runs don't pay for each other; drop it after."""
        name = f"innerloop_bench_{uuid.uuid4().hex[:12]}"
        server = make_url(self.server_url)
        self._administer(f"CREATE DATABASE {name}", "CHECKPOINT")
        try:
            database = Database(server.set(database=name).render_as_string(hide_password=False))
            migrate(connect(load_settings(database={"url": database.url}).database))
            yield database
        finally:
            self._administer(f"DROP DATABASE {name} WITH (FORCE)", "CHECKPOINT")

    def postgres_version(self) -> str:
        """The server's version and what of its settings decides on durability."""
        with _connected(make_url(self.server_url)) as connection, connection.cursor() as cursor:
            values = []
            for name in ("server_version", "fsync", "synchronous_commit"):
                cursor.execute(f"SHOW {name}")
                values.append(str((cursor.fetchone() or ("?",))[0]))
        return f"{values[0]} (fsync {values[1]}, synchronous_commit {values[2]})"

    def log_position(self) -> int:
        """Bytes that the server has written to its log since it was made."""
        with _connected(make_url(self.server_url)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
            return int((cursor.fetchone() or (0,))[0])

    def kafka_version(self) -> str:
        """Of our own broker; an outside one doesn't tell."""
        return "not ours" if load_settings().kafka.bootstrap_servers else chosen_version()

    def _administer(self, *statements: str) -> None:
        with _connected(make_url(self.server_url)) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)


@contextmanager
def running_cluster(*, kafka: bool = True, postgres: Mapping[str, str] = MappingProxyType({})) -> Iterator[Cluster]:
    """Start what is not set, once the start-up image is there, and make the topics; or the database alone.

    `postgres` are options of a server of our own.
    """
    logging.getLogger("librdkafka").setLevel(logging.ERROR)
    settings = load_settings()
    if postgres and not settings.database.url.get_secret_value():
        with _tuned(postgres) as url:
            settings = load_settings(database={"url": url})
            with _running(settings, kafka=kafka) as cluster:
                yield cluster
    else:
        with _running(settings, kafka=kafka) as cluster:
            yield cluster


@contextmanager
def _tuned(options: Mapping[str, str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="innerloop-bench-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # PostgreSQL runs as another user when we are root
        server = PostgresServer(Path(folder) / "postgres", temporary=True, options=options)
        server.start()
        try:
            yield server.url
        finally:
            server.stop()


@contextmanager
def _running(settings: Settings, *, kafka: bool) -> Iterator[Cluster]:
    if kafka:
        _make_image_first()
    else:
        settings = _at(settings, "not.used:9092")
    with (
        running_services(settings, announce=CONSOLE.print) as services,
        tempfile.TemporaryDirectory(prefix="innerloop-bench-", ignore_cleanup_errors=True) as folder,
    ):
        if kafka:
            there = _at(settings, services.bootstrap_servers)
            ensure_topics(there)
            _require_empty(there)
        yield Cluster(services.bootstrap_servers, services.database_url, Path(folder))


def _at(settings: Settings, bootstrap_servers: str) -> Settings:
    return load_settings(kafka=settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers}))


@contextmanager
def command(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `innerloop <arguments>` as a user would; SIGTERM at the end. Its output goes to `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "innerloop.worker", *arguments],
            env=dict(environment),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, and SIGKILL when that is not enough."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def require_running(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Leave with the end of the log when a process of the benchmark has ended."""
    if process.poll() is not None:
        raise SystemExit(f"A process under test ended with code {process.returncode}:\n{tail(log)}")


def seen(process: "subprocess.Popen[bytes]", log: Path, done: Callable[[], bool]) -> float:
    """When it was seen to be done, on the monotonic clock; looked at every 20 ms."""
    until = time.monotonic() + _LIMIT_SECONDS
    while not done():
        require_running(process, log)
        if time.monotonic() > until:
            raise SystemExit(f"Not done after {_LIMIT_SECONDS:.0f} s:\n{tail(log)}")
        time.sleep(_LOOK_SECONDS)
    return time.monotonic()


def ledger(cursor: Cursor, topic: str, what: str) -> int:
    """An aggregate over the partitions of a topic in the ledger."""
    cursor.execute(f"SELECT {what} FROM partition_ledger WHERE topic = %s", (topic,))
    return int((cursor.fetchone() or (0,))[0])


def tail(log: Path, size: int = 1_500) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-size:].strip()


def _make_image_first() -> None:
    """The first stop of our broker ever records a start-up image in the background: not while we measure."""
    java = find_java()
    if load_settings().kafka.bootstrap_servers or not java.makes_images or _image(java.major).exists():
        return
    CONSOLE.print("The broker's start-up image is missing: made first, once.")
    with running_services(load_settings(), announce=CONSOLE.print):
        pass
    until = time.monotonic() + _IMAGE_SECONDS
    while not _image(java.major).exists() and time.monotonic() < until:
        time.sleep(0.5)


def _image(major: int) -> Path:
    return cache_folder(chosen_version()) / f"java-{major}.aot"


def _require_empty(settings: Settings) -> None:
    consumer = clients.consumer(settings.kafka, "innerloop-bench-look")
    for topic in settings.topics.events:
        for partition in range(settings.topics.partitions):
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10.0)
            if high > low:
                raise SystemExit(f"{topic} holds records that are not the benchmark's: give it a broker of its own.")
    consumer.close()


@contextmanager
def _connected(url: URL) -> Iterator[Connection]:
    connection = psycopg2.connect(_libpq(url))
    connection.autocommit = True
    try:
        yield connection
    finally:
        connection.close()


def _libpq(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
