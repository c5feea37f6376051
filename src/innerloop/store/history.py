"""All support sets and impressions as an event table, which is what training from the database learns from."""

import polars as pl
from sqlalchemy import Connection, text

_QUERY = text("""
    SELECT s.user_id, i.item_id, i.category, e.event_type, e.event_time, e.event_hash
    FROM (SELECT * FROM support_sets UNION ALL SELECT * FROM impressions) s
    CROSS JOIN LATERAL unnest(s.items, s.event_types, s.event_times, s.event_hashes)
        AS e (item_no, event_type, event_time, event_hash)
    JOIN items i USING (item_no)
    ORDER BY e.event_time, e.event_hash
""")
_TYPES = {1: "click", 2: "cart", 3: "favorite", 4: "purchase", 5: "impression"}


def read_history(connection: Connection) -> pl.DataFrame:
    """Every stored example, oldest first; columns as `evaluation.event_table` has them.

    A support set is capped, so a busy user's old events are not in it, and their impressions are the newest few: for
    those, train from a file.
    """
    rows = connection.execute(_QUERY).all()
    return pl.DataFrame(
        {
            "event_id": [format(row.event_hash & 0xFFFF_FFFF_FFFF_FFFF, "016x") for row in rows],
            "event_type": [_TYPES[row.event_type] for row in rows],
            "user_id": [row.user_id for row in rows],
            "item_id": [row.item_id for row in rows],
            "event_time": [row.event_time for row in rows],
            "category": [row.category for row in rows],
        },
        schema={
            "event_id": pl.String,
            "event_type": pl.String,
            "user_id": pl.String,
            "item_id": pl.String,
            "event_time": pl.Int64,
            "category": pl.String,
        },
    )
