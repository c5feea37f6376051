"""A GPU's two limits, which nothing on it exceeds: measured in the same run as what is compared with them."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

_RUNS, _FLOATS, _SIDE = 9, 2**28, 8_192


def gpu_name() -> str:
    """Of the first one, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "not run: none here"


def copied_per_second(device: str) -> float:
    """Bytes read and written by a copy of 1 GiB."""
    source = torch.empty(_FLOATS, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def products_per_second(device: str) -> float:
    """Floating-point operations of a float32 product of 8,192 x 8,192 without TF32, additions counted too."""
    matrix = torch.randn(_SIDE, _SIDE, device=device)
    return 2 * _SIDE**3 / _seconds(lambda: matrix @ matrix)


def _seconds(run: Callable[[], Tensor]) -> float:
    """Median of `_RUNS` runs, after one that doesn't count."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)
