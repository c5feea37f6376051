"""The tables, as SQLAlchemy knows them. Alembic's migrations build the same; a test compares the two."""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
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

# Records [from_offset, to_offset) that retention deleted before they were handled, and that an operator let go.
partition_gaps = Table(
    "partition_gaps",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("topic_id", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("from_offset", BigInteger, primary_key=True),
    Column("to_offset", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("accepted_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
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

# What each user was shown lately, in the layout of support_sets: kept apart, for it is ten times as much as they do.
impressions = Table(
    "impressions",
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

# One row per erasure that was carried out. `number` orders them; `version` is the one that the erasure took among those
# of the user's support set, so that a user who comes back goes on above it; times in epoch milliseconds.
erasures = Table(
    "erasures",
    metadata,
    Column("user_hash", LargeBinary, primary_key=True),
    Column("requested_at", BigInteger, primary_key=True),
    Column("number", BigInteger, Identity(always=True), nullable=False, unique=True),
    Column("erased_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("erased_until", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("events", Integer, nullable=False),
    Column("impressions", Integer, nullable=False),
)

# The key of the hashes above: one row, made by the migration, never changed.
erasure_salt = Table(
    "erasure_salt",
    metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("salt", LargeBinary, nullable=False),
)
