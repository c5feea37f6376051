"""The ledger, the support sets, items, ads and releases."""

from alembic import op

revision = "0001"
down_revision = None

_UP = (
    """
    CREATE TABLE partition_ledger (
        topic text NOT NULL,
        topic_id text NOT NULL,
        partition integer NOT NULL,
        next_offset bigint,
        owner_epoch bigint NOT NULL,
        owner text NOT NULL,
        claimed_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, topic_id, partition)
    )
    """,
    # A full row (64 examples) has about 1.9 KB. Half-full pages keep updates on their page (HOT, no index work);
    # compression off and a high toast target keep the row in one place, where pglz once took most of the time.
    """
    CREATE TABLE support_sets (
        user_id text PRIMARY KEY,
        items integer[] STORAGE EXTERNAL NOT NULL,
        event_types smallint[] STORAGE EXTERNAL NOT NULL,
        weights real[] STORAGE EXTERNAL NOT NULL,
        event_times bigint[] STORAGE EXTERNAL NOT NULL,
        event_hashes bigint[] STORAGE EXTERNAL NOT NULL,
        version bigint NOT NULL
    ) WITH (fillfactor = 50, toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05)
    """,
    """
    CREATE TABLE items (
        item_no integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        item_id text NOT NULL UNIQUE
    )
    """,
    """
    CREATE TABLE ads (
        ad_id text PRIMARY KEY,
        item_no integer NOT NULL,
        last_seen timestamptz NOT NULL
    )
    """,
    """
    CREATE TABLE releases (
        version bigint PRIMARY KEY,
        card jsonb NOT NULL,
        location text NOT NULL,
        created timestamptz NOT NULL DEFAULT now()
    )
    """,
    # For people: one line per example, with names.
    """
    CREATE VIEW support_examples AS
    SELECT s.user_id, s.version, e.position, i.item_id,
           CASE e.event_type WHEN 1 THEN 'click' WHEN 2 THEN 'cart' WHEN 3 THEN 'favorite' WHEN 4 THEN 'purchase' END
               AS event_type,
           e.weight, to_timestamp(e.event_time / 1000.0) AS event_time
    FROM support_sets s
    CROSS JOIN LATERAL unnest(s.items, s.event_types, s.weights, s.event_times) WITH ORDINALITY
        AS e (item_no, event_type, weight, event_time, position)
    JOIN items i USING (item_no)
    """,
)


def upgrade() -> None:
    """Make the tables."""
    for statement in _UP:
        op.execute(statement)


def downgrade() -> None:
    """Remove them, with everything in them."""
    op.execute("DROP VIEW support_examples")
    op.execute("DROP TABLE releases, ads, items, support_sets, partition_ledger")
