"""The console's two threads: one looks each second, one reads what takes longer; neither waits for the other."""

import math
import time

from innerloop import metrics
from innerloop.config import Settings
from innerloop.streams.lag import PartitionLag
from innerloop.worker.health import Health, Verdict

from .history import History
from .repeated import Repeated
from .sources import Live, LiveSource
from .stored import Stored, StoredSource

_LIVE_SECONDS, _STORED_SECONDS = 1.0, 5.0
_OLD_SECONDS = 60.0


class Observer:
    """Looks for however many viewers there are, remembers the last hour, and shows the lag for Prometheus."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._live, self._stored = LiveSource(settings), StoredSource(settings)
        self._threads = (
            Repeated("observer", self._look, _LIVE_SECONDS),
            Repeated("reader", self._read, _STORED_SECONDS),
        )
        self.history = History()
        self.live, self.stored = Live(at=time.time()), Stored(at=time.time())
        self._looked = False
        self._health = Health(self, settings.http.stuck_after_seconds)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._health.watch()

    def stop(self) -> None:
        self._health.stop()
        ended = [thread.stop() for thread in self._threads]
        if all(ended):  # else its connections are in use, and end with the process
            self._live.close()
            self._stored.close()

    @property
    def turned_at(self) -> float:
        """When it last looked, well or not: what its health goes by."""
        return self._threads[0].turned_at

    @property
    def joined(self) -> bool:
        """Whether it has looked well once."""
        return self._looked

    @property
    def alive(self) -> Verdict:
        return self._health.live

    @property
    def ready(self) -> Verdict:
        """Red before the first good look, and while it is stuck."""
        live = self.alive
        if not live.good:
            return live
        if not self._looked:
            return Verdict(good=False, why=" ".join(["The console has not seen the lag yet.", *self.troubles]))
        return Verdict(good=True, why="The page is served, and is live.")

    @property
    def troubles(self) -> list[str]:
        """What is not shown as it is now, a sentence each."""
        found = [*self.live.troubles, *self.stored.troubles, *(thread.trouble for thread in self._threads)]
        silent = time.time() - self.stored.at
        if silent > _OLD_SECONDS:
            found.append(f"Users, releases, dead letters and quality are as they were {silent:.0f} s ago.")
        return [each for each in dict.fromkeys(found) if each]

    def _look(self) -> None:
        live = self.live = self._live.look()
        metrics.LAST_TURN.set_to_current_time()
        self.history.add(live.at, self._numbers(live))
        if live.groups and not live.troubles:
            show_lag([each.lag for group in live.groups for each in group.partitions])
            metrics.CONSOLE_LOOKED.set(live.at)
            self._looked = True

    def _read(self) -> None:
        self.stored = self._stored.look()

    def _numbers(self, live: Live) -> dict[str, float]:
        kafka, topics = self._settings.kafka, self._settings.topics
        rates = {topic: flow.per_second for topic, flow in live.flows.items()}
        lags = {group.group: float(group.offsets) for group in live.groups} if not live.troubles else {}
        return {
            "lag ingest": lags.get(kafka.ingest_group, math.nan),
            "lag adapt": lags.get(kafka.adapt_group, math.nan),
            "latency p50": live.latency.p50 * 1000,
            "latency p99": live.latency.p99 * 1000,
            "throughput events": sum(rates.get(topic, math.nan) for topic in topics.ingested),
            "throughput requests": rates.get(topics.requests, math.nan),
            "throughput scores": rates.get(topics.recommendations, math.nan),
        }


def show_lag(partitions: list[PartitionLag]) -> None:
    """For Prometheus: every partition of both groups, also while nobody runs who could tell of it."""
    for each in partitions:
        where = (each.group, each.topic, str(each.partition))
        metrics.LAG_OFFSETS.labels(*where).set(each.offsets)
        if each.seconds is not None:
            metrics.LAG_SECONDS.labels(*where).set(each.seconds)
