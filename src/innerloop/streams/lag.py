"""How far a consumer group is behind, in records and in seconds, as any tool outside sees it: by committed offsets."""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.scores import AdaptationRequest
from innerloop.streams import clients
from innerloop.streams.lost_brokers import BrokerCheck, has_lost_brokers
from innerloop.streams.partitions import Partition, of_place
from innerloop.streams.topics import partition_counts
from innerloop.streams.waiting import close

_ANSWER_SECONDS = 10.0
_COUNTS_SECONDS = 30.0  # as long as clients take to see new partitions
_READ_SECONDS = 2.0
_LEAST_SECONDS = 0.001  # of a record that waits, also by a clock that runs ahead: 0 says that none does
_UNTYPED: Any = OffsetSpec  # the stubs leave its constructors untyped
_EARLIEST, _LATEST = _UNTYPED.earliest(), _UNTYPED.latest()
_MOVING = frozenset(
    {
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    }
)


class PartitionLag(msgspec.Struct, frozen=True):
    """One partition's lag.

    `committed` is the group's offset, None before its first commit; `end` the log's end; `offsets` how many offsets
    are not yet committed; `seconds` how long the oldest record among them has waited: since it was written, an
    adaptation request since the event behind it was. 0.0 exactly when no record waits: also where offsets are left that
    only marks of transactions have. None when it is not known: not read in time, in a transaction that is still open,
    or without a time of its own.
    """

    group: str
    topic: str
    partition: int
    committed: int | None
    end: int
    offsets: int
    seconds: float | None


def group_lag(settings: Settings, group: str, topics: Iterable[str]) -> list[PartitionLag]:
    """Give the lag once; raises ServiceError when no broker answers or a topic does not exist."""
    with LagReader(settings) as reader:
        return reader.read(group, topics)


