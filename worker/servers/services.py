"""Apache Kafka and PostgreSQL for the demo, the tests and `innerloop up`: yours where they are set, else our own.

Our own are child processes on free ports of 127.0.0.1. They stop with this process, even when it is killed.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from innerloop.config import Settings
from innerloop.errors import ServiceError

from .kafka import KafkaServer
from .postgres import PostgresServer, closed_to_others

Server = KafkaServer | PostgresServer
LOOK_SECONDS = 0.2
"""How often `up` looks whether both still run."""


@dataclass(frozen=True)
class Services:
    """Where both are; the handles are None where an outside one is used."""

    bootstrap_servers: str
    database_url: str
    kafka: KafkaServer | None
    postgres: PostgresServer | None

    @property
    def started(self) -> list[Server]:
        """Those of our own."""
        return [server for server in (self.kafka, self.postgres) if server]


@contextmanager
def running_services(
    settings: Settings, data_dir: Path | None = None, announce: Callable[[str], None] = print
) -> Iterator[Services]:
    """Start what the settings don't name, both at once, and stop it at the end.

    Data is kept in `data_dir` and found there at the next start; without one it is temporary. Raises SettingsError or
    ServiceError with what to do; nothing is left running then.
    """
    with _folder(data_dir) as folder:
        temporary = data_dir is None
        kafka = postgres = None
        if not settings.kafka.bootstrap_servers:
            kafka = KafkaServer(folder / "kafka", temporary=temporary, announce=announce)
        if not settings.database.url.get_secret_value():
            postgres = PostgresServer(folder / "postgres", temporary=temporary)
        servers: list[Server] = [server for server in (kafka, postgres) if server]
        try:
            _start(servers)
            yield Services(
                bootstrap_servers=kafka.bootstrap_servers if kafka else settings.kafka.bootstrap_servers,
                database_url=postgres.url if postgres else settings.database.url.get_secret_value(),
                kafka=kafka,
                postgres=postgres,
            )
        finally:
            _stop(servers)


@contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    """The folder given, or a temporary one that PostgreSQL's user can enter too."""
    if data_dir is not None:
        data_dir.mkdir(parents=True, exist_ok=True)
        yield data_dir.absolute()
        return
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/tmp")]  # noqa: S108 - a fresh folder is made there
    place = places[0]
    if os.geteuid() == 0:
        place = next((each for each in places if each.is_dir() and not closed_to_others(each)), place)
    with tempfile.TemporaryDirectory(prefix="innerloop-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


def _start(servers: list[Server]) -> None:
    """Start all at once; the first that fails ends the others."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            for future in as_completed([pool.submit(server.start) for server in servers]):
                future.result()
        except BaseException:
            _stop(servers)  # one that is still starting sees this and gives up
            raise


def _stop(servers: list[Server]) -> None:
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda server: server.stop(), servers))


def up(settings: Settings, data_dir: Path | None, announce: Callable[[str], None] = print) -> None:
    """Keep Kafka and PostgreSQL running until Ctrl-C or SIGTERM; `innerloop up`.

    Prints what others need as lines to copy into a shell. Raises ServiceError when one of them ends by itself.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running_services(settings, data_dir, announce) as services:
            for line in _exports(services):
                announce(line)
            if not services.started:
                announce("# Both are set already: nothing was started.")
                return
            announce("# Running until Ctrl-C.")
            _wait(services.started)
    except KeyboardInterrupt:
        announce("# Stopped.")
    finally:
        signal.signal(signal.SIGTERM, before)


def _exports(services: Services) -> list[str]:
    """Of those that were started: somebody else's address may hold a password that is not ours to print."""
    found = []
    if services.kafka:
        found.append(f"export INNERLOOP_KAFKA__BOOTSTRAP_SERVERS={services.bootstrap_servers}")
    if services.postgres:
        found.append(f"export INNERLOOP_DATABASE__URL={services.database_url}")
    return found


def _wait(servers: list[Server]) -> None:
    while True:
        for server in servers:
            if not server.running:
                name = type(server).__name__.removesuffix("Server")
                raise ServiceError(f"{name} ended by itself: its log in {server.folder} says why. Start again.")
        time.sleep(LOOK_SECONDS)
