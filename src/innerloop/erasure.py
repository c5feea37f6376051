"""Erasure: a user's past is deleted, and kept out.

A record on the erasure topic is carried out in one transaction: the user's support set is deleted, a receipt is
written, the ledger moves (`store.erasures`). Then a request tells adapt, which puts tombstones on the score topics.

From then on events of the user that are not later than the erasure are dropped, whenever and from wherever they come: a
replay of every topic from zero leaves the user absent. A later event starts a new, empty set.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np

from innerloop.errors import DeadLetterError, Reason
from innerloop.events import NO_NUL, EpochMilliseconds, decode_with
from innerloop.store import erasures
from innerloop.store.database import Transaction
from innerloop.store.erasures import Erased
from innerloop.store.support_sets import SupportConflictError
from innerloop.support import Ints


class Erasure(msgspec.Struct, frozen=True):
    """A request to forget a user, as the wire contract (`schemas/erasure.v1.json`) has it."""

    user_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=NO_NUL)]
    requested_at: EpochMilliseconds


_DECODER = msgspec.json.Decoder(Erasure)


def decode_erasure(record: bytes | None, *, latest_ms: int) -> Erasure:
    """Decode one record's value; `latest_ms` is the latest time (epoch ms) that is still believed.

    A time far ahead, or in another unit, would keep the user out for good. Raises DeadLetterError with the reason.
    """
    erasure = decode_with(_DECODER, record)
    if erasure.requested_at > latest_ms:
        why = f"requested_at: {erasure.requested_at} is too far ahead of this machine's clock"
        raise DeadLetterError(Reason.INVALID_FIELD, why)
    return erasure


def decode_erasures(
    records: Sequence[bytes | None], *, latest_ms: int
) -> tuple[dict[str, int], list[tuple[int, DeadLetterError]]]:
    """Decode a batch: user -> the latest request (epoch ms), and what is bad with its position."""
    requested: dict[str, int] = {}
    bad: list[tuple[int, DeadLetterError]] = []
    for position, record in enumerate(records):
        try:
            erasure = decode_erasure(record, latest_ms=latest_ms)
        except DeadLetterError as error:
            bad.append((position, error))
        else:
            requested[erasure.user_id] = max(erasure.requested_at, requested.get(erasure.user_id, 0))
    return requested, bad


class Suppression:
    """Who was erased, as one writing process knows it: what keeps their past events out.

    Costs a batch one query while nobody was erased, and then a hash per distinct user. Memory is about 70 bytes for
    each erased user: the first eight bytes of the hash; what else a receipt says is read when such a user has an event.
    """

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._number = 0
        self._salt = b""

    def among(self, connection: Transaction, users: Sequence[str]) -> dict[str, Erased]:
        """Those of `users` who were erased, as far as known; `check` tells what this did not know."""
        if not self._known:
            return {}
        hashes = {user: erasures.hash_of(user, self._salt) for user in users}
        hits = {user: hashed for user, hashed in hashes.items() if hashed[:8] in self._known}
        return erasures.erased(connection, hits) if hits else {}

    def check(self, connection: Transaction, users: Sequence[str]) -> None:
        """Look for receipts that came since, when `users` are written and before that is committed.

        Raises SupportConflictError when one of them is of `users`: then `among` knows it now, and all is to be done
        again.
        """
        new = erasures.since(connection, self._number)
        if not new:
            return
        self._salt = self._salt or erasures.read_salt(connection)
        fresh = {hashed[:8] for _, hashed in new}  # also of those known already: they were erased once more
        self._known |= fresh
        self._number = new[-1][0]
        if any(erasures.hash_of(user, self._salt)[:8] in fresh for user in users):
            raise SupportConflictError("a user was erased meanwhile")


def past_and_base(erased: Mapping[str, Erased], users: Sequence[str]) -> tuple[Ints, Ints]:
    """Of each user [T]: up to when events are of an erased past (epoch ms, -1: none), and what versions go on above."""
    facts = [(erased[user].until, erased[user].version) if user in erased else (-1, 0) for user in users]
    columns = np.array(facts, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]
