"""`innerloop demo`: the whole loop on a real Kafka and a real PostgreSQL, watched from outside while it runs."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl
from pydantic import SecretStr
from rich.console import Console
from rich.live import Live

from innerloop.config import Settings, load_settings
from innerloop.errors import ServiceError
from innerloop.learning.catalogue import unadapted_list
from innerloop.learning.releases import Release
from innerloop.store import accounts
from innerloop.store.database import Database, connect, transaction
from innerloop.store.migrate import migrate
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.lag import LagReader
from innerloop.streams.offsets import end_offsets
from innerloop.streams.topics import ensure_topics
from innerloop.worker.pool import Pool
from innerloop.worker.processes import stop_on_signals
from innerloop.worker.replay import Pace, encode_events, parse_rate
from innerloop.worker.scrape import answers
from innerloop.worker.servers.services import running_services
from innerloop.worker.servers.watched_process import free_ports, require_free
from innerloop.worker.train import train_release

from .live import Subscriber
from .names import publish_items
from .source import Source, file_source, shop_source
from .table import Tick, table, tick_line

_DRAIN_SECONDS = 120.0
_TICK_SECONDS = 1.0
_WORKERS_LOG, _LOG_LINES = "workers.log", 20
_WINDOWS = {"WINDOW_SECONDS": "600", "GRACE_SECONDS": "60", "IDLE_SECONDS": "3"}
"""Of `innerloop quality`: a replay is some tens of times faster than life, and windows are by the events' own time."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of `innerloop demo`, as the command line has them."""

    seconds: float | None
    events: Path | None
    history: float
    rate: str
    limit: int | None
    columns: Mapping[str, str]
    report: Path | None
    data: Path | None
    workers: int
    console: bool
    seed: int


@dataclass
class Report:
    """The summary; `--report` writes it as JSON."""

    seconds: float = 0.0
    events_produced: int = 0
    events_stored: int = 0
    dead_letters: int = 0
    users_adapted: int = 0
    scores_published: dict[str, int] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    lag_final: int = 0
    hit_rate: dict[str, float] = field(default_factory=dict)
    ok: bool = False


def run_demo(settings: Settings, options: DemoOptions) -> int:
    """Run until Ctrl-C, `seconds`, or the end of the file; 0 when nothing was lost."""
    rate, started, console = parse_rate(options.rate), time.monotonic(), Console()
    # Until the loop runs both signals interrupt whatever is being done; from then on they end it in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = _run(settings, options, rate, console, started)
    except KeyboardInterrupt:
        console.print("Stopped before the loop ran.")
        return 130
    _tell(console, report, options.report)
    return 0 if report.ok else 1


def _run(settings: Settings, options: DemoOptions, rate: float | None, console: Console, started: float) -> Report:
    with running_services(settings, options.data, announce=console.print) as services, _folder(options.data) as folder:
        _point_at(services.bootstrap_servers, services.database_url, folder)
        settings = load_settings()
        console.print(f"== Kafka {services.bootstrap_servers} and PostgreSQL run {_since(started)}", highlight=False)
        engine = connect(settings.database)
        migrate(engine)
        ensure_topics(settings)
        source = _source(options)
        publish_items(settings, source.items)
        console.print(
            f"== training on {len(source.history):,} events of {source.name} {_since(started)}", highlight=False
        )
        release, _ = train_release(settings, engine, source.history)
        demo = _Demo(settings, engine, release, folder, options.workers, page=options.console)
        console.print(f"== {len(release.item_ids):,} items; workers start {_since(started)}", highlight=False)
        return demo.run(source, rate=rate, seconds=options.seconds, console=console, started=started)


