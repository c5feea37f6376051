"""Workers that are killed, stopped or broken on purpose at a chosen step. Test-only patches: the product has no switch.

Each worker is a process of its own, forked from one that has imported everything already, so that it starts at once.
"""

import itertools
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, Literal

import numpy as np
from pydantic import SecretStr
from sqlalchemy import text
from world import writing_as

from innerloop import support
from innerloop.adapt import Adapt
from innerloop.config import Settings
from innerloop.errors import StopError
from innerloop.ingest import Ingest
from innerloop.store import database, ledger
from innerloop.store.database import transaction
from innerloop.store.ledger import Ledger
from innerloop.streams import commits
from innerloop.streams.commits import Commits
from innerloop.streams.loop import Loop
from innerloop.streams.publisher import Publisher
from innerloop.streams.watch import OutputWatch
from innerloop.worker import processes
from innerloop.worker.logs import configure_logs

Kind = Literal["ingest", "adapt"]
When = Literal["before", "after"]
KILLED = 9
_EPOCH = text("SELECT owner_epoch FROM partition_ledger WHERE topic = :topic AND partition = :partition")

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["innerloop.ingest", "innerloop.adapt", "innerloop.worker.processes"])


@dataclass(frozen=True)
class Step:
    """A step of a batch: a call, and whether the moment is before or after it."""

    owner: type
    name: str
    when: When
    counts: Callable[..., bool] = lambda *_, **__: True
    """Whether a call with these arguments is the step."""


def _is_flush(_publisher: Publisher, seconds: float) -> bool:
    return seconds > 0  # one of 0 s only looks whether there is something left


def _has_done(self: Commits, *_: Any, **__: Any) -> bool:
    return bool(self._done)


def _every(count: int) -> Callable[..., bool]:
    calls = itertools.count(1)
    return lambda *_, **__: next(calls) % count == 0


STEPS: dict[Kind, dict[str, Step]] = {
    "ingest": {
        "before the transaction": Step(Ingest, "_store", "before"),
        "in the transaction, with the ledger moved": Step(Ledger, "advance", "after"),
        "after the transaction": Step(Ledger, "advanced", "before"),
        "before the produce": Step(Ingest, "_request", "before"),
        "with some produced": Step(Publisher, "send", "after", _every(5)),
        "before the flush": Step(Publisher, "flush", "before", _is_flush),
        "after the flush": Step(Publisher, "flush", "after", _is_flush),
        "before the commit": Step(Commits, "commit", "before", _has_done),
        "after the commit": Step(Commits, "commit", "after", _has_done),
        "after a claim": Step(Ledger, "claim", "after"),
    },
    "adapt": {
        "before the transaction": Step(Adapt, "_read", "before"),
        "after the transaction": Step(Adapt, "_read", "after"),
        "before the produce": Step(Adapt, "_publish", "before"),
        "with some produced": Step(Publisher, "send", "after", _every(5)),
        "before the flush": Step(Publisher, "flush", "before", _is_flush),
        "after the flush": Step(Publisher, "flush", "after", _is_flush),
        "before the commit": Step(Commits, "commit", "before", _has_done),
        "after the commit": Step(Commits, "commit", "after", _has_done),
    },
}


# Those that a batch meets only where something else has gone wrong.
RARE: dict[str, Step] = {"before the ledger is read again": Step(Ledger, "reload", "before")}


@dataclass(frozen=True)
class Fault:
    """Send ourselves `signal` at the step, the `nth` time that it is met."""

    step: str
    nth: int = 1
    signal: Signals = SIGKILL


def _no_ledger_check() -> None:
    """The ledger is not asked which records are in: their ids still say so, but their users are not asked for again."""
    Ingest._already_stored = lambda *_: None  # type: ignore[method-assign]


def _no_recognition() -> None:
    """Replays are not recognised, by the ledger or by their event ids: either alone keeps them out."""
    _no_ledger_check()
    support._already_stored = lambda _stored, tasks, _hashes: np.zeros(len(tasks), bool)  # type: ignore[assignment]


def _no_flush() -> None:
    Publisher.flush = lambda *_: None  # type: ignore[method-assign]


def _commit_first() -> None:
    """Offsets are committed when a batch is polled."""
    original = Loop._persist

    def persist(self: Loop, batch: Any) -> None:
        self._commits.done(batch)
        self._commits.commit(self._consumer, wait=True)
        original(self, batch)

    Loop._persist = persist  # type: ignore[method-assign]


def _no_fencing() -> None:
    condition = "l.owner_epoch = v.epoch AND "
    assert condition in ledger._ADVANCE
    ledger._ADVANCE = ledger._ADVANCE.replace(condition, "")


def _no_epoch_test() -> None:
    """Who reads the ledger again after a commit of unknown outcome takes whatever epoch is there for its own."""
    original = Ledger.reload

    def reload(self: Ledger) -> None:
        with transaction(self._engine) as connection:
            for (topic, partition), claim in self._claims.items():
                where = {"topic": topic, "partition": partition}
                epoch = connection.execute(_EPOCH, where).scalar_one()
                self._claims[topic, partition] = replace(claim, epoch=epoch)
        original(self)

    Ledger.reload = reload  # type: ignore[method-assign]


def _no_watch() -> None:
    OutputWatch.strangers = lambda *_: {}  # type: ignore[method-assign]


def _impatient() -> None:
    """Not a break: the server waits for a frozen session for a moment only."""
    database.FROZEN_SECONDS = 2.0


BREAKS: dict[str, Callable[[], None]] = {
    "ledger check off": _no_ledger_check,
    "replays not recognised": _no_recognition,
    "flush skipped": _no_flush,
    "offset committed first": _commit_first,
    "fencing off": _no_fencing,
    "epoch test off": _no_epoch_test,
    "watch off": _no_watch,
    "frozen sessions end soon": _impatient,
}


def start(
    kind: Kind, settings: Settings, name: str, log: Path, *, broken: str | None = None, fault: Fault | None = None
) -> BaseProcess:
    """Start a worker; the ledger remembers `name` as its writer."""
    arguments = (kind, settings, name, log, broken, fault)
    process = _FORKED.Process(target=_work, name=name, args=arguments, daemon=True)
    process.start()
    return process


def _work(  # noqa: PLR0917 - what the fork is given
    kind: Kind, settings: Settings, name: str, log: Path, broken: str | None, fault: Fault | None
) -> None:
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    configure_logs(settings, process=name)
    if broken:
        BREAKS[broken]()
    if fault:
        commits._EVERY_SECONDS = 0.0  # every batch commits, or some would never meet that step
        _set((STEPS[kind] | RARE)[fault.step], fault)
    url = SecretStr(writing_as(settings, name))
    own = settings.model_copy(update={"database": settings.database.model_copy(update={"url": url})})
    code = 0
    try:
        processes.run_ingest(own) if kind == "ingest" else processes.run_adapt(own, "cpu", 1)
    except StopError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except BaseException:  # noqa: BLE001 - the log says it, the test looks for it
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _set(step: Step, fault: Fault) -> None:
    original, met = getattr(step.owner, step.name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal met
        counts = step.counts(*arguments, **named)
        met += counts
        now = counts and met == fault.nth
        if now and step.when == "before":
            os.kill(os.getpid(), fault.signal)
        answer = original(*arguments, **named)
        if now and step.when == "after":
            os.kill(os.getpid(), fault.signal)
        return answer

    setattr(step.owner, step.name, call)
