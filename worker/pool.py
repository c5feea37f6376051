"""The worker pool: a supervisor and its processes, each a member of the consumer group.

A process that dies is started again, and the log says why it died. One whose first start ends with a sentence about
settings or services (exit code 2 or 3) would end so again: the supervisor then stops the others and leaves with it.
Once it has run, a missing service is an outage, and it is started until it stays.

A process whose loop hangs does not die by itself. Where the processes have ports they are asked for /livez, and one
that answers that its loop is stuck is ended. One that doesn't answer at all is left alone: it may be starting, and who
was frozen goes on when it wakes, or finds that its partitions have moved.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import structlog

_LOG = structlog.get_logger(__name__)
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 10.0
_SETTLED_SECONDS = 60.0
_MAX_BACKOFF_SECONDS = 30.0
_ASK_SECONDS = 5.0
_ANSWER_SECONDS = 1.0
_HOPELESS = {2, 3}
MEMBER = "_INNERLOOP_MEMBER"
"""A member's number in its pool: what its static membership is named by."""
SUPERVISED = "_INNERLOOP_SUPERVISED"
"""Set for members: their standard input is a pipe that only the supervisor holds open, and they stop when it ends."""


@dataclass
class _Member:
    arguments: Sequence[str]
    process: subprocess.Popen[bytes]
    started: float
    number: int
    failures: int = 0
    restart_at: float | None = None
    ask_at: float = 0.0
    kill_at: float | None = None
    """Set when it was told to stop because its loop is stuck."""


class Pool:
    """Runs `innerloop <arguments>` once for each entry, until told to stop; output to `log` when one is given.

    Member n shows its metrics and health on port n of `ports`, where they are given, of `host`.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        log: Path | None = None,
        *,
        ports: Sequence[int] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self._log, self._ports, self._host = log, ports, host
        self._members = [
            _Member(command, self._start(command, number), time.monotonic(), number)
            for number, command in enumerate(commands)
        ]

    @property
    def pids(self) -> list[int]:
        """Process ids of the members that run now."""
        return [member.process.pid for member in self._members if member.process.poll() is None]

    def run(self, stopping: Callable[[], bool]) -> int:
        """Keep all members running until told to stop; the exit code for the command line."""
        code = 0
        while not stopping() and code == 0:
            time.sleep(_LOOK_SECONDS)
            code = self.look()
        return code or self.stop()

    def look(self) -> int:
        """Start again whoever has died, end who is stuck; the exit code when one of them left for good, else 0."""
        for member in self._members:
            code = member.process.poll()
            if code is None:
                self._end_if_stuck(member)
                continue
            if code in _HOPELESS and member.failures == 0 and time.monotonic() - member.started < _SETTLED_SECONDS:
                self.stop()
                return code
            self._restart(member, code)
        return 0

    def _end_if_stuck(self, member: _Member) -> None:
        now = time.monotonic()
        if member.kill_at is not None:
            if now >= member.kill_at:
                member.process.kill()
        elif self._ports and now >= member.ask_at:
            member.ask_at = now + _ASK_SECONDS
            stuck = _stuck(self._host, self._ports[member.number])
            if stuck is not None:
                _LOG.error("process is stuck, is ended", why=stuck, pid=member.process.pid)
                member.process.send_signal(signal.SIGTERM)
                member.kill_at = now + _STOP_SECONDS

    def _restart(self, member: _Member, code: int) -> None:
        now = time.monotonic()
        if member.restart_at is None:
            member.failures = 1 if now - member.started > _SETTLED_SECONDS else member.failures + 1
            wait = backoff(member.failures)
            member.restart_at = now + wait
            _LOG.error("process ended, starts again", why=_why(code), pid=member.process.pid, in_seconds=wait)
        elif now >= member.restart_at:
            _close(member.process)
            member.process, member.started = self._start(member.arguments, member.number), now
            member.restart_at = member.kill_at = None

    def stop(self) -> int:
        """SIGTERM to all; 0 when each finished its batch and left by itself, 1 when one had to be killed."""
        running = [member.process for member in self._members if member.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS
        code = 0
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _LOG.error("killed: did not finish its batch in time", pid=process.pid)
                process.kill()
                process.wait()
                code = 1
            _close(process)
        return code

    def _start(self, arguments: Sequence[str], number: int) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the supervisor, which stops the others in order.
        command = [sys.executable, "-m", "innerloop.worker", *arguments]
        environment = {**os.environ, SUPERVISED: "1", MEMBER: str(number)}
        if self._ports:
            environment["INNERLOOP_HTTP__PORT"] = str(self._ports[number])
        if self._log is None:
            return subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.PIPE)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, env=environment, start_new_session=True, stdin=subprocess.PIPE, stdout=log, stderr=log
            )


def backoff(failures: int) -> float:
    """How many seconds a process stays down that has failed so many times in a row, from 0.2 s on."""
    return float(min(0.1 * 2.0 ** min(failures, 10), _MAX_BACKOFF_SECONDS))


def _stuck(host: str, port: int) -> str | None:
    """Why /livez is red; None when it is green or nobody answers in time."""
    connection = HTTPConnection(host, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", "/livez")
        answer = connection.getresponse()
        said = answer.read().decode(errors="replace").strip()
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
    return said if answer.status == HTTPStatus.SERVICE_UNAVAILABLE else None


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _why(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
