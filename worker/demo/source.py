"""Where the demo's events come from: the synthetic shop, or the later part of a file whose earlier part trained."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import read_events
from innerloop.evaluation.shop import Shop
from innerloop.events import CODES
from innerloop.shop_items import Item

from .names import named

_SHOP_HISTORY = 100_000
_CHUNK = 2_000
_WEEK_MS = 7 * 86_400_000


@dataclass(frozen=True)
class Source:
    """Events to train on, and the ones after them, oldest first, in chunks."""

    name: str
    history: pl.DataFrame
    live: Iterator[pl.DataFrame]
    total: int | None
    """How many live events there are; None when they do not end."""
    items: Iterable[Item] = ()
    """What the shop says of its items; a file of events has no names."""


def shop_source(seed: int, now_ms: int) -> Source:
    """The synthetic shop; its clock begins early enough that a long demo does not run ahead of the real one."""
    shop = Shop(seed, start=now_ms - 52 * _WEEK_MS)
    return Source("the synthetic shop", shop.history(_SHOP_HISTORY), shop.stream(), None, named(shop.catalogue()))


def file_source(path: Path, columns: Mapping[str, str], share: float, limit: int | None) -> Source:
    """The first `share` of the file's events (by time; at most `limit` rows) train, the rest is live."""
    events = read_events(path, columns=columns).filter(pl.col("event_type").is_in(list(CODES)))
    if limit is not None:
        events = events.head(limit)
    cut = int(len(events) * share)
    if cut == 0 or cut == len(events):
        raise SettingsError(f"{path} has {len(events)} events: too few to train on one part and replay the other.")
    rest = events.slice(cut)
    return Source(path.name, events.head(cut), rest.iter_slices(_CHUNK), len(rest))
