"""The consumer loop: polls, hands batches to a processor, commits offsets behind it, and survives outages.

What it promises is said with what it drives (`processor`). Each promise has its keeper: where reading starts `claims`,
that nothing is passed over `continuity`, what the log no longer holds `gaps`, what is done `commits`.
"""

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from innerloop import metrics
from innerloop.config import KafkaSettings
from innerloop.errors import RetryError, ServiceError, StopError
from innerloop.streams import clients
from innerloop.streams.batch import Batch
from innerloop.streams.claims import Claims
from innerloop.streams.commits import Commits
from innerloop.streams.continuity import Continuity
from innerloop.streams.gaps import Gaps, assign_anew
from innerloop.streams.lost_brokers import WHY, BrokerCheck
from innerloop.streams.partitions import Partition, names, of_place, place, places
from innerloop.streams.processor import Processor
from innerloop.streams.waiting import RETRY_SECONDS, Waiting, close

P = ParamSpec("P")
_LOG = structlog.get_logger(__name__)
_IDLE_SECONDS = 0.1
_JOIN_SECONDS = 20.0
_NOT_JOINED = (
    "the broker has given it no partitions yet: is it there, does this user have READ on the group and its topics, "
    "and, with kafka.group_protocol consumer, is it Kafka 4.0 or newer?"
)


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
        self._claims = Claims(processor, self._continuity)
        self._commits = Commits()
        self._gaps = Gaps(processor, accept=accept_gap)
        self._outage = Waiting("paused")
        self._joining = Waiting("not in its group", patience=_JOIN_SECONDS)
        self._left = False
        self.turned_at = time.monotonic()
        """When it last turned: what probes judge it by. Waiting for an outage is turning."""
        self._joined = False

    @property
    def joined(self) -> bool:
        """Whether the group has given it its partitions, none included, and all of them are claimed."""
        return self._joined and not self._claims.waiting

    @property
    def unclaimed(self) -> str | None:
        """Which partitions of this process it cannot claim yet, and why; safe to read from another thread."""
        return self._claims.why

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
                self._claims.compare(self._consumer)
                batch = self._poll()
                if len(batch):
                    self._brokers.heard()
                    self._persist(batch)
                elif self._brokers.lost(self._consumer):
                    self._renew()
                self._commits.commit(self._consumer)
                self._idle()
        finally:
            try:
                self._consumer.pause(places(self._owned))
                self._commits.last(self._consumer)
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
        self._commits.forget_answers()
        self._joined = False
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
            self._read_from(place(partition, offset))
        return batch.before(again) if again else batch

    def _is_claimed(self, partition: Partition) -> bool:
        return partition in self._owned and self._claims.settled(partition)

    def _is_error(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - the library's constants are named so
            partition = (message.topic() or "", message.partition() or 0)
            if partition in self._owned:
                self._gaps.found(partition, message.offset(), error.str())
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
                self._commits.done(batch)
                break
        self._recovered()

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
        self._consumer.pause(places(self._owned))
        until = time.monotonic() + RETRY_SECONDS
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
        where = TopicPartition(message.topic() or "", message.partition() or 0, message.offset() or 0)
        if of_place(where) in self._owned and not self._read_from(where):
            self._consumer.pause([where])

    def _read_from(self, where: TopicPartition) -> bool:
        """Go on there; whether it could be sought, and not only assigned anew, which ends a pause."""
        try:
            self._consumer.seek(where)
        except KafkaException:  # fetching has not begun or has ended
            assign_anew(self._consumer, where)
            return False
        return True

    def _resume(self) -> None:
        self._continuity.resumes()
        self._consumer.resume(places(self._owned.difference(self._claims.waiting)))

    def _idle(self) -> None:
        try:
            self._processor.idle()
        except RetryError as error:
            self._away(error)
            self._wait()
        else:
            self._recovered()

    # --- partitions

    def _pass_gaps(self) -> None:
        for partition, start in self._gaps.passed(self._consumer):
            self._continuity.starts({partition: start})
            self._claims.passed(partition)
            self._commits.passed(partition, start)

    def _claim_again(self) -> None:
        if self._claims.again(self._consumer) and not self._outage.waits:
            self._resume()

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = [of_place(each) for each in assigned]
        metrics.REBALANCES.labels("assigned").inc()
        _LOG.info("assigned", partitions=names(partitions))
        self._owned.update(partitions)
        metrics.PARTITIONS.set(len(self._owned))
        self._joined = True
        self._joining.ends()
        self._claims.assign(consumer, assigned)

    def _on_revoke(self, _: Consumer, revoked: list[TopicPartition]) -> None:
        if self._left:
            return
        partitions = [of_place(each) for each in revoked]
        metrics.REBALANCES.labels("revoked").inc()
        _LOG.info("revoked", partitions=names(partitions))
        self._commits.commit(self._consumer, wait=True)
        self._give_up(partitions)

    def _on_lost(self, _: Consumer, lost: list[TopicPartition]) -> None:
        if self._left:
            return
        partitions = [of_place(each) for each in lost]
        metrics.REBALANCES.labels("lost").inc()
        _LOG.warning("lost", partitions=names(partitions))
        self._give_up(partitions)

    def _on_commit(self, error: KafkaError | None, committed: list[TopicPartition]) -> None:
        if not self._left:
            self._commits.answered(error, committed)

    def _give_up(self, partitions: Sequence[Partition]) -> None:
        for keeper in (self._commits, self._gaps, self._continuity, self._claims):
            keeper.leaves(partitions)
        self._owned.difference_update(partitions)
        metrics.PARTITIONS.set(len(self._owned))
        self._processor.revoked(partitions)
