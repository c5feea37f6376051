"""Taking a batch apart so that the machine is used well: tasks of like size together, as many as a cache holds."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from innerloop.learning.heads.base import Support

_AT_ONCE = 1 << 19  # numbers: on a CPU, what stays in a core's cache from one product to the next
_WELL_FILLED = 0.7  # of the padded places: above that sorting by size costs more than it saves


def in_chunks(adapt: Callable[[Support], Tensor], support: Support, parameters: int, width: int = 0) -> Tensor:
    """Apply `adapt`, which gives [t, parameters] for t tasks, to tasks of like size together; [T, parameters].

    `width` is how many numbers a task needs besides its features. What a task gets doesn't depend on its chunk.
    """
    tasks, examples, dimension = support.features.shape
    whole = [(slice(0, tasks), examples)] if _filled(support) else list(_buckets(support))
    found = support.features.new_empty(tasks, parameters, dtype=torch.float32)
    for rows, length in whole:
        some = support.take(rows).shortened(length)
        at_once = _tasks_at_once(max(length * dimension, width), support.features.device, tasks)
        parts = [adapt(some.take(slice(at, at + at_once))) for at in range(0, len(some.mask), at_once)]
        if parts:
            found[rows] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found


def _filled(support: Support) -> bool:
    return bool(support.mask.sum() >= _WELL_FILLED * support.mask.numel())


def _buckets(support: Support) -> Iterator[tuple[Tensor, int]]:
    """Tasks by how far their examples reach, in powers of two: rows [t] and the width that they need."""
    places = torch.arange(1, support.mask.shape[1] + 1, device=support.mask.device)
    reach = (support.mask * places).amax(1)  # [T]
    floor = 0
    while floor < support.mask.shape[1]:
        ceiling = max(4, 2 * floor)
        rows = ((reach > floor) | (floor == 0) & (reach == 0)) & (reach <= ceiling)
        yield rows.nonzero().squeeze(1), min(ceiling, support.mask.shape[1])
        floor = ceiling


def _tasks_at_once(numbers: int, device: torch.device, tasks: int) -> int:
    """How many tasks of `numbers` numbers suit the device: a GPU takes all."""
    return max(1, _AT_ONCE // max(1, numbers)) if device.type == "cpu" else max(1, tasks)
