"""Each partition goes on where it was left off: a jump of its offsets is not believed before it has come twice.

Offsets rise by one, but where the log itself lacks records: behind a transaction, instead of an aborted one, and where
compaction took some. A consumer that hands out offset 105 after 99 does not say whether that is so, or whether it
passed over what is there, and with the next commit that would be lost without a trace. So what lies behind a jump is
put aside, and the partition is read again from where it should have gone on. The same jump again is the log's own.

A log that is written in transactions jumps all the time. After three jumps in a row that were its own a partition is
believed, until it is assigned or resumed anew.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from innerloop import metrics
from innerloop.streams.batch import Batch
from innerloop.streams.partitions import Partition, name

_LOG = structlog.get_logger(__name__)
_DOUBTS = 3
"""How many jumps in a row are looked at."""


@dataclass
class _Place:
    next: int
    """The offset after the last record that was handed on."""
    doubts: int = _DOUBTS
    doubted: int | None = None
    """The offset that came instead of `next`, and was put aside."""


class Continuity:
    """Where each partition should go on."""

    def __init__(self) -> None:
        self._places: dict[Partition, _Place] = {}

    def starts(self, offsets: Mapping[Partition, int]) -> None:
        """These partitions are read from here on.

        Where the offset is negative, as that of the log's beginning is, the first record that comes is believed.
        """
        self.leaves(offsets)
        self._places.update({partition: _Place(offset) for partition, offset in offsets.items() if offset >= 0})

    def leaves(self, partitions: Iterable[Partition]) -> None:
        """These partitions are read no more."""
        for partition in partitions:
            self._places.pop(partition, None)

    def resumes(self) -> None:
        """Partitions had been paused: jumps are looked at again."""
        for place in self._places.values():
            place.doubts = _DOUBTS

    def jumps(self, batch: Batch) -> dict[Partition, int]:
        """The partitions of a batch that jump, and the offset to read each again from.

        What the batch has of them from there on is not to be handed on; all else is taken to be.
        """
        firsts, nexts = batch.first_offsets, batch.next_offsets
        places = {partition: self._places.setdefault(partition, _Place(offset)) for partition, offset in firsts.items()}
        complete = sum(nexts.values()) - sum(firsts.values()) == len(batch)
        if complete and all(firsts[each] <= place.next and place.doubted is None for each, place in places.items()):
            for partition, offset in nexts.items():
                places[partition].next = max(places[partition].next, offset)
            return {}
        again: dict[Partition, int] = {}
        for partition, offset in zip(batch.partitions, batch.offsets, strict=True):
            if partition not in again and not _goes_on(partition, places[partition], offset):
                again[partition] = places[partition].next
        return again


def _goes_on(partition: Partition, place: _Place, offset: int) -> bool:
    """Whether the record at `offset` can be handed on; the partition's place is moved behind it then."""
    if place.doubted is not None and place.next <= offset < place.doubted:
        metrics.PASSED_OVER.inc()
        _LOG.warning("records had been passed over", **_told(partition, place.next, place.doubted))
        place.doubts, place.doubted = _DOUBTS, None
    if offset > place.next and offset != place.doubted and place.doubts:
        _LOG.info("offsets jump, read again", **_told(partition, place.next, offset))
        place.doubted = offset
        return False
    if offset == place.doubted:
        place.doubts -= 1
        place.doubted = None
    place.next = max(place.next, offset + 1)
    return True


def _told(partition: Partition, from_offset: int, to_offset: int) -> dict[str, object]:
    return {"partition": name(partition), "from_offset": from_offset, "to_offset": to_offset}
