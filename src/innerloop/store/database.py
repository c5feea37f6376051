"""The connection to Postgres, and what its failures mean to the loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psycopg2
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from innerloop import certificates
from innerloop.config import DatabaseSettings
from innerloop.errors import RetryError, ServiceError, SettingsError
from innerloop.store.tables import metadata

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Session  # noqa: N812 - likewise
    from psycopg2.extensions import cursor as Cursor  # noqa: N812 - the driver names its class so

Database = Engine
"""What `connect` gives and `transaction` takes."""
Transaction = Connection
"""What `transaction` gives and the functions of this package take."""

FROZEN_SECONDS = 20.0
"""A session that is in a transaction and says nothing for so long is ended by the server."""

_LOCKED = "55P03"
"""A lock that was not given in time."""

# The same transaction may pass the next time: https://www.postgresql.org/docs/current/errcodes-appendix.html.
_PASSING = {
    "25006",  # read-only: a standby, or a primary that has just become one
    "25P03",  # a transaction that said nothing for too long
    "40001",  # serialization failure
    "40P01",  # deadlock
    "53100",  # disk full
    "53200",  # out of memory
    "53300",  # too many connections
    "53400",  # a limit of the server's configuration
    _LOCKED,
    "57014",  # query cancelled
    "57P01",  # the server shuts down,
    "57P02",  # has crashed,
    "57P03",  # or starts
    "57P05",  # a session that said nothing for too long
    "58030",  # I/O error
}
_NOT_ALLOWED, _NO_ROLE = "42501", "42704"
_PORT = 5432
_DEFAULT_AUTHORITIES = "~/.postgresql/root.crt"
"""libpq's own: https://www.postgresql.org/docs/current/libpq-ssl.html."""


def connect(settings: DatabaseSettings, *, statement_seconds: float = 0.0) -> Engine:
    """An engine with one connection kept open; raises SettingsError when the address is missing or malformed.

    A statement that takes longer than `statement_seconds` raises RetryError; 0 is for as long as it takes.
    """
    address = settings.url.get_secret_value()
    if not address:
        raise SettingsError("No database is set: set INNERLOOP_DATABASE__URL, or run `innerloop up` for one to try.")
    try:
        url = make_url(address)
        if url.drivername in {"postgresql", "postgres"}:
            url = url.set(drivername="postgresql+psycopg2")
        if url.drivername != "postgresql+psycopg2":
            raise SettingsError(f"INNERLOOP_DATABASE__URL names {url.drivername}: only postgresql is supported.")
        engine = create_engine(
            url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=1,
            connect_args={"connect_timeout": 5, "application_name": "innerloop", "keepalives_idle": 30},
            hide_parameters=True,  # users' data has no place in an error's text
        )
    except (ArgumentError, ValueError):  # a ValueError quotes what stands where the port should
        raise SettingsError(
            "INNERLOOP_DATABASE__URL is not an address: write postgresql://user:password@host:5432/database."
        ) from None
    event.listen(engine, "connect", partial(_set_timeouts, statement_seconds))
    return engine


def _set_timeouts(statement_seconds: float, session: "Session", _record: object) -> None:
    """A process that is stopped in mid-transaction holds its locks, and with them whoever takes over: not for long."""
    with session.cursor() as cursor:
        cursor.execute("SET idle_in_transaction_session_timeout = %s", (int(FROZEN_SECONDS * 1000),))
        if statement_seconds:
            cursor.execute("SET statement_timeout = %s", (int(statement_seconds * 1000),))
    session.commit()


@contextmanager
def transaction(engine: Engine, *, of_one_moment: bool = False) -> Iterator[Connection]:
    """One transaction; raises RetryError, with nothing or everything committed, when the database goes away.

    All that is read in one `of_one_moment` is as it was at its first statement (REPEATABLE READ).
    """
    chosen = engine.execution_options(isolation_level="REPEATABLE READ") if of_one_moment else engine
    try:
        with chosen.begin() as connection:
            yield connection
    except (DBAPIError, psycopg2.Error) as error:
        if is_passing(error):
            engine.dispose()
            what = "A row stays locked" if _code(error) == _LOCKED else "The database is away"
            raise RetryError(f"{what}: {_first_line(error)}") from error
        if _code(error) == _NOT_ALLOWED:
            raise refusal(engine, error) from None
        raise


def is_passing(error: DBAPIError | psycopg2.Error) -> bool:
    """Whether the same statement may succeed later."""
    code = _code(error)
    if code is not None:
        return code in _PASSING or code.startswith("08")
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, psycopg2.OperationalError | psycopg2.InterfaceError)


def cursor_of(connection: Connection) -> "Cursor":
    """The driver's cursor inside this transaction, for COPY, which SQLAlchemy does not speak."""
    return cast("Cursor", connection.connection.cursor())


def require_tables(engine: Engine) -> None:
    """Raise ServiceError unless the database answers and has our tables."""
    try:
        present = set(inspect(engine).get_table_names())
    except DBAPIError as error:
        raise refusal(engine, error) from None
    missing = sorted(set(metadata.tables) - present)
    if missing:
        raise ServiceError(f"The database has no table {missing[0]}: run `innerloop migrate`.")


def refusal(engine: Engine, error: DBAPIError | psycopg2.Error, does: str = "refuses") -> ServiceError:
    """What to raise when the database `does` something that an operator must mend; no secret is in its sentence."""
    url, why = engine.url, _first_line(error)
    where = f"{url.host or 'its socket'}:{url.port or _PORT}/{url.database or ''}"
    hint = "start it, or correct INNERLOOP_DATABASE__URL"
    if why.endswith("does not exist") and "database" in why:
        hint = "create it, or correct INNERLOOP_DATABASE__URL"
    elif "password" in why:
        hint = "correct user and password in INNERLOOP_DATABASE__URL"
    elif "no encryption" in why:
        hint = "add sslmode=verify-full to INNERLOOP_DATABASE__URL"
    elif "certificate" in why:
        why = f"{why}: {_certificate(url)}" if "verify failed" in why else why
        hint = "renew the server's certificate, or correct sslrootcert and host in INNERLOOP_DATABASE__URL"
    elif _code(error) == _NOT_ALLOWED:
        hint = f"run `innerloop migrate` as the owner of the tables, with --grant-to {url.username} for this role"
    elif _code(error) == _NO_ROLE:
        hint = "make the role first, with CREATE ROLE"
    return ServiceError(f"The database at {where} {does} ({why}): {hint}.")


def _certificate(url: URL) -> str:
    """Why libpq does not accept the server's certificate."""
    given = str(url.query.get("sslrootcert", _DEFAULT_AUTHORITIES))
    authorities = None if given == "system" else Path(given).expanduser()
    return certificates.why_refused(
        url.host or "localhost", url.port or _PORT, authorities, certificates.POSTGRES_GREETING
    )


def _code(error: DBAPIError | psycopg2.Error) -> str | None:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code: str | None = getattr(cause, "pgcode", None)
    return code


def _first_line(error: DBAPIError | psycopg2.Error) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    text = str(cause).strip()
    return text.splitlines()[0] if text else type(cause).__name__
