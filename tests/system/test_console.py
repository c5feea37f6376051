"""The console in a real browser, against what the broker and the database say."""

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from programs import program
from shell import Shell

from innerloop.client import newest
from innerloop.config import Settings
from innerloop.evaluation.shop import Shop
from innerloop.scores import RecommendationScores
from innerloop.store import accounts
from innerloop.store.database import connect
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.lag import group_lag
from innerloop.streams.offsets import end_offsets
from innerloop.worker.watched_process import free_ports

Wait = Callable[..., None]
CHROMIUM = Path("/usr/bin/chromium")
# Its own calls home would be refused, many at a time.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
EVENTS = 60
EVENT = '{{"event_id":"live-{0}","event_type":"click","user_id":"live user","item_id":"{1}","event_time":{2}}}'
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's package chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def console(shell: Shell, settings: Settings, wait_for: Wait) -> Iterator[str]:
    """The page's address, with ingest and adapt running and everything handled."""
    assert shell.run("topics").code == 0
    shop = Shop(1, users=100, items=60)
    shop.history(1_500).write_csv(shell.folder / "shop.csv")
    assert shell.run("train", "--events", "shop.csv").code == 0
    http, page = free_ports(2)
    shell.start("adapt", "--member", "cpu", INNERLOOP_HTTP__PORT=str(http))
    shell.start("ingest")
    producer = EventProducer(settings)
    items = [f"{item}" for item in shop.history(1_500)["item_id"][:EVENTS]]
    for number, item in enumerate(items):
        producer.send("live user", "click", EVENT.format(number, item, 1_750_000_000_000 + number).encode())
    producer.send("live user", "click", b"not an event")
    producer.finish()
    wait_for(lambda: newest_size(settings) == EVENTS, 60)
    process = shell.start("console", "--port", str(page), INNERLOOP_CONSOLE__TARGETS=json.dumps([f"127.0.0.1:{http}"]))
    where = f"http://127.0.0.1:{page}/"
    wait_for(lambda: answers(where))
    yield where
    process.send_signal(signal.SIGTERM)
    assert shell.finish(process, 20).code == 0
    assert "Traceback" not in shell.errors(process)


def newest_size(settings: Settings) -> int:
    found = newest(settings, "recommendations", "live user")
    return found.support_size if isinstance(found, RecommendationScores) else 0


def answers(where: str) -> bool:
    try:
        with urllib.request.urlopen(where, timeout=5) as answer:  # noqa: S310 - http
            return bool(answer.status == 200)
    except OSError:
        return False


def number(text: str | None, pattern: str) -> int:
    found = re.search(pattern, text or "")
    assert found, text
    return int(found[1].replace(",", ""))


def open_page(browser: Browser, where: str, width: int, height: int, scheme: str) -> tuple[Page, list[str]]:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(where)
    return page, asked


def test_the_page_tells_the_truth_on_a_desktop_and_on_a_phone(
    console: str, browser: Browser, settings: Settings, tmp_path: Path, wait_for: Wait
) -> None:
    """One test, since what it needs takes long to start."""
    shows_lag_for_prometheus(console, settings, wait_for)
    its_numbers_are_the_broker_s_and_the_database_s(console, browser, settings, tmp_path)
    it_fits_a_phone_in_the_dark_and_works_by_keyboard(console, browser, tmp_path)
    a_stranger_s_client_reads_the_same_list(settings)


def a_stranger_s_client_reads_the_same_list(settings: Settings) -> None:
    """Kcat, which knows nothing of us but the topic's name."""
    kcat = program("kcat", "Debian's package kcat")
    command = [kcat, "-C", "-b", settings.kafka.bootstrap_servers, "-t", settings.topics.recommendations]
    done = subprocess.run(
        [*command, "-o", "beginning", "-e", "-q", "-f", "%k\t%s\n"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    last = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    found = newest(settings, "recommendations", "live user")
    assert msgspec.json.decode(last["live user"], type=RecommendationScores) == found


def its_numbers_are_the_broker_s_and_the_database_s(
    console: str, browser: Browser, settings: Settings, tmp_path: Path
) -> None:
    page, asked = open_page(browser, console, 1280, 900, "light")
    events = page.locator("[data-test=events]")
    ends = end_offsets(settings, [*settings.topics.events, settings.topics.recommendations, settings.topics.ads])
    expect(events).to_contain_text(f"{sum(ends[topic] for topic in settings.topics.events):,} in all")
    assert number(events.text_content(), r"([\d,]+) in all") == EVENTS + 1
    published = ends[settings.topics.recommendations] + ends[settings.topics.ads]
    expect(page.locator("[data-test=scores]")).to_contain_text(f"{published:,} in all")
    behind = sum(lag.offsets for lag in group_lag(settings, settings.kafka.ingest_group, settings.topics.events))
    expect(page.locator("[data-test=ingest]")).to_contain_text(f"{behind:,} behind")
    engine = connect(settings.database)
    with engine.connect() as connection:
        users = accounts.users(connection)
        version = accounts.versions(connection)["live user"]
    engine.dispose()
    expect(page.get_by_text(f"{users:,} users")).to_be_visible()
    expect(page.get_by_role("cell", name="undecodable")).to_be_visible()

    page.get_by_label("user id").fill("live user")
    page.get_by_label("user id").press("Enter")
    chain = page.locator("[data-test=chain]")
    expect(chain).to_contain_text(f"support set version {version}", timeout=20_000)
    expect(chain).to_contain_text("Fresh")
    found = newest(settings, "recommendations", "live user")
    assert isinstance(found, RecommendationScores)
    listed = page.locator(".q-table__container", has_text="Recommendations").locator("tbody tr")
    assert [cell.strip() for cell in listed.locator("td:nth-child(2)").all_text_contents()] == [
        item.item_id for item in found.items[:10]
    ]
    page.screenshot(path=tmp_path / "console-desktop.png", full_page=True)
    assert all(url.startswith((console, console.replace("http", "ws"), "data:")) for url in asked), asked


def it_fits_a_phone_in_the_dark_and_works_by_keyboard(console: str, browser: Browser, tmp_path: Path) -> None:
    page, _ = open_page(browser, console, 390, 844, "dark")
    expect(page.locator("[data-test=events]")).to_contain_text("in all")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "dark" in (page.locator("body").get_attribute("class") or "")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "user id":
            break
    page.keyboard.type("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing is stored or published of user nobody.")).to_be_visible(timeout=20_000)
    page.screenshot(path=tmp_path / "console-phone.png", full_page=True)


def shows_lag_for_prometheus(console: str, settings: Settings, wait_for: Wait) -> None:
    def shown() -> str:
        with urllib.request.urlopen(console + "metrics", timeout=5) as answer:  # noqa: S310 - http
            return str(answer.read().decode())

    wait_for(lambda: f'innerloop_lag_offsets{{group="{settings.kafka.adapt_group}"' in shown())
