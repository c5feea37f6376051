"""Growth: what an event and a user cost as users and items become more. The aim is a flat line.

    tests/bench.sh growth [--users 10000 1000000 10000000] [--items 1000 ...] [--json FILE] [--plot FILE.html]

For each number of users the table is filled by the database itself with that many support sets of eight events (a
tenth of the bytes of a full one; ten million are some 8 GB), then analysed, and a checkpoint is taken. Users are drawn
uniformly, which is the worst case: no cache of ours helps. Broker and database share the machine. PostgreSQL has
--shared-buffers, a quarter of the memory unless told otherwise, as its manual advises; our embedded one's 256 MB hold a
demo. It takes huge pages by itself where the kernel has enough of them (`vm.nr_hugepages`).

growth.ingest.<users>    microseconds an event: `innerloop ingest`, one process, over --events clicks that lie in Kafka,
                         timed as in ingest.py
growth.read.<users>      microseconds a user: `support_sets.read` as adapt does, 1,024 at a time, over --events users
                         of a connection that has read the whole table once
growth.score.<items>     microseconds a user: the best 50 of the catalogue as the service finds them (exact up to
                         `adapt.index_above` items, by the index above), 1,024 users at a time; see score.py
"""

import argparse
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import psutil
import torch
from cluster import Cluster, Database, command, ledger, running_cluster, seen
from machine import CONSOLE, Report, describe, options
from score import adapted, catalogue
from sqlalchemy import text

from innerloop.config import Settings, load_settings
from innerloop.learning.devices import use_threads
from innerloop.learning.item_index import ItemSearch
from innerloop.store import support_sets
from innerloop.store.database import connect, transaction
from innerloop.streams.event_producer import EventProducer

_UNIT = "us"
_AT_ONCE, _EXAMPLES, _ITEMS = 1_024, 8, 50_000
_START_MS = 1_750_000_000_000
_REPEATS = 3


def main() -> int:
    """Measure what was asked for."""
    asked = _options()
    use_threads(1)
    points: dict[str, dict[int, float]] = {"ingest": {}, "read": {}, "score": {}}
    if asked.users:
        with running_cluster(postgres={"shared_buffers": asked.shared_buffers}) as cluster:
            report = Report(describe(cluster.kafka_version(), cluster.postgres_version()))
            for users in asked.users:
                _users(report, cluster, users, asked.events, points)
    else:
        report = Report(describe("-", "-"))
    for items in asked.items:
        points["score"][items] = _score(items)
        report.add(f"growth.score.{items}", points["score"][items], _UNIT)
    for name, line in points.items():
        if len(line) > 1:
            first, last = sorted(line)[-2:]
            report.add(f"growth.{name}.slope", line[last] / line[first], "times", f"{last:,} against {first:,}")
    if asked.plot:
        _plot(points, asked.plot)
    return report.finish(asked.json)


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--users", type=int, nargs="*", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--items", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--events", type=int, default=200_000)
    quarter = f"{psutil.virtual_memory().total // 4 >> 20}MB"
    parser.add_argument("--shared-buffers", default=quarter, metavar="SIZE", help="of our own PostgreSQL")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an HTML page with the lines here")
    return parser.parse_args()


def _users(report: Report, cluster: Cluster, users: int, events: int, points: dict[str, dict[int, float]]) -> None:
    drawn = np.random.default_rng(users).integers(0, users, events)
    with cluster.database() as database:
        began = time.monotonic()
        size, pages = _fill(database, users)
        CONSOLE.print(f"{users:,} users: {size / 2**20:,.0f} MB, filled in {time.monotonic() - began:.0f} s")
        settings = cluster.settings(database)
        points["read"][users] = _read(settings, drawn)
        report.add(f"growth.read.{users}", points["read"][users], _UNIT, f"table of {size / 2**20:,.0f} MB, {pages}")
        points["ingest"][users] = _ingest(cluster, database, settings, drawn)
        distinct = len(np.unique(drawn))
        report.add(f"growth.ingest.{users}", points["ingest"][users], _UNIT, f"of {distinct:,} users")


def _fill(database: Database, users: int) -> tuple[int, str]:
    """Make support sets of eight events each; the table's size in bytes, and what the shared buffers lie on."""
    connection = database.open()
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO items (item_id) SELECT 'item-' || n FROM generate_series(1, %s) n", (_ITEMS,))
        cursor.execute(
            """
            INSERT INTO support_sets (user_id, items, event_types, weights, event_times, event_hashes, version)
            SELECT 'user-' || n, array_agg((1 + (n * 31 + k * 977) %% %(items)s)::integer), array_agg(1::smallint),
                   array_agg(1::real), array_agg((%(start)s + k)::bigint), array_agg((n * 8 + k)::bigint), 1
            FROM generate_series(0, %(users)s - 1) n, generate_series(1, %(examples)s) k GROUP BY n
            """,
            {"items": _ITEMS, "start": _START_MS, "users": users, "examples": _EXAMPLES},
        )
        cursor.execute("ANALYZE support_sets")
        cursor.execute("CHECKPOINT")
        cursor.execute("SELECT pg_total_relation_size('support_sets')")
        size = int((cursor.fetchone() or (0,))[0])
        cursor.execute("SHOW huge_pages_status")
        pages = f"huge pages {(cursor.fetchone() or ('unknown',))[0]}"
    connection.close()
    return size, pages


