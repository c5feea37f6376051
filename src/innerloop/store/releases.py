"""The register of releases: which there are, and where their files lie."""

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

_REGISTERING = 0x696E6E65726C6F70  # "innerlop": any number that nobody else locks


@dataclass(frozen=True)
class RegisteredRelease:
    version: int
    location: str
    """Path of the release's card (JSON); the weights lie beside it."""
    card: dict[str, Any]


def next_version(connection: Connection) -> int:
    """One above the newest; whoever then saves and registers it holds `registering` and looks again."""
    return int(connection.execute(text("SELECT coalesce(max(version), 0) + 1 FROM releases")).scalar_one())


def registering(connection: Connection) -> None:
    """From here to the end of the transaction nobody else saves or registers a release: their files have one name."""
    connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '10min'"))  # a large one, a slow disk
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _REGISTERING})


def register(connection: Connection, version: int, card: dict[str, Any], location: str) -> None:
    """Add a release; workers load it within their refresh interval."""
    connection.execute(
        text("INSERT INTO releases (version, card, location) VALUES (:version, cast(:card AS jsonb), :location)"),
        {"version": version, "card": json.dumps(card), "location": location},
    )


def newest(connection: Connection) -> RegisteredRelease | None:
    """The release in force, or None before the first training."""
    return next(iter(newest_few(connection, 1)), None)


def newest_few(connection: Connection, count: int) -> list[RegisteredRelease]:
    """The newest `count` releases, the one in force first."""
    rows = connection.execute(
        text("SELECT version, location, card FROM releases ORDER BY version DESC LIMIT :count"), {"count": count}
    )
    return [RegisteredRelease(row.version, row.location, row.card) for row in rows]
