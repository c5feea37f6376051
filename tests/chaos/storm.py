"""The faults, by a seed: each kind once in a drawn order, then at random until the time is over."""

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil
import psycopg2
from fleet import KINDS, Fleet, Kind, Worker, wait_until
from traffic import Traffic
from world import connected

from innerloop.config import Settings
from innerloop.streams.groups import members_with_partitions
from innerloop.worker.servers.services import Services

WORKERS = 2
"""Of each kind, in fair weather."""
_READY_SECONDS = 40.0
_SCALED_SECONDS = 25.0
_IN_TRANSACTION = """
    SELECT pid FROM pg_stat_activity
    WHERE application_name = 'innerloop' AND state <> 'idle' AND xact_start IS NOT NULL AND {which}
"""
_TERMINATE = (
    f"SELECT pg_terminate_backend(pid) FROM ({_IN_TRANSACTION.format(which='backend_xid IS NOT NULL')} LIMIT 1) AS w"
)
_BUSY = f"SELECT 1 FROM ({_IN_TRANSACTION.format(which='client_port = ANY(%s)')}) AS w"


class Storm:
    """Does one fault after the other; a fault leaves nothing broken that would not mend by itself."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        fleet: Fleet,
        traffic: Traffic,
        seed: int,
        *,
        session_seconds: float,
        release: Callable[[int], None],
    ) -> None:
        """`release` registers a release of that version."""
        self._release, self._version = release, 1
        self._settings, self._services, self._fleet, self._traffic = settings, services, fleet, traffic
        self._rng = random.Random(seed)
        self._session_seconds = session_seconds
        self.faults: Counter[str] = Counter()
        self.asleep: Counter[str] = Counter()
        """How often a worker was stopped in the middle of a transaction, and at rest."""
        self.kinds: dict[str, Callable[[], str | None]] = {
            "kill9-ingest": lambda: self._kill("ingest"),
            "kill9-adapt": lambda: self._kill("adapt"),
            "kill9-several": self._kill_several,
            "sigstop": self._sleep,
            "sigterm": self._terminate,
            "broker": self._broker,
            "postgres": self._postgres,
            "session": self._session,
            "scale": self._scale,
            "release": self._new_release,
            "clock": lambda: self._traffic.set_clock(self._rng),
        }

    @property
    def missing(self) -> list[str]:
        """The kinds not seen yet."""
        return [kind for kind in self.kinds if not self.faults[kind]]

    def rage(self, until: float) -> None:
        """Go on until that moment (monotonic seconds), and until each kind has been seen."""
        first = list(self.kinds)
        self._rng.shuffle(first)
        while time.monotonic() < until or self.missing:
            kind = first.pop(0) if first else self._rng.choice(self.missing or list(self.kinds))
            self._do(kind)
            if time.monotonic() > until + 120:
                return
            time.sleep(self._rng.uniform(0.3, 2.0))

    def _do(self, kind: str) -> None:
        began = time.monotonic()
        what = self.kinds[kind]()
        if what is None:
            return
        self.faults[kind] += 1
        tell(f"{kind}: {what} ({time.monotonic() - began:.1f} s); {self._traffic.rate:.0f} events/s")

    # --- processes

    def _pick(self, kind: Kind, least: int = 1) -> Worker | None:
        """A worker that is at work, when there are at least so many."""
        if not wait_until(lambda: len(self._fleet.alive(kind)) >= least, _READY_SECONDS):
            return None
        alive = self._fleet.alive(kind)
        return self._rng.choice(alive) if alive else None

    def _kill(self, kind: Kind) -> str | None:
        worker = self._pick(kind)
        if worker is None:
            return None
        if self._rng.random() < 0.5:
            self._wait_until_busy(worker)
        worker.send(signal.SIGKILL)
        return worker.name

    def _kill_several(self) -> str | None:
        workers = [worker for kind in KINDS for worker in self._fleet.alive(kind)]
        some = self._rng.sample(workers, self._rng.randint(2, len(workers))) if len(workers) > 1 else []
        for worker in some:
            worker.send(signal.SIGKILL)
        return ", ".join(worker.name for worker in some) or None

    def _terminate(self) -> str | None:
        worker = self._pick(self._rng.choice(KINDS))
        if worker is None:
            return None
        worker.retired = True  # no second signal: what has left its handlers behind would die of it
        worker.send(signal.SIGTERM)
        return worker.name

    def _sleep(self) -> str | None:
        """Stop a worker for longer than its session, in the middle of something, and let it go on as a zombie."""
        kind: Kind = "ingest" if self._rng.random() < 0.6 else "adapt"
        worker = self._pick(kind, 2)
        if worker is None:
            return None
        busy = self._wait_until_busy(worker)
        worker.stopped = True
        worker.send(signal.SIGSTOP)
        seconds = self._session_seconds + self._rng.uniform(1.0, 3.0)
        time.sleep(seconds)
        worker.send(signal.SIGCONT)
        worker.stopped = False
        self.asleep[where := "in a transaction" if busy else "at rest"] += 1
        return f"{worker.name} for {seconds:.1f} s, {where}"

    def _wait_until_busy(self, worker: Worker, seconds: float = 1.5) -> bool:
        """Wait for a moment in which the worker's database session is in a transaction; whether there was one."""
        ports = _ports(worker)
        with suppress(psycopg2.Error), connected(self._settings) as connection, connection.cursor() as cursor:
            until = time.monotonic() + seconds
            while ports and time.monotonic() < until:
                cursor.execute(_BUSY, (ports,))
                if cursor.fetchone():
                    return True
        return False

    def _scale(self) -> str | None:
        """1 -> 3 -> 1, and back to what is normal; None when the group did not come to that."""
        kind: Kind = "ingest" if not self.faults["scale"] or self._rng.random() < 0.7 else "adapt"
        group = self._settings.kafka.ingest_group if kind == "ingest" else self._settings.kafka.adapt_group
        reached = [self._scaled(kind, group, count) for count in (1, 3, 1)]
        self._fleet.scale(kind, WORKERS)
        return kind if all(reached) else None

    def _scaled(self, kind: Kind, group: str, count: int) -> bool:
        self._fleet.scale(kind, count)
        return wait_until(lambda: members_with_partitions(self._settings.kafka, group) == count, _SCALED_SECONDS)

    def _new_release(self) -> str:
        """A newer release, which each worker takes up when it next looks."""
        self._version += 1
        self._release(self._version)
        return f"version {self._version}"

    # --- services

    def _broker(self) -> str | None:
        kafka = self._services.kafka
        assert kafka
        kafka.stop()
        seconds = self._away()
        kafka.start()
        return f"away for {seconds:.1f} s"

    def _postgres(self) -> str | None:
        postgres = self._services.postgres
        assert postgres
        postgres.stop("immediate")
        seconds = self._away()
        postgres.start()
        return f"away for {seconds:.1f} s"

    def _away(self) -> float:
        """Stay away for a moment, in which now and then a worker dies as well."""
        seconds = self._rng.uniform(0.5, 4.0)
        if self._rng.random() < 0.3:
            alive = self._fleet.alive(self._rng.choice(KINDS))
            if alive:
                self._rng.choice(alive).send(signal.SIGKILL)
        time.sleep(seconds)
        return seconds

    def _session(self) -> str | None:
        """Terminate a worker's database session in the middle of a transaction that has written something."""
        with suppress(psycopg2.Error), connected(self._settings) as connection, connection.cursor() as cursor:
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                cursor.execute(_TERMINATE)
                if cursor.fetchone():
                    return "in mid-transaction"
        return None


def _ports(worker: Worker) -> list[int]:
    with suppress(psutil.Error):
        connections = psutil.Process(worker.process.pid).net_connections(kind="tcp")
        return [each.laddr.port for each in connections]
    return []


def tell(what: str) -> None:
    """A line for whoever watches."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")
    sys.stderr.flush()
