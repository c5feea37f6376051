"""Categories of items, and everybody's activity."""

from alembic import op

revision = "0002"
down_revision = "0001"

_UP = (
    "ALTER TABLE items ADD COLUMN category text",
    """
    CREATE TABLE activity (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        events integer NOT NULL,
        packed bytea STORAGE EXTERNAL NOT NULL
    )
    """,
)


def upgrade() -> None:
    """Add them."""
    for statement in _UP:
        op.execute(statement)


def downgrade() -> None:
    """Remove them, with what is in them."""
    op.execute("DROP TABLE activity")
    op.execute("ALTER TABLE items DROP COLUMN category")
