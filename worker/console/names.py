"""What items are called, read from the shop's catalogue topic where there is one."""

import time
from collections.abc import Iterable, Sequence

import structlog

from innerloop.config import Settings
from innerloop.errors import DeadLetterError, InnerloopError
from innerloop.shop_items import decode_item
from innerloop.store.item_names import ItemNames
from innerloop.streams.batch import Record
from innerloop.streams.tail import Tail

from .repeated import Repeated

_LOG = structlog.get_logger(__name__)
_EVERY_SECONDS = 1.0
_AGAIN_SECONDS = 10.0
"""How long after a failure the topic is opened anew."""
_TURN_SECONDS = 2.0
"""It comes back after about so long, whatever is left to be read: it may have to stop."""
_AT_ONCE, _PATIENCE_SECONDS = 1_000, 0.2


class Names:
    """Follows the topic in a thread of its own, from its beginning; joins no group and commits nothing.

    Whatever is wrong with it costs names alone: items without one are shown by their ids, and `notice` says why.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._topic = settings, settings.topics.items
        self._most = settings.console.named_items
        self._names = ItemNames(self._most)
        self._tail: Tail | None = None
        self._not_before = 0.0
        self._current, self._stale, self._why = False, False, ""
        self._skipped, self._last_skipped = 0, ""
        self._thread = Repeated("names", self.read, _EVERY_SECONDS)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.stop():  # else they are in use, and end with the process
            self.close()

    def close(self) -> None:
        self._close_tail()
        self._names.close()

    def of(self, items: Iterable[str]) -> dict[str, str]:
        """The names of those items that have one."""
        return self._names.of(items)

    @property
    def notice(self) -> str:
        """What a viewer should know of names that are not shown; empty when nothing is amiss."""
        return " ".join(each for each in (self._state(), self._bound(), self._faults()) if each)

    def _state(self) -> str:
        if not self._why and not self._current:
            return f"Names are being read from topic {self._topic}, {len(self._names):,} so far."
        if len(self._names):
            return f"{self._why} Names are as they were." if self._why else ""
        why = self._why or f"Topic {self._topic} holds no names."
        return (
            f"Items are shown by their ids. {why} For names the shop writes its items to {self._topic}: see"
            " Describing items in schemas/README.md."
        )

    def _bound(self) -> str:
        if not self._names.full:
            return ""
        return (
            f"Topic {self._topic} names more items than console.named_items allows ({self._most:,}): the others are"
            " shown by their ids."
        )

    def _faults(self) -> str:
        if not self._skipped:
            return ""
        return f"Skipped on topic {self._topic}, since they are no items: {self._skipped:,} ({self._last_skipped})."

    def read(self) -> None:
        """Take in all that has come: what the thread does each second."""
        if time.monotonic() < self._not_before:
            return
        try:
            self._turn()
        except InnerloopError as error:
            self._fails(str(error))
        except Exception as error:  # noqa: BLE001 - names must not take the look-up along
            if not self._why:  # once, not every few seconds
                _LOG.exception("no names")
            self._fails(f"Names cannot be read ({type(error).__name__}): the console's log says more.")

    def _turn(self) -> None:
        tail, until = self._tail or self._opened(), time.monotonic() + _TURN_SECONDS
        while time.monotonic() < until and (records := tail.new(_AT_ONCE, _PATIENCE_SECONDS)):
            self._forget_stale()
            self._names.put(self._decoded(records))
        if tail.current:
            self._forget_stale()
            self._current, self._why = True, ""

    def _fails(self, why: str) -> None:
        self._close_tail()
        self._why, self._not_before = why, time.monotonic() + _AGAIN_SECONDS

    def _opened(self) -> Tail:
        self._tail, self._stale = Tail(self._settings, self._topic), True
        return self._tail

    def _forget_stale(self) -> None:
        """What was known before the topic was opened: it is read from the beginning, and may be another one now."""
        if self._stale:
            self._names.clear()
            self._stale, self._skipped = False, 0

    def _close_tail(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def _decoded(self, records: Sequence[Record]) -> dict[str, str | None]:
        """What items are called now, None for those that are gone; what is no item is counted and left out."""
        names: dict[str, str | None] = {}
        before = self._skipped
        for record in records:
            try:
                item, name = _named(record)
            except DeadLetterError as error:
                self._skipped += 1
                self._last_skipped = str(error)
            else:
                names[item] = name
        if self._skipped > before:  # once for a batch: there may be many
            _LOG.warning("no items", topic=self._topic, skipped=self._skipped - before, why=self._last_skipped)
        return names


def _named(record: Record) -> tuple[str, str | None]:
    """Raises DeadLetterError."""
    if record.value is None:
        return (record.key or b"").decode(errors="replace"), None
    item = decode_item(record.key, record.value)
    return item.item_id, item.name
