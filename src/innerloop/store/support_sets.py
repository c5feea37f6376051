"""Support sets, and impressions, which have the same layout, in Postgres: moved by binary COPY, a batch at a time.

Layout of the stream: https://www.postgresql.org/docs/current/sql-copy.html (binary format) and `array_recv`: a
one-dimensional array is ndim, has_null, element type, length, lower bound (int32 each, big-endian), then for each
element its length in bytes and its value.
"""

import io
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from innerloop.store.database import cursor_of
from innerloop.support import EXAMPLE, Ints, SupportSets

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
_HEADER_BYTES = 20


@dataclass(frozen=True)
class _Column:
    """One array column: its field in EXAMPLE, the element's wire type, and Postgres's number for that type."""

    field: str
    wire: str
    oid: int

    @property
    def element(self) -> np.dtype[np.void]:
        return np.dtype([("bytes", ">i4"), ("value", self.wire)])

    def header(self, length: int) -> bytes:
        """Field length and array header of `length` elements; Postgres writes an empty array with no dimension."""
        if length == 0:
            return struct.pack(">iiii", 12, 0, 0, self.oid)
        size = _HEADER_BYTES + length * self.element.itemsize
        return struct.pack(">iiiiii", size, 1, 0, self.oid, length, 1)


_COLUMNS = (
    _Column("item", ">i4", 23),
    _Column("type", ">i2", 21),
    _Column("weight", ">f4", 700),
    _Column("time", ">i8", 20),
    _Column("hash", ">i8", 20),
)
_NAMES = "items, event_types, weights, event_times, event_hashes"

Table = Literal["support_sets", "impressions"]
"""Which of the two tables is meant: what users did, or what they were shown."""

_STAGE = "CREATE TEMPORARY TABLE IF NOT EXISTS incoming_{0} (LIKE {0} INCLUDING STORAGE) ON COMMIT DELETE ROWS"
# Users in order, so that two writers never wait for each other in a circle. The version is the guard against a second
# writer of the same user: whoever was not shown version n - 1 cannot write n. A row that was inserted has no xmax.
_MERGE = f"""
    WITH merged AS (
    INSERT INTO {{0}} AS s (user_id, {_NAMES}, version)
    SELECT user_id, {_NAMES}, version FROM incoming_{{0}} ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET
        items = excluded.items, event_types = excluded.event_types, weights = excluded.weights,
        event_times = excluded.event_times, event_hashes = excluded.event_hashes, version = excluded.version
    WHERE s.version = excluded.version - 1
    RETURNING s.xmax = 0 AS inserted
    ) SELECT count(*), count(*) FILTER (WHERE inserted) FROM merged
"""  # noqa: S608 - column names of ours


class SupportConflictError(Exception):
    """Another writer changed one of these users since it was read; read again and merge again."""


def write(
    connection: Connection,
    users: list[str],
    sets: SupportSets,
    versions: Ints,
    *,
    reborn: int = 0,
    table: Table = "support_sets",
) -> None:
    """Write sets, each with a version one above what is stored. Raises SupportConflictError; the caller rolls back.

    A user's first set has version 1, but for `reborn` of them, who were erased and came back. A set that is expected to
    be there and isn't was deleted by somebody: that is a conflict, too, or the deleted would come back.
    """
    cursor = cursor_of(connection)
    cursor.execute(_STAGE.format(table))
    cursor.copy_expert(f"COPY incoming_{table} FROM STDIN (FORMAT binary)", io.BytesIO(encode(users, sets, versions)))
    cursor.execute(_MERGE.format(table))
    written, inserted = cursor.fetchone() or (0, 0)
    expected = int((versions == 1).sum()) + reborn
    if written != len(users):
        raise SupportConflictError(f"{len(users) - written} of {len(users)} users have another writer")
    if inserted != expected:
        raise SupportConflictError(f"{inserted} of {len(users)} users had no set, {expected} were thought to have none")


