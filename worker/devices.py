"""Which device and how many threads each worker process gets."""

import os
from dataclasses import dataclass

from innerloop.errors import SettingsError

_CPU = "cpu"
_PER_GPU = 8


@dataclass(frozen=True)
class Share:
    """What one worker process computes on."""

    device: str
    threads: int


def shares(devices: str, processes: int | None, most: int) -> list[Share]:
    """Give `processes` workers their devices in turn, and the cores in equal parts.

    By default a CPU has one worker, whose threads are as many as there are cores, and a GPU one for each two cores that
    it has a share of, but not more than `_PER_GPU`, or all together more than `most`, the partitions there are to work
    on. A worker leaves a GPU idle for nine tenths of the time (tests/benchmarks/README.md), so that they share it well.
    `devices` is a list, or `auto`: every GPU, or the CPU without one. Raises SettingsError for one that is not there.
    """
    names = _available() if devices == "auto" else [name.strip() for name in devices.split(",") if name.strip()]
    for name in names:
        _check(name)
    if not names:
        raise SettingsError("--devices is empty: write auto, cpu, or a list such as cuda:0,cuda:1.")
    cores = os.cpu_count() or 1
    turns = min(max(1, cores // (2 * len(names))), _PER_GPU, max(1, most // len(names)))
    workers = [name for turn in range(turns) for name in names if turn == 0 or name != _CPU]
    if processes is not None:
        workers = [names[number % len(names)] for number in range(processes)]
    return [Share(name, max(1, cores // len(workers))) for name in workers]


def _available() -> list[str]:
    from innerloop.learning.devices import gpus  # noqa: PLC0415 - torch is slow to load, and only this needs it

    return gpus() or [_CPU]


def _check(name: str) -> None:
    if name == _CPU:
        return
    from innerloop.learning.devices import gpus  # noqa: PLC0415

    if name not in (known := gpus()):
        raise SettingsError(f"There is no device {name}: choose from {', '.join([_CPU, *known])}.")
