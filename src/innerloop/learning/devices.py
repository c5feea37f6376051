"""What this machine computes on."""

import torch


def gpus() -> list[str]:
    """The devices that torch sees besides the CPU: cuda:0 and so on."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def use_threads(count: int) -> None:
    """Let torch use `count` threads of the CPU; 0 leaves it to torch."""
    if count:
        torch.set_num_threads(count)
