"""Processor time by part: what the product's processes, PostgreSQL and the broker have used so far."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Costs:
    """Seconds of processor time, user and system."""

    worker: float
    postgres: float
    kafka: float

    def __sub__(self, other: "Costs") -> "Costs":
        return Costs(self.worker - other.worker, self.postgres - other.postgres, self.kafka - other.kafka)

    def each(self, count: int) -> "Costs":
        """Microseconds for each of `count`."""
        factor = 1e6 / count
        return Costs(self.worker * factor, self.postgres * factor, self.kafka * factor)


def costs(worker_pid: int) -> Costs:
    """Of the worker's process tree, and of the two servers that this process has started.

    Processes that have ended count through their parent, as the system adds them up.
    """
    worker = list(_family(psutil.Process(worker_pid)))
    pids = {process.pid for process in worker}
    others = [process for process in _family(psutil.Process(os.getpid())) if process.pid not in pids]
    by_name = {name: [p for p in others if _name(p).startswith(name)] for name in ("postgres", "java")}
    return Costs(*(sum(map(_seconds, part)) for part in (worker, by_name["postgres"], by_name["java"])))


def _family(process: psutil.Process) -> Iterator[psutil.Process]:
    yield process
    yield from process.children(recursive=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _seconds(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:4]))  # user, system, and both of children that have ended
    except psutil.Error:
        return 0.0
