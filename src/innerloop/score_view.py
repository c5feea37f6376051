"""Which of a user's score records holds.

Of two records of a user the one with the higher (model_version, support_version) holds, whichever comes last; of two
with the same order the one with the later scored_at, so that a recomputation after a change of the catalogue counts and
an exact repeat does not. All readers that have read the same records agree, in whichever order they came. A tombstone
forgets the user, its order included: what comes after it is taken as the user's first record.
"""

import logging

import msgspec

from innerloop.scores import AdScores, Model, RecommendationScores

Record = RecommendationScores | AdScores

_LOG = logging.getLogger(__name__)
_TYPES: dict[Model, type[Record]] = {"recommendations": RecommendationScores, "ads": AdScores}
_BEFORE_ALL = (-1, -1, -1)


class Tombstone(msgspec.Struct, frozen=True):
    """This user's scores are erased: drop what was derived from them."""

    user_id: str


class ScoreView:
    """The newest record of each user, from records in any order. Pure: knows no Kafka, only keys and values.

    Holds each user's encoded record (about 2 KB with 50 items) and order: a million users are some 2.5 GB. Readers that
    need less take a `user_id`, or a group, which divides the users among its members.
    """

    def __init__(self, model: Model, *, user_id: str | None = None) -> None:
        self.model = model
        self.stale_dropped = 0
        """Records that were older than what was known, or the same again."""
        self.undecodable = 0
        """Records that are not score records of this model, skipped."""
        self._decode = msgspec.json.Decoder(_TYPES[model]).decode
        self._only = None if user_id is None else user_id.encode()
        self._orders: dict[bytes, tuple[int, int, int]] = {}
        self._values: dict[bytes, bytes] = {}
        self._replaced: dict[bytes, bytes] = {}  # of the only user: for everybody it would double the memory

    def __len__(self) -> int:
        return len(self._values)

    def get(self, user_id: str) -> Record | None:
        value = self._values.get(user_id.encode())
        return None if value is None else self._decode(value)

    def get_before(self, user_id: str) -> Record | None:
        """The record that the newest one has replaced; only in a view of one user, None in others."""
        value = self._replaced.get(user_id.encode())
        return None if value is None else self._decode(value)

    def users(self) -> list[str]:
        return [key.decode() for key in list(self._values)]

    def apply(self, key: bytes | None, value: bytes | None) -> Record | Tombstone | None:
        """Take one record in; what it changed is returned, None when nothing. Never raises for what a record holds."""
        if self._only is not None and key != self._only:
            return None
        if key is not None and value is None:
            self._orders.pop(key, None)
            self._values.pop(key, None)
            self._replaced.pop(key, None)
            return Tombstone(key.decode(errors="replace"))
        record = self._decoded(key, value or b"")
        if key is None or value is None or record is None:
            return None
        order = (*record.order, record.scored_at)
        if order <= self._orders.get(key, _BEFORE_ALL):
            self.stale_dropped += 1
            return None
        if self._only is not None and key in self._values:
            self._replaced[key] = self._values[key]
        self._orders[key], self._values[key] = order, value
        return record

    def _decoded(self, key: bytes | None, value: bytes) -> Record | None:
        """Give the record, or count and log why it is none."""
        try:
            record = self._decode(value)
            if key is not None and record.user_id == key.decode() and record.model == self.model:
                return record
            why = f"it is of user {record.user_id!r} and model {record.model!r}"
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            why = str(error)
        self.undecodable += 1
        _LOG.warning("a record with key %r on the %s topic is skipped: %s", key, self.model, why)
        return None
