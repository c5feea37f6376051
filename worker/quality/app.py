"""`innerloop quality`: the windowed join of clicks and lists on Faust, which tells what adaptation is worth.

    events.clicks, events.purchases, scores.recommendations, scores.ads
        |  an agent each, shared among the processes: keeps a sample of the users, drops the rest undecoded
        v
    GROUP-sample           one partition: the rate is bounded before it, so that one process can hold it
        |  one agent: `QualityWindows`, whose memory is a table (changelog GROUP-memory-changelog)
        v
    quality.windows        one record for each closed window

What happens when the process dies, in the order of one message of the sample:

1. what users are remembered by is written to the table: the message comes again and changes nothing
2. windows that close are judged and published: they are judged again, from the same memory, and published again alike
3. progress is written: the message comes again and is known by its offset
4. what only the closed windows needed is forgotten: it is forgotten when its user is next touched

Faust's `take` acknowledges a batch whose body raised, and Faust may commit past an event in flight: tests/integration/
test_quality_faust.py shows both. In a rebalance it also drops what it has fetched and goes on behind that. The first is
avoided here; what the judge misses it sees by the offsets, and reads it again (`passed_over.py`); what is lost on the
way to the sample costs a figure a little accuracy. So nothing may ever depend on this process, and it writes nowhere
but to its own topics.
"""

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import faust
import msgspec
import structlog
from faust.types import TP, EventT, StreamT

from innerloop import metrics
from innerloop.config import KafkaSettings, Settings
from innerloop.errors import ServiceError
from innerloop.evaluation.quality.state import Batch, Progress, User
from innerloop.evaluation.quality.windows import QualityWindows, WindowShape
from innerloop.streams.clients import require_broker
from innerloop.streams.topics import partition_counts
from innerloop.worker.endpoint import listening
from innerloop.worker.gauges import LagGauges, measured
from innerloop.worker.health import Health
from innerloop.worker.processes import stop_on_signals

from .gauges import WindowGauges
from .passed_over import PassedOver
from .sample import Reader, Record, Sampler
from .security import credentials

_LOG = structlog.get_logger(__name__)
_TAKEN, _WITHIN_SECONDS = 1_000, 0.25
_SENT = 200  # records in one message of the sample: some 300 KB
_TICK_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_FINISH_SECONDS = 5.0
_STOP_SECONDS = 20.0
_SHOWN_WINDOWS = 3  # so many windows without a click, and the gauges say nothing
_SAMPLE_KEPT_SECONDS = 3_600.0
_PROGRESS = b"\0progress"  # no user's: identifiers have no NUL


