"""Dead letters: the record as it came, with Kafka Connect's headers saying where from and why."""

from innerloop.errors import DeadLetterError
from innerloop.streams.batch import Record
from innerloop.streams.publisher import Headers, Publisher

_PREFIX = "__connect.errors."
# In bytes; together well below the megabyte that a broker takes by default.
_MAX_VALUE = 800_000
_MAX_KEY = 50_000
_MAX_HEADERS = 50_000
_MAX_MESSAGE = 1_024


def send_dead_letter(publisher: Publisher, topic: str, record: Record, error: DeadLetterError, *, group: str) -> None:
    """Queue `record` for the dead-letter topic; it is acknowledged by the flush before the offset moves.

    A record near the broker's size limit would be refused with our headers added, so what is long is cut and its full
    length said in a header; the whole of it stays on the topic it came from.
    """
    key, cut_key = _cut(record.key, _MAX_KEY, "innerloop.original.key.bytes")
    value, cut_value = _cut(record.value, _MAX_VALUE, "innerloop.original.bytes")
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
    size = sum(len(name) + len(value or b"") for name, value in record.headers)
    return list(record.headers) if size <= _MAX_HEADERS else [("innerloop.original.headers.bytes", str(size))]
