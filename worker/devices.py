"""Which device and how many threads each worker process gets."""

import os
from dataclasses import dataclass

from innerloop.errors import SettingsError


@dataclass(frozen=True)
class Share:
    """What one worker process computes on."""

    device: str
    threads: int


def shares(devices: str, processes: int | None) -> list[Share]:
    """Give `processes` workers (default: one per device) their devices in turn, and the cores in equal parts.

    `auto` is every GPU, or the CPU without one. Raises SettingsError for a device that is not there.
    """
    names = _available() if devices == "auto" else [name.strip() for name in devices.split(",") if name.strip()]
    for name in names:
        _check(name)
    if not names:
        raise SettingsError("--devices is empty: write auto, cpu, or a list such as cuda:0,cuda:1.")
    count = processes or len(names)
    threads = max(1, (os.cpu_count() or 1) // count)
    return [Share(names[number % len(names)], threads) for number in range(count)]


def _available() -> list[str]:
    from innerloop.learning.devices import gpus  # noqa: PLC0415 - torch is slow to load, and only this needs it

    return gpus() or ["cpu"]


def _check(name: str) -> None:
    if name == "cpu":
        return
    from innerloop.learning.devices import gpus  # noqa: PLC0415

    if name not in (known := gpus()):
        raise SettingsError(f"There is no device {name}: choose from {', '.join(['cpu', *known])}.")
