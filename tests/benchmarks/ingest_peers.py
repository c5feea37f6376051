"""Running the peers: each in an environment of its own, on the same records, broker, database server and cores."""

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clicks import Clicks
from cluster import Cluster, stop, tail
from peer_environment import PEERS, PeerError, environment

from innerloop.config import KafkaSettings
from innerloop.streams.groups import members_with_partitions

SCRIPTS = {"faust": "faust_agent.py", "quix": "quix.py", "pathway": "pathway_subscriber.py"}
_START_SECONDS = 60.0
_LOOK_SECONDS = 0.05


_BATCH = 1_000  # what a peer at most commits at once


@dataclass(frozen=True)
class Measured:
    """Events committed within `seconds` after the start, the first of them at `first`; examples in the table."""

    events: int
    seconds: float
    first: float
    examples: int

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


def measure(peer: str, cluster: Cluster, clicks: Clicks, *, topic: str, processes: int, limit: float) -> Measured:
    """Run a peer until all is committed or `limit` seconds after its first record. Raises PeerError.

    The clock starts when the broker first says that a member of the group has partitions, or when the first record
    reaches the peer's own code if that comes first, and stops after the last commit: start-up and imports are not
    counted. What its processes say they committed is compared with the table.
    """
    python = environment(peer)
    log, errors = cluster.folder / f"{peer}.log", cluster.folder / f"{peer}.errors"
    with cluster.database() as database, closing(database.open()) as connection:
        cursor = connection.cursor()
        cursor.execute(_table())
        variables = {
            **os.environ,
            "BENCH_BROKER": cluster.bootstrap_servers,
            "BENCH_DATABASE": database.dsn,
            "BENCH_TOPIC": topic,
            "BENCH_GROUP": f"bench-{peer}-{uuid.uuid4().hex[:8]}",
        }
        with _running(_commands(peer, python, processes), variables, log, errors) as running:
            peer_run = _PeerRun(running, log, errors)
            began = peer_run.wait_started(cluster.settings(database).kafka, variables["BENCH_GROUP"])
            peer_run.wait_done(began + limit, len(clicks))
        cursor.execute("SELECT coalesce(sum(events), 0), coalesce(sum(cardinality(items)), 0) FROM peer_sets")
        events, examples = map(int, cursor.fetchone() or (0, 0))
    said = _committed(log)
    # A peer that is cut off may have committed a batch that it could no longer say so of.
    if not 0 <= events - sum(count for _, count in said) <= _BATCH * processes:
        raise PeerError(f"it says that it committed {sum(count for _, count in said)} events, its table has {events}")
    if not said:
        raise PeerError(f"nothing was committed: {tail(errors, 300)}")
    counted = [(at, count) for at, count in said if at <= began + limit]
    seen = _started(log) or began
    began = min(began, seen)
    return Measured(sum(count for _, count in counted), max(at for at, _ in counted) - began, seen - began, examples)


def _table() -> str:
    """The peers' table, from the module that only their environments can import."""
    source = (PEERS / "upserts.py").read_text()
    return source.partition('TABLE = """')[2].partition('"""')[0]


def _commands(peer: str, python: Path, processes: int) -> list[list[str]]:
    script = str(PEERS / SCRIPTS[peer])
    if peer == "faust":
        return [[str(python), script, "worker", "--loglevel=warn", "--without-web"]] * processes
    if peer == "pathway":
        port = str(_free_ports(processes))
        spawn = ["spawn", "--processes", str(processes), "--first-port", port]
        return [[str(python.with_name("pathway")), *spawn, str(python), script]]
    return [[str(python), script]] * processes


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(21_000, 31_000, count):
        with ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise PeerError("no free ports in a row")


@contextmanager
def _running(
    commands: list[list[str]], environment: dict[str, str], log: Path, errors: Path
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as out, errors.open("ab") as wrong:
        for command in commands:
            # Each in a folder of its own: some keep state where they run.
            folder = log.parent / f"{log.stem}-{len(processes)}"
            folder.mkdir(exist_ok=True)
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=out, stderr=wrong, start_new_session=True
            )
            processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            stop(process)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started itself and left behind


@dataclass(frozen=True)
class _PeerRun:
    """The peer's processes and what they have written."""

    processes: list["subprocess.Popen[bytes]"]
    log: Path
    errors: Path

    def wait_started(self, settings: KafkaSettings, group: str) -> float:
        """When the clock starts. Raises PeerError when a process ends or nothing begins."""
        until = time.monotonic() + _START_SECONDS
        while (first := _started(self.log)) is None and not members_with_partitions(settings, group):
            if time.monotonic() > until:
                raise PeerError(f"no record within {_START_SECONDS:.0f} s: {tail(self.errors, 300)}")
            self._require_running()
            time.sleep(_LOOK_SECONDS)
        return time.monotonic() if first is None else first

    def wait_done(self, until: float, count: int) -> None:
        """Until all is committed, or the time is up. Raises PeerError when a process ends."""
        while time.monotonic() < until and sum(done for _, done in _committed(self.log)) < count:
            self._require_running()
            time.sleep(_LOOK_SECONDS)

    def _require_running(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise PeerError(f"a process ended with code {process.returncode}: {tail(self.errors, 300)}")


def _lines(log: Path, word: str) -> list[list[str]]:
    lines = (line.split() for line in log.read_text(errors="replace").splitlines())
    return [line for line in lines if line and line[0] == word]


def _started(log: Path) -> float | None:
    return min((float(line[1]) for line in _lines(log, "started")), default=None)


def _committed(log: Path) -> list[tuple[float, int]]:
    return [(float(line[1]), int(line[2])) for line in _lines(log, "committed")]
