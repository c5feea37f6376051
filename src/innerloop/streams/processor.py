"""What the consumer loop drives, and what it promises to it.

What a processor may rely on:
- `assigned` is called before any record of a partition is handed over, and decides where reading starts (`claims`): at
  an offset that the log does not hold, there is a gap.
- What `handle` is given of a partition goes on where the batch before ended, or repeats some of it (`continuity`).
- `handle` returns only when everything that follows from the batch is stored and replicated. Only then are the
  batch's offsets committed (`commits`), so a committed offset means: done. It may be called again with the same batch.
- RetryError from either: polling goes on (no rebalance), and the same call is made again. From `handle` all partitions
  are paused meanwhile; a partition that could not be assigned waits alone.
- `revoked` is called after the last batch of those partitions, when their offsets are committed.
- `gap` is called only when gaps are accepted (`gaps`): a partition's records before `to_offset` are gone, and reading
  goes on there as soon as it returns.
- Any StopError leaves the loop; what was not committed is read again by the next owner.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from innerloop.streams.batch import Batch
from innerloop.streams.partitions import Partition

LogEnds = Callable[[Partition], tuple[int, int]]
"""The oldest offset of a partition that the broker still has, and the next one it will give. Raises RetryError."""


class Processor(Protocol):
    """What the loop drives; see the module's contract."""

    def assigned(self, committed: Mapping[Partition, int | None], log_ends: LogEnds) -> Mapping[Partition, int | None]:
        """Take over partitions with these committed offsets; where to start each, None for the oldest record."""

    def stands_at(self, partition: Partition) -> int | None:
        """The first offset that is not in its store, None where it keeps no such account."""

    def revoked(self, partitions: Sequence[Partition]) -> None: ...

    def handle(self, batch: Batch) -> None: ...

    def gap(self, partition: Partition, from_offset: int, to_offset: int) -> None:
        """Go on at `to_offset`: the records since `from_offset` are gone. Raises RetryError."""

    def idle(self) -> None:
        """Called after each batch and at least every 0.1 s; what raises RetryError is called again."""
