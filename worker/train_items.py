"""What the shop says of its items, for training: its catalogue topic, where there is one."""

from collections.abc import Container

import polars as pl
import structlog

from innerloop.config import Settings
from innerloop.errors import DeadLetterError
from innerloop.learning.described import COLUMNS
from innerloop.shop_items import decode_item
from innerloop.streams.batch import Record
from innerloop.streams.topics import existing
from innerloop.streams.whole_topic import whole_topic

_LOG = structlog.get_logger(__name__)
_Said = tuple[int, str | None, float | None, str]
"""When, the category, the price and the name."""


def items_on_topic(settings: Settings, met: Container[str]) -> pl.DataFrame:
    """What the topic says of the items that were `met`, and of the newest `learning.described_items` others.

    An empty table where there is no such topic. Raises ServiceError or RetryError when there is one and it cannot be
    read: a release that does without what is known would be a worse one, and nobody would see why.
    """
    topic = settings.topics.items
    if not existing(settings, [topic]):
        _LOG.info("items are not described", why=f"Topic {topic} does not exist: `innerloop topics` makes it.")
        return pl.DataFrame(schema=COLUMNS)
    found = _Found(met, settings.learning.described_items)
    for record in whole_topic(settings, topic):
        found.take(record)
    table = found.table()
    if found.skipped:  # once: there may be many
        _LOG.warning("no items", topic=topic, skipped=found.skipped, why=found.last_skipped)
    if found.full:
        most = settings.learning.described_items
        _LOG.info("the oldest are left out", most=most, setting="learning.described_items")
    return table


class _Found:
    """The newest of each item's records; of the items that nobody met about `most`, at any time."""

    def __init__(self, met: Container[str], most: int) -> None:
        self._met, self._most = met, most
        self._of_met: dict[str, _Said] = {}
        self._others: dict[str, _Said] = {}
        self.full = False
        self.skipped, self.last_skipped = 0, ""

    def take(self, record: Record) -> None:
        if record.value is None:
            gone = (record.key or b"").decode(errors="replace")
            self._of_met.pop(gone, None)
            self._others.pop(gone, None)
            return
        try:
            item = decode_item(record.key, record.value)
        except DeadLetterError as error:
            self.skipped, self.last_skipped = self.skipped + 1, str(error)
            return
        rows = self._of_met if item.item_id in self._met else self._others
        rows[item.item_id] = record.timestamp_ms, item.category, item.price, item.name
        if len(self._others) > 2 * self._most:
            self._others = self._newest()

    def _newest(self) -> dict[str, _Said]:
        by_age = sorted(self._others.items(), key=lambda row: (-row[1][0], row[0]))
        self.full |= len(by_age) > self._most
        return dict(by_age[: self._most])

    def table(self) -> pl.DataFrame:
        rows = [(item, *said[1:]) for item, said in [*sorted(self._of_met.items()), *self._newest().items()]]
        return pl.DataFrame(rows, schema=COLUMNS, orient="row")
