"""The partition ledger: where each partition stands in Postgres, and which owner may move it.

Promise: an owner that has been superseded writes nothing. Claiming raises `owner_epoch`; `advance` runs in the same
transaction as the data and touches no row when the epoch is old or the offset is not the one this owner left, and the
transaction then rolls back with FencedError.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psycopg2.extras import execute_values
from sqlalchemy import Connection, Engine, text

from innerloop.errors import FencedError
from innerloop.store.database import cursor_of, transaction

Partition = tuple[str, int]
"""(topic, partition)"""

OWNER = f"{socket.gethostname()}:{os.getpid()}"

# Whoever holds a partition's row is at work, or frozen: then the server lets go of it, and we ask again until it does.
_CLAIM_WAITS = text("SET LOCAL lock_timeout = '500ms'")
_CLAIM = text("""
    INSERT INTO partition_ledger AS l (topic, topic_id, partition, owner_epoch, owner)
    VALUES (:topic, :topic_id, :partition, 1, :owner)
    ON CONFLICT (topic, topic_id, partition)
    DO UPDATE SET owner_epoch = l.owner_epoch + 1, owner = excluded.owner, claimed_at = now()
    RETURNING owner_epoch, next_offset
""")

_ADVANCE = """
    UPDATE partition_ledger AS l SET next_offset = v.next_offset
    FROM (VALUES %s) AS v (topic, topic_id, partition, epoch, expected, next_offset)
    WHERE l.topic = v.topic AND l.topic_id = v.topic_id AND l.partition = v.partition
      AND l.owner_epoch = v.epoch AND l.next_offset IS NOT DISTINCT FROM v.expected::bigint
"""

_GAP = text("""
    INSERT INTO partition_gaps AS g (topic, topic_id, partition, from_offset, to_offset, owner)
    VALUES (:topic, :topic_id, :partition, :from_offset, :to_offset, :owner)
    ON CONFLICT (topic, topic_id, partition, from_offset)
    DO UPDATE SET to_offset = greatest(g.to_offset, excluded.to_offset)
""")

# A ledger that keeps no offset of its own (null, as adapt's) stays so.
_PASS = text("""
    UPDATE partition_ledger SET next_offset = next_offset + greatest(0, :to_offset - next_offset)
    WHERE topic = :topic AND topic_id = :topic_id AND partition = :partition AND owner_epoch = :epoch
    RETURNING next_offset
""")


@dataclass(frozen=True)
class Claim:
    """What this process holds of a partition: its epoch, and the offset of the first record not in Postgres."""

    topic_id: str
    epoch: int
    next_offset: int | None


class Ledger:
    """The claims of this process."""

    def __init__(self, engine: Engine, topic_ids: Mapping[str, str]) -> None:
        self._engine, self._topic_ids = engine, topic_ids
        self._claims: dict[Partition, Claim] = {}

    def claim(self, partitions: Sequence[Partition]) -> dict[Partition, Claim]:
        """Take over `partitions`: whoever held them before can no longer write. Raises RetryError."""
        claims = {}
        with transaction(self._engine) as connection:
            connection.execute(_CLAIM_WAITS)
            for topic, partition in sorted(partitions):
                topic_id = self._topic_ids[topic]
                values = {"topic": topic, "topic_id": topic_id, "partition": partition, "owner": OWNER}
                epoch, next_offset = connection.execute(_CLAIM, values).one()
                claims[topic, partition] = Claim(topic_id, epoch, next_offset)
        self._claims.update(claims)
        return claims

    def release(self, partitions: Sequence[Partition]) -> None:
        """Forget claims; the next owner claims for itself."""
        for partition in partitions:
            self._claims.pop(partition, None)

    def __getitem__(self, partition: Partition) -> Claim:
        return self._claims[partition]

    def __contains__(self, partition: Partition) -> bool:
        return partition in self._claims

    def advance(self, connection: Connection, offsets: Mapping[Partition, int]) -> None:
        """Move each partition to its next offset, inside the caller's transaction. Raises FencedError."""
        rows = []
        for (topic, partition), offset in sorted(offsets.items()):
            claim = self._claims[topic, partition]
            rows.append((topic, claim.topic_id, partition, claim.epoch, claim.next_offset, offset))
        cursor = cursor_of(connection)
        execute_values(cursor, _ADVANCE, rows, page_size=len(rows))
        if cursor.rowcount != len(rows):
            names = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(offsets))
            raise FencedError(f"Another process owns one of {names} now; this batch was rolled back, it will redo it.")

    def advanced(self, offsets: Mapping[Partition, int]) -> None:
        """The transaction that called `advance` has committed."""
        for partition, offset in offsets.items():
            claim = self._claims[partition]
            self._claims[partition] = Claim(claim.topic_id, claim.epoch, offset)

    def gap(self, partition: Partition, from_offset: int, to_offset: int) -> None:
        """Record that the records [from_offset, to_offset) are gone, and move the partition behind them.

        Both in one transaction; the same gap again changes nothing. Raises FencedError and RetryError.
        """
        topic, number = partition
        claim = self._claims[partition]
        where = {"topic": topic, "topic_id": claim.topic_id, "partition": number, "to_offset": to_offset}
        with transaction(self._engine) as connection:
            connection.execute(_GAP, {**where, "from_offset": from_offset, "owner": OWNER})
            moved = connection.execute(_PASS, {**where, "epoch": claim.epoch}).one_or_none()
            if moved is None:
                raise FencedError(f"Another process owns {topic}[{number}] now; it will meet the gap.")
        self._claims[partition] = Claim(claim.topic_id, claim.epoch, moved.next_offset)

    def reload(self) -> None:
        """Read again where the claimed partitions stand, after a commit whose outcome is unknown.

        Raises FencedError when another process has claimed one since, RetryError when the database is away.
        """
        query = text(
            "SELECT owner_epoch, next_offset FROM partition_ledger"
            " WHERE topic = :topic AND topic_id = :topic_id AND partition = :partition"
        )
        with transaction(self._engine) as connection:
            for (topic, partition), claim in list(self._claims.items()):
                values = {"topic": topic, "topic_id": claim.topic_id, "partition": partition}
                row = connection.execute(query, values).one_or_none()
                if row is None or row.owner_epoch != claim.epoch:
                    raise FencedError(f"Another process owns {topic}[{partition}] now; it will redo this batch.")
                self._claims[topic, partition] = Claim(claim.topic_id, claim.epoch, row.next_offset)
