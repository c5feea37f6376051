"""Messages in: decoding of one event record, and what makes it a dead letter."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from innerloop.errors import DeadLetterError, Reason

MAX_IDENTIFIER_BYTES = 256
NO_NUL = "^[^\\x00]*$"
"""Of text that Postgres shall store."""
Message = TypeVar("Message")


class EventType(IntEnum):
    """The code under which an event's type is stored."""

    CLICK = 1
    CART = 2
    FAVORITE = 3
    PURCHASE = 4
    IMPRESSION = 5


IMPRESSION = EventType.IMPRESSION.name.lower()
CODES: dict[str, int] = {kind.name.lower(): int(kind) for kind in EventType if kind is not EventType.IMPRESSION}
"""What users did: the examples of support sets. What they were shown is no example, and is kept apart."""

Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER_BYTES)]
EpochMilliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Event(msgspec.Struct, gc=False):
    """What a user did or was shown, as `schemas/event.v1.json` has it; unknown fields are ignored."""

    event_id: Identifier
    event_type: Literal["click", "cart", "favorite", "purchase", "impression"]
    user_id: Identifier
    item_id: Identifier
    event_time: EpochMilliseconds | Annotated[datetime, msgspec.Meta(tz=True)]
    session_id: str | None = None
    category: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER_BYTES)] | None = None
    ad_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER_BYTES)] | None = None
    price: float | None = None
    quantity: float | None = None
    currency: str | None = None
    value: float | None = None

    @property
    def time_ms(self) -> int:
        """`event_time` as epoch milliseconds."""
        time = self.event_time
        return time if isinstance(time, int) else (time - _EPOCH) // timedelta(milliseconds=1)


_TOGETHER = 64
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DECODER = msgspec.json.Decoder(Event)


def decode(record: bytes | None, *, latest_ms: int = 2**53, max_bytes: int = 1_048_576) -> Event:
    """Decode one record's value; `latest_ms` is the latest event time (epoch ms) that is still believed.

    The event's `event_time` comes back as epoch milliseconds. Raises DeadLetterError with the reason and a message
    that names the field and what is wrong with it.
    """
    if record and len(record) > max_bytes:
        raise DeadLetterError(Reason.TOO_LARGE, f"the record has {len(record)} bytes, more than {max_bytes}")
    event = decode_with(_DECODER, record)
    _check_identifiers(event)
    time = event.time_ms
    if not 0 <= time <= latest_ms:
        why = "before 1970" if time < 0 else "too far ahead of this machine's clock"
        raise DeadLetterError(Reason.INVALID_FIELD, f"event_time: {time} is {why}")
    event.event_time = time
    return event


def decode_with(decoder: "msgspec.json.Decoder[Message]", record: bytes | None) -> Message:
    """Decode one record's value; raises DeadLetterError, whose message names the field and what is wrong with it."""
    if not record:
        raise DeadLetterError(Reason.UNDECODABLE, "the record is empty")
    try:
        return decoder.decode(record)
    except msgspec.ValidationError as error:
        raise DeadLetterError(Reason.INVALID_FIELD, _field_first(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DeadLetterError(Reason.UNDECODABLE, f"the record is not JSON: {error}") from None


def decode_many(
    records: Sequence[bytes | None], *, latest_ms: int, max_bytes: int
) -> tuple[list[Event], list[int], list[tuple[int, DeadLetterError]]]:
    """Decode a batch: the events, the position of each in `records`, and what is bad with its position.

    A few records at a time go straight through msgspec; where one of them is unusual, each goes through `decode`,
    which also says why.
    """
    events: list[Event] = []
    positions: list[int] = []
    bad: list[tuple[int, DeadLetterError]] = []
    for first in range(0, len(records), _TOGETHER):
        some = records[first : first + _TOGETHER]
        decoded = _decode_usual(some, latest_ms, max_bytes)
        if decoded is not None:
            events += decoded
            positions += range(first, first + len(some))
            continue
        for position, record in enumerate(some, first):
            try:
                events.append(decode(record, latest_ms=latest_ms, max_bytes=max_bytes))
                positions.append(position)
            except DeadLetterError as error:
                bad.append((position, error))
    return events, positions, bad


def _decode_usual(records: Sequence[Any], latest_ms: int, max_bytes: int) -> list[Event] | None:
    """The events when all of these need no closer look, else None."""
    try:
        longest = max(map(len, records))
        if longest > max_bytes or b"\\u0000" in b"".join(records):
            return None
        events = [_DECODER.decode(record) for record in records]
        if max([event.event_time for event in events]) > latest_ms:  # type: ignore[operator]
            return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
        return None  # bad, empty, or with a time in words
    # JSON never makes text shorter than its UTF-8, and UTF-8 takes at most four bytes for a character.
    if longest > MAX_IDENTIFIER_BYTES and any(map(_may_be_long, events)):
        return None
    return events


def _may_be_long(event: Event) -> bool:
    longest = max(len(event.event_id), len(event.user_id), len(event.item_id))
    others = (event.ad_id, event.session_id, event.category)
    return 4 * max(longest, *(len(other or "") for other in others)) > MAX_IDENTIFIER_BYTES


def _field_first(message: str) -> str:
    """Msgspec says "Expected ... - at `$.user_id`"; operators group by the field."""
    what, _, where = message.partition(" - at `$.")
    if where:
        return f"{where.rstrip('`')}: {what}"
    return message.replace("Object missing required field", "missing field")


def _check_identifiers(event: Event) -> None:
    for name in ("event_id", "user_id", "item_id", "ad_id", "session_id", "category"):
        value = getattr(event, name)
        if value is None:
            continue
        if len(value.encode()) > MAX_IDENTIFIER_BYTES:
            raise DeadLetterError(Reason.INVALID_FIELD, f"{name}: longer than {MAX_IDENTIFIER_BYTES} bytes")
        if "\0" in value:
            raise DeadLetterError(Reason.INVALID_FIELD, f"{name}: contains a NUL character")