class Quality:
    """The Faust app of one process."""

    def __init__(self, settings: Settings, sources: dict[str, int]) -> None:
        """`sources` are the topics that are read, with their numbers of partitions."""
        self._settings, self._sources = settings, sources
        quality = settings.quality
        self._shape = WindowShape(
            1000 * quality.window_seconds,
            1000 * quality.grace_seconds,
            int(1000 * quality.idle_seconds),
            quality.users,
            round(3_600_000 * settings.learning.attribution_hours),
        )
        self._sampler = Sampler(quality.hold_out, float(quality.events_per_second))
        self._reader = Reader(settings)
        self._windows: QualityWindows | None = None  # made of the table when the sample's partition is ours
        self._gauges = WindowGauges()
        self._shown_ms = _SHOWN_WINDOWS * self._shape.window_ms + self._shape.grace_ms + self._shape.idle_ms
        self.joined, self._judges, self._leaving = False, False, False
        self._ticked_at = self._judged_at = time.monotonic()
        self._in_hand: dict[object, float] = {}  # the batches in hand, since when
        self.app = self._app()

    def _app(self) -> faust.App:
        kafka = self._settings.kafka
        raw: dict[str, Any] = {"key_serializer": "raw", "value_serializer": "raw"}
        app = faust.App(
            kafka.quality_group,
            broker=";".join(f"kafka://{server.strip()}" for server in kafka.bootstrap_servers.split(",")),
            broker_credentials=credentials(kafka),
            broker_session_timeout=_seconds(kafka, "session.timeout.ms", 10.0),
            broker_heartbeat_interval=_seconds(kafka, "heartbeat.interval.ms", 1.0),
            consumer_auto_offset_reset="earliest" if self._settings.quality.from_beginning else "latest",
            store="memory://",
            datadir=Path(tempfile.gettempdir()) / f"{kafka.quality_group}-data",  # stays empty, but Faust makes it
            table_standby_replicas=0,
            topic_partitions=1,
            topic_replication_factor=self._settings.topics.replication_factor,
            topic_disable_leader=True,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            web_enabled=False,
        )
        self._sample_name = f"{kafka.quality_group}-sample"
        self._missing = PassedOver(app, TP(self._sample_name, 0))
        self._sample = app.topic(self._sample_name, partitions=1, internal=True, retention=_SAMPLE_KEPT_SECONDS, **raw)
        self._memory = app.Table("memory", key_type=bytes, value_type=bytes, partitions=1)
        self._output = app.topic(self._settings.topics.quality_windows, **raw)
        for name, partitions in self._sources.items():
            source = app.topic(name, partitions=partitions, **raw)
            app.agent(source, name=f"read-{name}", concurrency=1)(self._read)
        app.agent(self._sample, name="judge", concurrency=1)(self._judge)
        app.timer(_TICK_SECONDS)(self._tick)
        app.on_partitions_revoked.connect(self._revoked)
        app.on_partitions_assigned.connect(self._assigned)
        app.on_rebalance_complete.connect(self._settled)
        return app

    # --- from the topics to the sample

    async def _read(self, stream: StreamT[bytes]) -> None:
        whole: Any = stream  # the declared interface lacks some of what a stream can do
        # Not `take`: that one takes a batch for done whatever became of it, also when it is cancelled.
        async for events in whole.noack_take(_TAKEN, within=_WITHIN_SECONDS):
            await self._unless_leaving()
            with self._busy():
                try:
                    await self._forward(events)
                except Exception as error:  # noqa: BLE001 - without these records is better than not at all
                    _LOG.error("a batch was not sampled", why=repr(error), records=len(events))
                for event in events:
                    await whole.ack(event)

    async def _forward(self, events: Sequence[EventT[bytes]]) -> None:
        taken: dict[tuple[str, int], list[Record]] = {}
        for event in events:
            message = event.message
            # Whoever is erased may have been in the sample when their share was larger.
            if message.key is not None and (self._sampler.takes(message.key) or message.value is None):
                record = Record(message.key, message.value, round(message.timestamp * 1000))
                taken.setdefault((message.topic, message.partition), []).append(record)
        self._sampler.adjust(self._part())
        now = int(time.time() * 1000)
        for (topic, partition), records in taken.items():
            for first in range(0, len(records), _SENT):
                await self._send(self._reader.batch(topic, partition, records[first : first + _SENT], now))

    def _part(self) -> float:
        owned = sum(each.topic in self._sources for each in self.app.consumer.assignment())
        return owned / sum(self._sources.values())

    async def _send(self, batch: Batch) -> None:
        await (await self._sample.send(value=msgspec.msgpack.encode(batch), partition=0))

    async def _tick(self) -> None:
        """Goes through the sample to whoever judges: so time passes there without clicks, and it is seen to work."""
        if not self._leaving:
            await self._send(Batch("", int(time.time() * 1000)))
        self._ticked_at = time.monotonic()
        metrics.LAST_TURN.set(time.time() - (time.monotonic() - self.turned_at))

    # --- from the sample to the windows

    async def _judge(self, stream: StreamT[bytes]) -> None:
        whole: Any = stream
        unacknowledged = whole.noack()
        async for event in unacknowledged.events():
            await self._unless_leaving()
            with self._busy():
                windows = self._windows = self._windows or self._recalled()
                batch, offset = msgspec.msgpack.decode(event.value, type=Batch), event.message.offset
                if await self._missing.before(offset, windows.progress.next_offset):
                    continue
                # Known by its offset; that it is no later than what is known tells it from a topic that was made anew.
                if offset >= windows.progress.next_offset or batch.at > windows.progress.heard:
                    await self._take(windows, batch, offset)
                await unacknowledged.ack(event)
            self._judged_at = time.monotonic()

    async def _take(self, windows: QualityWindows, batch: Batch, offset: int) -> None:
        windows.hear(batch)
        starts = windows.closable(batch.at)
        self._write(windows)  # 1
        for start in starts:
            found = windows.judge(start, batch.at)
            self._write(windows)
            await (await self._output.send(key=str(start).encode(), value=msgspec.json.encode(found)))  # 2
            self._gauges.show(found)
            windows.close(start)
        self._gauges.clear_after(self._shown_ms, batch.at)
        windows.progress.next_offset = offset + 1
        progress = self._memory[_PROGRESS] = msgspec.msgpack.encode(windows.progress)  # 3
        self._write(windows)  # 4
        # A table's own writes are not waited for. They go out in order: with this one all before it are on the topic.
        await self._memory.send_changelog(0, _PROGRESS, progress)

    def _write(self, windows: QualityWindows) -> None:
        for name in sorted(windows.take_changes()):
            key, user = name.encode(), windows.users.get(name)
            if user is None:
                self._memory.pop(key, None)
            else:
                self._memory[key] = msgspec.msgpack.encode(user)

    def _recalled(self) -> QualityWindows:
        stored = {bytes(key): bytes(value) for key, value in self._memory.items()}
        progress = stored.pop(_PROGRESS, None)
        users = {name.decode(): msgspec.msgpack.decode(value, type=User) for name, value in stored.items()}
        _LOG.info("memory recalled", users=len(users))
        return QualityWindows(
            self._shape, users, Progress() if progress is None else msgspec.msgpack.decode(progress, type=Progress)
        )

    # --- membership

    async def _revoked(self, *_: object, **__: object) -> None:
        self._windows, self.joined = None, False

    async def _assigned(self, *signalled: Any, **__: object) -> None:
        _, partitions = signalled
        self._windows, self._judges = None, any(each.topic == self._sample_name for each in partitions)
        if not self._judges:
            self._gauges.clear()

    async def _settled(self, *_: object, **__: object) -> None:
        self._windows, self.joined, self._judged_at = None, True, time.monotonic()

    @property
    def turned_at(self) -> float:
        """When the slowest of its parts last went on: the timer, each batch in hand, the judge while it has its memory.

        Asked by other threads.
        """
        judged = [self._judged_at] if self.joined and self._judges else []
        return min([self._ticked_at, *judged, *list(self._in_hand.values())])

    # --- running

    @contextmanager
    def _busy(self) -> Iterator[None]:
        batch = object()
        self._in_hand[batch] = time.monotonic()
        try:
            yield
        finally:
            del self._in_hand[batch]

    async def _unless_leaving(self) -> None:
        """What is not begun is not acknowledged: it waits here to be cancelled, and comes again."""
        if self._leaving:
            await asyncio.Event().wait()

    async def _finish(self) -> None:
        """Let what is in hand be done."""
        self._leaving = True
        if not self.joined:
            return
        self.app.consumer.stop_flow()
        until = time.monotonic() + _FINISH_SECONDS
        while self._in_hand and time.monotonic() < until:  # noqa: ASYNC110 - bodies of agents set it
            await asyncio.sleep(_LOOK_SECONDS)

    async def run(self, stopping: Callable[[], bool]) -> None:
        """Until told to stop. Raises ServiceError when Faust gives up."""
        starting = asyncio.ensure_future(self.app.start())
        while not stopping() and not self.app.should_stop and not (starting.done() and starting.exception()):
            if not self.joined:  # the timer waits for the memory, too, which may take minutes to read
                self._ticked_at = time.monotonic()
            await asyncio.sleep(_LOOK_SECONDS)
        reason: BaseException | None = self.app.crash_reason
        if stopping() and reason is None:
            await self._finish()
        with suppress(TimeoutError):  # what is not acknowledged comes again
            await asyncio.wait_for(self.app.stop(), _STOP_SECONDS)
        if starting.done() and starting.exception():
            reason = starting.exception()
        if not stopping():
            raise ServiceError(
                f"Faust has given up ({reason!r}): look at the brokers, then start innerloop quality again."
            )


