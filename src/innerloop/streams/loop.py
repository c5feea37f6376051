"""The consumer loop: polls, hands batches to a processor, commits offsets behind it, and survives outages.

What a processor may rely on:
- `assigned` is called before any record of a partition is handed over, and decides where reading starts: at an offset
  that the log does not hold, there is a gap.
- What `handle` is given of a partition goes on where the batch before ended, or repeats some of it (`continuity`).
- `handle` returns only when everything that follows from the batch is stored and replicated. Only then are the
  batch's offsets committed, so a committed offset means: done. It may be called again with the same batch.
- RetryError from either: polling goes on (no rebalance), and the same call is made again. From `handle` all partitions
  are paused meanwhile; a partition that could not be assigned waits alone.
- `revoked` is called after the last batch of those partitions, when their offsets are committed.
- `gap` is called only when gaps are accepted: a partition's records before `to_offset` are gone, and reading goes on
  there as soon as it returns.
- Any StopError leaves the loop; what was not committed is read again by the next owner.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ParamSpec, Protocol

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from innerloop import metrics
from innerloop.config import KafkaSettings
from innerloop.errors import RetryError, ServiceError, StopError
from innerloop.streams import clients
from innerloop.streams.batch import Batch, Partition
from innerloop.streams.continuity import Continuity
from innerloop.streams.lost_brokers import WHY, BrokerCheck
from innerloop.streams.waiting import Waiting, close

P = ParamSpec("P")
_LOG = structlog.get_logger(__name__)
_COMMIT_SECONDS = 0.2
_RETRY_SECONDS = 0.5
_IDLE_SECONDS = 0.1
_JOIN_SECONDS = 20.0
_NOT_JOINED = (
    "the broker has given it no partitions yet: is it there, does this user have READ on the group and its topics, "
    "and, with kafka.group_protocol consumer, is it Kafka 4.0 or newer?"
)
_OTHER_HISTORY = ("log truncation", "No epoch found")
_ENDS_SECONDS = 2.0
"""How long one partition without a leader may hold up the others."""
_LAST_COMMIT_SECONDS = 1.5
"""How long a stop waits for the broker to take the last offsets: what it does not take is read again."""


LogEnds = Callable[[Partition], tuple[int, int]]
"""The oldest offset of a partition that the broker still has, and the next one it will give. Raises RetryError."""


class Processor(Protocol):
    """What the loop drives; see the module's contract."""

    def assigned(self, committed: Mapping[Partition, int | None], log_ends: LogEnds) -> Mapping[Partition, int | None]:
        """Take over partitions with these committed offsets; where to start each, None for the oldest record."""

    def stands_at(self, partition: Partition) -> int | None:
        """The first offset that is not in its store, None where it keeps no such account."""

    def revoked(self, partitions: Sequence[Partition]) -> None: ...

    def handle(self, batch: Batch) -> None: ...

    def gap(self, partition: Partition, from_offset: int, to_offset: int) -> None:
        """Go on at `to_offset`: the records since `from_offset` are gone. Raises RetryError."""

    def idle(self) -> None:
        """Called after each batch and at least every 0.1 s; what raises RetryError is called again."""


