"""The connection to Postgres, and what its failures mean to the loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import psycopg2
from sqlalchemy import Connection, Engine, create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from innerloop.config import DatabaseSettings
from innerloop.errors import RetryError, ServiceError, SettingsError
from innerloop.store.tables import metadata

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor  # noqa: N812 - the driver names its class so

Database = Engine
"""What `connect` gives and `transaction` takes."""
Transaction = Connection
"""What `transaction` gives and the functions of this package take."""

# Deadlock, serialization failure, lock timeout, query cancelled: the same transaction may pass the next time.
_PASSING = {"40P01", "40001", "55P03", "57014", "57P01", "57P02", "57P03", "53300"}


def connect(settings: DatabaseSettings) -> Engine:
    """An engine with one connection kept open; raises SettingsError when the address is missing or malformed."""
    address = settings.url.get_secret_value()
    if not address:
        raise SettingsError("No database is set: set INNERLOOP_DATABASE__URL, or run `innerloop up` for one to try.")
    try:
        url = make_url(address)
        if url.drivername in {"postgresql", "postgres"}:
            url = url.set(drivername="postgresql+psycopg2")
        if url.drivername != "postgresql+psycopg2":
            raise SettingsError(f"INNERLOOP_DATABASE__URL names {url.drivername}: only postgresql is supported.")
        return create_engine(
            url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=1,
            connect_args={"connect_timeout": 5, "application_name": "innerloop", "keepalives_idle": 30},
        )
    except ArgumentError:
        raise SettingsError(
            "INNERLOOP_DATABASE__URL is not an address: write postgresql://user:password@host:5432/database."
        ) from None


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction; raises RetryError, with nothing or everything committed, when the database goes away."""
    try:
        with engine.begin() as connection:
            yield connection
    except (DBAPIError, psycopg2.Error) as error:
        if is_passing(error):
            engine.dispose()
            raise RetryError(f"The database is away: {_first_line(error)}") from error
        raise


def is_passing(error: DBAPIError | psycopg2.Error) -> bool:
    """Whether the same statement may succeed later."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "pgcode", None)
    if code is not None:
        return code in _PASSING or code.startswith("08")
    return isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError)


def cursor_of(connection: Connection) -> "Cursor":
    """The driver's cursor inside this transaction, for COPY, which SQLAlchemy does not speak."""
    return cast("Cursor", connection.connection.cursor())


def require_tables(engine: Engine) -> None:
    """Raise ServiceError unless the database answers and has our tables."""
    try:
        present = set(inspect(engine).get_table_names())
    except DBAPIError as error:
        raise ServiceError(
            f"The database at {engine.url.render_as_string(hide_password=True)} refuses ({_first_line(error)}): "
            "start it, or correct INNERLOOP_DATABASE__URL."
        ) from None
    missing = sorted(set(metadata.tables) - present)
    if missing:
        raise ServiceError(f"The database has no table {missing[0]}: run `innerloop migrate`.")


def _first_line(error: DBAPIError | psycopg2.Error) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    text = str(cause).strip()
    return text.splitlines()[0] if text else type(cause).__name__