class _Demo:
    """One run: the worker processes, the subscriber, and the accounts before and after."""

    def __init__(
        self, settings: Settings, engine: Database, release: Release, folder: Path, workers: int, *, page: bool
    ) -> None:
        self._settings, self._engine, self._workers, self._folder = settings, engine, workers, folder
        self._page = _page_port(settings) if page else None
        self._probes: list[str] = []
        self._subscriber = Subscriber(settings, unadapted_list(release, settings.adapt.top))
        self._producer = EventProducer(settings)
        self._before = self._accounts()
        self._report = Report()

    def run(
        self,
        source: Source,
        *,
        rate: float | None,
        seconds: float | None,
        console: Console,
        started: float,
    ) -> Report:
        """Start the workers, replay, drain, stop; see `Report`."""
        self._subscriber.start()
        pool = self._pool()
        try:
            self._wait_for_members(
                pool, lambda ready: console.print(f"== ready: {ready} {_since(started)}", highlight=False)
            )
            stopping = stop_on_signals()
            console.print(f"== the loop runs {_since(started)}{self._page_sentence()}", highlight=False)
            with LagReader(self._settings) as lags:
                self.lag(lags)  # the first look opens connections, which would hold up the events
                began = time.monotonic()
                self._replay(source, pool, lags, rate=rate, seconds=seconds, stopping=stopping, console=console)
                self._producer.finish()
                self._report.seconds = round(time.monotonic() - began, 3)
                self._report.lag_final = self._drain(lags, pool)
        finally:
            code = pool.stop()
        self._fill(code)
        self._subscriber.close()
        return self._report

    # --- running

    def _pool(self) -> Pool:
        threads = str(max(1, (os.cpu_count() or 1) // self._workers))
        adapts = [["adapt", "--member", "cpu", "--threads", threads] for _ in range(self._workers)]
        members, log = [["ingest"], *adapts], self._folder / _WORKERS_LOG
        if self._page is None:
            return Pool(members, log)
        members.append(["quality"])
        ports = free_ports(len(members) + 1)
        os.environ["INNERLOOP_CONSOLE__TARGETS"] = json.dumps([f"127.0.0.1:{port}" for port in ports[:-1]])
        self._probes = [
            f"http://127.0.0.1:{ports[-2]}/readyz",
            f"http://{self._settings.console.host}:{self._page}/livez",
        ]
        for name, seconds in _WINDOWS.items():
            os.environ.setdefault(f"INNERLOOP_QUALITY__{name}", seconds)
        return Pool([*members, ["console", "--port", str(self._page)]], log, ports=ports)

    def _page_sentence(self) -> str:
        return "" if self._page is None else f": look at http://{self._settings.console.host}:{self._page}/"

    def _wait_for_members(self, pool: Pool, tell: Callable[[str], None]) -> None:
        """Wait until both groups own all their partitions, and quality and the page answer; `tell` hears who is ready.

        The clock of latency should not run while processes start.
        """
        kafka, until, told = self._settings.kafka, time.monotonic() + 60, ""
        wanted = {"ingest": (kafka.ingest_group, 1), "adapt": (kafka.adapt_group, self._workers)}
        while True:
            ready = {name: self._assigned(group) for name, (group, _) in wanted.items()}
            said = ", ".join(f"{ready[name]} of {members} {name}" for name, (_, members) in wanted.items())
            if any(ready.values()) and said != told:
                tell(told := said)
            if all(ready[name] >= members for name, (_, members) in wanted.items()) and all(map(answers, self._probes)):
                return
            if pool.look() or time.monotonic() > until:
                raise ServiceError(f"The workers did not start. The end of their log:\n{self._end_of_log()}")
            time.sleep(0.1)

    def _end_of_log(self) -> str:
        """Quoted, since the folder it lies in may be gone when this is read."""
        text = (self._folder / _WORKERS_LOG).read_text(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_LINES:])

    def _assigned(self, group: str) -> int:
        from innerloop.streams.groups import members_with_partitions  # noqa: PLC0415

        return members_with_partitions(self._settings.kafka, group)

    def _replay(
        self,
        source: Source,
        pool: Pool,
        lags: LagReader,
        *,
        rate: float | None,
        seconds: float | None,
        stopping: Callable[[], bool],
        console: Console,
    ) -> None:
        pace, began = Pace(rate), time.monotonic()
        ticks = _Ticks(self, lags, source.total)
        live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        with live or _nothing():
            for user, kind, item, when, payload in _rows(source.live, pace):
                self._subscriber.about_to_send(user, kind, item, when)
                self._producer.send(user, kind, payload)
                if time.monotonic() - ticks.at >= _TICK_SECONDS:
                    tick = ticks.next()
                    if live:
                        live.update(table(tick, source.name))
                    else:
                        console.print(tick_line(tick), highlight=False, soft_wrap=True)
                    pool.look()
                if stopping() or (seconds is not None and time.monotonic() - began >= seconds):
                    return

    def _drain(self, lags: LagReader, pool: Pool) -> int:
        """Wait until both groups have handled everything; what is left after two minutes."""
        until = time.monotonic() + _DRAIN_SECONDS
        while (left := self.lag(lags)[0]) and time.monotonic() < until:
            pool.look()
            time.sleep(0.2)
        return left

    # --- measuring

    def lag(self, lags: LagReader) -> tuple[int, float]:
        """Offsets behind in both groups together, and the age in seconds of the oldest record not yet handled."""
        kafka, topics = self._settings.kafka, self._settings.topics
        found = lags.read(kafka.ingest_group, topics.events) + lags.read(kafka.adapt_group, [topics.requests])
        return sum(each.offsets for each in found), max((each.seconds or 0.0 for each in found), default=0.0)

    def _accounts(self) -> dict[str, int]:
        topics = self._settings.topics
        ends = end_offsets(self._settings, [topics.dead_letters, topics.recommendations, topics.ads])
        with transaction(self._engine) as connection:
            return {**ends, "handled": accounts.events_handled(connection)}

    def _fill(self, code: int) -> None:
        report, topics = self._report, self._settings.topics
        now = self._accounts()
        since = {name: now[name] - self._before[name] for name in now}
        p50, p99 = self._subscriber.percentiles(whole=True)
        report.events_produced = self._producer.sent
        report.dead_letters = since[topics.dead_letters]
        report.events_stored = since["handled"] - report.dead_letters
        report.users_adapted = self._subscriber.users
        report.scores_published = {"recommendations": since[topics.recommendations], "ads": since[topics.ads]}
        report.latency_ms = {"p50": round(p50, 1), "p99": round(p99, 1)}
        report.hit_rate = {arm: round(value, 4) for arm, value in self._subscriber.hits.rates().items()}
        report.ok = (
            code == 0
            and report.lag_final == 0
            and report.events_produced == report.events_stored + report.dead_letters
            and self._all_fresh()
        )

    def _all_fresh(self) -> bool:
        """Whether each user's newest list names the version of the support set that Postgres has."""
        with transaction(self._engine) as connection:
            stored = accounts.versions(connection)
        until = time.monotonic() + 10
        while (published := self._subscriber.versions()) != stored and time.monotonic() < until:
            time.sleep(0.1)
        return published == stored

    @property
    def subscriber(self) -> Subscriber:
        return self._subscriber

    @property
    def sent(self) -> int:
        return self._producer.sent


class _Ticks:
    """Turns the demo's counters into what one second of it looked like."""

    def __init__(self, demo: _Demo, lags: LagReader, total: int | None) -> None:
        self._demo, self._lags, self._total = demo, lags, total
        self.at = self._began = time.monotonic()
        self._sent = self._records = 0

    def next(self) -> Tick:
        demo, now = self._demo, time.monotonic()
        passed, sent, records = now - self.at, demo.sent, demo.subscriber.records
        offsets, seconds = demo.lag(self._lags)
        p50, p99 = demo.subscriber.percentiles()
        tick = Tick(
            seconds=now - self._began,
            events=sent,
            total=self._total,
            events_per_second=(sent - self._sent) / passed,
            adapted_per_second=(records - self._records) / passed,
            lag_offsets=offsets,
            lag_seconds=seconds,
            p50_ms=p50,
            p99_ms=p99,
            hit_rates=demo.subscriber.hits.rates(),
            clicks=demo.subscriber.hits.clicks,
        )
        self.at, self._sent, self._records = now, sent, records
        return tick


def _rows(chunks: Iterator[pl.DataFrame], pace: Pace) -> Iterator[tuple[str, str, str, int, bytes]]:
    """Every event when it is due: user, type, item, time, and the record."""
    due = 0
    for chunk in chunks:
        columns = (chunk[name].to_list() for name in ("user_id", "event_type", "item_id", "event_time"))
        for row in zip(*columns, encode_events(chunk), strict=True):
            while due == 0:
                due = pace.due()
                if due == 0:
                    time.sleep(0.001)
            due -= 1
            yield row


def _page_port(settings: Settings) -> int:
    """The port set, or a free one where that is taken."""
    try:
        require_free("The page", [settings.console.port])
    except ServiceError:
        return free_ports(1)[0]
    return settings.console.port


def _source(options: DemoOptions) -> Source:
    if options.events is None:
        return shop_source(options.seed, int(time.time() * 1000))
    return file_source(options.events, options.columns, options.history, options.limit)


def _point_at(bootstrap_servers: str, database_url: str, folder: Path) -> None:
    """Settings of the worker processes: they read the environment as anyone's would."""
    os.environ["INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"] = bootstrap_servers
    os.environ["INNERLOOP_DATABASE__URL"] = SecretStr(database_url).get_secret_value()
    os.environ["INNERLOOP_LEARNING__RELEASES_DIR"] = str(folder / "releases")
    # The synthetic shop's clicks have no order to learn, and nobody should wait while that is found out.
    os.environ.setdefault("INNERLOOP_LEARNING__SEQUENCE", "off")


@contextmanager
def _folder(data: Path | None) -> Iterator[Path]:
    if data is not None:
        yield data.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="innerloop-demo-") as name:
        yield Path(name)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _since(started: float) -> str:
    return f"(after {time.monotonic() - started:.1f} s)"


def _tell(console: Console, report: Report, path: Path | None) -> None:
    text = json.dumps(asdict(report), indent=2)
    console.print(text, highlight=False)
    if path is not None:
        path.write_text(text + "\n")
