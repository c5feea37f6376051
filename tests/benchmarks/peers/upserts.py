"""The database part that every peer shares: per-user arrays, a whole batch in one upsert, the newest 64 kept.

The table is the obvious one (text arrays that people can read), and so is the statement: new examples are appended to
the stored ones and the oldest cut off, in SQL. Nothing is deduplicated or reordered, and no adaptation is asked for:
less work than Innerloop's for the same events.

Lines on standard output tell the benchmark, on the machine's monotonic clock: `started T` at the first record, and
`committed T N` when a transaction with N events has been committed.
"""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg2
from psycopg2.extras import execute_values

CAPACITY = 64

TABLE = """
    CREATE TABLE peer_sets (
        user_id text PRIMARY KEY, items text[] NOT NULL, event_types text[] NOT NULL,
        event_times bigint[] NOT NULL, event_ids text[] NOT NULL, events bigint NOT NULL
    )
"""
_KEPT = "greatest(1, cardinality(s.items) + cardinality(excluded.items) - 63)"
_UPSERT = f"""
    INSERT INTO peer_sets AS s (user_id, items, event_types, event_times, event_ids, events) VALUES %s
    ON CONFLICT (user_id) DO UPDATE SET
        items = (s.items || excluded.items)[{_KEPT}:],
        event_types = (s.event_types || excluded.event_types)[{_KEPT}:],
        event_times = (s.event_times || excluded.event_times)[{_KEPT}:],
        event_ids = (s.event_ids || excluded.event_ids)[{_KEPT}:],
        events = s.events + excluded.events
"""
_TEMPLATE = "(%s, %s::text[], %s::text[], %s::bigint[], %s::text[], %s)"


class Sets:
    """The peer's table of per-user arrays, over one connection."""

    def __init__(self) -> None:
        self._connection = psycopg2.connect(os.environ["BENCH_DATABASE"])

    def append(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Store a batch of decoded events in one transaction."""
        users: dict[str, list[Mapping[str, Any]]] = {}
        count = 0
        for event in events:
            users.setdefault(event["user_id"], []).append(event)
            count += 1
        rows = [_row(user, users[user]) for user in sorted(users)]
        with self._connection, self._connection.cursor() as cursor:
            execute_values(cursor, _UPSERT, rows, _TEMPLATE, page_size=2_000)
        tell("committed", count)


def tell(what: str, count: int | str = "") -> None:
    """A line for the benchmark, in one write so that processes that share the file don't mix.

    Written past `sys.stdout`, which Faust turns into log lines.
    """
    os.write(1, f"{what} {time.monotonic():.6f} {count}\n".encode())


def _row(user: str, events: list[Mapping[str, Any]]) -> tuple[Any, ...]:
    kept = events[-CAPACITY:]
    columns = [[event[name] for event in kept] for name in ("item_id", "event_type", "event_time", "event_id")]
    return user, *columns, len(events)
