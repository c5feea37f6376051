"""What ingest cannot be quicker than: Postgres given the finished bytes, and Kafka read without looking."""

import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from clicks import Clicks, Stored
from cluster import Cluster
from sqlalchemy import text

from innerloop.config import Settings
from innerloop.store import support_sets
from innerloop.store.database import connect, cursor_of, transaction
from innerloop.store.ledger import Ledger
from innerloop.streams import clients
from innerloop.support import EXAMPLE, SupportCache, SupportSets, gather, merge

_BATCH = 20_000
_TOPIC_ID = "benchmark"


@dataclass(frozen=True)
class _Batch:
    """One transaction: the COPY stream of its rows, how many there are, and the partition's next offset."""

    stream: bytes
    rows: int
    next_offset: int


def postgres_limit(cluster: Cluster, clicks: Clicks, connections: int) -> tuple[float, Stored]:
    """Events/s of the transactions alone, and what they stored.

    Timed: for every 20,000 events one transaction of the product's own statements (COPY of bytes made beforehand into
    the temporary table, merge, ledger), from the first BEGIN to the last COMMIT. Not timed: decoding, merging and
    encoding in Python, item numbers, Kafka. With several connections each has its own share of the users, as the
    members of a consumer group do.
    """
    with cluster.database() as database:
        settings = cluster.settings(database)
        shares = [_encoded(clicks, settings, share, connections) for share in range(connections)]
        failures: list[BaseException] = []

        def run(share: int, barrier: threading.Barrier) -> None:
            try:
                _write_all(settings, share, shares[share], barrier)
            except BaseException as error:  # noqa: BLE001 - told to the main thread
                failures.append(error)
                barrier.abort()

        barrier = threading.Barrier(connections + 1)
        threads = [threading.Thread(target=run, args=(share, barrier)) for share in range(connections)]
        for thread in threads:
            thread.start()
        barrier.wait()
        began = time.monotonic()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        if failures:
            raise failures[0]
        return len(clicks) / seconds, stored(settings)


def stored(settings: Settings) -> Stored:
    """What the support sets of this database hold."""
    query = text("""
        SELECT count(*), coalesce(sum(cardinality(event_times)), 0),
               coalesce(sum((SELECT sum(time) FROM unnest(event_times) AS time)), 0) FROM support_sets
    """)
    engine = connect(settings.database)
    with transaction(engine) as connection:
        users, examples, times = connection.execute(query).one()
    engine.dispose()
    return Stored(users, int(examples), int(times))


def kafka_limit(settings: Settings, count: int) -> float:
    """Events/s of one confluent-kafka consumer that only reads, from the first record to the last."""
    consumer = clients.consumer(settings.kafka, "innerloop-bench-limit")
    consumer.subscribe([settings.topics.clicks])
    first = consumer.poll(30.0)
    if first is None or first.error() is not None:
        raise SystemExit("The consumer of kafka_limit got no record within 30 s.")
    began, read = time.monotonic(), 1
    while read < count:
        read += sum(message.error() is None for message in consumer.consume(_BATCH, 0.05))
        if time.monotonic() - began > 120.0:
            raise SystemExit(f"The consumer of kafka_limit read {read} of {count} records in 120 s.")
    seconds = time.monotonic() - began
    consumer.close()
    return count / seconds


def _write_all(settings: Settings, share: int, batches: Sequence[_Batch], barrier: threading.Barrier) -> None:
    engine = connect(settings.database)
    topic = settings.topics.clicks
    ledger = Ledger(engine, {topic: _TOPIC_ID})
    ledger.claim([(topic, share)])
    barrier.wait()
    for batch in batches:
        with transaction(engine) as connection:
            cursor = cursor_of(connection)
            cursor.execute(support_sets._STAGE.format("support_sets"))
            cursor.copy_expert("COPY incoming_support_sets FROM STDIN (FORMAT binary)", io.BytesIO(batch.stream))
            cursor.execute(support_sets._MERGE.format("support_sets"))
            written = (cursor.fetchone() or (0,))[0]
            if written != batch.rows:
                raise RuntimeError(f"{written} of {batch.rows} rows were merged")
            ledger.advance(connection, {(topic, share): batch.next_offset})
        ledger.advanced({(topic, share): batch.next_offset})
    engine.dispose()


def _encoded(clicks: Clicks, settings: Settings, share: int, shares: int) -> list[_Batch]:
    """What the product would send for this share of the users, batch by batch."""
    mine = clicks.source[clicks.users[clicks.source] % shares == share]
    known = SupportCache(int(clicks.users.max()) + 1, settings.support.capacity)
    examples = _examples(clicks)
    batches = []
    for start in range(0, len(mine), _BATCH):
        events = mine[start : start + _BATCH]
        numbers, positions = np.unique(clicks.users[events], return_inverse=True)
        names = [f"user-{number}" for number in numbers.tolist()]
        new = known.missing(names)
        known.put(new, SupportSets.empty(len(new)), np.zeros(len(new), np.int64))
        sets, versions = known.get(names)
        merged = merge(sets, positions.astype(np.int64), examples[events], settings.support.capacity)
        changed = np.flatnonzero(merged.changed)
        written, users = gather(merged.sets, changed), [names[row] for row in changed]
        known.put(users, written, versions[changed] + 1)
        stream = support_sets.encode(users, written, versions[changed] + 1)
        batches.append(_Batch(stream, len(users), start + len(events)))
    return batches


def _examples(clicks: Clicks) -> np.ndarray:
    examples = np.empty(len(clicks.users), EXAMPLE)
    digest = xxhash.xxh3_64_intdigest
    hashes = [digest(b"evt-%012d" % number) for number in range(len(examples))]
    examples["time"], examples["hash"] = clicks.times, np.array(hashes, np.uint64).view(np.int64)
    examples["item"], examples["type"], examples["weight"] = clicks.items, 1, 1.0
    return examples
