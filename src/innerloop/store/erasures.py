"""Erasures in Postgres: the deletion of what is stored of a user, and the receipt that keeps the user's past out.

Promise: once the receipt of an erasure is committed, no writer brings back what it removed, also one that read the
user before. A writer looks for new receipts after it has written its users and before it commits (`since`); an erasure
holds its users' rows, missing ones included, before it writes its receipt. So one of the two waits for the other on the
row, and then either the writer sees the receipt, or the erasure deletes what the writer has written.

A receipt names its user by a hash that is keyed with this database's own salt: it says nothing to whoever sees it on
paper or in a log, and everything to whoever has the database and a list of users.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from psycopg2.extras import execute_values
from sqlalchemy import Connection, Row, text

from innerloop.store.database import cursor_of

HASH_BYTES = 16

_SALT = text("SELECT salt FROM erasure_salt")
# One erasing transaction at a time, so that receipts become visible in the order of their numbers.
_TURN = text("SELECT pg_advisory_xact_lock(7223344552)")
_ERASED = text("""
    SELECT user_hash, max(requested_at) AS requested_at, max(erased_until) AS erased_until, max(version) AS version
    FROM erasures WHERE user_hash = ANY(:hashes) GROUP BY user_hash
""")
# Takes the row of each user, also of one who has none: an insert waits for whoever inserts the same user meanwhile.
_HOLD = """
    INSERT INTO {0} AS s (user_id, items, event_types, weights, event_times, event_hashes, version)
    SELECT user_id, '{{}}', '{{}}', '{{}}', '{{}}', '{{}}', 1
    FROM unnest(cast(:users AS text[])) AS u (user_id) ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET version = s.version + 1
"""
_DELETE = """
    DELETE FROM {0} WHERE user_id = ANY(:users)
    RETURNING user_id, version, cardinality(items) AS stored, event_times[cardinality(event_times)] AS newest
"""
_RECORD = "INSERT INTO erasures (user_hash, requested_at, erased_until, version, events, impressions) VALUES %s"
_SINCE = text("SELECT number, user_hash FROM erasures WHERE number > :number ORDER BY number")
_RECEIPTS = text("""
    SELECT user_hash, requested_at, erased_at, erased_until, version, events, impressions FROM erasures
    WHERE user_hash = ANY(:hashes) ORDER BY number
""")


@dataclass(frozen=True)
class Erased:
    """What holds of a user who was erased, by all receipts together; times in epoch milliseconds."""

    requested_at: int
    until: int
    """Events that are not later than this are of the past that was erased."""
    version: int
    """The highest version that an erasure took: a user who comes back begins above it."""


@dataclass(frozen=True)
class Receipt:
    """One erasure that was carried out; times in epoch milliseconds but `erased_at`."""

    user_hash: bytes
    requested_at: int
    erased_at: datetime
    erased_until: int
    version: int
    events: int
    """How many events the support set had that was deleted; 0 where there was none."""
    impressions: int
    """How many impressions were deleted."""


def read_salt(connection: Connection) -> bytes:
    """The key of this database's hashes."""
    return bytes(connection.execute(_SALT).scalar_one())


def hash_of(user: str, salt: bytes) -> bytes:
    """The name under which receipts know `user`: BLAKE2b (RFC 7693), keyed."""
    return hashlib.blake2b(user.encode(), digest_size=HASH_BYTES, key=salt).digest()


def erase(connection: Connection, requested: Mapping[str, int]) -> dict[str, Erased]:
    """Delete what is stored of the users of `requested` (user -> epoch ms), write receipts; what holds of each now.

    An erasure that was carried out before, or that a later one covers, changes nothing: what its user has stored is of
    events since. Of any other user all goes that is stored, also what a clock ahead of ours dated after the request.
    """
    connection.execute(_TURN)
    salt = read_salt(connection)
    hashes = {user: hash_of(user, salt) for user in requested}
    known = erased(connection, hashes)
    todo = [user for user, at in requested.items() if user not in known or known[user].requested_at < at]
    if todo:
        did, shown = (_delete(connection, table, todo) for table in ("support_sets", "impressions"))
        rows = []
        for user in todo:
            before = known.get(user, Erased(0, 0, 0))
            version = max(did[user].version, before.version)
            until = max(requested[user], did[user].newest or 0, shown[user].newest or 0)
            rows.append((hashes[user], requested[user], until, version, did[user].stored, shown[user].stored))
            known[user] = Erased(requested[user], max(until, before.until), version)
        execute_values(cursor_of(connection), _RECORD, rows, page_size=len(rows))
    return known


def _delete(
    connection: Connection, table: Literal["support_sets", "impressions"], users: list[str]
) -> dict[str, Row[Any]]:
    """Hold the row of every user and delete it; what it was: of who had none nothing, with version 1."""
    connection.execute(text(_HOLD.format(table)), {"users": users})
    return {row.user_id: row for row in connection.execute(text(_DELETE.format(table)), {"users": users})}


def erased(connection: Connection, hashes: Mapping[str, bytes]) -> dict[str, Erased]:
    """Those of the users of `hashes` (user -> hash) who were erased, and what holds of them."""
    users = {hashed: user for user, hashed in hashes.items()}
    rows = connection.execute(_ERASED, {"hashes": list(users)})
    return {users[bytes(row.user_hash)]: Erased(row.requested_at, row.erased_until, row.version) for row in rows}


def since(connection: Connection, number: int) -> Sequence[tuple[int, bytes]]:
    """(number, hash) of every receipt above `number`, in order; see the module for when to ask."""
    return [(row.number, bytes(row.user_hash)) for row in connection.execute(_SINCE, {"number": number})]


def receipts(connection: Connection, hashes: Collection[bytes]) -> list[Receipt]:
    """All receipts of these hashes, oldest first."""
    rows = connection.execute(_RECEIPTS, {"hashes": list(hashes)})
    return [Receipt(bytes(row.user_hash), *row[1:]) for row in rows]
