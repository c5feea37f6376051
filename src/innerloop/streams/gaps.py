"""Where the log does not hold the record that is wanted: go on behind the gap, recorded first, or stop.

Nothing is skipped in silence. What is stored already is no gap; what retention took is one, which a person accepts with
--accept-gap; a log that ends before the record, or whose history is another, has lost what was handled here: no gap
explains that, and the worker stops.
"""

from collections.abc import Iterable, Iterator

import structlog
from confluent_kafka import Consumer, KafkaException, TopicPartition

from innerloop import metrics
from innerloop.errors import RetryError, StopError
from innerloop.streams.partitions import Partition, name, place
from innerloop.streams.processor import Processor
from innerloop.streams.waiting import RETRY_SECONDS, Waiting

_LOG = structlog.get_logger(__name__)
_OTHER_HISTORY = ("log truncation", "No epoch found")
_ENDS_SECONDS = 2.0
"""How long one partition without a leader may hold up the others."""


class Gaps:
    """The partitions whose next record is not in their log. They bring nothing; the others' records are handled."""

    def __init__(self, processor: Processor, *, accept: bool) -> None:
        self._processor, self._accept = processor, accept
        self._wanted: dict[Partition, int] = {}
        self._passing = Waiting("gap not passed")

    def found(self, partition: Partition, offset: int | None, why: str) -> None:
        """The log does not hold the record at `offset`; `why` is what librdkafka says.

        It tells in words alone which error it is. Without an offset it may be that the log's beginning is not known.
        Raises StopError where the log's history is not the one that was read.
        """
        if any(words in why for words in _OTHER_HISTORY):
            raise StopError(
                f"{name(partition)} has lost records that were handled here: its leader's log is another one than was "
                f"read ({why.rstrip('.')}). Nothing was skipped; see Gaps in deploy/OPERATIONS.md."
            )
        self._wanted[partition] = offset or 0

    def leaves(self, partitions: Iterable[Partition]) -> None:
        """These are others' now."""
        for partition in partitions:
            self._wanted.pop(partition, None)
        if not self._wanted:
            self._passing.ends()

    def passed(self, consumer: Consumer) -> Iterator[tuple[Partition, int]]:
        """Have the consumer go on behind the gaps: which partition does, and where, as soon as it does.

        Raises StopError; what was told before holds.
        """
        if not self._wanted or self._passing.tried_within(RETRY_SECONDS):
            return
        for partition, wanted in list(self._wanted.items()):
            try:
                start = self._start(consumer, partition, wanted)
                assign_anew(consumer, place(partition, start))
            except (RetryError, KafkaException) as error:
                self._passing.goes_on(str(error), partition=name(partition))
                metrics.PAUSES.inc()
                return
            del self._wanted[partition]
            yield partition, start
        self._passing.ends()

    def _start(self, consumer: Consumer, partition: Partition, wanted: int) -> int:
        """Where reading can go on. Raises RetryError and StopError."""
        first, end = log_ends(consumer, partition)
        if wanted > end:
            raise StopError(
                f"{name(partition)} ends at offset {end}, before the next record this worker needs, {wanted}: the "
                "broker has lost records that were handled here, which no gap explains. Nothing was skipped."
            )
        missing = max(wanted, self._processor.stands_at(partition) or 0)  # what is stored is not needed any more
        if missing < first and not self._accept:
            raise StopError(
                f"{name(partition)} no longer holds the next record this worker needs, offset {missing}: retention "
                f"has passed it, and what lay before offset {first} is gone. Nothing was skipped. To go on with what "
                "there is, and have the gap recorded, start once with --accept-gap."
            )
        if missing < first:
            self._processor.gap(partition, missing, first)
            _LOG.warning("gap accepted", partition=name(partition), from_offset=missing, to_offset=first)
        return max(wanted, first)


def assign_anew(consumer: Consumer, where: TopicPartition) -> None:
    """Read from there; a partition whose fetching has failed, or has not begun, cannot be sought in."""
    consumer.incremental_unassign([where])
    consumer.incremental_assign([where])
    consumer.resume([where])  # librdkafka may still think of it as paused


def log_ends(consumer: Consumer, partition: Partition) -> tuple[int, int]:
    """The oldest offset that the broker still has, and the next one it will give. Raises RetryError."""
    try:
        first, end = consumer.get_watermark_offsets(place(partition), _ENDS_SECONDS)
    except KafkaException as error:
        why = error.args[0].str()
        raise RetryError(f"The broker does not tell where {name(partition)} ends: {why}") from error
    return first, end
