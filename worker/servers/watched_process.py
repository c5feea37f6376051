"""A server as a child process that never outlives this one; `parent_watch.py` is the process in between."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from innerloop.errors import ServiceError

GRACE = 20.0
"""Seconds that a server gets to stop before it is killed."""
POLL = 0.02
"""Seconds between two looks at whether a server is ready."""
LOG_TAIL = 400
"""Characters of the log that an error quotes."""
_GIVEN: set[int] = set()  # ports: who got one may not listen yet


@dataclass(frozen=True)
class Order:
    """What to run, and how it is to end."""

    name: str
    command: Sequence[str]
    log: Path
    lock: Path
    """Held while the server runs: a second start on the same folder waits for the first one's end."""
    endings: Sequence[signal.Signals]
    """Sent when the parent is gone, one after the other."""
    identity: dict[str, Any] = field(default_factory=dict)
    """`user`, `group` and `extra_groups` as subprocess.Popen takes them."""
    remove: Path | None = None
    """Temporary data, removed when the parent is gone."""


class WatchedProcess:
    """A running server. Raises ServiceError when it cannot be started or its folder is in use."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._log_start = order.log.stat().st_size if order.log.exists() else 0
        self._watch = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("parent_watch.py")), _as_json(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then stops us in order
        )
        _alive.add(self)
        self.pid = self._read_pid()

    def _read_pid(self) -> int:
        assert self._watch.stdout  # noqa: S101 - asked for above
        if not select.select([self._watch.stdout], [], [], GRACE + 5)[0]:
            self.close()
            raise ServiceError(
                f"{self.order.name} can't use {self.order.lock.parent}: another one is running there. "
                "Stop that one, or give another data folder."
            )
        line = self._watch.stdout.readline().decode().strip()
        if not line.isdigit():
            raise ServiceError(f"{self.order.name} could not be started: {line or 'its watch process died'}.")
        return int(line)

    @property
    def running(self) -> bool:
        return self._watch.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send the server a signal; nothing happens when it is gone."""
        assert self._watch.stdin  # noqa: S101 - asked for above
        with suppress(BrokenPipeError, ValueError):
            self._watch.stdin.write(bytes([number]))

    def end(self, number: signal.Signals, grace: float = GRACE) -> None:
        """Send a signal and wait until the server is gone, killing it after `grace` seconds."""
        for step in (number, signal.SIGKILL):
            self.send(step)
            with suppress(subprocess.TimeoutExpired):
                self._watch.wait(grace)
                break
        self.close()

    def close(self) -> None:
        """Let go of the pipes; the watch ends the server if it still runs."""
        for pipe in (self._watch.stdin, self._watch.stdout):
            if pipe:
                pipe.close()
        _alive.discard(self)

    def new_log(self) -> str:
        """What the server has logged since this start."""
        with self.order.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def wait_ready(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until `ready()`; raises ServiceError with the gist of the log when the server dies or takes too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running or time.monotonic() > deadline:
                why = "is not ready after {seconds:.0f} s" if self.running else "stopped while starting"
                self.end(signal.SIGKILL)
                raise ServiceError(
                    f"{self.order.name} {why.format(seconds=seconds)}: {_gist(self.new_log())} "
                    f"Its log is {self.order.log}."
                )
            time.sleep(POLL)


_alive: weakref.WeakSet[WatchedProcess] = weakref.WeakSet()


def _close_in_fork() -> None:
    """A forked worker must not hold the pipe open: then the watch would not see the parent die."""
    for process in list(_alive):
        process.close()


os.register_at_fork(after_in_child=_close_in_fork)


def _as_json(order: Order) -> str:
    return json.dumps(
        {
            "command": [str(part) for part in order.command],
            "log": str(order.log),
            "lock": str(order.lock),
            "endings": list(order.endings),
            "grace": GRACE,
            "identity": order.identity,
            "remove": str(order.remove) if order.remove else None,
        }
    )


def _gist(log: str) -> str:
    """The lines that look like the reason, else the last ones."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    bad = [line for line in lines if any(word in line for word in ("ERROR", "FATAL", "Exception", "Error:"))]
    text = " | ".join((bad or lines)[-3:])
    return f"“{text[-LOG_TAIL:]}”." if text else "it logged nothing."


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on now, none of them given here before."""
    with ExitStack() as drawn:
        ports: list[int] = []
        while len(ports) < count:  # all stay bound until there are enough: no port is drawn twice
            sock = drawn.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            if (port := int(sock.getsockname()[1])) not in _GIVEN:
                ports.append(port)
        _GIVEN.update(ports)
        return ports


def require_free(name: str, ports: Sequence[int]) -> None:
    """Raise ServiceError when one of these ports of 127.0.0.1 is taken."""
    for port in ports:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                raise ServiceError(
                    f"{name} can't listen on 127.0.0.1:{port}: something else does. Stop that, or start anew."
                ) from None
