"""What one poll brought, by column: the processors work on lists, not on messages."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import msgspec
from confluent_kafka import Message

from innerloop.tracing import newest_parents

Partition = tuple[str, int]
"""(topic, partition)"""


class Record(msgspec.Struct, frozen=True):
    """One record with everything a dead letter repeats."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


def record_of(message: Message) -> Record:
    """What a message that is no error brought."""
    headers = message.headers() or ()
    pairs = tuple([(str(pair[0]), pair[1] if isinstance(pair[1], bytes) else None) for pair in headers])
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        timestamp_ms=int(message.timestamp()[1]),
        key=message.key(),
        value=message.value(),
        headers=pairs,
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
        """By partition, the offset after the last record here: the later of equal keys wins in a dict."""
        return {partition: last + 1 for partition, last in self._last(self._topics, self._numbers, self.offsets)}

    @cached_property
    def _first_positions(self) -> dict[Partition, int]:
        backwards = range(len(self) - 1, -1, -1)
        return dict(self._last(self._topics[::-1], self._numbers[::-1], backwards))

    @property
    def first_offsets(self) -> dict[Partition, int]:
        return {partition: self.offsets[position] for partition, position in self._first_positions.items()}

    @property
    def appended_ms(self) -> int:
        """When the oldest of these records was put on its topic, as far as the first of each partition tell."""
        return min(map(self.timestamp_ms, self._first_positions.values()))

    @staticmethod
    def _last(topics: list[str], numbers: list[int], values: Sequence[int]) -> Iterable[tuple[Partition, int]]:
        return dict(zip(zip(topics, numbers, strict=True), values, strict=True)).items()

    def timestamp_ms(self, position: int) -> int:
        """When the record was produced, by the broker's or producer's clock."""
        return int(self._messages[position].timestamp()[1])

    def record(self, position: int) -> Record:
        return record_of(self._messages[position])

    def trace_parents(self) -> dict[str, str]:
        """By key, the newest W3C trace context that its records carry."""
        return newest_parents((message.key(), record_of(message).headers) for message in self._messages)

    def keeping(self, wanted: Callable[[Partition], bool]) -> "Batch":
        """The records of the partitions that are wanted; itself when that is all of them."""
        if all(map(wanted, self.next_offsets)):
            return self
        pairs = zip(self._messages, self.partitions, strict=True)
        return Batch([message for message, partition in pairs if wanted(partition)])
