"""What a run of chaos runs against: services of its own, small releases, and a ledger that remembers its writers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import psycopg2
import torch
from psycopg2.extensions import connection as Connection  # noqa: N812 - it is a class

from innerloop.config import Settings
from innerloop.evaluation.judge.verdict import LedgerWrite
from innerloop.learning.candidates import PLAIN
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads import BayesHead
from innerloop.learning.ranker import Ranker
from innerloop.learning.releases import Card, DataSummary, Release, save
from innerloop.store import items
from innerloop.store.audit import StoredExample, StoredSet
from innerloop.store.database import Database, transaction
from innerloop.streams.topics import catalogue, ensure_topics
from innerloop.worker.train import register

DIMENSION = 16
ADS = 5

# Who wrote: a setting of the session, which each worker has in its database address.
WRITER = "chaos.writer"
_AUDIT = f"""
    CREATE TABLE ledger_writes (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        topic text, partition int, epoch bigint, next_offset bigint, writer text
    );
    CREATE FUNCTION note_ledger_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO ledger_writes (topic, partition, epoch, next_offset, writer)
        VALUES (NEW.topic, NEW.partition, NEW.owner_epoch, NEW.next_offset, current_setting('{WRITER}', true));
        RETURN NULL;
    END $$;
    CREATE TRIGGER note AFTER INSERT OR UPDATE ON partition_ledger FOR EACH ROW EXECUTE FUNCTION note_ledger_write();
"""


def prepare(settings: Settings, engine: Database, folder: Path, *, item_count: int, ranked: bool = False) -> None:
    """Topics, the audit of the ledger, a random release and a few ads; the tables are there."""
    # Nothing may be compacted away before the judge has read it.
    kept: dict[str, str | int | float] = {"cleanup.policy": "delete", "retention.ms": -1}
    ensure_topics(settings, {name: msgspec.structs.replace(topic, config=kept) for name, topic in catalogue().items()})
    with connected(settings) as connection, connection.cursor() as cursor:
        cursor.execute(_AUDIT)
    release = random_release(item_count, ranked=ranked)
    register(settings, engine, release, save(release, folder))
    numbers = items.ItemNumbers(engine).intern(release.item_ids, {})
    with transaction(engine) as transaction_:
        items.see_ads(transaction_, {f"ad-{n}": numbers[n] for n in range(ADS)})


@contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    """A plain connection in which every statement is its own transaction."""
    connection = psycopg2.connect(settings.database.url.get_secret_value().replace("+psycopg2", ""))
    connection.autocommit = True
    try:
        yield connection
    finally:
        connection.close()


def ledger_writes(settings: Settings) -> Iterator[LedgerWrite]:
    """What the audit has kept, in the order of the writes to each row."""
    with connected(settings) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT topic, partition, epoch, next_offset, writer FROM ledger_writes ORDER BY number")
        for row in cursor:
            yield LedgerWrite(*row)


def impressions(settings: Settings) -> Iterator[StoredSet]:
    """What is kept of what users were shown, by plain SQL."""
    columns = "event_times, event_hashes, items, event_types, weights"
    with connected(settings) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT item_no, item_id FROM items")
        names = dict(cursor.fetchall())
        cursor.execute(f"SELECT user_id, version, {columns} FROM impressions")
        for user, version, times, hashes, numbers, types, weights in cursor:
            rows = zip(times, hashes, [names[number] for number in numbers], types, weights, strict=True)
            yield StoredSet(user, version, [StoredExample(*row) for row in rows])


def environment(settings: Settings, writer: str) -> dict[str, str]:
    """The variables under which `innerloop` has these settings; the ledger remembers `writer`."""
    passed = {name: value.get_secret_value() for name, value in settings.kafka.properties.items()}
    ours = {
        f"INNERLOOP_{name.upper()}": getattr(settings, name).model_dump_json()
        for name in ("topics", "support", "ingest", "trends", "adapt")
    }
    outer = {name: value for name, value in os.environ.items() if not name.startswith("INNERLOOP_")}
    return {
        **outer,
        **ours,
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": passed}),
        "INNERLOOP_DATABASE__URL": writing_as(settings, writer),
        "INNERLOOP_LOG_FORMAT": "json",
        "OMP_NUM_THREADS": "1",
    }


def writing_as(settings: Settings, writer: str) -> str:
    """The database address of a worker of this name."""
    return f"{settings.database.url.get_secret_value()}?options=-c%20{WRITER}%3D{writer}"


def random_release(count: int, *, ranked: bool, version: int = 1) -> Release:
    """Items with random vectors, named i0 and so on: what scores mean does not matter here."""
    draw = torch.Generator().manual_seed(version)
    vectors = torch.nn.functional.normalize(torch.randn(count, DIMENSION, generator=draw), dim=1)
    root = torch.randn(DIMENSION, DIMENSION, generator=draw).tril() * 0.1 + torch.eye(DIMENSION)
    head = BayesHead(torch.randn(DIMENSION, generator=draw), root, 0.5, 3_600.0)
    encoder = Encoder(
        [f"i{n}" for n in range(count)], vectors, [], torch.zeros(0, DIMENSION - 2), torch.full((count,), -1)
    )
    data = DataSummary(events=1, users=1, items=count, first_event_time=0, last_event_time=1)
    card = Card(version, "2026-01-01T00:00:00Z", head.name, DIMENSION, data, {}, {}, "0")
    if not ranked:
        return Release(card, encoder, head)
    torch.manual_seed(0)
    ranker = Ranker.new(torch.zeros(PLAIN), torch.ones(PLAIN))
    ranker.network.requires_grad_(requires_grad=False)
    return replace(Release(card, encoder, head), ranker=ranker)
