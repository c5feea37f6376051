"""Reading the dead-letter topic, and sending what it holds back to where it came from.

What was replayed is marked on the dead-letter topic itself, by a record without a key whose header `MARKER` says so and
whose value names partitions and offsets of that topic (JSON). That needs no database, and lives as long as what it
marks. A marker is sent when the records that it names are acknowledged: killed between the two, the next replay sends
them once more, which is harmless, because ingest knows an event by its id.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams import clients
from innerloop.streams.batch import UNREADABLE, Record, headers_of, record_of
from innerloop.streams.dead_letters import DeadLetter, read_dead_letter
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import partition_counts

MARKER = "innerloop.replayed"
Place = tuple[int, int]
"""(partition, offset) on the dead-letter topic."""

_GROUP = "innerloop-dlq"  # a name only: it neither joins nor commits
_READ_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_FLUSH_SECONDS = 60.0
_LETTERS_AT_ONCE = 1_000
_BYTES_AT_ONCE = 32_000_000
_LARGEST_MESSAGE = 1_000_000_000  # librdkafka's own bound: the broker decides
_decode_marker = msgspec.json.Decoder(dict[int, list[int]]).decode


class DeadLetterQueue:
    """The dead-letter topic as it is now: what is added later is not seen. Raises ServiceError."""

    def __init__(self, settings: Settings) -> None:
        self.topic = settings.topics.dead_letters
        self._settings = settings
        count = partition_counts(settings, [self.topic])[self.topic]
        with self._consumer() as consumer:
            self._bounds = {number: _bounds(consumer, self.topic, number) for number in range(count)}
        self.replayed = self._replayed()
        """Where the letters are that were replayed before."""

    def letters(self) -> Iterator[DeadLetter]:
        """Every dead letter, oldest first within each partition; records that others wrote are left out."""
        for message in self._messages():
            letter = read_dead_letter(message)
            if letter is not None:
                yield letter

    def _replayed(self) -> set[Place]:
        found: set[Place] = set()
        for message in self._messages():
            if message.key() is None and [name for name, _ in headers_of(message)] == [MARKER]:
                found |= _marked(message)
        return found

    def _messages(self) -> Iterator[Message]:
        """Everything between the bounds. Raises ServiceError when the broker falls silent."""
        ends = {number: end for number, (start, end) in self._bounds.items() if start < end}
        with self._consumer() as consumer:
            consumer.assign([TopicPartition(self.topic, number, self._bounds[number][0]) for number in ends])
            heard = time.monotonic()
            while ends:
                first = consumer.poll(0.5)  # `consume` alone would wait for as many as it may bring
                for message in [] if first is None else [first, *consumer.consume(_LETTERS_AT_ONCE, 0.0)]:
                    heard = time.monotonic()
                    number, offset = message.partition() or 0, message.offset() or 0
                    if number in ends and offset < ends[number] and not _is_end(message, self.topic):
                        yield message
                    if number in ends and offset + 1 >= ends[number]:
                        del ends[number]
                if time.monotonic() - heard > _READ_SECONDS:
                    raise ServiceError(f"{self.topic} cannot be read: no answer for {_READ_SECONDS:.0f} s.")

    def _consumer(self) -> Consumer:
        return clients.consumer(self._settings.kafka, _GROUP, enable_partition_eof=True)


@dataclass
class Replay:
    """What a replay did, or with `dry_run` would have done."""

    sent: Counter[str] = field(default_factory=Counter)
    """By the topic that they went back to."""
    earlier: int = 0
    """Letters that were asked for and had been replayed before."""
    gone: list[DeadLetter] = field(default_factory=list)
    """Cut ones that are no longer where they came from."""
    elsewhere: Counter[str] = field(default_factory=Counter)
    """By topic: of topics that ingest doesn't read under these settings."""


