"""Records of the sample that Faust has passed over: seen by a gap in the offsets, and read again."""

import time
from contextlib import suppress
from typing import Any

import faust
import structlog
from aiokafka.errors import IllegalStateError
from faust.types import TP

_LOG = structlog.get_logger(__name__)
_FIRST_SECONDS = 1.0  # what Faust still had in hand may undo the seek
_MOST_ATTEMPTS = 5  # each with twice the time: another seek drops what a slow broker is about to send


class PassedOver:
    """A partition without gaps of its own (no compaction, no transactions), whose reader knows what comes next."""

    def __init__(self, app: faust.App, partition: TP) -> None:
        self._app, self._partition = app, partition
        self._expected, self._first, self._attempts, self._again_at = -1, -1, 0, 0.0

    async def before(self, offset: int, expected: int) -> bool:
        """Whether this record must wait for others from `expected` (0: nothing is) on: then it comes again after them.

        What Kafka has removed is not waited for, and nothing for longer than half a minute.
        """
        if expected == 0 or offset <= expected:
            self._expected = -1
            return False
        if expected != self._expected:
            consumer: Any = self._app.consumer
            starts = await consumer.earliest_offsets(self._partition)
            self._expected, self._first = expected, max(expected, starts[self._partition])
            self._attempts, self._again_at = 0, 0.0
        if offset <= self._first:
            return False
        if time.monotonic() >= self._again_at:
            if self._attempts == _MOST_ATTEMPTS:
                _LOG.warning("records of the sample are lost", first=self._first, next=offset)
                return False
            await self._read_again()
        return True

    async def _read_again(self) -> None:
        self._again_at = time.monotonic() + _FIRST_SECONDS * 2**self._attempts
        self._attempts += 1
        _LOG.info("records that Faust passed over are read again", first=self._first)
        with suppress(IllegalStateError):  # it has just moved to another process, which sees the gap, too
            await self._app.consumer.seek_wait({self._partition: self._first})
