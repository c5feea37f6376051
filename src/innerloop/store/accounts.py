"""Sums over the tables, for reports that must add up."""

from sqlalchemy import Connection, text


def events_handled(connection: Connection) -> int:
    """Event records whose transaction has committed, over all partitions: what the ledger says."""
    return int(connection.execute(text("SELECT coalesce(sum(next_offset), 0) FROM partition_ledger")).scalar_one())


def users(connection: Connection) -> int:
    """How many users have a support set."""
    return int(connection.execute(text("SELECT count(*) FROM support_sets")).scalar_one())


def users_about(connection: Connection, *, exact_up_to: int) -> tuple[int, bool]:
    """The same without reading a large table: of more than `exact_up_to` the planner's estimate, and then False."""
    estimate = text("SELECT reltuples FROM pg_class WHERE oid = 'support_sets'::regclass")
    estimated = int(connection.execute(estimate).scalar_one())
    if estimated > exact_up_to:
        return estimated, False
    counted = text("SELECT count(*) FROM (SELECT FROM support_sets LIMIT :most) AS few")  # never analysed: no estimate
    found = int(connection.execute(counted, {"most": exact_up_to + 1}).scalar_one())
    return found, found <= exact_up_to


def some_user(connection: Connection) -> str | None:
    """Anybody who has a support set."""
    found: str | None = connection.execute(text("SELECT user_id FROM support_sets LIMIT 1")).scalar_one_or_none()
    return found


def versions(connection: Connection) -> dict[str, int]:
    """The version of every user's support set."""
    rows = connection.execute(text("SELECT user_id, version FROM support_sets"))
    return {row.user_id: row.version for row in rows}
