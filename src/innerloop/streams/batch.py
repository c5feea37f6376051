"""What one poll brought, by column: the processors work on lists, not on messages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import methodcaller

import msgspec
from confluent_kafka import Message

from innerloop.streams.partitions import Partition
from innerloop.tracing import newest_parents

RecordHeaders = tuple[tuple[str, bytes | None], ...]
UNREADABLE = "innerloop.original.headers.unreadable"
"""Stands for the headers of a record that can't be read."""
# Not called as a method: where that has become quick, Python 3.11 looks for no pending error.
_headers = methodcaller("headers")


class Record(msgspec.Struct, frozen=True):
    """One record with everything a dead letter repeats."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: RecordHeaders


def headers_of(message: Message) -> RecordHeaders:
    """A message's headers; `UNREADABLE` alone where one has a name that is no UTF-8.

    On such a name confluent-kafka gives a list with holes and an error that is pending: whoever looks into that list
    ends the process.
    """
    try:
        headers = _headers(message) or ()
    except SystemError:
        headers = [(UNREADABLE, b"")]
        message.set_headers(headers)
    return tuple([(str(pair[0]), pair[1] if isinstance(pair[1], bytes) else None) for pair in headers])


def record_of(message: Message) -> Record:
    """What a message that is no error brought."""
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        timestamp_ms=int(message.timestamp()[1]),
        key=message.key(),
        value=message.value(),
        headers=headers_of(message),
    )


class Batch:
    """Messages of one poll, in offset order within each partition, none of them an error."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages

    def __len__(self) -> int:
        return len(self._messages)

    @cached_property
    def values(self) -> list[bytes | None]:
        return [message.value() for message in self._messages]

    @cached_property
    def offsets(self) -> list[int]:
        return [message.offset() or 0 for message in self._messages]

    @cached_property
    def _topics(self) -> list[str]:
        return [message.topic() or "" for message in self._messages]

    @cached_property
    def _numbers(self) -> list[int]:
        return [message.partition() or 0 for message in self._messages]

    @property
    def partitions(self) -> list[Partition]:
        return list(zip(self._topics, self._numbers, strict=True))

    @cached_property
    def next_offsets(self) -> dict[Partition, int]:
        """By partition, the offset after the last record here."""
        return {partition: self.offsets[position] + 1 for partition, position in self._last_positions.items()}

    @property
    def leader_epochs(self) -> dict[Partition, int]:
        """By partition, the epoch of the leader that took the last record here, where the broker tells it (KIP-320)."""
        epochs = {
            partition: self._messages[position].leader_epoch() for partition, position in self._last_positions.items()
        }
        return {partition: epoch for partition, epoch in epochs.items() if epoch is not None}

    @cached_property
    def _last_positions(self) -> dict[Partition, int]:
        return self._last(self._topics, self._numbers, range(len(self)))

    @cached_property
    def _first_positions(self) -> dict[Partition, int]:
        return self._last(self._topics[::-1], self._numbers[::-1], range(len(self) - 1, -1, -1))

    @cached_property
    def first_offsets(self) -> dict[Partition, int]:
        return {partition: self.offsets[position] for partition, position in self._first_positions.items()}

    @property
    def appended_ms(self) -> int:
        """When the oldest of these records was put on its topic, as far as the first of each partition tell."""
        return min(map(self.timestamp_ms, self._first_positions.values()))

    @staticmethod
    def _last(topics: list[str], numbers: list[int], positions: Iterable[int]) -> dict[Partition, int]:
        """By partition the last of its positions: the later of equal keys wins in a dict."""
        return dict(zip(zip(topics, numbers, strict=True), positions, strict=True))

    def timestamp_ms(self, position: int) -> int:
        """When the record was produced, by the broker's or producer's clock."""
        return int(self._messages[position].timestamp()[1])

    def record(self, position: int) -> Record:
        return record_of(self._messages[position])

    def trace_parents(self) -> dict[str, str]:
        """By key, the newest W3C trace context that its records carry."""
        return newest_parents((message.key(), headers_of(message)) for message in self._messages)

    def keeping(self, wanted: Callable[[Partition], bool]) -> "Batch":
        """The records of the partitions that are wanted; itself when that is all of them."""
        if all(map(wanted, self.next_offsets)):
            return self
        pairs = zip(self._messages, self.partitions, strict=True)
        return Batch([message for message, partition in pairs if wanted(partition)])

    def before(self, ends: Mapping[Partition, int]) -> "Batch":
        """Of the partitions that `ends` names, only the records below that offset."""
        triples = zip(self._messages, self.partitions, self.offsets, strict=True)
        return Batch([message for message, of, offset in triples if of not in ends or offset < ends[of]])
