"""Support sets as the ads' head reads them: padded, and with the clicks that a later purchase relabelled."""

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.learning.ads.attribution import DAY, NEVER, attribute
from innerloop.learning.ads.pairs import KINDS, Past
from innerloop.learning.devices import moved
from innerloop.support import SupportSets, ranges

_CLICK, _PURCHASE = 1, 1 + KINDS.index("purchase")  # event type codes as stored: from 1 in the order of KINDS


def past_of(
    sets: SupportSets,
    items: NDArray[np.int64],
    categories: NDArray[np.int64],
    *,
    window: int = DAY,
    device: torch.device | None = None,
) -> Past:
    """The events of T tasks, padded to the longest, with purchases attributed to the clicks within `window` (ms).

    `items` and `categories` [N] number those of `sets.examples`, as the ads to be asked about are numbered; -1 where
    unknown. An item that is unknown is never the same as another. Raises ValueError when the window is not positive.
    """
    sizes, examples = sets.sizes, sets.examples
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    times, types = examples["time"].astype(np.int64), examples["type"].astype(np.int64)
    known = items >= 0
    clicks, purchases = known & (types == _CLICK), known & (types == _PURCHASE)
    converted = attribute(tasks, items, times, clicks, purchases, window=window).converted_at
    return Past(
        items=pad(sets, np.where(known, items, -2 - np.arange(len(items))), -1, device),
        categories=pad(sets, categories, -1, device),
        kinds=pad(sets, types - 1, len(KINDS), device),
        times=pad(sets, times, 0, device),
        converted_at=pad(sets, converted, NEVER, device),
        mask=pad(sets, np.ones(len(times), np.int64), 0, device).bool(),
    )


def pad(sets: SupportSets, values: NDArray[np.int64], fill: int, device: torch.device | None = None) -> torch.Tensor:
    """`values` [N] of the examples as [T, S], with `fill` behind the shorter sets."""
    sizes = sets.sizes
    width = max(1, int(sizes.max(initial=0)))
    found = np.full(len(sizes) * width, fill, np.int64)
    found[ranges(np.arange(len(sizes)) * width, sizes)] = values
    return moved(torch.from_numpy(found.reshape(len(sizes), width)), device)
