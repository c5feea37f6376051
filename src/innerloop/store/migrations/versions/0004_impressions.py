"""What each user was shown lately."""

from alembic import op

revision = "0004"
down_revision = "0003"

# Laid out and stored as support_sets is; a full row (32 impressions) has about 1 KB.
_UP = """
    CREATE TABLE impressions (
        user_id text PRIMARY KEY,
        items integer[] STORAGE EXTERNAL NOT NULL,
        event_types smallint[] STORAGE EXTERNAL NOT NULL,
        weights real[] STORAGE EXTERNAL NOT NULL,
        event_times bigint[] STORAGE EXTERNAL NOT NULL,
        event_hashes bigint[] STORAGE EXTERNAL NOT NULL,
        version bigint NOT NULL
    ) WITH (fillfactor = 50, toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05)
"""


def upgrade() -> None:
    """Add it."""
    op.execute(_UP)


def downgrade() -> None:
    """Remove it, with what is in it."""
    op.execute("DROP TABLE impressions")
