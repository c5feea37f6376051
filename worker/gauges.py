"""Gauges that nobody's batch sets: lag as the broker tells it, and what the GPU does."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import structlog

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams.lag import LagReader, PartitionLag

_LOG = structlog.get_logger(__name__)
_EVERY_SECONDS = 2.0

Partition = tuple[str, int]
Look = Callable[[LagReader], object]


class LagGauges:
    """Shows the lag of some partitions of one group; those that are no longer owned vanish.

    A partition without a commit counts from the start of its log. Of a group that begins at the end (`from_end`) that
    would be a lag that nobody works off: then it is not shown.
    """

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        owned: Callable[[], Collection[Partition]] | None,
        *,
        from_end: bool = False,
    ) -> None:
        self._group, self._topics, self._owned, self._from_end = group, list(topics), owned, from_end
        self._shown: set[Partition] = set()

    def look(self, reader: LagReader) -> list[PartitionLag]:
        """Read and show once. Raises ServiceError when no broker answers; what is shown then stays as it was."""
        found = reader.read(self._group, self._topics)
        owned = None if self._owned is None else set(self._owned())
        if self._from_end:
            found = [each for each in found if each.committed is not None]
        mine = [each for each in found if owned is None or (each.topic, each.partition) in owned]
        for each in mine:
            where = (each.group, each.topic, str(each.partition))
            metrics.LAG_OFFSETS.labels(*where).set(each.offsets)
            if each.seconds is not None:  # else it was not read in time: the last one is nearer than none
                metrics.LAG_SECONDS.labels(*where).set(each.seconds)
        now = {(each.topic, each.partition) for each in mine}
        for topic, partition in self._shown - now:
            for gauge in (metrics.LAG_OFFSETS, metrics.LAG_SECONDS):
                gauge.remove(self._group, topic, str(partition))
        self._shown = now
        return mine


def gpu_gauges(device: str) -> list[Look]:
    """What there is to look at on this device: nothing on a CPU."""
    if not device.startswith("cuda"):
        return []
    from innerloop.learning.devices import gpu_use  # noqa: PLC0415 - torch

    def look(_: LagReader) -> None:
        memory, busy = gpu_use(device)
        metrics.GPU_MEMORY.labels(device).set(memory)
        metrics.GPU_BUSY.labels(device).set(busy)

    return [look]


@contextmanager
def measured(settings: Settings, *gauges: Look) -> Iterator[None]:
    """Look every two seconds, in a thread of its own with its own connections, while the context lasts.

    Nothing happens without a listener that would show it.
    """
    if not settings.http.port:
        yield
        return
    stopped = threading.Event()
    thread = threading.Thread(target=_measure, args=(settings, gauges, stopped), name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(5.0)


def _measure(settings: Settings, gauges: Sequence[Look], stopped: threading.Event) -> None:
    with LagReader(settings) as reader:
        while not stopped.wait(_EVERY_SECONDS):
            try:
                for look in gauges:
                    look(reader)
            except ServiceError as error:
                _LOG.warning("lag not known", why=str(error))
