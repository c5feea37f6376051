"""Brings the database to the newest table layout (Alembic)."""

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from innerloop.errors import ServiceError


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
        address = engine.url.render_as_string(hide_password=True)
        raise ServiceError(
            f"The database at {address} cannot be migrated ({str(error.orig).strip().splitlines()[0]}): "
            "start it, or correct INNERLOOP_DATABASE__URL."
        ) from None
