"""`innerloop evaluate stream --through-kafka`: the same events through the real loop, judged by the score topic.

The events before the first moment go through at full speed, the others at a rate; just before an event that is asked
for is sent, its user's newest list on the topic is held against it. What differs from the protocol's own figures is
the effect of latency: a list that names an older state because the newer one was still on its way. Lists of the newest
state are told apart: on them, both should be the same but for what moves with all users.
"""

import json
import os
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from innerloop.client import ScoreReader
from innerloop.config import Settings, load_settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.evaluation.outcome import Ints
from innerloop.evaluation.stream.options import StreamOptions
from innerloop.evaluation.stream.protocol import Heard
from innerloop.evaluation.stream.served import list_length, seen
from innerloop.events import CODES
from innerloop.learning.releases import Release, save
from innerloop.learning.stream_log import StreamLog
from innerloop.scores import RecommendationScores
from innerloop.store import releases
from innerloop.store.database import connect, transaction
from innerloop.store.migrate import migrate
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.lag import LagReader
from innerloop.streams.topics import ensure_topics

from .pool import Pool
from .replay import Pace
from .servers.services import running_services

_NAMES = {code: name for name, code in CODES.items()}
_START_SECONDS, _DRAIN_SECONDS = 60.0, 600.0


def own_services() -> Settings:
    """The settings, which must name neither a broker nor a database. Raises SettingsError."""
    settings = load_settings()
    if settings.kafka.bootstrap_servers or settings.database.url.get_secret_value():
        raise SettingsError(
            "--through-kafka writes the data's events to a broker and database of its own: unset"
            " INNERLOOP_KAFKA__BOOTSTRAP_SERVERS and INNERLOOP_DATABASE__URL, also in innerloop.toml."
        )
    return settings


def through_kafka(log: StreamLog, rows: Ints, release: Release, options: StreamOptions, *, rate: float) -> Heard:
    """Run the log through ingest and adapt, on a Kafka and PostgreSQL of its own.

    Raises SettingsError when others are set, ServiceError when they don't start.
    """
    with (
        tempfile.TemporaryDirectory(prefix="innerloop-evaluate-") as name,
        running_services(own_services(), announce=lambda _: None) as services,
    ):
        os.environ["INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"] = services.bootstrap_servers
        os.environ["INNERLOOP_DATABASE__URL"] = services.database_url
        os.environ["INNERLOOP_ADAPT__TOP"] = str(list_length(options))
        os.environ["INNERLOOP_SUPPORT__CAPACITY"] = str(options.capacity)
        os.environ["INNERLOOP_QUALITY__HOLD_OUT"] = "0"  # every user's adapted list is asked for
        settings = load_settings()
        _prepare(settings, release, Path(name))
        pool = Pool([["ingest"], ["adapt", "--member", "cpu", "--threads", "1"]], log=Path(name) / "workers.log")
        try:
            _wait(settings, pool)
            return _Run(settings, log, options, pool).judge(rows, rate)
        finally:
            pool.stop()


def _prepare(settings: Settings, release: Release, folder: Path) -> None:
    engine = connect(settings.database)
    migrate(engine)
    ensure_topics(settings)
    location = save(release, folder)
    with transaction(engine) as connection:
        releases.register(connection, release.version, msgspec.json.decode(location.read_bytes()), str(location))
    engine.dispose()


def _wait(settings: Settings, pool: Pool) -> None:
    until = time.monotonic() + _START_SECONDS
    groups = (settings.kafka.ingest_group, settings.kafka.adapt_group)
    while not all(members_with_partitions(settings.kafka, group) for group in groups):
        if pool.look() or time.monotonic() > until:
            raise ServiceError("The workers did not start: try `innerloop demo`, which keeps their log with --data.")
        time.sleep(0.1)


class _Run:
    """One run: what is sent, and what a subscriber knows of each user meanwhile."""

    def __init__(self, settings: Settings, log: StreamLog, options: StreamOptions, pool: Pool) -> None:
        self._settings, self._log, self._options, self._pool = settings, log, options, pool
        self._producer = EventProducer(settings)
        self._records: dict[str, RecommendationScores] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        """By user, how many events were sent, and the newest of their times."""
        self._item_numbers = {item: number for number, item in enumerate(log.item_ids)}

    def judge(self, rows: Ints, rate: float) -> Heard:
        """Send everything, judge before each of `rows`."""
        with ScoreReader(self._settings, model="recommendations") as reader:
            thread = threading.Thread(target=self._follow, args=(reader,), daemon=True)
            thread.start()
            first = int(rows[0])
            for row in range(first):
                self._send(row)
            self._drain()
            heard = self._live(rows, first, Pace(rate))
            reader.stop()
            thread.join(5.0)
        return heard

    def _live(self, rows: Ints, first: int, pace: Pace) -> Heard:
        asked = dict(zip(rows.tolist(), range(len(rows)), strict=True))
        ranks, newest, due = np.full(len(rows), -1), np.zeros(len(rows), np.bool_), 0
        for row in range(first, int(rows[-1]) + 1):
            while due == 0:
                due = pace.due()
                if due == 0:
                    time.sleep(0.001)
            due -= 1
            at = asked.get(row)
            if at is not None:
                ranks[at], newest[at] = self._rank(row)
            self._send(row)
        self._drain()
        return Heard(ranks, newest)

    def _rank(self, row: int) -> tuple[int, bool]:
        """The rank of a row's item on its user's list, 0 if it isn't there; whether the list is of the newest state."""
        log, user = self._log, self._log.user_ids[self._log.users[row]]
        record = self._records.get(user)
        if record is None or log.earlier[row] == log.first[row]:
            return -1, False
        removed = seen(log, np.array([row]), self._options)
        gone = set() if removed is None else set(removed[0].tolist())
        numbers = [self._item_numbers.get(item.item_id, -1) for item in record.items]
        listed = [number for number in numbers if number not in gone]
        rank = listed.index(log.items[row]) + 1 if log.items[row] in listed else 0
        events, newest = self._sent[user]
        whole = record.support_size >= min(events, self._options.capacity)
        return rank, whole and record.event_time >= newest

    def _send(self, row: int) -> None:
        log = self._log
        user, kind = log.user_ids[log.users[row]], _NAMES.get(int(log.kinds[row]))
        if kind is None:
            return  # of a type that the event topics don't take
        event = {
            "event_id": f"row-{row}",
            "event_type": kind,
            "user_id": user,
            "item_id": log.item_ids[log.items[row]],
            "event_time": int(log.times[row]),
        }
        if log.categories[row] >= 0:
            event["category"] = log.category_names[log.categories[row]]
        events, newest = self._sent.get(user, (0, 0))
        self._sent[user] = events + 1, max(newest, int(log.times[row]))
        self._producer.send(user, kind, json.dumps(event).encode())

    def _follow(self, reader: ScoreReader) -> None:
        for record in reader:
            if isinstance(record, RecommendationScores):
                self._records[record.user_id] = record

    def _drain(self) -> None:
        self._producer.finish()
        kafka, topics = self._settings.kafka, self._settings.topics
        until = time.monotonic() + _DRAIN_SECONDS
        with LagReader(self._settings) as lags:
            while any(
                each.offsets
                for each in lags.read(kafka.ingest_group, topics.events)
                + lags.read(kafka.adapt_group, [topics.requests])
            ):
                self._pool.look()
                if time.monotonic() > until:
                    raise ServiceError("The workers are still behind after ten minutes: give a lower --rate.")
                time.sleep(0.2)
