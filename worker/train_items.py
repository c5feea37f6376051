"""What the shop says of its items, for training: its catalogue topic, where there is one."""

from collections.abc import Container

import polars as pl
import structlog

from innerloop.config import Settings
from innerloop.errors import DeadLetterError, ServiceError
from innerloop.learning.described import COLUMNS
from innerloop.shop_items import decode_item
from innerloop.streams.batch import Record
from innerloop.streams.topics import require_topics
from innerloop.streams.whole_topic import whole_topic

_LOG = structlog.get_logger(__name__)


def items_on_topic(settings: Settings, met: Container[str]) -> pl.DataFrame | None:
    """What the topic says of the items that were `met`, and of `learning.described_items` others.

    None where there is no topic that can be read, or nothing on it: training goes on without. Raises RetryError when
    the broker falls silent on the way.
    """
    topic = settings.topics.items
    try:
        require_topics(settings, [topic])
    except ServiceError as error:
        _LOG.info("items are not described", why=str(error))
        return None
    found = _Found(met, settings.learning.described_items)
    for record in whole_topic(settings, topic):
        found.take(record)
    if found.skipped:  # once: there may be many
        _LOG.warning("no items", topic=topic, skipped=found.skipped, why=found.last_skipped)
    if found.left_out:
        _LOG.warning("items left out", items=found.left_out, why="learning.described_items allows no more")
    return found.table()


class _Found:
    """The newest of each item's records; of the items that nobody met at most `most`."""

    def __init__(self, met: Container[str], most: int) -> None:
        self._met, self._room = met, most
        self._rows: dict[str, tuple[str | None, float | None, str]] = {}
        self.left_out = self.skipped = 0
        self.last_skipped = ""

    def take(self, record: Record) -> None:
        if record.value is None:
            self._forget((record.key or b"").decode(errors="replace"))
            return
        try:
            item = decode_item(record.key, record.value)
        except DeadLetterError as error:
            self.skipped, self.last_skipped = self.skipped + 1, str(error)
            return
        if item.item_id not in self._rows and item.item_id not in self._met:
            if not self._room:
                self.left_out += 1
                return
            self._room -= 1
        self._rows[item.item_id] = item.category, item.price, item.name

    def _forget(self, item_id: str) -> None:
        if self._rows.pop(item_id, None) is not None and item_id not in self._met:
            self._room += 1

    def table(self) -> pl.DataFrame | None:
        rows = [(item, *said) for item, said in sorted(self._rows.items())]
        return pl.DataFrame(rows, schema=COLUMNS, orient="row") if rows else None
