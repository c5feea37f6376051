"""From assigned to read: the processor takes a partition over, and its place is compared with its leader's log.

A partition that cannot be taken over, because its owner before has not let go of it, waits alone, and is tried again.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from innerloop import metrics
from innerloop.errors import RetryError
from innerloop.streams.continuity import Continuity
from innerloop.streams.gaps import log_ends
from innerloop.streams.partitions import Partition, names, of_place, place, places
from innerloop.streams.processor import Processor
from innerloop.streams.waiting import RETRY_SECONDS, Waiting

_COMMITTED_SECONDS = 10.0


class Claims:
    """Which of the assigned partitions are not handled yet."""

    def __init__(self, processor: Processor, continuity: Continuity) -> None:
        self._processor, self._continuity = processor, continuity
        self._waiting: list[Partition] = []
        self._why = ""
        self._claiming = Waiting("not claimed")
        self._unsought: dict[Partition, TopicPartition] = {}
        """Where partitions start that were not compared with their leader's log yet; what they bring is left out."""

    @property
    def waiting(self) -> Sequence[Partition]:
        """Those that the processor could not take over yet."""
        return self._waiting

    @property
    def why(self) -> str | None:
        """Which they are, and why; safe to read from another thread."""
        partitions = sorted(self._waiting)
        return f"Not claimed yet: {', '.join(names(partitions))} ({self._why})." if partitions else None

    def settled(self, partition: Partition) -> bool:
        """Whether what the partition brings is to be handled."""
        return partition not in self._waiting and partition not in self._unsought

    def assign(self, consumer: Consumer, assigned: Sequence[TopicPartition]) -> None:
        """Read assigned partitions from where the processor wants; those that it can't take over bring nothing yet."""
        partitions = [of_place(each) for each in assigned]
        try:
            starts = self._claim(consumer, partitions)
        except RetryError as error:
            self._not_claimed(partitions, error)
            # From where does not matter, the claim will seek; without a place librdkafka would look for one now.
            starts = [place(each, OFFSET_BEGINNING) for each in partitions]
            consumer.incremental_assign(starts)
            consumer.pause(starts)
            self._waiting += partitions
        else:
            consumer.incremental_assign(starts)
            self._unsought.update({of_place(each): each for each in starts if each.leader_epoch is not None})
            # librdkafka still thinks of one as paused that was lost in a pause.
            consumer.resume(starts)

    def again(self, consumer: Consumer) -> bool:
        """Try again, one by one, those that wait; whether it was time to. The others' records are handled meanwhile.

        A frozen owner may hold some partitions and not all; which they are is not known.
        """
        if not self._waiting or self._claiming.tried_within(RETRY_SECONDS):
            return False
        while self._waiting:
            try:
                consumer.seek(*self._claim(consumer, self._waiting[:1]))
            except (RetryError, KafkaException) as error:
                self._not_claimed(self._waiting, error)
                self._waiting = self._waiting[1:] + self._waiting[:1]  # the next time another one is first
                return True
            self._waiting = self._waiting[1:]
        self._claiming.ends()
        return True

    def compare(self, consumer: Consumer) -> None:
        """Have librdkafka compare where partitions were left with their leader's log.

        A seek does, an assignment doesn't.
        """
        for partition, where in list(self._unsought.items()):
            try:
                consumer.seek(where)
            except KafkaException:  # fetching has not begun
                continue
            del self._unsought[partition]

    def passed(self, partition: Partition) -> None:
        """It reads on from somewhere else."""
        self._unsought.pop(partition, None)

    def leaves(self, partitions: Iterable[Partition]) -> None:
        """These are others' now."""
        gone = set(partitions)
        self._unsought = {each: where for each, where in self._unsought.items() if each not in gone}
        self._waiting = [each for each in self._waiting if each not in gone]
        if not self._waiting:
            self._claiming.ends()

    def _claim(self, consumer: Consumer, partitions: Sequence[Partition]) -> list[TopicPartition]:
        """Have the processor take them over; where to read each from. Raises RetryError."""
        if not partitions:
            return []
        try:
            found = consumer.committed(places(partitions), timeout=_COMMITTED_SECONDS)
        except KafkaException as error:
            raise RetryError(f"The broker does not tell the committed offsets: {error.args[0].str()}") from error
        committed = {of_place(each): each.offset if each.offset >= 0 else None for each in found}
        starts = self._processor.assigned(committed, partial(log_ends, consumer))
        offsets = {partition: OFFSET_BEGINNING if start is None else start for partition, start in starts.items()}
        self._continuity.starts(offsets)
        # Of another place, or of a topic that was made again, the epoch says nothing.
        epochs = {of_place(each): each.leader_epoch for each in found if each.offset == offsets[of_place(each)]}
        return [place(partition, offset, epochs.get(partition)) for partition, offset in offsets.items()]

    def _not_claimed(self, partitions: Sequence[Partition], error: Exception) -> None:
        self._why = str(error).rstrip(".")
        self._claiming.goes_on(str(error), partitions=names(partitions))
        metrics.PAUSES.inc()