def _read(settings: Settings, drawn: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> float:
    engine = connect(settings.database)
    with transaction(engine) as connection:  # every page once: a connection that has lived for hours has seen them
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        connection.execute(
            text("SELECT sum(version) FROM (SELECT * FROM support_sets ORDER BY user_id) AS all_of_them")
        )
    names = [f"user-{user}" for user in drawn.tolist()]
    batches = [list(dict.fromkeys(names[at : at + _AT_ONCE])) for at in range(0, len(names), _AT_ONCE)]
    began, users = time.perf_counter(), 0
    for batch in batches:
        with transaction(engine) as connection:
            found, _, _ = support_sets.read(connection, batch)
        users += len(found)
    seconds = time.perf_counter() - began
    engine.dispose()
    if users != sum(map(len, batches)):
        raise SystemExit(f"{users} users were found of {sum(map(len, batches))}.")
    return 1e6 * seconds / users


def _ingest(
    cluster: Cluster, database: Database, settings: Settings, drawn: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> float:
    """Topics of its own: what an earlier size left on others would be read as well."""
    mark = uuid.uuid4().hex[:8]
    log = cluster.folder / f"growth-{mark}.log"
    topics = {"CLICKS": f"events.clicks.{mark}", "PURCHASES": f"events.purchases.{mark}"}
    own = load_settings(
        kafka=settings.kafka,
        database=settings.database,
        topics=settings.topics.model_copy(update={name.lower(): topic for name, topic in topics.items()}),
    )
    _send(own, drawn)
    environment = cluster.environment(
        database,
        INNERLOOP_KAFKA__INGEST_GROUP=f"growth-{mark}",
        **{f"INNERLOOP_TOPICS__{name}": topic for name, topic in topics.items()},
    )
    connection = database.open()
    cursor, topic = connection.cursor(), own.topics.clicks
    with command(["ingest"], environment, log) as process:
        began = seen(process, log, lambda: ledger(cursor, topic, "count(*)") > 0)
        ended = seen(process, log, lambda: ledger(cursor, topic, "coalesce(sum(next_offset), 0)") >= len(drawn))
    cursor.execute("SELECT sum(version - 1), sum(cardinality(items)) FROM support_sets WHERE version > 1")
    versions, examples = cursor.fetchone() or (0, 0)
    expected = len(drawn) + _EXAMPLES * len(np.unique(drawn))
    capacity = own.support.capacity
    connection.close()
    if versions < len(np.unique(drawn)) or (examples != expected and np.bincount(drawn).max() + _EXAMPLES <= capacity):
        raise SystemExit(f"{examples} examples are stored, {expected} were expected.")
    return 1e6 * (ended - began) / len(drawn)


def _send(settings: Settings, drawn: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
    from innerloop.streams.topics import ensure_topics  # noqa: PLC0415 - its warnings are of other topics

    ensure_topics(settings)
    producer = EventProducer(settings)
    for number, user in enumerate(drawn.tolist()):
        name = f"user-{user}"
        value = b'{"event_id":"new-%d","event_type":"click","user_id":"%s","item_id":"item-%d","event_time":%d}' % (
            number,
            name.encode(),
            1 + number % _ITEMS,
            _START_MS + 1_000 + number,
        )
        producer.send(name, "click", value)
    producer.finish(120.0)


def _score(items: int) -> float:
    vectors, clusters = catalogue(items)
    head, tasks = adapted(vectors, clusters, 2 * _AT_ONCE)
    search = ItemSearch(load_settings().adapt.index_above)
    with torch.inference_mode():
        search.best(head, tasks[_AT_ONCE:], vectors, 50)
        search.wait()
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            search.best(head, tasks[:_AT_ONCE], vectors, 50)
            times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[_REPEATS // 2] / _AT_ONCE


def _plot(points: Mapping[str, Mapping[int, float]], file: Path) -> None:
    figure = go.Figure()
    for name, line in points.items():
        sizes: Sequence[int] = sorted(line)
        figure.add_scatter(x=sizes, y=[line[size] for size in sizes], name=name, mode="lines+markers")
    title = "Microseconds an event (ingest) or a user (read, score), as users or items become more"
    figure.update_layout(title=title, template="simple_white", height=400)
    figure.update_xaxes(type="log", dtick=1, title="users (ingest, read), items (score)")
    figure.update_yaxes(type="log", dtick=1, title="microseconds")
    figure.write_html(file, include_plotlyjs=True)


if __name__ == "__main__":
    sys.exit(main())
