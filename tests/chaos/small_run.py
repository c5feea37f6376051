"""A run of a few events with workers that are stopped, killed or broken at chosen steps, and its judgement."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from broken import Fault, Kind, start
from confluent_kafka import Consumer, KafkaException, TopicPartition
from settle import settle
from world import impressions, ledger_writes, prepare

from innerloop.config import AdaptSettings, IngestSettings, KafkaSettings, Settings, SupportSettings, TopicSettings
from innerloop.evaluation.judge.evidence import gathered, rules_of
from innerloop.evaluation.judge.verdict import LedgerWrite, Verdict, judge
from innerloop.store.database import Database, connect
from innerloop.streams import clients

SECONDS = 40.0
CAPACITY = 4
USERS = 8
_TIME = 1_700_000_000_000
_PAUSE_SECONDS = 0.03
# A worker that died is out of its group after a second; and nobody waits longer than that for a stopped one.
_PROPERTIES = {"session.timeout.ms": "1000", "heartbeat.interval.ms": "200", "fetch.wait.max.ms": "20"}


def small(settings: Settings, *, static_membership: str = "", **properties: str) -> Settings:
    """Small batches, sets and lists; one partition of each topic, and short sessions."""
    changed = {"properties": _PROPERTIES | properties, "static_membership": static_membership}
    kafka = KafkaSettings(**{**dict(settings.kafka), **changed})
    topics = TopicSettings(**{**dict(settings.topics), "partitions": 1})
    sections = {
        "kafka": kafka,
        "topics": topics,
        "support": SupportSettings(capacity=CAPACITY),
        "ingest": IngestSettings(batch_size=6, cached_users=100),
        "adapt": AdaptSettings(batch_size=3, top=5),
    }
    return settings.model_copy(update=sections)


@dataclass
class SmallRun:
    """One world; its workers end with it."""

    settings: Settings
    folder: Path
    engine: Database = field(init=False)
    workers: list[BaseProcess] = field(default_factory=list)
    sent: int = 0
    _consumers: dict[str, Consumer] = field(default_factory=dict)
    _last: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "workers.log").touch()  # the first worker takes a moment to write to it
        self.engine = connect(self.settings.database)
        prepare(self.settings, self.engine, self.folder, item_count=30)

    def send(self, count: int) -> None:
        """The next `count` events of all users, now and then one that is repeated, late or poison."""
        producer = clients.producer(self.settings.kafka)
        for number in range(self.sent, self.sent + count):
            event: dict[str, str | int] = {
                "event_id": f"e{number}",
                "event_type": "click" if number % 3 else "purchase",
                "user_id": f"u{number % USERS}",
                "item_id": f"i{number % 30}",
                "event_time": _TIME + 1000 * (number if number % 7 else number - 40),
            }
            if number % 10 == 3:
                event = self._last
            self._last = event
            topic = self.settings.topics.purchases if event["event_type"] == "purchase" else self.settings.topics.clicks
            value = b"{" if number % 25 == 24 else json.dumps(event).encode()
            producer.produce(topic, value, str(event["user_id"]))
        assert producer.flush(SECONDS) == 0
        self.sent += count

    def start(self, kind: Kind, *, broken: str | None = None, fault: Fault | None = None) -> BaseProcess:
        name = f"{kind}-{len(self.workers)}"
        worker = start(kind, self.settings, name, self.folder / "workers.log", broken=broken, fault=fault)
        self.workers.append(worker)
        return worker

    def run(self, *kinds: Kind, watched: bool = True) -> None:
        """Intact workers until everything has settled."""
        workers = [self.start(kind) for kind in kinds]
        until(
            lambda: all(map(self._joined, workers)), self.said
        )  # where there is nothing to do, all is settled at once
        assert settle(self.settings, SECONDS, watched=watched, pause=0.2) == [], self.said
        for worker in workers:
            worker.terminate()
            worker.join(SECONDS)
            assert worker.exitcode == 0, self.said

    def _joined(self, worker: BaseProcess) -> bool:
        """Whether it has been given its partitions; before, SIGTERM may find it without its handlers."""
        assert worker.is_alive(), f"{worker.exitcode}: {self.said}"
        lines = (self.folder / "workers.log").read_text(errors="replace").splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return any((line["event"], line["process"]) == ("assigned", worker.name) for line in said)

    def caught_up(self, kind: Kind) -> bool:
        """Whether the group of this kind has committed everything there is."""
        topics, kafka = self.settings.topics, self.settings.kafka
        group = kafka.ingest_group if kind == "ingest" else kafka.adapt_group
        names = [topics.clicks, topics.purchases] if kind == "ingest" else [topics.requests]
        try:
            places = self._consumer(group).committed([TopicPartition(name, 0) for name in names], timeout=SECONDS)
        except KafkaException:
            return False  # a new group has no coordinator for a moment
        return all(max(place.offset, 0) == self._end(place) for place in places) and self._end(places[0]) > 0

    def _consumer(self, group: str) -> Consumer:
        """One that asks about the group and is no member of it."""
        if group not in self._consumers:
            self._consumers[group] = clients.consumer(self.settings.kafka, group)
        return self._consumers[group]

    def _end(self, place: TopicPartition) -> int:
        end: int = self._consumer("nobody").get_watermark_offsets(place, timeout=SECONDS)[1]
        return end

    @property
    def writes(self) -> list[LedgerWrite]:
        return [write for write in ledger_writes(self.settings) if write.topic in self.settings.topics.events]

    @property
    def published(self) -> int:
        """How many lists of recommendations there are."""
        return self._end(TopicPartition(self.settings.topics.recommendations, 0))

    def skip_watching(self) -> None:
        """What is on the score topics now counts as watched, as it would where nobody watches."""
        topics = (self.settings.topics.recommendations, self.settings.topics.ads)
        ends = [TopicPartition(topic, 0, self._end(TopicPartition(topic, 0))) for topic in topics]
        self._consumer(self.settings.kafka.adapt_group + "-watch").commit(offsets=ends, asynchronous=False)

    def judged(self) -> Verdict:
        shown, writes = impressions(self.settings), ledger_writes(self.settings)
        evidence = gathered(self.settings, self.engine, writes=writes, shown=shown)
        return judge(evidence, rules_of(self.settings))

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join(SECONDS)
        for consumer in self._consumers.values():
            consumer.close()
        self.engine.dispose()

    @property
    def said(self) -> str:
        log = self.folder / "workers.log"
        return log.read_text(errors="replace")[-4_000:] if log.exists() else ""


def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(_PAUSE_SECONDS)


def is_stopped(worker: BaseProcess) -> bool:
    """Whether it has sent itself SIGSTOP. Fails when it has ended instead."""
    assert worker.is_alive(), f"ended with {worker.exitcode}"
    return bool(psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)


def ended(worker: BaseProcess, codes: Sequence[int]) -> None:
    """Wait for its end, with one of these codes."""
    worker.join(SECONDS)
    assert worker.exitcode in codes, worker.exitcode
