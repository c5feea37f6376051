"""Dead letters: the record as it came, with Kafka Connect's headers saying where from and why."""

from innerloop.errors import DeadLetterError
from innerloop.streams.batch import Record
from innerloop.streams.publisher import Headers, Publisher

_PREFIX = "__connect.errors."


def send_dead_letter(publisher: Publisher, topic: str, record: Record, error: DeadLetterError, *, group: str) -> None:
    """Queue `record` for the dead-letter topic; it is acknowledged by the flush before the offset moves.

    A record near the broker's size limit would be refused with its headers added, so a value over 900 kB is cut; its
    full length is in a header and the whole of it stays on the topic it came from.
    """
    headers: Headers = [
        *record.headers,
        (_PREFIX + "topic", record.topic),
        (_PREFIX + "partition", str(record.partition)),
        (_PREFIX + "offset", str(record.offset)),
        (_PREFIX + "connector.name", group),
        (_PREFIX + "stage", "VALUE_CONVERTER"),
        (_PREFIX + "exception.class.name", f"innerloop.{error.reason}"),
        (_PREFIX + "exception.message", str(error)[:1024]),
    ]
    value = record.value
    if value is not None and len(value) > _MAX_VALUE:
        headers.append(("innerloop.original.bytes", str(len(value))))
        value = value[:_MAX_VALUE]
    publisher.send(topic, record.key, value, headers=headers)


_MAX_VALUE = 900_000
