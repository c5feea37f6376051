"""Receipts of erasures, and the salt of their hashes."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_UP = (
    """
    CREATE TABLE erasures (
        user_hash bytea NOT NULL,
        requested_at bigint NOT NULL,
        number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
        erased_at timestamptz NOT NULL DEFAULT now(),
        erased_until bigint NOT NULL,
        version bigint NOT NULL,
        events integer NOT NULL,
        impressions integer NOT NULL,
        PRIMARY KEY (user_hash, requested_at)
    )
    """,
    "CREATE TABLE erasure_salt (one boolean PRIMARY KEY DEFAULT true CHECK (one), salt bytea NOT NULL)",
)


def upgrade() -> None:
    """Add them, with a salt that this database alone has."""
    for statement in _UP:
        op.execute(statement)
    op.execute(sa.text("INSERT INTO erasure_salt (salt) VALUES (:salt)").bindparams(salt=secrets.token_bytes(32)))


def downgrade() -> None:
    """Remove them: who was erased is no longer known, and a replay would bring them back."""
    op.execute("DROP TABLE erasure_salt, erasures")
