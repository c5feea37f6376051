"""Everybody's activity in Postgres: ingest appends pieces, every adapt process reads each piece once.

A statistic, not state: a piece that is lost with its process costs a second of popularity. So pieces are bounded in
number and rate, and those that no reader will want are deleted.
"""

from dataclasses import dataclass, field

import numpy as np
from sqlalchemy import Connection, text

from innerloop.trends import ACTIVITY, Activity

_APPEND = text("INSERT INTO activity (events, packed) VALUES (:events, :packed)")
# A piece's number is drawn before it is committed, so a lower one may appear after a higher one: readers look back.
_LOOK_BACK = 256
_AFTER = text("SELECT number, packed FROM activity WHERE number > :number AND number <> ALL(:seen) ORDER BY number")
_NEWEST = text("""
    SELECT number, packed FROM (
        SELECT number, packed, events, sum(events) OVER (ORDER BY number DESC) AS so_far FROM activity
    ) AS counted
    WHERE so_far - events < :most ORDER BY number
""")
_TRIM = text("""
    DELETE FROM activity WHERE number <= (
        SELECT max(number) FROM (
            SELECT number, events, sum(events) OVER (ORDER BY number DESC) AS so_far FROM activity
        ) AS counted WHERE so_far - events >= :most
    )
""")


def append(connection: Connection, activity: Activity) -> None:
    """Add a piece."""
    connection.execute(_APPEND, {"events": len(activity), "packed": activity.tobytes()})


def trim(connection: Connection, events: int) -> None:
    """Delete the oldest pieces beyond those that hold the newest `events` events."""
    connection.execute(_TRIM, {"most": events})


@dataclass
class ActivityReader:
    """Reads each piece once: first those with the newest `warm_up` events, then what is new.

    `newest` numbers the last piece.
    """

    warm_up: int
    newest: int = 0
    _seen: set[int] = field(default_factory=set)
    _oldest: int | None = None
    """None before the warm-up; what it left out is older than this, and stays out."""

    def read(self, connection: Connection) -> Activity:
        """What has been added since the last call, [N] of ACTIVITY."""
        if self._oldest is None:
            rows = connection.execute(_NEWEST, {"most": self.warm_up}).all()
            full = sum(len(row.packed) for row in rows) >= self.warm_up * ACTIVITY.itemsize
            self._oldest = rows[0].number if full else 0
        else:
            after = max(self.newest - _LOOK_BACK, self._oldest - 1)
            rows = connection.execute(_AFTER, {"number": after, "seen": list(self._seen)}).all()
        self.newest = max([self.newest, *(row.number for row in rows)])
        self._seen = {n for n in self._seen | {row.number for row in rows} if n > self.newest - _LOOK_BACK}
        return np.frombuffer(b"".join(bytes(row.packed) for row in rows), ACTIVITY)
