"""Offsets are committed behind the work, never before it: a lost commit costs a repeat, nothing else.

With the next offset goes the epoch of the leader that took the record before it. By that, which is given back at the
next claim, librdkafka finds that a log has lost its end meanwhile, however long it has become again (KIP-320).
"""

import time
from collections.abc import Iterable, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from innerloop.streams.batch import Batch
from innerloop.streams.partitions import Partition, of_place, place
from innerloop.streams.waiting import Waiting

_EVERY_SECONDS = 0.2
_LAST_SECONDS = 1.5
"""How long a stop waits for the broker to take the last offsets: what it does not take is read again."""
_POLL_SECONDS = 0.1


class Commits:
    """What is done and not committed yet, by partition."""

    def __init__(self) -> None:
        self._done: dict[Partition, TopicPartition] = {}
        self._asked: dict[Partition, int] = {}
        """The offset that the broker was last asked to take, of each partition that has not left since."""
        self._committed_at = 0.0
        self._unanswered = 0
        self._refused = Waiting("offsets not committed", patience=5.0)

    def done(self, batch: Batch) -> None:
        """All of a batch is done."""
        epochs = batch.leader_epochs
        self._done |= {each: place(each, offset, epochs.get(each)) for each, offset in batch.next_offsets.items()}

    def passed(self, partition: Partition, offset: int) -> None:
        """What lies before `offset` is not needed any more."""
        if partition not in self._done or self._done[partition].offset < offset:
            self._done[partition] = place(partition, offset)

    def leaves(self, partitions: Iterable[Partition]) -> None:
        """These are others' now."""
        for partition in partitions:
            self._done.pop(partition, None)
            self._asked.pop(partition, None)

    def commit(self, consumer: Consumer, *, wait: bool = False) -> None:
        """Commit what is done, if the last time was 0.2 s ago or the answer is waited for."""
        if not self._done or (not wait and time.monotonic() - self._committed_at < _EVERY_SECONDS):
            return
        offsets = list(self._done.values())
        self._committed_at = time.monotonic()
        answers: Sequence[TopicPartition] = []
        try:
            if wait:
                answers = consumer.commit(offsets=offsets, asynchronous=False) or []
            else:
                consumer.commit(offsets=offsets, asynchronous=True)
                self._unanswered += 1
        except KafkaException as error:
            self._refused.goes_on(error.args[0].str())
            return
        self._asked |= {partition: each.offset for partition, each in self._done.items()}
        self._done.clear()
        self._ask_again([(each, each.error) for each in answers if each.error is not None])

    def answered(self, error: KafkaError | None, committed: Sequence[TopicPartition]) -> None:
        """Told by the next poll how a commit went; what the broker did not take is committed with the next."""
        self._unanswered = max(0, self._unanswered - 1)
        refused = [(each, why) for each in committed if (why := error or each.error) is not None]
        if not refused:
            self._refused.ends()
        self._ask_again(refused)

    def _ask_again(self, refused: Iterable[tuple[TopicPartition, KafkaError]]) -> None:
        """With the next commit, unless there is newer, or newer was asked for since, or it is another's now.

        A refusal that comes late would set the group back behind what is done.
        """
        for each, why in refused:
            self._refused.goes_on(why.str())
            partition = of_place(each)
            if partition not in self._done and each.offset == self._asked.get(partition):
                self._done[partition] = place(partition, each.offset, each.leader_epoch)

    def forget_answers(self) -> None:
        """The consumer that was asked is no more."""
        self._unanswered = 0

    def last(self, consumer: Consumer) -> None:
        """Commit before leaving; a broker that does not answer in time is not waited for."""
        until = time.monotonic() + _LAST_SECONDS
        self._committed_at = 0.0
        self.commit(consumer)
        while self._unanswered and time.monotonic() < until:
            consumer.poll(_POLL_SECONDS)  # what it brings is not handled, and so not committed
