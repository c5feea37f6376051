"""Brings the database to the newest table layout (Alembic)."""

from alembic import command
from alembic.config import Config
from psycopg2 import Error, sql
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from innerloop.store.database import cursor_of, refusal
from innerloop.store.tables import metadata


def migrate(engine: Engine) -> None:
    """Run every migration that has not run; safe to run again and from several processes at once."""
    config = Config()
    config.set_main_option("script_location", "innerloop.store:migrations")
    try:
        with engine.begin() as connection:
            # One at a time: the lock goes with the transaction.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7223344551)")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        raise refusal(engine, error, "cannot be migrated") from None


def grant(engine: Engine, role: str) -> None:
    """Let `role` do what every process but `migrate` does: read and write the tables, and keep temporary ones.

    To be run again after each migration, as the owner of the tables. Raises ServiceError.
    """
    try:
        with engine.begin() as connection:
            cursor = cursor_of(connection)
            cursor.execute("SELECT current_database(), current_schema()")
            database, schema = (sql.Identifier(name) for name in cursor.fetchone() or ())
            tables = sql.SQL(", ").join(sql.Identifier(name) for name in sorted(metadata.tables))
            for statement in _GRANTS:
                known = {"database": database, "schema": schema, "tables": tables, "role": sql.Identifier(role)}
                cursor.execute(sql.SQL(statement).format(**known))
    except (DBAPIError, Error) as error:
        raise refusal(engine, error, f"does not let {role} in") from None


_GRANTS = (
    "GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role}",
    "GRANT USAGE ON SCHEMA {schema} TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role}",
)
