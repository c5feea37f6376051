"""Gathers what the judge judges: the topics from their beginning, and Postgres by plain SQL."""

import time
from collections.abc import Collection, Iterable, Iterator

from innerloop.config import Settings
from innerloop.evaluation.judge.contents import Contents, prior_of
from innerloop.evaluation.judge.oracle import Rules
from innerloop.evaluation.judge.verdict import Evidence, LedgerWrite
from innerloop.learning.releases import load
from innerloop.store import erasures, items, releases
from innerloop.store.audit import StoredSet, ledger_rows, stored_sets
from innerloop.store.database import Database, transaction
from innerloop.streams.batch import Record
from innerloop.streams.topics import partition_counts
from innerloop.streams.whole_topic import committed_offsets, whole_topic

_MOST_RELEASES = 1_000


def rules_of(settings: Settings) -> Rules:
    """What the settings of the run say of its records."""
    latest = int((time.time() + settings.ingest.max_ahead_seconds) * 1000)
    support = settings.support
    return Rules(support.capacity, support.weights, latest, settings.ingest.max_record_bytes, support.impressions)


def gathered(
    settings: Settings,
    engine: Database,
    *,
    writes: Iterable[LedgerWrite] = (),
    shown: Iterable[StoredSet] | None = None,
) -> Evidence:
    """The evidence of a run under `settings`; what is large is read as the judge asks for it."""
    topics = settings.topics
    events = [topics.clicks, topics.purchases, topics.impressions]
    ingested = [*events, topics.erasures]
    with transaction(engine) as connection:
        ledger = ledger_rows(connection)
    contents = _contents(settings, engine)
    return Evidence(
        produced=(record for topic in events for record in whole_topic(settings, topic)),
        stored=_sets(engine),
        ledger=ledger,
        dead_letters=whole_topic(settings, topics.dead_letters),
        requests=whole_topic(settings, topics.requests),
        scores=_scores(settings, ads=bool(contents.ads)),
        requests_topic=topics.requests,
        partitions=partition_counts(settings, [topics.requests])[topics.requests],
        committed={
            settings.kafka.ingest_group: committed_offsets(settings, settings.kafka.ingest_group, ingested),
            settings.kafka.adapt_group: committed_offsets(settings, settings.kafka.adapt_group, [topics.requests]),
        },
        writes=writes,
        contents=None if settings.adapt.exclude_seen else contents,
        erasures=whole_topic(settings, topics.erasures),
        shown=shown,
        receipts=lambda users: _receipts(engine, users),
    )


def _scores(settings: Settings, *, ads: bool) -> dict[str, Iterator[Record]]:
    """Where there are ads, everybody must have a list of them; where there are none, nobody has."""
    topics = {"recommendations": settings.topics.recommendations, "ads": settings.topics.ads}
    return {model: whole_topic(settings, topic) for model, topic in topics.items() if ads or model != "ads"}


def _contents(settings: Settings, engine: Database) -> Contents:
    """What lists are made from. Items that a release lacks come into its lists when adapt hears of them: left out."""
    with transaction(engine) as connection:
        known = {item for _, item, _ in items.items_after(connection, 0)}
        ads = items.active_ads(connection, settings.adapt.ad_active_days)
        its_items = {n: item for n, item, _ in items.items_numbered(connection, [number for _, number in ads])}
        registered = releases.newest_few(connection, _MOST_RELEASES)
    priors = {each.version: prior_of(load(each.location, each.card)) for each in registered}
    return Contents(
        priors={version: prior for version, prior in priors.items() if prior and known <= set(prior.item_ids)},
        ads={ad: its_items[number] for ad, number in ads},
        top=settings.adapt.top,
        hold_out=settings.quality.hold_out,
    )


def _receipts(engine: Database, users: Collection[str]) -> dict[str, int]:
    with transaction(engine) as connection:
        salt = erasures.read_salt(connection)
        hashes = {user: erasures.hash_of(user, salt) for user in users}
        return {user: erased.until for user, erased in erasures.erased(connection, hashes).items()}


def _sets(engine: Database) -> Iterator[StoredSet]:
    with transaction(engine) as connection:
        yield from stored_sets(connection)
