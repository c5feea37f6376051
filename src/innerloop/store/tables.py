"""The tables, as SQLAlchemy knows them. Alembic's migrations build the same; a test compares the two."""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL

metadata = MetaData()

# Where each partition stands, and who owns it. A topic that is deleted and made again has a new topic_id.
partition_ledger = Table(
    "partition_ledger",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("topic_id", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("next_offset", BigInteger),  # null: claimed, nothing handled yet
    Column("owner_epoch", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("claimed_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
)

# One row per user: parallel arrays in event-time order, newest last.
support_sets = Table(
    "support_sets",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("items", ARRAY(Integer), nullable=False),
    Column("event_types", ARRAY(SmallInteger), nullable=False),
    Column("weights", ARRAY(REAL), nullable=False),
    Column("event_times", ARRAY(BigInteger), nullable=False),
    Column("event_hashes", ARRAY(BigInteger), nullable=False),
    Column("version", BigInteger, nullable=False),
)

items = Table(
    "items",
    metadata,
    Column("item_no", Integer, Identity(always=True), primary_key=True),
    Column("item_id", Text, nullable=False, unique=True),
    Column("category", Text),
)

# What everybody did lately, in pieces of about a second: packed `trends.ACTIVITY`, for live popularity and co-visits.
activity = Table(
    "activity",
    metadata,
    Column("number", BigInteger, Identity(always=True), primary_key=True),
    Column("events", Integer, nullable=False),
    Column("packed", LargeBinary, nullable=False),
)

ads = Table(
    "ads",
    metadata,
    Column("ad_id", Text, primary_key=True),
    Column("item_no", Integer, nullable=False),
    Column("last_seen", DateTime(timezone=True), nullable=False),
)

releases = Table(
    "releases",
    metadata,
    Column("version", BigInteger, primary_key=True),
    Column("card", JSONB, nullable=False),
    Column("location", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False, server_default=text("now()")),
)