class Loop:
    """Runs one processor as one member of a consumer group."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        group: str,
        topics: Sequence[str],
        processor: Processor,
        batch_size: int,
        poll_seconds: float,
        stopping: Callable[[], bool],
        accept_gap: bool = False,
        instance: str | None = None,
        batch_keys: int | None = None,
    ) -> None:
        """`instance` is the name of a static member (KIP-345): one that comes back within its session moves nothing.

        `batch_keys` bounds how many different keys a batch has, to about a quarter more than that.
        """
        self._group, self._topics, self._processor = group, list(topics), processor
        self._batch_size, self._poll_seconds, self._stopping = batch_size, poll_seconds, stopping
        self._batch_keys = batch_keys
        # A start below the log's beginning means that retention has passed us: that is for a person to decide.
        self._own: dict[str, clients.Value] = {"auto_offset_reset": "error"}
        self._namesake = ""
        if instance is not None:
            self._own["group_instance_id"] = instance
            self._namesake = (
                f" Each process needs a kafka.static_membership of its own: see whether another is {instance}, too. "
                "Where one of that name has been killed, start again when its session is over."
            )
        self._settings, self._brokers = settings, BrokerCheck(settings, self._topics[0])
        self._generation = 0
        self._consumer = self._new_consumer()
        self._continuity = Continuity()
        self._owned: set[Partition] = set()
        self._unclaimed: list[Partition] = []
        self._unclaimed_why = ""
        self._claimed_at = 0.0
        """When it was last tried to claim them."""
        self._done: dict[Partition, TopicPartition] = {}
        """What to commit: the next offset, and the epoch of the leader that took the record before it.

        By that, which is given back at the next claim, librdkafka finds that a log has lost its end meanwhile, however
        long it has become again (KIP-320).
        """
        self._unsought: dict[Partition, TopicPartition] = {}
        """Where partitions start that were not compared with their leader's log yet; what they bring is left out."""
        self._committed_at = 0.0
        self._committing = 0
        self._accept_gap = accept_gap
        self._gaps: dict[Partition, int] = {}
        self._passed_at = 0.0
        """When it was last tried in vain to pass them."""
        self._outage, self._uncommitted = Waiting("paused"), Waiting("offsets not committed", patience=5.0)
        self._claiming, self._passing = Waiting("not claimed"), Waiting("gap not passed")
        self._joining = Waiting("not in its group", patience=_JOIN_SECONDS)
        self._left = False
        self.turned_at = time.monotonic()
        """When it last turned: what probes judge it by. Waiting for an outage is turning."""
        self._joined = False

    @property
    def joined(self) -> bool:
        """Whether the group has given it its partitions, none included, and all of them are claimed."""
        return self._joined and not self._unclaimed

    @property
    def unclaimed(self) -> str | None:
        """Which partitions of this process it cannot claim yet, and why; safe to read from another thread."""
        partitions = sorted(self._unclaimed)
        if not partitions:
            return None
        return f"Not claimed yet: {', '.join(_names(partitions))} ({self._unclaimed_why})."

    @property
    def owned(self) -> frozenset[Partition]:
        """The partitions of this process now; safe to read from another thread."""
        return frozenset(self._owned.copy())

    def run(self) -> None:
        """Work until told to stop; the batch in hand is finished and committed. Raises StopError."""
        try:
            self._subscribe()
            while not self._stopping():
                self._turned()
                if not self._joined:
                    self._joining.goes_on(_NOT_JOINED)
                self._claim_again()
                self._pass_gaps()
                self._compare()
                batch = self._poll()
                if len(batch):
                    self._brokers.heard()
                    self._persist(batch)
                elif self._brokers.lost(self._consumer):
                    self._renew()
                self._commit()
                self._idle()
        finally:
            try:
                self._commit_last()
            finally:
                self._leave()

    def _new_consumer(self) -> Consumer:
        self._generation += 1
        return clients.consumer(self._settings, self._group, on_commit=self._of_now(self._on_commit), **self._own)

    def _subscribe(self) -> None:
        assigned, revoked, lost = map(self._of_now, (self._on_assign, self._on_revoke, self._on_lost))
        self._consumer.subscribe(self._topics, on_assign=assigned, on_revoke=revoked, on_lost=lost)

    def _of_now(self, callback: Callable[P, None]) -> Callable[P, None]:
        """The same for the consumer at hand alone: one that was replaced has nothing to tell any more."""
        generation = self._generation

        def called(*args: P.args, **named: P.kwargs) -> None:
            if generation == self._generation:
                callback(*args, **named)

        return called

    def _renew(self) -> None:
        """Another consumer for one that can do nothing any more; the group gives the partitions again."""
        _LOG.warning("consumer made anew", why=WHY)
        lost, self._consumer = self._consumer, self._new_consumer()
        self._give_up(sorted(self._owned))
        self._committing, self._joined = 0, False
        close(lost)
        self._subscribe()

    def _leave(self) -> None:
        # Closing is done by another thread, which may outlive us: its callbacks find nothing left to do.
        self._left = True
        self._give_up(sorted(self._owned))
        close(self._consumer)

    def _turned(self) -> None:
        self.turned_at = time.monotonic()
        metrics.LAST_TURN.set_to_current_time()

    # --- polling

    def _poll(self) -> Batch:
        """Block for the first record, then take what else has come within `poll_seconds`."""
        with metrics.STEP_SECONDS.labels("poll").time():
            first = self._consumer.poll(_IDLE_SECONDS)
            if first is None:
                return Batch([])
            messages = [first, *self._take(self._batch_size - 1)]
        if [1 for message in messages if message.error() is not None]:
            messages = [message for message in messages if not self._is_error(message)]
        return self._without_jumps(Batch(messages).keeping(self._is_claimed))

    def _take(self, most: int) -> list[Message]:
        if self._batch_keys is None:
            return self._consumer.consume(most, self._poll_seconds) if most else []
        keys: set[bytes | None] = set()
        taken: list[Message] = []
        while len(taken) < most and len(keys) < self._batch_keys:
            portion = min(most - len(taken), max(1, self._batch_keys // 4))
            some = self._consumer.consume(portion, self._poll_seconds)
            taken += some
            if len(some) < portion:
                break
            keys.update(message.key() for message in some)
        return taken

    def _without_jumps(self, batch: Batch) -> Batch:
        """The batch up to where a partition jumps; from there it is read again."""
        again = self._continuity.jumps(batch)
        for partition, offset in again.items():
            self._read_from(_place(partition, offset))
        return batch.before(again) if again else batch

    def _is_claimed(self, partition: Partition) -> bool:
        return partition in self._owned and partition not in self._unclaimed and partition not in self._unsought

    def _is_error(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - the library's constants are named so
            partition = (message.topic() or "", message.partition() or 0)
            if partition in self._owned:
                self._gaps[partition] = self._wanted(partition, message.offset(), error.str())
            return True
        if error.code() in clients.MISSING:
            raise ServiceError(f"Topic {message.topic()} does not exist: run `innerloop topics`.")
        if error.code() in clients.FORBIDDEN:
            raise StopError(
                f"Kafka does not let this user read {message.topic() or 'the topics'} in group {self._group} "
                f"({error.str()}): give it the ACLs that deploy/OPERATIONS.md lists."
            )
        if clients.is_fatal(error):
            raise StopError(f"The broker has shut this consumer out ({error.str()}).{self._namesake}")
        _LOG.warning("consumer error", error=error.str())
        return True

    @staticmethod
    def _wanted(partition: Partition, offset: int | None, why: str) -> int:
        """The record that the log does not hold; raises StopError where its history is not the one we have read.

        librdkafka tells in words alone which it is. Without an offset it may be that the log's beginning is not known.
        """
        if not any(words in why for words in _OTHER_HISTORY):
            return offset or 0
        raise StopError(
            f"{_name(partition)} has lost records that were handled here: its leader's log is another one than was "
            f"read ({why.rstrip('.')}). Nothing was skipped; see Gaps in deploy/OPERATIONS.md."
        )

    # --- handling

    def _persist(self, batch: Batch) -> None:
        """Hand over the batch until it is done, or its partitions are no longer ours."""
        while len(batch):
            try:
                self._processor.handle(batch)
            except RetryError as error:
                self._away(error, records=len(batch))
                if not self._wait():
                    return
                batch = batch.keeping(self._is_claimed)
            else:
                self._is_done(batch)
                break
        self._recovered()

    def _is_done(self, batch: Batch) -> None:
        epochs = batch.leader_epochs
        self._done |= {each: _place(each, offset, epochs.get(each)) for each, offset in batch.next_offsets.items()}

    def _away(self, error: Exception, **facts: object) -> None:
        """Tell and count that the database or the broker is away, once for each try."""
        self._outage.goes_on(str(error), **facts)
        metrics.PAUSES.inc()

    def _recovered(self) -> None:
        if self._outage.waits:
            self._outage.ends()
            self._resume()

    def _wait(self) -> bool:
        """Stay in the group without fetching for a moment; False when told to stop."""
        with metrics.STEP_SECONDS.labels("wait").time():
            return self._paused()

    def _paused(self) -> bool:
        self._consumer.pause(self._partitions(self._owned))
        until = time.monotonic() + _RETRY_SECONDS
        while (left := until - time.monotonic()) > 0:
            if self._stopping():
                return False
            self._turned()
            message = self._consumer.poll(min(left, _IDLE_SECONDS))
            if message is not None and not self._is_error(message):
                self._put_back(message)
        return True

    def _put_back(self, message: Message) -> None:
        """Fetched before the pause took hold: read it again later."""
        place = TopicPartition(message.topic() or "", message.partition() or 0, message.offset() or 0)
        if (place.topic, place.partition) in self._owned and not self._read_from(place):
            self._consumer.pause([place])

    def _read_from(self, place: TopicPartition) -> bool:
        """Go on there; whether it could be sought, and not only assigned anew, which ends a pause."""
        try:
            self._consumer.seek(place)
        except KafkaException:  # fetching has not begun or has ended
            self._consumer.incremental_unassign([place])
            self._consumer.incremental_assign([place])
            self._consumer.resume([place])  # librdkafka may still think of it as paused
            return False
        return True

    def _compare(self) -> None:
        """Have librdkafka compare where partitions were left with their leader's log.

        A seek does, an assignment doesn't.
        """
        for partition, place in list(self._unsought.items()):
            try:
                self._consumer.seek(place)
            except KafkaException:  # fetching has not begun
                continue
            del self._unsought[partition]

    def _resume(self) -> None:
        self._continuity.resumes()
        self._consumer.resume(self._partitions(self._owned.difference(self._unclaimed)))

    def _idle(self) -> None:
        try:
            self._processor.idle()
        except RetryError as error:
            self._away(error)
            self._wait()
        else:
            self._recovered()

    # --- offsets

    def _commit(self, *, wait: bool = False) -> None:
        """Commit what is done, behind the work: a lost commit costs a repeat, nothing else."""
        if not self._done or (not wait and time.monotonic() - self._committed_at < _COMMIT_SECONDS):
            return
        offsets = list(self._done.values())
        self._committed_at = time.monotonic()
        try:
            if wait:
                self._consumer.commit(offsets=offsets, asynchronous=False)
            else:
                self._consumer.commit(offsets=offsets, asynchronous=True)
                self._committing += 1
        except KafkaException as error:
            self._uncommitted.goes_on(error.args[0].str())
            return
        self._done.clear()

    def _on_commit(self, error: KafkaError | None, committed: list[TopicPartition]) -> None:
        """Told by the next poll how a commit went; what the broker did not take is committed with the next."""
        if self._left:
            return
        self._committing = max(0, self._committing - 1)
        refused = [(each, why) for each in committed if (why := error or each.error) is not None]
        if not refused:
            self._uncommitted.ends()
        for each, why in refused:
            self._uncommitted.goes_on(why.str())
            partition = (each.topic, each.partition)
            if partition in self._owned:
                self._done.setdefault(partition, _place(partition, each.offset, each.leader_epoch))  # there is newer

    def _commit_last(self) -> None:
        """Commit before leaving; a broker that does not answer in time is not waited for."""
        self._consumer.pause(self._partitions(self._owned))
        until = time.monotonic() + _LAST_COMMIT_SECONDS
        self._committed_at = 0.0
        self._commit()
        while self._committing and time.monotonic() < until:
            self._consumer.poll(_IDLE_SECONDS)  # what it brings is not handled, and so not committed

    # --- gaps

    def _pass_gaps(self) -> None:
        """Where the log does not hold the record wanted: go on behind the gap, recorded first, or stop.

        Such a partition brings nothing; the others' records are handled while it waits.
        """
        if not self._gaps or time.monotonic() < self._passed_at + _RETRY_SECONDS:
            return
        for partition, wanted in list(self._gaps.items()):
            try:
                self._pass_gap(partition, wanted)
            except (RetryError, KafkaException) as error:
                self._passing.goes_on(str(error), partition=_name(partition))
                metrics.PAUSES.inc()
                self._passed_at = time.monotonic()
                return
            self._gaps.pop(partition, None)
        self._passing.ends()

    def _pass_gap(self, partition: Partition, wanted: int) -> None:
        first, end = self._log_ends(partition)
        if wanted > end:
            raise StopError(
                f"{_name(partition)} ends at offset {end}, before the next record this worker needs, {wanted}: the "
                "broker has lost records that were handled here, which no gap explains. Nothing was skipped."
            )
        missing = max(wanted, self._processor.stands_at(partition) or 0)  # what is stored is not needed any more
        if missing < first and not self._accept_gap:
            raise StopError(
                f"{_name(partition)} no longer holds the next record this worker needs, offset {missing}: retention "
                f"has passed it, and what lay before offset {first} is gone. Nothing was skipped. To go on with what "
                "there is, and have the gap recorded, start once with --accept-gap."
            )
        if missing < first:
            self._processor.gap(partition, missing, first)
            _LOG.warning("gap accepted", partition=_name(partition), from_offset=missing, to_offset=first)
        start = max(wanted, first)
        # A partition whose fetching has failed cannot be sought in.
        place = [TopicPartition(*partition, start)]
        self._consumer.incremental_unassign(place)
        self._consumer.incremental_assign(place)
        self._consumer.resume(place)
        self._continuity.starts({partition: start})
        self._unsought.pop(partition, None)
        if partition not in self._done or self._done[partition].offset < start:
            self._done[partition] = _place(partition, start)

    def _log_ends(self, partition: Partition) -> tuple[int, int]:
        try:
            first, end = self._consumer.get_watermark_offsets(TopicPartition(*partition), _ENDS_SECONDS)
        except KafkaException as error:
            why = error.args[0].str()
            raise RetryError(f"The broker does not tell where {_name(partition)} ends: {why}") from error
        return first, end

    # --- rebalance

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = [(p.topic, p.partition) for p in assigned]
        metrics.REBALANCES.labels("assigned").inc()
        _LOG.info("assigned", partitions=_names(partitions))
        self._owned.update(partitions)
        metrics.PARTITIONS.set(len(self._owned))
        self._joined = True
        self._joining.ends()
        try:
            places = self._claim(partitions)
        except RetryError as error:
            self._not_claimed(partitions, error)
            # From where does not matter, the claim will seek; without a place librdkafka would look for one now.
            waiting = [TopicPartition(p.topic, p.partition, OFFSET_BEGINNING) for p in assigned]
            consumer.incremental_assign(waiting)
            consumer.pause(waiting)
            self._unclaimed += partitions
        else:
            consumer.incremental_assign(places)
            self._unsought.update({(p.topic, p.partition): p for p in places if p.leader_epoch is not None})
            # librdkafka still thinks of one as paused that was lost in a pause.
            consumer.resume(places)

    def _claim(self, partitions: Sequence[Partition]) -> list[TopicPartition]:
        if not partitions:
            return []
        try:
            found = self._consumer.committed(self._partitions(partitions), timeout=10.0)
        except KafkaException as error:
            raise RetryError(f"The broker does not tell the committed offsets: {error.args[0].str()}") from error
        committed = {(p.topic, p.partition): p.offset if p.offset >= 0 else None for p in found}
        starts = self._processor.assigned(committed, self._log_ends)
        offsets = {partition: OFFSET_BEGINNING if start is None else start for partition, start in starts.items()}
        self._continuity.starts(offsets)
        # Of another place, or of a topic that was made again, the epoch says nothing.
        epochs = {(p.topic, p.partition): p.leader_epoch for p in found if p.offset == offsets[p.topic, p.partition]}
        return [_place(partition, offset, epochs.get(partition)) for partition, offset in offsets.items()]

    def _claim_again(self) -> None:
        """Claim what could not be claimed when it was assigned, one by one; the others' records are handled meanwhile.

        A frozen owner may hold some partitions and not all; which they are is not known.
        """
        if not self._unclaimed or time.monotonic() < self._claimed_at + _RETRY_SECONDS:
            return
        while self._unclaimed:
            try:
                self._consumer.seek(*self._claim(self._unclaimed[:1]))
            except (RetryError, KafkaException) as error:
                self._not_claimed(self._unclaimed, error)
                self._unclaimed = self._unclaimed[1:] + self._unclaimed[:1]  # the next time another one is first
                break
            self._unclaimed = self._unclaimed[1:]
        else:
            self._claiming.ends()
        if not self._outage.waits:
            self._resume()

    def _not_claimed(self, partitions: Sequence[Partition], error: Exception) -> None:
        self._unclaimed_why = str(error).rstrip(".")
        self._claiming.goes_on(str(error), partitions=_names(partitions))
        metrics.PAUSES.inc()
        self._claimed_at = time.monotonic()

    def _on_revoke(self, _: Consumer, revoked: list[TopicPartition]) -> None:
        if self._left:
            return
        partitions = [(p.topic, p.partition) for p in revoked]
        metrics.REBALANCES.labels("revoked").inc()
        _LOG.info("revoked", partitions=_names(partitions))
        self._commit(wait=True)
        self._give_up(partitions)

    def _on_lost(self, _: Consumer, lost: list[TopicPartition]) -> None:
        if self._left:
            return
        partitions = [(p.topic, p.partition) for p in lost]
        metrics.REBALANCES.labels("lost").inc()
        _LOG.warning("lost", partitions=_names(partitions))
        self._give_up(partitions)

    def _give_up(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._done.pop(partition, None)
            self._unsought.pop(partition, None)
            self._gaps.pop(partition, None)
        self._continuity.leaves(partitions)
        self._owned.difference_update(partitions)
        metrics.PARTITIONS.set(len(self._owned))
        self._unclaimed = [each for each in self._unclaimed if each not in partitions]
        if not self._unclaimed:
            self._claiming.ends()
        if not self._gaps:
            self._passing.ends()
        self._processor.revoked(partitions)

    @staticmethod
    def _partitions(partitions: Iterable[Partition]) -> list[TopicPartition]:
        return [_place(each) for each in partitions]


def _place(partition: Partition, offset: int = OFFSET_INVALID, epoch: int | None = None) -> TopicPartition:
    topic, number = partition
    if epoch is None:
        return TopicPartition(topic, number, offset)
    return TopicPartition(topic, number, offset, leader_epoch=epoch)


def _names(partitions: Sequence[Partition]) -> list[str]:
    return [_name(each) for each in partitions]


def _name(partition: Partition) -> str:
    return f"{partition[0]}[{partition[1]}]"
