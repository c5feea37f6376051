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
_AFTER = text("SELECT number, packed FROM activity WHERE number > :number ORDER BY number")
_NEWEST = text("""
    SELECT number, packed FROM (
        SELECT number, packed, sum(events) OVER (ORDER BY number DESC) AS so_far FROM activity
    ) AS counted
    WHERE so_far <= :events ORDER BY number
""")
_TRIM = text("""
    DELETE FROM activity WHERE number <= (
        SELECT max(number) FROM (
            SELECT number, sum(events) OVER (ORDER BY number DESC) AS so_far FROM activity
        ) AS counted WHERE so_far > :events
    )
""")


def append(connection: Connection, activity: Activity) -> None:
    """Add a piece."""
    connection.execute(_APPEND, {"events": len(activity), "packed": activity.tobytes()})


def trim(connection: Connection, events: int) -> None:
    """Delete the oldest pieces beyond the newest `events` events."""
    connection.execute(_TRIM, {"events": events})


@dataclass
class ActivityReader:
    """Reads each piece once: first the newest `warm_up` events, then what is new. `newest` numbers the last piece."""

    warm_up: int
    newest: int = 0
    _seen: set[int] = field(default_factory=set)
    _started: bool = False

    def read(self, connection: Connection) -> Activity:
        """What has been added since the last call, [N] of ACTIVITY."""
        if self._started:
            rows = connection.execute(_AFTER, {"number": self.newest - _LOOK_BACK}).all()
        else:
            rows = connection.execute(_NEWEST, {"events": self.warm_up}).all()
        fresh = [row for row in rows if row.number not in self._seen]
        self._started = True
        self.newest = max([self.newest, *(row.number for row in fresh)])
        self._seen = {n for n in self._seen if n > self.newest - _LOOK_BACK} | {row.number for row in fresh}
        return np.frombuffer(b"".join(bytes(row.packed) for row in fresh), ACTIVITY)