def read(
    connection: Connection, users: list[str], *, table: Table = "support_sets"
) -> tuple[list[str], SupportSets, Ints]:
    """The stored ones among `users`, in the table's order: identifiers, sets and versions [T]."""
    cursor = cursor_of(connection)
    query = cursor.mogrify(
        f"COPY (SELECT user_id, {_NAMES}, version FROM {table} WHERE user_id = ANY(%s))"  # noqa: S608
        " TO STDOUT (FORMAT binary)",
        (users,),
    )
    stream = io.BytesIO()
    cursor.copy_expert(query.decode(), stream)
    return decode(stream.getbuffer())


def versions(connection: Connection, users: list[str]) -> dict[str, int]:
    """The version of each user among `users` who has a set."""
    cursor = cursor_of(connection)
    cursor.execute("SELECT user_id, version FROM support_sets WHERE user_id = ANY(%s)", (users,))
    return dict(cursor.fetchall())


def users_after(connection: Connection, user: str, most: int) -> list[tuple[str, int, int]]:
    """The next users behind `user`, in the table's order, at most so many: identifier, version, newest event."""
    cursor = cursor_of(connection)
    cursor.execute(
        "SELECT user_id, version, coalesce(event_times[cardinality(event_times)], 0) FROM support_sets"
        " WHERE user_id > %s ORDER BY user_id LIMIT %s",
        (user, most),
    )
    found: list[tuple[str, int, int]] = cursor.fetchall()
    return found


def encode(users: list[str], sets: SupportSets, versions: Ints) -> bytes:
    """The COPY stream of a batch. Elements are encoded a column at a time, rows are joined from slices."""
    columns = [_elements(column, sets.examples[column.field]) for column in _COLUMNS]
    widths = [column.element.itemsize for column in _COLUMNS]
    headers: dict[int, list[bytes]] = {}
    parts = [_SIGNATURE]
    starts = sets.starts.tolist()
    for row, (user, version) in enumerate(zip(users, versions.tolist(), strict=True)):
        start, end = starts[row], starts[row + 1]
        header = headers.get(end - start)
        if header is None:
            header = headers[end - start] = [column.header(end - start) for column in _COLUMNS]
        name = user.encode()
        parts.append(struct.pack(">hi", 2 + len(_COLUMNS), len(name)) + name)
        for head, column, width in zip(header, columns, widths, strict=True):
            parts.append(head)
            parts.append(column[start * width : end * width])
        parts.append(struct.pack(">iq", 8, version))
    parts.append(_TRAILER)
    return b"".join(parts)


def _elements(column: _Column, values: NDArray[np.generic]) -> bytes:
    out = np.empty(len(values), column.element)
    out["bytes"] = column.element["value"].itemsize
    out["value"] = values
    return out.tobytes()


def decode(stream: memoryview) -> tuple[list[str], SupportSets, Ints]:
    """Rows of a COPY stream in `encode`'s layout: identifiers, sets, versions."""
    users: list[str] = []
    sizes: list[int] = []
    versions: list[int] = []
    pieces: list[list[memoryview]] = [[] for _ in _COLUMNS]
    at = len(_SIGNATURE)
    while struct.unpack_from(">h", stream, at)[0] != -1:
        (name_bytes,) = struct.unpack_from(">i", stream, at + 2)
        users.append(bytes(stream[at + 6 : at + 6 + name_bytes]).decode())
        at += 6 + name_bytes
        for number, piece in enumerate(pieces):
            (size,) = struct.unpack_from(">i", stream, at)
            piece.append(stream[at + 4 + _HEADER_BYTES : at + 4 + size])
            at += 4 + size
            if number == 0:
                sizes.append(max(size - _HEADER_BYTES, 0) // _COLUMNS[0].element.itemsize)
        versions.append(struct.unpack_from(">q", stream, at + 4)[0])
        at += 12
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    examples = np.empty(int(starts[-1]), EXAMPLE)
    for column, piece in zip(_COLUMNS, pieces, strict=True):
        examples[column.field] = np.frombuffer(b"".join(piece), column.element)["value"]
    return users, SupportSets(starts, examples), np.array(versions, np.int64)
