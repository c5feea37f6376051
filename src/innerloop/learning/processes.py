"""Training by several processes at once: who they are, and what they agree on.

torchrun starts them and tells each its rank. All do the same with the same history; only the steps of gradient descent
are shared out. What is decided by a number goes by the first one's, or one would stop while another waits for it.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist


def join_processes() -> None:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo without; nothing to do for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave_processes() -> None:
    """Undo `join_processes`."""
    if _joined():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for the first or only one."""
    return dist.get_rank() if _joined() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if _joined() else 1


def agreed(number: float) -> float:
    """The first process's number, in all of them."""
    if not _joined():
        return number
    told = torch.tensor([number], dtype=torch.float64, device=_device())
    dist.broadcast(told, 0)
    return float(told)


def from_first(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in all of them; the others don't call it."""
    if not _joined():
        return make()
    content = make() if rank() == 0 else b""
    size = int(agreed(len(content)))
    told = torch.empty(size, dtype=torch.uint8, device=_device())
    if rank() == 0:
        told.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(told, 0)
    return told.cpu().numpy().tobytes()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
