"""The shop's catalogue as it tells it: one item, what people call it, and what it is like."""

from typing import Annotated

import msgspec

from innerloop.errors import DeadLetterError, Reason
from innerloop.events import MAX_IDENTIFIER_BYTES, NO_NUL, decode_with

Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_IDENTIFIER_BYTES, pattern=NO_NUL)]


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record of the topic `catalog.items`, as the wire contract (`schemas/item.v1.json`) has it."""

    item_id: Identifier
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=NO_NUL)]
    category: Identifier | None = None
    price: float | None = None
    url: Annotated[str, msgspec.Meta(max_length=2048, pattern=NO_NUL)] | None = None


_DECODER = msgspec.json.Decoder(Item)


def decode_item(key: bytes | None, value: bytes) -> Item:
    """Decode one record; raises DeadLetterError with the reason, also where the key names another item."""
    item = decode_with(_DECODER, value)
    if item.item_id.encode() != key:
        raise DeadLetterError(Reason.INVALID_FIELD, f"item_id: {item.item_id!r} is not the record's key")
    return item