class LagReader:
    """Reads lag again and again, over open connections: about a millisecond a time where nothing lags."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._brokers = settings, BrokerCheck(settings.kafka, settings.topics.requests)
        self.admin: AdminClient = clients.admin(settings.kafka)
        """For who asks the broker more."""
        self._counts: dict[str, int] = {}
        self._counted_at = float("-inf")
        self._since: dict[Partition, tuple[int, float | None]] = {}  # offset asked for, since when it waits (epoch s)
        self._decode = msgspec.json.Decoder(AdaptationRequest).decode
        self._of_groups: dict[str, Consumer] = {}
        self._consumer = self._new_consumer()

    def _new_consumer(self) -> Consumer:
        return clients.consumer(
            self._settings.kafka,
            "innerloop-lag",  # a name only: it neither joins nor commits
            enable_partition_eof=True,
            queued_min_messages=1,  # one record of each partition is wanted, not the log
            queued_max_messages_kbytes=1_024,
            fetch_message_max_bytes=65_536,
            fetch_wait_max_ms=10,
            fetch_queue_backoff_ms=10,  # else a full queue delays the next question by a second
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for consumer in (self._consumer, *self._of_groups.values()):
            close(consumer)

    def _renew_what_is_lost(self) -> None:
        """Other clients for those that can do nothing any more."""
        kafka, topic = self._settings.kafka, self._settings.topics.requests
        if has_lost_brokers(self.admin, kafka, topic):
            self.admin = clients.admin(kafka)
        if has_lost_brokers(self._consumer, kafka, topic):
            close(self._consumer)
            self._consumer = self._new_consumer()
        for group in [group for group, each in self._of_groups.items() if has_lost_brokers(each, kafka, topic)]:
            close(self._of_groups.pop(group))

    def read(self, group: str, topics: Iterable[str]) -> list[PartitionLag]:
        """Give the lag of `group` over every partition of `topics`, in order.

        A partition without a committed offset counts from the log's start, and so does one whose committed offset the
        broker has deleted since. Raises ServiceError when no broker answers or a topic does not exist.
        """
        partitions = self._partitions(list(topics))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            try:
                return self._read(group, partitions)
            except KafkaException as error:  # a leader or coordinator is moving
                if error.args[0].code() not in _MOVING or time.monotonic() > deadline:
                    self._renew_what_is_lost()
                    raise self._unanswered(error.args[0].str()) from None
                time.sleep(0.05)
            except TimeoutError:
                self._renew_what_is_lost()
                raise self._unanswered("no answer in time") from None

    def _read(self, group: str, partitions: list[Partition]) -> list[PartitionLag]:
        # Asked for at once. The end is asked for with the others, so a lag may be a few records old.
        starting = self._watermarks(partitions, _EARLIEST)
        ending = self._watermarks(partitions, _LATEST)
        wanted = [TopicPartition(*each) for each in partitions]
        answer = self._of_group(group).committed(wanted, timeout=_ANSWER_SECONDS)
        committed = {of_place(each): each.offset for each in answer}
        starts = {each: _answer(future).offset for each, future in starting.items()}
        ends = {each: _answer(future).offset for each, future in ending.items()}
        next_ = {each: min(max(committed[each], starts[each]), ends[each]) for each in partitions}
        seconds = self._ages({each: next_[each] for each in partitions if next_[each] < ends[each]}, ends)
        return [
            PartitionLag(
                group=group,
                topic=each[0],
                partition=each[1],
                committed=committed[each] if committed[each] >= 0 else None,
                end=ends[each],
                offsets=ends[each] - next_[each],
                seconds=seconds.get(each, 0.0),
            )
            for each in partitions
        ]

    def _of_group(self, group: str) -> Consumer:
        """A consumer that is asked what its group has committed; it never joins.

        librdkafka 2.16 crashes the process when an admin client asks that while the coordinator starts or moves: only a
        consumer has what the answer is handed to.
        """
        if group not in self._of_groups:
            asks_only = {"group_protocol": "classic"}  # of either protocol, since it is no member
            self._of_groups[group] = clients.consumer(self._settings.kafka.model_copy(update=asks_only), group)
        return self._of_groups[group]

    def _partitions(self, topics: list[str]) -> list[Partition]:
        stale = time.monotonic() - self._counted_at > _COUNTS_SECONDS
        if stale or any(topic not in self._counts for topic in topics):
            self._counts |= partition_counts(self._settings, topics)
            self._counted_at = time.monotonic()
        return [(topic, number) for topic in topics for number in range(self._counts[topic])]

    def _watermarks(self, partitions: list[Partition], which: Any) -> "dict[Partition, Future[Any]]":
        asked = {TopicPartition(*each): which for each in partitions}
        answers = self.admin.list_offsets(asked, request_timeout=_ANSWER_SECONDS)
        return {of_place(each): future for each, future in answers.items()}

    def _unanswered(self, why: str) -> ServiceError:
        where = self._settings.kafka.bootstrap_servers
        return ServiceError(f"Kafka at {where} does not tell the lag: {why.rstrip('.')}.")

    def _ages(self, lagging: dict[Partition, int], ends: dict[Partition, int]) -> dict[Partition, float | None]:
        """How long the record at each offset has waited, in seconds: 0 where there is none, None if not known."""
        unknown = {each: offset for each, offset in lagging.items() if self._since.get(each, (-1, None))[0] != offset}
        nothing = self._look_up(unknown, ends) if unknown else set()
        now = time.time()
        ages: dict[Partition, float | None] = dict.fromkeys(nothing, 0.0)
        for each in lagging.keys() - nothing:
            offset, since = self._since.get(each, (-1, None))
            ages[each] = max(_LEAST_SECONDS, now - since) if offset == lagging[each] and since is not None else None
        return ages

    def _look_up(self, offsets: dict[Partition, int], ends: dict[Partition, int]) -> set[Partition]:
        """Read the record at each offset; the partitions without one.

        There what is left are marks of transactions, which nobody has to handle. The next record may come at any time,
        so that is looked up anew each time; and so is a transaction that is still open, which hides the end.
        """
        waiting, nothing = dict(offsets), set()
        self._consumer.assign([TopicPartition(*each, offset) for each, offset in offsets.items()])
        deadline = time.monotonic() + _READ_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            message = self._consumer.poll(left)
            if message is None:
                break
            each = (message.topic() or "", message.partition() or 0)
            error = message.error()
            if each not in waiting or (error is not None and error.code() != KafkaError._PARTITION_EOF):  # noqa: SLF001
                continue
            offset = waiting.pop(each)
            if error is None:
                self._since[each] = (offset, self._waits_since(message))
            elif (message.offset() or 0) >= ends[each]:
                nothing.add(each)
        self._consumer.unassign()
        if waiting.keys() != offsets.keys():
            self._brokers.heard()
        elif waiting and self._brokers.lost(self._consumer):
            self._renew_what_is_lost()
        return nothing

    def _waits_since(self, message: Message) -> float | None:
        """When it was written (epoch s), a request when the event behind it was; None where nothing tells."""
        since = message.timestamp()[1]
        if message.topic() == self._settings.topics.requests:
            with suppress(msgspec.MsgspecError):
                since = self._decode(message.value() or b"").appended_at or since
        return since / 1000 if since > 0 else None


def _answer(future: "Future[Any]") -> Any:
    return future.result(timeout=_ANSWER_SECONDS + 1.0)
