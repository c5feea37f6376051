"""A real Prometheus over the running loop, with the rules and the dashboard that are deployed."""

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import yaml  # type: ignore[import-untyped]
from deployment import DEPLOY, metric_names, panels
from programs import program
from quality_shop import Shop as QualityShop
from shell import Shell

from innerloop.config import Settings
from innerloop.evaluation.shop import Shop
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.topics import ensure_topics
from innerloop.worker.servers.watched_process import free_ports

SECONDS_OF_A_MINUTE = 3
NOT_HERE = {"innerloop_gpu_memory_bytes", "innerloop_gpu_busy_ratio"}  # where there is no GPU


class Prometheus:
    """The server's answers."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer, None when nobody answers yet."""
        try:
            asked = f"{path}?{urllib.parse.urlencode(parameters)}"
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{asked}") as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def data(self, query: str) -> list[Any]:
        """What a query returns, without what is not a number."""
        found = self.ask("query", query=query) or {"result": []}
        return [each for each in found["result"] if each["value"][1] != "NaN"]

    def firing(self) -> set[tuple[str, str]]:
        """Alert and group (or job) of all that fire."""
        alerts = (self.ask("alerts") or {"alerts": []})["alerts"]
        return {
            (each["labels"]["alertname"], each["labels"].get("group") or each["labels"].get("job", ""))
            for each in alerts
            if each["state"] == "firing"
        }


def hurried(text: str) -> str:
    """The same rules, with seconds for minutes."""
    text = re.sub(r"(?<=for: )30s", "2s", text).replace(":15s]", ":1s]")
    return re.sub(r"\b(\d+)m\b", lambda found: f"{SECONDS_OF_A_MINUTE * int(found[1])}s", text)


@pytest.fixture
def ports() -> dict[str, int]:
    return dict(zip(("ingest", "adapt", "quality", "console", "prometheus"), free_ports(5), strict=True))


@pytest.fixture
def prometheus(ports: dict[str, int], tmp_path: Path) -> Iterator[Prometheus]:
    """Scraping the ports of this test under the jobs of the real configuration."""
    folder = tmp_path / "prometheus"
    folder.mkdir()
    (folder / "rules.yml").write_text(hurried((DEPLOY / "prometheus" / "rules.yml").read_text()))
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    jobs = [job for job in configuration["scrape_configs"] if job["job_name"] in ports]
    for job in jobs:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump({**configuration, "scrape_configs": jobs}))
    command = [
        program("prometheus", "apt-get install prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
    ]
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    yield Prometheus(ports["prometheus"])
    server.kill()
    server.wait()


@pytest.fixture
def loop(shell: Shell, settings: Settings, ports: dict[str, int]) -> Callable[[str], Any]:
    """A released model and a steady stream of events; called with a command, it starts that with its listener."""
    ensure_topics(settings)
    history = Shop(5, users=300, items=200).history(48_000)  # 20 minutes of it
    history.head(3_000).write_csv(shell.folder / "history.csv")
    history.write_csv(shell.folder / "events.csv")
    trained = shell.finish(shell.start("train", "--events", "history.csv"), 120)
    assert trained.code == 0, trained.err
    shell.start("replay", "events.csv", "--rate", "40", "--shift-to-now")

    def start(command: str) -> Any:
        if command == "console":
            return shell.start("console", "--port", str(ports["console"]))
        return shell.start(command, INNERLOOP_HTTP__PORT=str(ports[command]))

    for command in ("ingest", "console"):
        start(command)
    return start


def judge(shell: Shell, settings: Settings, port: int) -> None:
    """`innerloop quality` over topics of its own, which hold two days of a shop's: its labels come after 24 hours."""
    mark = f"{settings.kafka.quality_group}.judged"
    topics = {name: f"{name}.{mark}" for name in ("clicks", "purchases", "recommendations", "ads", "quality_windows")}
    there = settings.model_copy(update={"topics": settings.topics.model_copy(update=topics)})
    ensure_topics(there)
    past = QualityShop(there)
    past.go_on(400)
    past.a_day_later()
    past.go_on(400)
    past.pass_time(240)
    quality = {"window_seconds": 60, "grace_seconds": 90, "idle_seconds": 2, "from_beginning": True}
    shell.start(
        "quality",
        INNERLOOP_HTTP__PORT=str(port),
        INNERLOOP_TOPICS=there.topics.model_dump_json(),
        INNERLOOP_QUALITY=json.dumps({**quality, "events_per_second": 10_000_000}),
    )


@pytest.mark.timeout(900)
def test_the_lag_alerts_fire_and_resolve_and_the_dashboard_has_data(
    prometheus: Prometheus, loop: Callable[[str], Any], settings: Settings, shell: Shell, ports: dict[str, int]
) -> None:
    group = settings.kafka.adapt_group
    adapt = loop("adapt")
    judge(shell, settings, ports["quality"])
    poison = EventProducer(settings)
    poison.send("user", "click", b"no event")
    poison.finish()
    settled(lambda: empty_panels(prometheus))
    settled(lambda: {alert for alert, of in prometheus.firing() if of == group})

    stopped = {("InnerloopGroupStopped", group), ("InnerloopDown", "adapt")}
    adapt.terminate()
    adapt.wait()
    settled(lambda: stopped - prometheus.firing())
    loop("adapt")
    settled(lambda: stopped & prometheus.firing())

    stalled = {("InnerloopLagStalled", settings.kafka.ingest_group)}
    with psycopg2.connect(settings.database.url.get_secret_value().replace("+psycopg2", "")) as connection:
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE support_sets IN ACCESS EXCLUSIVE MODE")
        settled(lambda: stalled - prometheus.firing())
    connection.close()
    settled(lambda: stalled & prometheus.firing())


def settled(look: Callable[[], object], seconds: float = 150.0) -> None:
    """Wait until nothing is left to wait for; what is left is told."""
    until = time.monotonic() + seconds
    while left := look():
        assert time.monotonic() < until, left
        time.sleep(0.2)


def empty_panels(prometheus: Prometheus) -> list[str]:
    """Queries of the dashboard that return nothing, those excepted that cannot return anything here."""
    if prometheus.ask("query", query="up") is None:
        return ["no answer"]
    return [
        f"{title}: {query}"
        for title, asked in panels()
        for query in asked
        if not NOT_HERE & metric_names(query) and not prometheus.data(hurried(query))
    ]
