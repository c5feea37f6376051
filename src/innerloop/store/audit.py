"""The tables as a judge reads them: plain SQL and plain values, sharing nothing with the code that writes them."""

from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Connection, text

_SETS = text("SELECT user_id, version, items, event_types, weights, event_times, event_hashes FROM support_sets")
_ITEMS = text("SELECT item_no, item_id FROM items")
_LEDGER = text("SELECT topic, topic_id, partition, next_offset, owner_epoch FROM partition_ledger")
_AT_ONCE = 5_000


class StoredExample(NamedTuple):
    """One element of each array: event time (epoch ms), hash of the event id, item by name, type code, weight."""

    time: int
    hash: int
    item: str
    type: int
    weight: float


class StoredSet(NamedTuple):
    """One user's row, in the order in which it is stored."""

    user: str
    version: int
    examples: list[StoredExample]


class LedgerRow(NamedTuple):
    """Where a partition stands."""

    topic: str
    topic_id: str
    partition: int
    next_offset: int | None
    epoch: int


def stored_sets(connection: Connection) -> Iterator[StoredSet]:
    """Every row of support_sets."""
    names = {row.item_no: row.item_id for row in connection.execute(_ITEMS)}
    rows = connection.execution_options(yield_per=_AT_ONCE).execute(_SETS)
    for user, version, items, types, weights, times, hashes in rows:
        columns = zip(times, hashes, [names[item] for item in items], types, weights, strict=True)
        yield StoredSet(user, version, [StoredExample(*values) for values in columns])


def ledger_rows(connection: Connection) -> list[LedgerRow]:
    """Every row of partition_ledger."""
    return [LedgerRow(*row) for row in connection.execute(_LEDGER)]