def _seconds(kafka: KafkaSettings, name: str, otherwise: float) -> float:
    given = kafka.properties.get(name)
    return otherwise if given is None else float(given.get_secret_value()) / 1000


def _leave_anyway(stopping: Callable[[], bool]) -> None:
    """Faust's clients wait for a broker that is gone, and do not let themselves be cancelled: nobody should wait along.

    What is not acknowledged comes again, and what is lost here costs nothing.
    """
    while not stopping():
        time.sleep(_LOOK_SECONDS)
    time.sleep(_FINISH_SECONDS + _STOP_SECONDS)
    _LOG.warning("left without waiting for the broker")
    os._exit(0)


def run_quality(settings: Settings, stopping: Callable[[], bool] | None = None) -> None:
    """One quality process, until told to stop. Raises SettingsError and ServiceError."""
    for chatty in ("faust", "mode", "aiokafka"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("faust.transport.producer").setLevel(
        logging.ERROR
    )  # it warns of every hundred messages that wait
    if stopping is None:
        stopping = stop_on_signals()
        threading.Thread(target=_leave_anyway, args=[stopping], name="leave", daemon=True).start()
    require_broker(settings.kafka)
    topics = settings.topics
    names = [topics.clicks, topics.purchases, topics.recommendations, topics.ads]
    counts = partition_counts(settings, [*names, topics.quality_windows])
    quality = Quality(settings, {name: counts[name] for name in names})
    lag = LagGauges(settings.kafka.quality_group, names, None, from_end=not settings.quality.from_beginning)
    health = Health(quality, settings.http.stuck_after_seconds)
    with listening(settings.http, health), measured(settings, lag.look):
        asyncio.run(quality.run(stopping))
