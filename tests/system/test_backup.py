"""Backup and restore of the database, as OPERATIONS.md describes it."""

import subprocess
from collections.abc import Callable
from typing import Any

import psycopg2
from shell import Shell

from innerloop.config import Settings
from innerloop.store.audit import ledger_rows, stored_sets
from innerloop.store.database import connect, transaction
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.lag import group_lag
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers.postgres import wheel_folder

Wait = Callable[..., None]
EVENT = '{{"event_id":"e{0}","event_type":"click","user_id":"u{1}","item_id":"i{2}","event_time":{3}}}'


def send(settings: Settings, first: int, count: int) -> None:
    producer = EventProducer(settings)
    for number in range(first, first + count):
        event = EVENT.format(number, number % 40, number % 97, 1_750_000_000_000 + number)
        producer.send(f"u{number % 40}", "click", event.encode())
    producer.finish()


def state(settings: Settings) -> dict[str, Any]:
    """Every user's set, by items' names, without its version: how many there are depends on the batches."""
    engine = connect(settings.database)
    with transaction(engine) as connection:
        found = {each.user: each.examples for each in stored_sets(connection)}
    engine.dispose()
    return found


def handled(settings: Settings) -> int:
    """Records that the database's own ledger has: after a restore the broker's offsets say nothing of them."""
    engine = connect(settings.database)
    with transaction(engine) as connection:
        found = sum(row.next_offset or 0 for row in ledger_rows(connection))
    engine.dispose()
    return found


def behind(settings: Settings) -> int:
    """Records that the broker has no commit for."""
    return sum(each.offsets for each in group_lag(settings, settings.kafka.ingest_group, settings.topics.events))


def test_a_restored_database_catches_up_to_what_was_lost(shell: Shell, settings: Settings, wait_for: Wait) -> None:
    ensure_topics(settings)
    address = settings.database.url.get_secret_value().replace("+psycopg2", "")
    server, _, name = address.rpartition("/")
    dump, programs = shell.folder / "innerloop.dump", wheel_folder() / "bin"

    ingest = shell.start("ingest")
    send(settings, 0, 500)
    wait_for(lambda: handled(settings) == 500)
    # A dump is one consistent state, the ledger's offsets included: ingest works on.
    subprocess.run([programs / "pg_dump", "--format=custom", f"--file={dump}", address], check=True)
    at_dump = state(settings)
    send(settings, 500, 700)
    wait_for(lambda: handled(settings) == 1_200)
    wait_for(lambda: behind(settings) == 0)
    before = state(settings)
    assert before != at_dump
    ingest.terminate()
    shell.finish(ingest)

    administrator = psycopg2.connect(f"{server}/template1")
    administrator.autocommit = True
    with administrator.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    administrator.close()
    subprocess.run([programs / "pg_restore", f"--dbname={address}", "--exit-on-error", dump], check=True)
    assert state(settings) == at_dump
    assert handled(settings) == 500

    assert behind(settings) == 0, (
        "the broker knows nothing of the restore; ingest goes by the ledger where it is behind"
    )
    shell.start("ingest")
    wait_for(lambda: handled(settings) == 1_200)
    assert state(settings) == before
