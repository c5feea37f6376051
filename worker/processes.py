"""What one ingest or adapt process is made of: the only place that picks concrete classes."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import structlog

from innerloop.config import Settings
from innerloop.errors import BreakerError, ServiceError
from innerloop.store.database import Database, connect, require_tables
from innerloop.store.ledger import Ledger
from innerloop.streams.clients import require_broker
from innerloop.streams.loop import Loop
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import partition_counts, require_topics, topic_ids
from innerloop.tracing import exported_traces

from .endpoint import listening
from .gauges import LagGauges, gpu_gauges, measured
from .health import Health
from .pool import MEMBER, SUPERVISED

_LOG = structlog.get_logger(__name__)
_LOOK_SECONDS = 0.1


def stop_on_signals() -> Callable[[], bool]:
    """SIGTERM and SIGINT ask for a stop; the batch in hand is finished."""
    asked = False

    def ask(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    if os.environ.get(SUPERVISED):
        threading.Thread(target=_stop_with_supervisor, daemon=True).start()
    return lambda: asked


def _stop_with_supervisor() -> None:
    """A member whose supervisor was killed would stay in its group for good, and nobody would know of it."""
    while os.read(0, 1):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


def run_ingest(settings: Settings, *, accept_gap: bool = False) -> None:
    """One ingest process, until told to stop. Raises StopError."""
    from innerloop.ingest import Ingest  # noqa: PLC0415 - each command imports what it runs

    stopping = stop_on_signals()
    topics = settings.topics
    engine = connect(settings.database)
    _require_answers(settings, engine)
    require_topics(settings, [*topics.ingested, topics.requests, topics.dead_letters])
    ledger = Ledger(engine, topic_ids(settings, topics.ingested))
    with exported_traces("ingest") as traces:
        loop = Loop(
            settings.kafka,
            group=settings.kafka.ingest_group,
            topics=topics.ingested,
            processor=Ingest(settings, engine, ledger, Publisher(settings.kafka), traces),
            batch_size=settings.ingest.batch_size,
            poll_seconds=settings.ingest.poll_seconds,
            stopping=stopping,
            accept_gap=accept_gap,
            instance=_instance(settings),
        )
        _run(settings, loop, settings.kafka.ingest_group, topics.ingested, stopping=stopping)
    engine.dispose()


def run_adapt(settings: Settings, device: str, threads: int = 0, *, accept_gap: bool = False) -> None:
    """One adapt process on `device`, until told to stop; `threads` 0 leaves it to torch. Raises StopError."""
    from innerloop.adapt import Adapt  # noqa: PLC0415 - torch is only loaded here
    from innerloop.learning.devices import use_threads  # noqa: PLC0415
    from innerloop.streams.watch import OutputWatch  # noqa: PLC0415

    use_threads(threads)
    stopping = stop_on_signals()
    topics = settings.topics
    engine = connect(settings.database)
    _require_answers(settings, engine)
    outputs = (topics.recommendations, topics.ads)
    _require_equal_partitions(settings, [topics.requests, *outputs])
    ledger = Ledger(engine, topic_ids(settings, [topics.requests]))
    watch = OutputWatch(settings.kafka, group=settings.kafka.adapt_group + "-watch", topics=outputs)
    with exported_traces("adapt") as traces:
        adapt = Adapt(settings, engine, ledger, Publisher(settings.kafka), watch, device=device, traces=traces)
        loop = Loop(
            settings.kafka,
            group=settings.kafka.adapt_group,
            topics=[topics.requests],
            processor=adapt,
            batch_size=settings.adapt.batch_size,
            batch_keys=settings.adapt.batch_users,
            poll_seconds=settings.adapt.poll_seconds,
            stopping=stopping,
            accept_gap=accept_gap,
            instance=_instance(settings),
        )
        try:
            _run(settings, loop, settings.kafka.adapt_group, [topics.requests], stopping=stopping, device=device)
        finally:
            watch.close()
            engine.dispose()


def require_services(settings: Settings) -> None:
    """Raise SettingsError or ServiceError unless the database has its tables and the broker answers."""
    engine = connect(settings.database)
    try:
        _require_answers(settings, engine)
    finally:
        engine.dispose()


def _require_answers(settings: Settings, engine: Database) -> None:
    require_tables(engine)
    require_broker(settings.kafka)


def _instance(settings: Settings) -> str | None:
    """The name of this process as a static member of its group; None when it is a dynamic one."""
    prefix = settings.kafka.static_membership
    return f"{prefix}-{os.environ.get(MEMBER, '0')}" if prefix else None


def _run(
    settings: Settings,
    loop: Loop,
    group: str,
    topics: Sequence[str],
    *,
    stopping: Callable[[], bool],
    device: str = "cpu",
) -> None:
    """Run the loop, and show how it does while it runs; and that the breaker has stopped it, for a while longer."""
    lag = LagGauges(group, topics, lambda: loop.owned)
    health = Health(loop, settings.http.stuck_after_seconds, unclaimed=lambda: loop.unclaimed)
    with listening(settings.http, health) as port, measured(settings, lag.look, *gpu_gauges(device)):
        _keep_loaded()
        try:
            loop.run()
        except BreakerError as error:
            health.over(str(error))
            if port:
                _linger(settings.http.linger_seconds, stopping, str(error))
            raise


def _keep_loaded() -> None:
    """Keep the garbage collector off what is there for good: torch's modules alone held up a batch for 140 ms."""
    gc.collect()
    gc.freeze()


def _linger(seconds: float, stopping: Callable[[], bool], why: str) -> None:
    _LOG.error("stopped, and shows it before it leaves", why=why, for_seconds=seconds)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stopping():
        time.sleep(_LOOK_SECONDS)


def _require_equal_partitions(settings: Settings, names: list[str]) -> None:
    """A user's scores lie on the partition number of its requests: that is how an owner knows its own output."""
    counts = partition_counts(settings, names)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ServiceError(f"These topics need equally many partitions, but {listed}: add partitions to the smaller.")
