"""`innerloop erase USER...`: asks for erasures as a shop would, and waits until they are carried out."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec
import typer

from innerloop.config import Settings
from innerloop.erasure import Erasure, decode_erasure
from innerloop.errors import DeadLetterError, RetryError, ServiceError, SettingsError
from innerloop.store.database import Database, connect, require_tables, transaction
from innerloop.store.erasures import Receipt, hash_of, read_salt, receipts
from innerloop.streams.publisher import Publisher
from innerloop.streams.tombstones import TombstoneWatch
from innerloop.streams.topics import require_topics

_LOOK_SECONDS = 0.1
_FLUSH_SECONDS = 10.0


def run_erase(settings: Settings, users: Sequence[str], seconds: float) -> None:
    """Send the erasures, wait at most so many seconds, and print a receipt each.

    Raises SettingsError for an identifier that is none, ServiceError when a service is missing or nobody answers in
    time: the erasures are then on their topic, and are carried out when somebody does.
    """
    now = int(time.time() * 1000)
    records = {user: _record(user, now) for user in users}
    engine, topics = connect(settings.database), settings.topics
    require_tables(engine)
    require_topics(settings, [topics.erasures])
    with TombstoneWatch(settings, records) as watch:
        _send(settings, records)
        deadline = time.monotonic() + seconds
        found = _receipts(settings, engine, list(records), now, deadline)
        for user, receipt in found.items():
            typer.echo(_told(user, receipt))
        lacking = watch.missing(max(1.0, deadline - time.monotonic()))
    engine.dispose()
    if lacking:
        raise ServiceError(
            f"Adapt has not written all tombstones on {' and '.join(lacking)} within {seconds:g} s: what is stored is"
            " deleted, and the tombstones follow when `innerloop adapt` runs and has caught up."
        )
    typer.echo(f"Tombstones are on {topics.recommendations} and {topics.ads}.")


def _record(user: str, now_ms: int) -> bytes:
    record = msgspec.json.encode(Erasure(user, now_ms))
    try:
        decode_erasure(record, latest_ms=now_ms)
    except DeadLetterError as error:
        raise SettingsError(f"{user!r} is no user: {error}.") from None
    return record


def _send(settings: Settings, records: Mapping[str, bytes]) -> None:
    publisher = Publisher(settings.kafka)
    for user, record in records.items():
        publisher.send(settings.topics.erasures, user, record)
    try:
        publisher.flush(_FLUSH_SECONDS)
    except RetryError as error:
        raise ServiceError(f"The erasures may not have been sent ({error}): give the command again.") from None


def _receipts(
    settings: Settings, engine: Database, users: Sequence[str], since_ms: int, deadline: float
) -> dict[str, Receipt]:
    """The receipts of these erasures, or of later ones of the same users, as soon as all are there."""
    with transaction(engine) as connection:
        salt = read_salt(connection)
    names = {hash_of(user, salt): user for user in users}
    while True:
        with transaction(engine) as connection:
            all_ = receipts(connection, names)
        found = {names[each.user_hash]: each for each in all_ if each.requested_at >= since_ms}
        if len(found) == len(names):
            return found
        if time.monotonic() > deadline:
            raise ServiceError(
                f"Ingest has carried out {len(found)} of {len(names)} erasures in time: the rest wait on"
                f" {settings.topics.erasures}, and are done when `innerloop ingest` runs and has caught up."
            )
        time.sleep(_LOOK_SECONDS)


def _told(user: str, receipt: Receipt) -> str:
    until = datetime.fromtimestamp(receipt.erased_until / 1000, UTC)
    return (
        f"{user}: erased at {receipt.erased_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ},"
        f" {receipt.events} stored events and {receipt.impressions} impressions removed,"
        f" none up to {until:%Y-%m-%dT%H:%M:%S.%fZ} is taken again. Receipt {receipt.user_hash.hex()}."
    )
