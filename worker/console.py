"""`innerloop console`: one live page over the whole loop, and the lag of both groups for Prometheus."""

import math
import threading
import time

import structlog
from nicegui import app, ui
from prometheus_client import make_asgi_app

from innerloop import metrics
from innerloop.config import Settings
from innerloop.store.database import connect, require_tables
from innerloop.streams.clients import require_broker

from .console_history import History
from .console_lookup import Person, look_up
from .console_page import Page
from .console_sources import Snapshot, Sources
from .processes import stop_on_signals

_LOG = structlog.get_logger(__name__)
_EVERY_SECONDS = 1.0


class Observer:
    """Looks once a second, for however many viewers there are, and remembers the last hour."""

    def __init__(self, settings: Settings, sources: Sources) -> None:
        self._settings, self._sources = settings, sources
        self._stopped = threading.Event()
        self.history = History()
        self.newest = Snapshot(at=time.time())
        self._thread = threading.Thread(target=self._observe, name="observer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(10.0)
        self._sources.close()

    def _observe(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            self.newest = self._sources.look()
            self.history.add(self.newest.at, self._numbers(self.newest))
            _show_lag(self.newest)
            self._stopped.wait(max(0.0, _EVERY_SECONDS - (time.monotonic() - began)))

    def _numbers(self, snapshot: Snapshot) -> dict[str, float]:
        kafka, topics = self._settings.kafka, self._settings.topics
        rates = {topic: flow.per_second for topic, flow in snapshot.flows.items()}
        lags = {group.group: float(group.offsets) for group in snapshot.groups}
        return {
            "lag ingest": lags.get(kafka.ingest_group, math.nan),
            "lag adapt": lags.get(kafka.adapt_group, math.nan),
            "latency p50": snapshot.p50 * 1000,
            "latency p99": snapshot.p99 * 1000,
            "throughput events": sum(rates.get(topic, 0.0) for topic in topics.events),
            "throughput requests": rates.get(topics.requests, 0.0),
            "throughput scores": rates.get(topics.recommendations, 0.0),
        }


def _show_lag(snapshot: Snapshot) -> None:
    """For Prometheus: every partition of both groups, also while nobody runs who could tell of it."""
    for each in (partition.lag for group in snapshot.groups for partition in group.partitions):
        where = (each.group, each.topic, str(each.partition))
        metrics.LAG_OFFSETS.labels(*where).set(each.offsets)
        if each.seconds is not None:
            metrics.LAG_SECONDS.labels(*where).set(each.seconds)


def run_console(settings: Settings) -> None:
    """Serve the page until SIGTERM or Ctrl-C. Raises ServiceError and SettingsError."""
    engine = connect(settings.database)
    require_tables(engine)
    require_broker(settings.kafka)
    observer = Observer(settings, Sources(settings))

    def find(user_id: str) -> Person:
        return look_up(settings, engine, user_id)

    @ui.page("/")
    def page() -> None:
        Page(settings, lambda: observer.newest, observer.history, find).show()

    app.mount("/metrics", make_asgi_app(disable_compression=True))
    app.add_api_route("/livez", lambda: "The page is served.")
    app.on_startup(observer.start)
    app.on_shutdown(observer.stop)
    stop_on_signals()  # the server stops by itself on both, and raises them again for whoever was there before
    where = settings.console
    _LOG.info("console", page=f"http://{where.host}:{where.port}/")
    ui.run(
        host=where.host,
        port=where.port,
        title="Innerloop",
        dark=None,
        reload=False,
        show=False,
        show_welcome_message=False,
        endpoint_documentation="none",
    )
