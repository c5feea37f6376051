"""What this machine computes on."""

import torch


def gpus() -> list[str]:
    """The devices that torch sees besides the CPU: cuda:0 and so on."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def gpu_use(device: str) -> tuple[int, float]:
    """Bytes that this process holds on the GPU, and the share of the last second in which the GPU worked at all.

    The share is the driver's own (NVML): of all processes that use the GPU.
    """
    return torch.cuda.memory_reserved(device), torch.cuda.utilization(device) / 100


def use_threads(count: int) -> None:
    """Let torch use `count` threads of the CPU; 0 leaves it to torch."""
    if count:
        torch.set_num_threads(count)
