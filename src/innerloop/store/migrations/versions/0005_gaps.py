"""Records that retention deleted before they were read, and that an operator let go."""

from alembic import op

revision = "0005"
down_revision = "0004"

_UP = """
    CREATE TABLE partition_gaps (
        topic text,
        topic_id text,
        partition integer,
        from_offset bigint,
        to_offset bigint NOT NULL,
        owner text NOT NULL,
        accepted_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, topic_id, partition, from_offset)
    )
"""


def upgrade() -> None:
    """Add it."""
    op.execute(_UP)


def downgrade() -> None:
    """Remove it, with what is in it."""
    op.execute("DROP TABLE partition_gaps")
