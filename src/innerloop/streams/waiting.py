"""Waits as an operator sees them: one line when one begins, then at growing intervals, one when it ends."""

import logging
import threading
import time

import structlog
from confluent_kafka import Consumer

_LOG = structlog.get_logger(__name__)
RETRY_SECONDS = 0.5
"""After what raised RetryError the same is tried again."""
_FIRST_SECONDS = 5.0
_MOST_SECONDS = 300.0
_CLOSE_SECONDS = 1.5


class Waiting:
    """Tells of one kind of wait, however often the thing is tried again meanwhile."""

    def __init__(self, what: str, *, patience: float = 0.0) -> None:
        """A wait shorter than `patience` seconds is not worth a line."""
        self._what, self._patience = what, patience
        self._since: float | None = None
        self._next = self._interval = self._tried = 0.0

    @property
    def waits(self) -> bool:
        return self._since is not None

    def tried_within(self, seconds: float) -> bool:
        """Whether it waits and was tried in vain so lately."""
        return self.waits and time.monotonic() < self._tried + seconds

    def goes_on(self, why: str, **facts: object) -> None:
        """Tried in vain: told now, and 5, 15, 35 s later, and so on, at least every 5 minutes."""
        now = self._tried = time.monotonic()
        if self._since is None:
            self._since, self._next, self._interval = now, now + self._patience, _FIRST_SECONDS
        if now >= self._next:
            _LOG.warning(self._what, why=why, for_seconds=round(now - self._since, 1), **facts)
            self._next, self._interval = now + self._interval, min(2 * self._interval, _MOST_SECONDS)

    def ends(self) -> None:
        """It is over; told only if the wait was."""
        if self._since is None:
            return
        waited, self._since = time.monotonic() - self._since, None
        if self._interval > _FIRST_SECONDS:
            _LOG.info(f"{self._what}: over", after_seconds=round(waited, 1))


class Repeats(logging.Filter):
    """Lets a line of librdkafka through once, then at growing intervals: with no broker it has dozens a second.

    Lines count as the same that begin with the same word (`FAIL`, `SESSTMOUT`); a minute without one begins anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, tuple[float, float, float]] = {}  # last seen, next let through, interval (s)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to let it through."""
        kind, now = record.getMessage().partition(" ")[0], time.monotonic()
        seen, due, interval = self._kinds.get(kind, (now, now, _FIRST_SECONDS))
        if now - seen > 60.0:  # noqa: PLR2004 - of the docstring
            due, interval = now, _FIRST_SECONDS
        if now < due:
            self._kinds[kind] = now, due, interval
            return False
        self._kinds[kind] = now, now + interval, min(2 * interval, _MOST_SECONDS)
        return True


def close(consumer: Consumer) -> None:
    """Leave the group and close; without a broker, librdkafka would wait 10 s for a commit that is under way.

    What is not closed within 1.5 s ends with the process, and the group learns of it when the session runs out.
    """
    closing = threading.Thread(target=consumer.close, name="close", daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)
