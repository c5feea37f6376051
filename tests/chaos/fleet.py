"""The workers: real `innerloop ingest` and `innerloop adapt` processes, started again when they die."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from world import environment

from innerloop.config import Settings

Kind = Literal["ingest", "adapt"]
KINDS: tuple[Kind, ...] = ("ingest", "adapt")
_COMMANDS: dict[Kind, list[str]] = {"ingest": ["ingest"], "adapt": ["adapt", "--member", "cpu", "--threads", "1"]}
# 0: told to stop. 3: started while the broker or the database was away. 4: superseded. Killed by us: -9.
EXPECTED_CODES = {0, 3, 4, -signal.SIGKILL}
# An exception that nobody handled, and one that was logged: as JSON it is a field, and has no word "Traceback".
ERRORS = ("Traceback", '"exception":')
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 20.0
_PAUSE_SECONDS = 0.3


@dataclass
class Worker:
    """One process, from its start to its end."""

    name: str
    kind: Kind
    process: "subprocess.Popen[bytes]"
    log: Path
    retired: bool = False
    stopped: bool = False
    """By SIGSTOP, for now."""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


@dataclass
class Fleet(threading.Thread):
    """Keeps `wanted` workers of each kind running; `findings` are ends that no worker should come to."""

    settings: Settings
    folder: Path
    wanted: dict[Kind, int]
    logs: Path | None = None
    """Where what the workers said is kept; without one it goes when they end well."""
    findings: list[str] = field(default_factory=list)
    exits: dict[int, int] = field(default_factory=dict)
    most_memory: int = 0
    """Bytes of the largest worker seen."""

    def __post_init__(self) -> None:
        super().__init__(name="fleet", daemon=True)
        self._workers: list[Worker] = []
        self._numbers = itertools.count(1)
        self._lock, self._halt = threading.RLock(), threading.Event()
        self._looked = 0.0

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while not self._halt.wait(_LOOK_SECONDS):
            self._look()

    def alive(self, kind: Kind) -> list[Worker]:
        """Those at work now, and to stay."""
        with self._lock:
            mine = [each for each in self._workers if each.kind == kind and not each.retired]
            return [each for each in mine if each.alive and not each.stopped]

    def scale(self, kind: Kind, count: int) -> None:
        """Want another number; those too many get SIGTERM."""
        with self._lock:
            self.wanted[kind] = count
            for worker in self.alive(kind)[count:]:
                worker.retired = True
                worker.send(signal.SIGTERM)

    def close(self) -> None:
        """SIGTERM to all, and wait: each must finish its batch and leave with 0."""
        self._halt.set()
        self.join()
        for worker in self._workers:
            worker.send(signal.SIGCONT)
            if not worker.retired:  # told twice, one that is about to have ended would die of it
                worker.send(signal.SIGTERM)
            worker.retired = True
        until = time.monotonic() + _STOP_SECONDS
        for worker in self._workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.1, until - time.monotonic()))
            if worker.alive:
                self.findings.append(f"{worker.name} had not stopped {_STOP_SECONDS:.0f} s after SIGTERM.")
                worker.process.kill()
                worker.process.wait()
            self._bury(worker)
        self._workers = []

    def _look(self) -> None:
        with self._lock:
            for worker in [each for each in self._workers if not each.alive]:
                self._workers.remove(worker)
                self._bury(worker)
            for kind in KINDS:
                running = [each for each in self._workers if each.kind == kind and not each.retired]
                for _ in range(self.wanted[kind] - len(running)):
                    self._start(kind)
        if time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            self.most_memory = max([self.most_memory, *map(_memory, self._workers)])

    def _start(self, kind: Kind) -> None:
        name = f"{kind}-{next(self._numbers)}"
        log = (self.logs or self.folder).absolute() / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "innerloop.worker", *_COMMANDS[kind]],
                cwd=self.folder,
                env=environment(self.settings, name),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._workers.append(Worker(name, kind, process, log))

    def _bury(self, worker: Worker) -> None:
        code = worker.process.returncode
        self.exits[code] = self.exits.get(code, 0) + 1
        said = worker.log.read_text(errors="replace")
        early = code == -signal.SIGTERM and "assigned" not in said  # before it could listen to signals
        if (code not in EXPECTED_CODES and not early) or any(mark in said for mark in ERRORS):
            self.findings.append(f"{worker.name} left with code {code}: {said.strip()[-1500:]}")
        if self.logs is None:
            worker.log.unlink()


def _memory(worker: Worker) -> int:
    with suppress(psutil.Error):
        return int(psutil.Process(worker.process.pid).memory_info().rss)
    return 0


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True
