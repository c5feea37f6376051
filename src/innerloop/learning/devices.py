"""What this machine computes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def moved(values: Tensor, device: torch.device | None) -> Tensor:
    """A batch's array, which lies in the CPU's memory, on the device; on the CPU the very same tensor.

    To a GPU it goes from pinned memory, so that nobody waits for the copy: what is computed with it comes after it.
    """
    if device is None or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def gpus() -> list[str]:
    """The devices that torch sees besides the CPU: cuda:0 and so on."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def gpu_memory(device: str) -> int:
    """Bytes that this process holds on the GPU."""
    return torch.cuda.memory_reserved(device)


def gpu_busy(device: str) -> float:
    """The share of the last second in which the GPU worked at all, for whichever process.

    The driver's own figure (NVML), which it doesn't have for part of a GPU (MIG): raises whatever it refuses with.
    """
    return torch.cuda.utilization(device) / 100


def use_threads(count: int) -> None:
    """Let torch use `count` threads of the CPU; 0 leaves it to torch."""
    if count:
        torch.set_num_threads(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread of the CPU in here, and as many as before behind it.

    For what is done in many small steps: waking a second thread takes longer than one of them (some 90 µs for 4 where
    the processor is virtual).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
