"""Gauges that nobody's batch sets: lag as the broker tells it, and what the GPU does."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from innerloop import metrics
from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.streams.lag import LagReader, PartitionLag
from innerloop.streams.partitions import Partition
from innerloop.streams.waiting import Waiting

_EVERY_SECONDS = 2.0

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
    from innerloop.learning import devices  # noqa: PLC0415 - torch

    # Two, for the driver may refuse the one. Read before shown: a label that is asked for stands at 0.
    def memory(_: LagReader) -> None:
        found = devices.gpu_memory(device)
        metrics.GPU_MEMORY.labels(device).set(found)

    def busy(_: LagReader) -> None:
        found = devices.gpu_busy(device)
        metrics.GPU_BUSY.labels(device).set(found)

    return [memory, busy]


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
    waits = [(look, Waiting("gauge not known")) for look in gauges]
    with LagReader(settings) as reader:
        while not stopped.wait(_EVERY_SECONDS):
            for look, wait in waits:
                try:
                    look(reader)
                except ServiceError as error:
                    wait.goes_on(str(error))
                except Exception as error:  # noqa: BLE001 - what one gauge meets must not end the others
                    wait.goes_on(repr(error))
                else:
                    wait.ends()
