"""What the demo measures while it runs: a subscriber's view of the loop, from outside."""

import threading
import time
from collections import deque

import numpy as np

from innerloop.client import ScoreReader
from innerloop.config import Settings
from innerloop.evaluation.prequential import HitRates
from innerloop.scores import RecommendationScores

_WINDOW = 20_000


class Subscriber:
    """Subscribes to the recommendations as a downstream service would, and judges each click by the list before it.

    Latency runs from handing an event to the producer until a list that names it (or a later one of the user) is
    readable here.
    """

    def __init__(self, settings: Settings, unadapted: list[str]) -> None:
        self._reader = ScoreReader(settings, model="recommendations")
        self._lists: dict[str, list[str]] = {}
        self._versions: dict[str, int] = {}
        self._waiting: dict[str, deque[tuple[int, float]]] = {}
        self._unadapted = unadapted
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="subscriber", daemon=True)
        self.hits = HitRates()
        self.records = 0
        self.latencies_ms: deque[float] = deque(maxlen=_WINDOW)
        self.all_latencies_ms: list[float] = []

    def start(self) -> None:
        """Begin to follow the topic; what is on it already counts as known."""
        self._reader.wait_until_current(30.0)
        self._thread.start()

    def about_to_send(self, user_id: str, event_type: str, item_id: str, event_time: int) -> None:
        """Judge a click by the newest list of its user, then start the clock of its event."""
        with self._lock:
            if event_type == "click":
                self.hits.observe(user_id, item_id, self._lists, self._unadapted)
            self._waiting.setdefault(user_id, deque()).append((event_time, time.perf_counter()))

    def _follow(self) -> None:
        for record in self._reader:
            if isinstance(record, RecommendationScores):
                self._take(record)

    def _take(self, record: RecommendationScores) -> None:
        now = time.perf_counter()
        with self._lock:
            self.records += 1
            if record.arm == "adapted":  # a click of the hold-out counts in no arm: its list is the unadapted one
                self._lists[record.user_id] = [item.item_id for item in record.items]
            self._versions[record.user_id] = record.support_version
            waiting = self._waiting.get(record.user_id)
            while waiting and waiting[0][0] <= record.event_time:
                _, sent = waiting.popleft()
                self.latencies_ms.append((now - sent) * 1000)
                self.all_latencies_ms.append((now - sent) * 1000)

    def percentiles(self, *, whole: bool = False) -> tuple[float, float]:
        """p50 and p99 of the latency in milliseconds, of the last events or of the whole run; NaN before the first."""
        with self._lock:
            values = list(self.all_latencies_ms if whole else self.latencies_ms)
        if not values:
            return float("nan"), float("nan")
        p50, p99 = np.percentile(values, [50, 99])
        return float(p50), float(p99)

    @property
    def users(self) -> int:
        return len(self._versions)

    def versions(self) -> dict[str, int]:
        """The support version that each user's newest list names."""
        with self._lock:
            return dict(self._versions)

    def close(self) -> None:
        self._reader.stop()
        self._thread.join(5.0)
        self._reader.close()