class Replayer:
    """Sends dead letters back as they came: bytes, key and headers, to the partition they came from."""

    def __init__(self, settings: Settings, *, dry_run: bool = False) -> None:
        self._settings, self._dry_run = settings, dry_run
        self._queue = DeadLetterQueue(settings)
        self._counts = partition_counts(settings, settings.topics.ingested)
        self._publisher = Publisher(settings.kafka, message_max_bytes=_LARGEST_MESSAGE)
        self._unmarked: list[Place] = []
        self._bytes = 0

    def run(self, wanted: Callable[[DeadLetter], bool]) -> Replay:
        """Replay those that are wanted. Raises ServiceError or RetryError; what was marked until then stays so."""
        done = Replay()
        with clients.consumer(self._settings.kafka, _GROUP, enable_partition_eof=True) as originals:
            for letter in filter(wanted, self._queue.letters()):
                if letter.place in self._queue.replayed:
                    done.earlier += 1
                elif letter.record.topic not in self._counts:
                    done.elsewhere[letter.record.topic] += 1
                elif (record := _whole(originals, letter)) is None:
                    done.gone.append(letter)
                else:
                    done.sent[record.topic] += 1
                    self._send(record, letter.place)
        self._mark()
        return done

    def _send(self, record: Record, place: Place) -> None:
        if self._dry_run:
            return
        # The partition it came from, so that a key's records stay together however their writer chose it.
        partition = record.partition if record.partition < self._counts[record.topic] else -1
        self._publisher.send(record.topic, record.key, record.value, headers=list(record.headers), partition=partition)
        self._unmarked.append(place)
        self._bytes += len(record.value or b"")
        if len(self._unmarked) >= _LETTERS_AT_ONCE or self._bytes >= _BYTES_AT_ONCE:
            self._mark()

    def _mark(self) -> None:
        """Wait until what was sent is acknowledged, then say so on the dead-letter topic."""
        if not self._unmarked:
            return
        self._publisher.flush(_FLUSH_SECONDS)
        offsets: defaultdict[int, list[int]] = defaultdict(list)
        for partition, offset in self._unmarked:
            offsets[partition].append(offset)
        self._publisher.send(self._queue.topic, None, msgspec.json.encode(offsets), headers=[(MARKER, b"")])
        self._publisher.flush(_FLUSH_SECONDS)
        self._unmarked, self._bytes = [], 0


def _whole(consumer: Consumer, letter: DeadLetter) -> Record | None:
    """The record to send; of a cut one the original, None when that is gone, unreadable or another."""
    cut = letter.record
    if not letter.cut:
        return cut
    start, end = _bounds(consumer, cut.topic, cut.partition)
    if not start <= cut.offset < end:
        return None
    consumer.assign([TopicPartition(cut.topic, cut.partition, cut.offset)])
    message = consumer.poll(_ANSWER_SECONDS)
    consumer.unassign()
    if message is None or _is_end(message, cut.topic) or message.offset() != cut.offset:
        return None
    found = record_of(message)
    if found.headers == ((UNREADABLE, b""),):
        return None
    same = (found.value or b"").startswith(cut.value or b"") and (found.key or b"").startswith(cut.key or b"")
    return found if same else None


def _bounds(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    try:
        start, end = consumer.get_watermark_offsets(TopicPartition(topic, partition), _ANSWER_SECONDS)
    except KafkaException as error:
        why = error.args[0].str().rstrip(".")
        raise ServiceError(f"Kafka does not say where {topic}[{partition}] ends: {why}.") from None
    return start, end


def _is_end(message: Message, topic: str) -> bool:
    """Whether this is no record but the end of the partition; raises ServiceError for any other error."""
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - librdkafka's own name
        return True
    raise ServiceError(f"{topic} cannot be read: {error.str().rstrip('.')}.")


def _marked(message: Message) -> set[Place]:
    try:
        named = _decode_marker(message.value() or b"")
    except msgspec.MsgspecError:
        return set()
    return {(partition, offset) for partition, offsets in named.items() for offset in offsets}
