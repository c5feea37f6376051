"""Reading scores, for the services that use them: the newest record of every user, and each new one as it comes.

    with ScoreReader("broker:9092", model="recommendations") as reader:
        reader.wait_until_current(timeout=30)
        record = reader.get("user-1")       # or None
        for record in reader:               # every record from here on that is newer than what is known
            ...

Which of two records holds is said in score_view.py.
"""

import logging
import time
from collections import deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition, murmur2

from innerloop.config import KafkaSettings, Settings, TopicSettings
from innerloop.errors import RetryError, ServiceError
from innerloop.score_view import Record, ScoreView, Tombstone
from innerloop.scores import Model
from innerloop.streams import clients
from innerloop.streams.lost_brokers import BrokerCheck
from innerloop.streams.waiting import close

__all__ = ["Record", "ScoreReader", "Tombstone", "newest"]

_LOG = logging.getLogger(__name__)
_BATCH = 1_000
_ANSWER_SECONDS = 10.0
_COMMIT_SECONDS = 1.0
_REASON_SECONDS = 3.0
_STEP_SECONDS = 0.25  # how soon a reader in another thread sees `stop`


class ScoreReader:
    """A reader of one score topic; see the module's text for what holds.

    Without a group it reads every partition from its beginning and keeps the newest record of each user: a view, whole
    after `wait_until_current`. With a group the partitions are shared among the group's readers and each goes on where
    the group stopped: every record is seen at least once, its offset being committed after the loop asked for the next
    one. Leaving the loop leaves the record at hand uncommitted, but this reader goes on behind it: handle errors inside
    the loop, or close the reader and open another. A group's reader knows only what it has itself read since its
    partitions were assigned: for the first record of a user the service's own store must compare `record.order`.

    Partitions added to the topic later are read by a group's readers, by others after a restart. One thread reads;
    `get`, `stop` and the counters may be used from any. Raises ServiceError when no broker answers or the topic does
    not exist.
    """

    def __init__(
        self,
        where: Settings | str,
        model: Model = "recommendations",
        *,
        group: str | None = None,
        topic: str | None = None,
        user_id: str | None = None,
        partitions: Collection[int] | None = None,
        tombstones: bool = False,
    ) -> None:
        """`where` is settings or bootstrap servers; `topic` overrides the settings' or default name.

        `user_id` keeps and yields this user only; `partitions` reads these only (not with a group); `tombstones` makes
        iteration yield a Tombstone for each user who was erased.
        """
        if group is not None and partitions is not None:
            raise ValueError("a group decides on the partitions: give one or the other")
        self._kafka = KafkaSettings(bootstrap_servers=where) if isinstance(where, str) else where.kafka
        names = TopicSettings() if isinstance(where, str) else where.topics
        self.topic = topic or (names.recommendations if model == "recommendations" else names.ads)
        self._model, self._user_id, self._tombstones = model, user_id, tombstones
        self._views: dict[int, ScoreView] = {}  # by partition, so that a revoked one takes its users along
        self._retired = [0, 0]  # counters of revoked partitions
        self._group = group
        self._pending: deque[Message] = deque()  # read from Kafka, not yet looked at
        self._next: dict[int, int] = {}  # by partition: the offset after the last record read
        self._handled: dict[int, int] = {}  # by partition: the offset to commit
        self._committed_at = time.monotonic()
        self._stopped = False
        self._wanted, self._brokers = partitions, BrokerCheck(self._kafka, self.topic)
        self._consumer: Consumer | None = self._opened()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Commit what was handled (with a group) and leave; may be called twice."""
        self.stop()
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            self._commit(consumer, asynchronous=False)
            consumer.close()

    def stop(self) -> None:
        """End iteration, from any thread or signal handler, within a quarter of a second."""
        self._stopped = True

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def users(self) -> list[str]:
        """Every user with a record, in no order."""
        return [user for view in self._all() for user in view.users()]

    def get(self, user_id: str) -> Record | None:
        """The user's newest record among what was read so far."""
        found = [record for view in self._all() if (record := view.get(user_id))]
        # More than one only when the topic's partitions were increased: then the same rule decides.
        return max(found, key=lambda record: (*record.order, record.scored_at), default=None)

    def get_before(self, user_id: str) -> Record | None:
        """The record that the user's newest one replaced, if it was read; only where one `user_id` was asked for."""
        found = [record for view in self._all() if (record := view.get_before(user_id))]
        return max(found, key=lambda record: (*record.order, record.scored_at), default=None)

    @property
    def stale_dropped(self) -> int:
        """Records that were older than what was known, or the same again."""
        return self._retired[0] + sum(view.stale_dropped for view in self._all())

    @property
    def undecodable(self) -> int:
        """Records that are not score records of this model, skipped."""
        return self._retired[1] + sum(view.undecodable for view in self._all())

    def __iter__(self) -> Iterator[Record]:
        """Each record that advances its user, until `stop`; tombstones too where they were asked for."""
        return self.records()

    def records(self, idle_seconds: float | None = None) -> Iterator[Record]:
        """As iteration, but ends after `idle_seconds` without a record."""
        last = time.monotonic()
        wait = _STEP_SECONDS if idle_seconds is None else min(_STEP_SECONDS, idle_seconds)
        while not self._stopped:
            self._fetch(wait)
            last = time.monotonic() if self._pending else last
            while self._pending and not self._stopped:
                message = self._pending.popleft()
                change = self._apply(message)
                if isinstance(change, Record) or (change is not None and self._tombstones):
                    yield change  # type: ignore[misc] # a Tombstone only for those who asked
                self._done(message)
            self._commit_sometimes()
            if idle_seconds is not None and time.monotonic() - last >= idle_seconds:
                return

    def refresh(self, timeout: float = 0.0) -> int:
        """Take in what has come, waiting up to `timeout` seconds for the first of it; the number of users changed.

        On a topic that is written faster than this reads it ends with `stop` alone.
        """
        return self._refresh(timeout, float("inf"))

    def _refresh(self, timeout: float, deadline: float) -> int:
        changed: set[str] = set()
        self._fetch(timeout)
        while self._pending and not self._stopped and time.monotonic() < deadline:
            while self._pending:
                message = self._pending.popleft()
                if (change := self._apply(message)) is not None:
                    changed.add(change.user_id)
                self._done(message)
            self._fetch(0.0)
        self._commit_sometimes()
        return len(changed)

    def wait_until_current(self, timeout: float = 60.0) -> None:
        """Read up to what the topic held when this was called; not with a group.

        Raises RetryError when that takes longer than `timeout` seconds.
        """
        if self._group is not None:
            raise ValueError("a group's reader never has the whole topic: read without a group")
        deadline = time.monotonic() + timeout
        consumer = self._open()
        ends = {number: _bounds(consumer, self.topic, number, deadline - time.monotonic())[1] for number in self._next}
        while behind := [number for number, end in ends.items() if self._next.get(number, 0) < end]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RetryError(
                    f"{self.topic} is not read to its end after {timeout} s: partitions {behind} are left."
                )
            self._refresh(min(left, _STEP_SECONDS), deadline)

    def _opened(self) -> Consumer:
        consumer = clients.consumer(
            self._kafka,
            self._group or "innerloop-reader",  # without a group it is a name only: nothing is joined or committed
            enable_partition_eof=True,
        )
        try:
            count = _partition_count(consumer, self._kafka, self.topic)
            if self._group is None:
                self._assign(consumer, count, range(count) if self._wanted is None else self._wanted)
            else:
                consumer.subscribe([self.topic], on_revoke=self._revoked, on_lost=self._lost)
        except BaseException:
            consumer.close()
            raise
        return consumer

    def _assign(self, consumer: Consumer, count: int, numbers: Collection[int]) -> None:
        if strange := [number for number in numbers if not 0 <= number < count]:
            raise ServiceError(f"{self.topic} has {count} partitions, none of which is {strange[0]}.")
        try:
            # Asked for before: an assignment to a partition whose leader is not yet known waits for half a second.
            self._next = {number: _bounds(consumer, self.topic, number, _ANSWER_SECONDS)[0] for number in numbers}
        except RetryError as error:
            raise ServiceError(str(error)) from None
        consumer.assign([TopicPartition(self.topic, number, start) for number, start in self._next.items()])

    def _open(self) -> Consumer:
        if self._consumer is None:
            raise ValueError("the reader is closed")
        return self._consumer

    def _all(self) -> list[ScoreView]:
        return list(self._views.values())

    def _fetch(self, timeout: float) -> None:
        """Have something pending, waiting for the first record only: `consume` would wait for the whole batch."""
        consumer = self._open()
        if self._pending:
            return
        first = consumer.poll(timeout)
        if first is not None:
            self._brokers.heard()
        elif self._brokers.lost(consumer):
            self._reopen(consumer)
            return
        if first is not None and self._is_record(first):
            self._pending.append(first)  # before `consume`, in which its partition may be revoked
        if first is not None:
            self._pending.extend(each for each in consumer.consume(_BATCH, 0.0) if self._is_record(each))

    def _reopen(self, lost: Consumer) -> None:
        """Begin again with another consumer; what is known already changes nobody."""
        try:
            self._consumer = self._opened()
        except ServiceError:
            return  # away again; asked again in five seconds
        _LOG.warning("reading %s anew: its consumer had lost every broker of a cluster that is there", self.topic)
        self._handled.clear()  # a group's next member sees these again
        close(lost)

    def _is_record(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own name
            self._advance(message)
        elif clients.is_fatal(error) or error.code() in clients.HOPELESS:
            raise ServiceError(f"{self.topic} cannot be read: {error.str()}.")
        else:
            _LOG.warning("reading %s: %s; trying again", self.topic, error.str())
        return False

    def _advance(self, message: Message) -> None:
        """The end of a partition may lie behind records that compaction removed: its offset is where we are."""
        number, offset = message.partition(), message.offset()
        if number is not None and offset is not None:
            self._next[number] = max(offset, self._next.get(number, 0))

    def _apply(self, message: Message) -> Record | Tombstone | None:
        number = message.partition() or 0
        if number not in self._views:
            self._views[number] = ScoreView(self._model, user_id=self._user_id)
        return self._views[number].apply(message.key(), message.value())

    def _done(self, message: Message) -> None:
        number = message.partition() or 0
        self._next[number] = self._handled[number] = (message.offset() or 0) + 1

    def _commit_sometimes(self) -> None:
        if time.monotonic() - self._committed_at >= _COMMIT_SECONDS:
            self._commit(self._open(), asynchronous=True)

    def _commit(self, consumer: Consumer, *, asynchronous: bool, of: Collection[int] | None = None) -> None:
        self._committed_at = time.monotonic()
        numbers = [number for number in self._handled if of is None or number in of]
        offsets = [TopicPartition(self.topic, number, self._handled.pop(number)) for number in numbers]
        if self._group is None or not offsets:
            return
        try:
            if asynchronous:
                consumer.commit(offsets=offsets, asynchronous=True)
            else:
                consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:  # the group has moved on: its next reader sees these records again
            _LOG.warning("offsets of %s are not committed: %s", self.topic, error.args[0].str())

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._commit(consumer, asynchronous=False, of=[each.partition for each in partitions])
        self._drop(partitions)

    def _lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._drop(partitions)

    def _drop(self, partitions: list[TopicPartition]) -> None:
        gone = {each.partition for each in partitions}
        self._pending = deque(each for each in self._pending if each.partition() not in gone)
        for each in partitions:
            self._handled.pop(each.partition, None)
            self._next.pop(each.partition, None)
            view = self._views.pop(each.partition, None)
            if view is not None:
                self._retired[0] += view.stale_dropped
                self._retired[1] += view.undecodable


def newest(where: Settings | str, model: Model, user_id: str, timeout: float = 30.0) -> Record | None:
    """Find one user's newest scores, or None; raises as `newest_two` does."""
    return newest_two(where, model, user_id, timeout)[0]


def newest_two(
    where: Settings | str, model: Model, user_id: str, timeout: float = 30.0
) -> tuple[Record | None, Record | None]:
    """Find one user's newest scores and those before them, which compaction may have removed.

    Reads the user's partition, and the others only where that one has nothing, which is so after the topic's partitions
    were increased. Raises ServiceError when no broker answers or the topic does not exist, RetryError when reading
    takes longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    kafka = KafkaSettings(bootstrap_servers=where) if isinstance(where, str) else where.kafka
    names = TopicSettings() if isinstance(where, str) else where.topics
    with clients.consumer(kafka, "innerloop-reader") as consumer:
        count = _partition_count(consumer, kafka, names.recommendations if model == "recommendations" else names.ads)
    own = murmur2(user_id.encode(), count)
    for partitions in ({own}, set(range(count)) - {own}):
        with ScoreReader(where, model, user_id=user_id, partitions=partitions) as reader:
            reader.wait_until_current(deadline - time.monotonic())
            if record := reader.get(user_id):
                return record, reader.get_before(user_id)
    return None, None


def _partition_count(consumer: Consumer, kafka: KafkaSettings, topic: str) -> int:
    """How many partitions the topic has."""
    try:
        partitions = consumer.list_topics(topic, timeout=_ANSWER_SECONDS).topics[topic].partitions
    except KafkaException as error:
        clients.require_broker(kafka, _REASON_SECONDS)  # a refusal has a sentence of its own
        raise ServiceError(
            f"No Kafka broker answers at {kafka.bootstrap_servers} ({error.args[0].str()}): "
            "start it, or correct the address."
        ) from None
    if not partitions:
        raise ServiceError(f"Topic {topic} does not exist: run `innerloop topics`.")
    return len(partitions)


def _bounds(consumer: Consumer, topic: str, number: int, seconds: float) -> tuple[int, int]:
    """First offset and end of a partition; waits up to `seconds` for it to have a leader, then raises RetryError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return consumer.get_watermark_offsets(TopicPartition(topic, number), max(0.1, deadline - time.monotonic()))
        except KafkaException as error:
            if time.monotonic() >= deadline:
                why = error.args[0].str().rstrip(".")
                raise RetryError(f"Kafka does not say where {topic} [{number}] ends: {why}.") from None
            time.sleep(0.05)
