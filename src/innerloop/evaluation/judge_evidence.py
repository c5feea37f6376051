"""Gathers what the judge judges: the topics from their beginning, and Postgres by plain SQL."""

import time
from collections.abc import Iterable, Iterator

from innerloop.config import Settings
from innerloop.evaluation.judge import Evidence, LedgerWrite
from innerloop.evaluation.judge_oracle import Rules
from innerloop.store.audit import StoredSet, ledger_rows, stored_sets
from innerloop.store.database import Database, transaction
from innerloop.streams.batch import Record
from innerloop.streams.whole_topic import committed_offsets, whole_topic


def rules_of(settings: Settings) -> Rules:
    """What the settings of the run say of its records."""
    latest = int((time.time() + settings.ingest.max_ahead_seconds) * 1000)
    return Rules(settings.support.capacity, settings.support.weights, latest, settings.ingest.max_record_bytes)


def gathered(settings: Settings, engine: Database, *, writes: Iterable[LedgerWrite] = ()) -> Evidence:
    """The evidence of a run under `settings`; what is large is read as the judge asks for it."""
    topics = settings.topics
    events = [topics.clicks, topics.purchases]
    with transaction(engine) as connection:
        ledger = ledger_rows(connection)
    return Evidence(
        produced=(record for topic in events for record in whole_topic(settings, topic)),
        stored=_sets(engine),
        ledger=ledger,
        dead_letters=whole_topic(settings, topics.dead_letters),
        requests=whole_topic(settings, topics.requests),
        scores=_scores(settings),
        requests_topic=topics.requests,
        committed={
            settings.kafka.ingest_group: committed_offsets(settings, settings.kafka.ingest_group, events),
            settings.kafka.adapt_group: committed_offsets(settings, settings.kafka.adapt_group, [topics.requests]),
        },
        writes=writes,
    )


def _scores(settings: Settings) -> dict[str, Iterator[Record]]:
    topics = {"recommendations": settings.topics.recommendations, "ads": settings.topics.ads}
    ads = settings.kafka.adapt_group  # any name will do: nothing is committed
    held = committed_offsets(settings, ads, [settings.topics.ads])
    return {model: whole_topic(settings, topic) for model, topic in topics.items() if model != "ads" or held}


def _sets(engine: Database) -> Iterator[StoredSet]:
    with transaction(engine) as connection:
        yield from stored_sets(connection)
