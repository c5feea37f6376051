"""What ingest tells of everybody's activity: gathered in memory, sampled to a rate, written about once a second."""

import time

import numpy as np

from innerloop.config import TrendsSettings
from innerloop.store import activity
from innerloop.store.database import Transaction
from innerloop.trends import Activity

_TRIM_SECONDS = 60.0


class ActivityLog:
    """Activity that is committed but not yet told. What is lost with the process is a second of statistics."""

    def __init__(self, settings: TrendsSettings) -> None:
        self._settings = settings
        self._pending: list[Activity] = []
        self._written_at = self._trimmed_at = time.monotonic()
        self._rng = np.random.default_rng()

    def add(self, told: Activity) -> None:
        """Take in what a committed batch changed."""
        if len(told):
            self._pending.append(told)

    @property
    def due(self) -> bool:
        return bool(self._pending) and time.monotonic() - self._written_at >= self._settings.every_seconds

    def write(self, connection: Transaction) -> None:
        """Write a piece within `connection`'s transaction; `written` says that it was committed."""
        activity.append(connection, self._sample())
        now = time.monotonic()
        if now - self._trimmed_at > _TRIM_SECONDS:
            activity.trim(connection, self._settings.kept_events)
            self._trimmed_at = now  # should this roll back, the next one is soon enough

    def written(self) -> None:
        self._pending, self._written_at = [], time.monotonic()

    def _sample(self) -> Activity:
        told = np.concatenate(self._pending)
        elapsed = max(time.monotonic() - self._written_at, self._settings.every_seconds)
        most = max(1, int(elapsed * self._settings.events_per_second))
        if len(told) > most:
            told = told[np.sort(self._rng.choice(len(told), most, replace=False))]
        return told
