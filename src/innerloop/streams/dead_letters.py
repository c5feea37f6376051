"""Dead letters: the record as it came, with Kafka Connect's headers saying where from and why."""

from dataclasses import dataclass

from confluent_kafka import Message

from innerloop.errors import DeadLetterError
from innerloop.streams.batch import UNREADABLE, Record, RecordHeaders, record_of
from innerloop.streams.publisher import Headers, Publisher

_PREFIX = "__connect.errors."
_OURS = ("topic", "partition", "offset", "connector.name", "stage", "exception.class.name", "exception.message")
_CUT_KEY, _CUT_VALUE = "innerloop.original.key.bytes", "innerloop.original.bytes"
_CUT_HEADERS = "innerloop.original.headers.bytes"
# In bytes; together well below the megabyte that a broker takes by default.
_MAX_VALUE = 800_000
_MAX_KEY = 50_000
_MAX_HEADERS = 50_000
_FRAME = 10  # of a header: the lengths of its name and its value
_MAX_MESSAGE = 1_024
_MOST_DIGITS = 19  # of an offset
_PARTITIONS, _OFFSETS = 2**31, 2**63


def send_dead_letter(publisher: Publisher, topic: str, record: Record, error: DeadLetterError, *, group: str) -> None:
    """Queue `record` for the dead-letter topic; it is acknowledged by the flush before the offset moves.

    A record near the broker's size limit would be refused with our headers added, so what is long is cut and its full
    length said in a header; the whole of it stays on the topic it came from.
    """
    key, cut_key = _cut(record.key, _MAX_KEY, _CUT_KEY)
    value, cut_value = _cut(record.value, _MAX_VALUE, _CUT_VALUE)
    headers: Headers = [
        *_own_headers(record),
        *cut_key,
        *cut_value,
        (_PREFIX + "topic", record.topic),
        (_PREFIX + "partition", str(record.partition)),
        (_PREFIX + "offset", str(record.offset)),
        (_PREFIX + "connector.name", group),
        (_PREFIX + "stage", "VALUE_CONVERTER"),
        (_PREFIX + "exception.class.name", f"innerloop.{error.reason}"),
        (_PREFIX + "exception.message", str(error)[:_MAX_MESSAGE]),
    ]
    publisher.send(topic, key, value, headers=headers)


def _cut(content: bytes | None, most: int, header: str) -> tuple[bytes | None, Headers]:
    if content is None or len(content) <= most:
        return content, []
    return content[:most], [(header, str(len(content)))]


def _own_headers(record: Record) -> Headers:
    size = sum(len(name.encode()) + len(value or b"") + _FRAME for name, value in record.headers)
    return list(record.headers) if size <= _MAX_HEADERS else [(_CUT_HEADERS, str(size))]


@dataclass(frozen=True)
class DeadLetter:
    """What a record of the dead-letter topic says; made by `read_dead_letter`."""

    place: tuple[int, int]
    """(partition, offset) of the letter on the dead-letter topic."""
    refused_ms: int
    """When it was dead-lettered, epoch milliseconds."""
    reason: str
    message: str
    record: Record
    """The record as it came and where it came from; its timestamp is the letter's."""
    cut: bool
    """Key, value or headers were too long, or could not be read: the whole record is, at most, where it came from."""


def read_dead_letter(message: Message) -> DeadLetter | None:
    """Take a dead letter apart; None for a record that `send_dead_letter` has not made.

    Only the headers that were added are looked at, which come last: those that the record had, whatever their names, go
    back as they came.
    """
    letter = record_of(message)
    own, added = letter.headers[: -len(_OURS)], letter.headers[-len(_OURS) :]
    if [name for name, _ in added] != [_PREFIX + name for name in _OURS]:
        return None
    topic, partition, offset, _, _, reason, why = ((value or b"").decode(errors="replace") for _, value in added)
    number, place = _number(partition.encode()), _number(offset.encode())
    if not (0 <= number < _PARTITIONS and 0 <= place < _OFFSETS):
        return None
    own, cut_value = _without_cut(own, _CUT_VALUE, letter.value, _MAX_VALUE)
    own, cut_key = _without_cut(own, _CUT_KEY, letter.key, _MAX_KEY)
    cut_headers = len(own) == 1 and (
        own[0][0] == UNREADABLE or (own[0][0] == _CUT_HEADERS and _number(own[0][1]) > _MAX_HEADERS)
    )
    record = Record(topic, number, place, letter.timestamp_ms, letter.key, letter.value, own)
    return DeadLetter(
        place=(letter.partition, letter.offset),
        refused_ms=letter.timestamp_ms,
        reason=reason.removeprefix("innerloop."),
        message=why,
        record=record,
        cut=cut_value or cut_key or cut_headers,
    )


def _without_cut(headers: RecordHeaders, name: str, content: bytes | None, most: int) -> tuple[RecordHeaders, bool]:
    """The headers without the last one, if that says that `content` was cut; whether it did."""
    if len(content or b"") == most and headers and headers[-1][0] == name and _number(headers[-1][1]) > most:
        return headers[:-1], True
    return headers, False


def _number(text: bytes | None) -> int:
    return int(text) if text and text.isdigit() and len(text) <= _MOST_DIGITS else -1
