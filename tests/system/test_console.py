"""The console in a real browser, against what the broker, the database and the processes say."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from programs import program
from shell import Shell

from innerloop.client import newest, newest_two
from innerloop.config import Settings
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.evaluation.shop import Shop
from innerloop.scores import AdScores, RecommendationScores
from innerloop.store import accounts, support_sets
from innerloop.store.database import connect
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.lag import group_lag
from innerloop.streams.offsets import end_offsets
from innerloop.streams.whole_topic import whole_topic
from innerloop.worker.demo.names import named, publish_items
from innerloop.worker.scrape import Scraped, scrape
from innerloop.worker.servers.watched_process import free_ports

Wait = Callable[..., None]
CHROMIUM = Path("/usr/bin/chromium")
# Its own calls home would be refused, many at a time.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))
PATIENCE = 60_000
"""Milliseconds for what the page shows; the machine may be busy."""
USER, EVENTS, ADS = "a live user", 60, 3
"""The user is in the adapted arm."""
FRAMED = """() => {
    const field = document.activeElement.closest('.q-field')?.querySelector('.q-field__control')
    const framed = each => each && getComputedStyle(each).boxShadow.includes('0px 0px 0px 3px')
    return framed(document.activeElement) || framed(field)
}"""
"""Whether it is seen what has the focus: of a field, its frame tells."""
TEXTS = """table => [...table.querySelectorAll('thead tr, tbody tr')].map(
    row => [...row.children].map(cell => cell.textContent.trim())
)"""
ODD_NAMES = (
    "跑鞋, حذاء الجري",
    "<img src=x onerror=alert(1)> {{ 7 * 7 }} & Sons",
    "A name that goes on for longer than any cell is wide, and has " + "W" * 100,
)
IN_PARALLEL = 30
"""Other users, in both arms, whose clicks quality judges."""


@dataclass
class Loop:
    """Ingest, adapt and quality at work; `send` adds events, a time each of them."""

    settings: Settings
    shell: Shell
    targets: list[str]
    items: list[str]
    wait_for: Wait
    sent: int = 0
    newest: int = 0

    def send(self, user: str, *items: str, kind: str = "click") -> None:
        producer = EventProducer(self.settings)
        for item in items:
            self.sent += 1
            self.newest = max(int(time.time() * 1000), self.newest + 1)
            event: dict[str, Any] = {"event_id": f"e-{self.sent}", "event_type": kind, "user_id": user}
            event |= {"item_id": item, "event_time": self.newest}
            if self.sent <= ADS:
                event["ad_id"] = f"ad-{self.sent}"
            producer.send(user, kind, json.dumps(event).encode())
        producer.finish()

    def send_bad(self) -> None:
        producer = EventProducer(self.settings)
        producer.send(USER, "click", b"not an event")
        producer.finish()

    def listed(self, size: int) -> bool:
        """Whether the user's list is made of so many events."""
        found = newest(self.settings, "recommendations", USER)
        return isinstance(found, RecommendationScores) and found.support_size == size


@pytest.fixture
def loop(shell: Shell, settings: Settings, wait_for: Wait) -> Loop:
    """Everything handled, and a window judged."""
    assert shell.run("topics").code == 0
    shop = Shop(1, users=100, items=60)
    history = shop.history(1_500)
    history.write_csv(shell.folder / "shop.csv")
    assert shell.finish(shell.start("train", "--events", "shop.csv"), 300).code == 0
    ports = free_ports(3)
    quick = {"WINDOW_SECONDS": "5", "GRACE_SECONDS": "1", "IDLE_SECONDS": "1", "HOLD_OUT": "0.5"}
    quality = {f"INNERLOOP_QUALITY__{name}": value for name, value in quick.items()}
    quality["INNERLOOP_QUALITY__FROM_BEGINNING"] = "true"
    for command, port in zip((["adapt", "--member", "cpu"], ["ingest"], ["quality"]), ports, strict=True):
        shell.start(*command, INNERLOOP_HTTP__PORT=str(port), **quality)
    items = [f"{item}" for item in history["item_id"][:EVENTS]]
    made = Loop(settings, shell, [f"127.0.0.1:{port}" for port in ports], items, wait_for)
    made.send(USER, *items)
    made.send_bad()
    for number in range(IN_PARALLEL):
        made.send(f"u-{number}", *items[:3])
    wait_for(lambda: made.listed(EVENTS), 300)
    return made


@pytest.fixture
def console(loop: Loop) -> Iterator[str]:
    """The page's address; it is ready."""
    yield from serve(loop.shell, loop.targets, loop.wait_for)


@pytest.fixture
def idle_console(shell: Shell, wait_for: Wait) -> Iterator[str]:
    """The same where nothing else runs."""
    assert shell.run("topics").code == 0
    yield from serve(shell, ["127.0.0.1:1"], wait_for)


def serve(shell: Shell, targets: list[str], wait_for: Wait) -> Iterator[str]:
    (port,) = free_ports(1)
    process = shell.start("console", "--port", str(port), INNERLOOP_CONSOLE__TARGETS=json.dumps(targets))
    where = f"http://127.0.0.1:{port}/"
    wait_for(lambda: answer(where + "readyz")[0] == 200, 120)
    yield where
    process.send_signal(signal.SIGTERM)
    assert shell.finish(process, 60).code == 0
    assert "Traceback" not in shell.errors(process)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip("needs chromium: Debian's package chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def answer(where: str) -> tuple[int, str]:
    with suppress(OSError), urllib.request.urlopen(where, timeout=5) as found:  # noqa: S310 - http
        return found.status, found.read().decode()
    return 0, ""


def windows(settings: Settings) -> list[QualityWindow]:
    told = [
        msgspec.json.decode(record.value or b"", type=QualityWindow)
        for record in whole_topic(settings, settings.topics.quality_windows)
    ]
    return sorted({each.window_start: each for each in told}.values(), key=lambda each: each.window_start)


def open_page(browser: Browser, where: str, width: int, height: int, scheme: Any) -> tuple[Page, list[str]]:
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(where)
    expect(edge(page, "events")).to_contain_text("in all")
    return page, asked


def edge(page: Page, name: str) -> Locator:
    return page.locator(f"[data-test=edge-{name}]")


def rows_of(page: Page, table: str) -> list[dict[str, str]]:
    """A table's rows, by title, all of one moment: in the next there may be others."""
    titles, *rows = page.locator(f"[data-test={table}]").evaluate(TEXTS)
    return [dict(zip(titles, row, strict=True)) for row in rows if len(row) == len(titles)]


def column(page: Page, table: str, title: str) -> list[str]:
    """The cells of a table's column."""
    return [row[title] for row in rows_of(page, table)]


def plotted(page: Page, name: str) -> dict[str, list[tuple[int, float]]]:
    """The points that a chart has, by line."""
    chart = page.locator(f"[data-test=plot-{name}]")
    series = chart.evaluate("element => getElement(element.id.slice(1)).chart.getOption().series")
    return {line["name"]: [(int(at), float(value)) for at, value in line["data"]] for line in series}


def photograph(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"console-{name}.png", full_page=True)


def look_up(page: Page, user: str) -> Locator:
    page.get_by_label("user id").fill(user)
    page.get_by_label("user id").press("Enter")
    return page.locator("[data-test=chain]")


@pytest.mark.timeout(600)
def test_the_page_tells_the_truth(console: str, browser: Browser, loop: Loop, wait_for: Wait) -> None:
    """One test, since what it needs takes long to start."""
    page, asked = open_page(browser, console, 1280, 900, "light")
    the_way_is_as_the_broker_and_the_processes_say(page, loop)
    the_tables_are_as_the_broker_and_the_database_say(page, loop)
    the_quality_is_as_it_was_told(page, loop, wait_for)
    the_user_is_as_stored_and_published(page, loop)
    names = the_items_have_the_names_that_the_shop_tells(page, loop)
    a_click_moves_the_list(page, loop, names, wait_for)
    who_asks_twice_has_one_answer(page)
    the_plots_are_what_was_measured(page, loop, wait_for)
    photograph(page, "desktop-light")
    assert all(url.startswith((console, console.replace("http", "ws"), "data:")) for url in asked), asked
    dark = open_with_user(browser, console, 1280, 900)
    photograph(dark, "desktop-dark")
    every_control_is_reached_by_keyboard(dark)
    it_fits_a_phone_in_the_dark(browser, console)


def the_way_is_as_the_broker_and_the_processes_say(page: Page, loop: Loop) -> None:
    settings, topics, kafka = loop.settings, loop.settings.topics, loop.settings.kafka
    ends = end_offsets(settings, [*topics.ingested, topics.requests, topics.recommendations, topics.ads])
    assert sum(ends[topic] for topic in topics.ingested) == loop.sent + 1
    expect(edge(page, "events")).to_contain_text(f"{loop.sent + 1:,} in all")
    expect(edge(page, "requests")).to_contain_text(f"{ends[topics.requests]:,} in all")
    expect(edge(page, "scores")).to_contain_text(f"{ends[topics.recommendations] + ends[topics.ads]:,} in all")
    for name, group, read in (
        ("events", kafka.ingest_group, topics.ingested),
        ("requests", kafka.adapt_group, [topics.requests]),
    ):
        assert sum(each.offsets for each in group_lag(settings, group, read)) == 0
        expect(edge(page, name)).to_contain_text("0 behind, 0.0 s")
        expect(edge(page, name)).to_contain_text("0/s")
    expect(edge(page, "letters")).to_contain_text("1 letters, 1 not replayed")
    expect(edge(page, "releases")).to_contain_text("1 in force")
    expect(edge(page, "releases")).to_contain_text("0 of 1 processes behind")
    expect(page.locator("[data-test=ingest]")).to_contain_text("ok")
    expect(page.locator("[data-test=adapt]")).to_contain_text("ok")


def the_tables_are_as_the_broker_and_the_database_say(page: Page, loop: Loop) -> None:
    settings = loop.settings
    engine = connect(settings.database)
    with engine.connect() as connection:
        users = accounts.users(connection)
    engine.dispose()
    assert users == 1 + IN_PARALLEL
    expect(page.locator("[data-test=at]")).to_contain_text(f"{users:,} users")
    expect(page.locator("[data-test=letters]").get_by_role("cell", name="undecodable")).to_be_visible()
    assert column(page, "letters", "letters") == ["1"]
    assert "JSON" in column(page, "letters", "example")[0]
    assert column(page, "releases", "version") == ["1"]
    loop.wait_for(lambda: column(page, "processes", "up") == ["yes"] * 3, 60)  # one may answer late for once
    expect(page.locator("[data-test=partitions]")).to_contain_text(settings.kafka.quality_group)
    topics, kafka = settings.topics, settings.kafka
    judged = (topics.clicks, topics.purchases, topics.recommendations, topics.ads)
    wanted = Counter(
        {(kafka.ingest_group, topic): topics.partitions for topic in topics.ingested}
        | {(kafka.adapt_group, topics.requests): topics.partitions}
        | {(kafka.quality_group, topic): topics.partitions for topic in judged}
    )

    def all_is_well() -> bool:
        """Once quality has joined and committed: nothing before has waited for that."""
        rows = rows_of(page, "partitions")
        assert Counter((row["group"], row["topic"]) for row in rows) == wanted
        return all(row["owner"] != "nobody" and row["status"] in {"ok", "warning"} for row in rows)

    loop.wait_for(all_is_well, 60)


def the_quality_is_as_it_was_told(page: Page, loop: Loop, wait_for: Wait) -> None:
    """Clicks of users with lists, until a window has both arms."""

    def judged() -> bool:
        for number in range(IN_PARALLEL):
            loop.send(f"u-{number}", loop.items[loop.sent % len(loop.items)])
        time.sleep(1)
        return any(window.lift for window in windows(loop.settings))

    wait_for(judged, 180)
    wait_for(lambda: shown_quality(page) == told_quality(windows(loop.settings)[-1]), 120)

    def is_plotted() -> bool:
        """Another window may be told at any moment."""
        wanted = told_hit_rates(windows(loop.settings))
        assert wanted["adapted"]
        return {name.replace("-", "_"): points for name, points in plotted(page, "hit-rate").items()} == wanted

    wait_for(is_plotted, 60)


def told_hit_rates(told: list[QualityWindow]) -> dict[str, Any]:
    return {
        arm: [
            (window.window_end, pytest.approx(at.hit_rate))
            for window in told
            for group in window.arms
            for at in group.at
            if at.k == 20 and group.arm == arm and group.clicks
        ]
        for arm in ("adapted", "hold_out", "placebo")
    }


def shown_quality(page: Page) -> dict[tuple[str, str], list[str]]:
    titles = ("users", "clicks", "hit@10", "mrr@10", "hit@20", "mrr@20")
    rows = rows_of(page, "quality-table")
    return {(row["arm"].replace("-", "_"), row["model"]): [row[title] for title in titles] for row in rows}


def told_quality(window: QualityWindow) -> dict[tuple[str, str], list[str]]:
    return {
        (group.arm, "all" if group.model_version is None else str(group.model_version)): [
            f"{group.users:,}",
            f"{group.clicks:,}",
            *(f"{value:.3f}" if group.clicks else "" for at in group.at for value in (at.hit_rate, at.mrr)),
        ]
        for group in [*window.arms, *window.versions]
    }


def the_user_is_as_stored_and_published(page: Page, loop: Loop) -> None:
    settings = loop.settings
    engine = connect(settings.database)
    with engine.connect() as connection:
        version = accounts.versions(connection)[USER]
        _, sets, _ = support_sets.read(connection, [USER])
    engine.dispose()
    chain = look_up(page, USER)
    expect(chain).to_contain_text(f"support set version {version}, {EVENTS} events")
    expect(chain).to_contain_text("fresh")
    shown, ads = newest(settings, "recommendations", USER), newest(settings, "ads", USER)
    assert isinstance(shown, RecommendationScores)
    assert isinstance(ads, AdScores)
    assert column(page, "listed", "item") == [item.item_id for item in shown.items[:10]]
    assert column(page, "listed", "score") == [f"{item.score:.4f}" for item in shown.items[:10]]
    assert len(ads.ads) == ADS
    assert column(page, "ads", "ad") == [ad.ad_id for ad in ads.ads]
    assert column(page, "ads", "item") == [ad.item_id for ad in ads.ads]
    for at, title in enumerate(ads.columns):
        assert column(page, "ads", title) == [ads.written(ad)[at] for ad in ads.ads]
    times = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(int(ms) / 1000)) for ms in sets.examples["time"][::-1]]
    assert column(page, "support", "time") == times[:10]
    assert column(page, "support", "item") == loop.items[::-1][:10]
    assert set(column(page, "support", "event")) == {"click"}


def the_items_have_the_names_that_the_shop_tells(page: Page, loop: Loop) -> dict[str, str]:
    """Which are of any length and alphabet, and may look like markup; an item may have none."""
    expect(page.locator("[data-test=names]")).to_contain_text(f"Topic {loop.settings.topics.items} holds no names")
    shown, ads = newest(loop.settings, "recommendations", USER), newest(loop.settings, "ads", USER)
    assert isinstance(shown, RecommendationScores)
    assert isinstance(ads, AdScores)
    told = list(named(Shop(1, users=100, items=60).catalogue()))
    odd = dict(zip((item.item_id for item in shown.items), ODD_NAMES, strict=False))
    bare = shown.items[len(ODD_NAMES)].item_id
    items = [msgspec.structs.replace(item, name=odd.get(item.item_id, item.name)) for item in told]
    publish_items(loop.settings, [item for item in items if item.item_id != bare])
    names = {item.item_id: item.name for item in items if item.item_id != bare}

    def all_is_known() -> bool:
        expect(look_up(page, "")).to_have_count(0)
        expect(look_up(page, USER)).to_be_visible()
        return not page.locator("[data-test=names]").inner_text()

    loop.wait_for(all_is_known, 60)
    assert named_items(page, "listed") == [(names.get(each.item_id), each.item_id) for each in shown.items[:10]]
    assert named_items(page, "ads") == [(names.get(each.item_id), each.item_id) for each in ads.ads]
    assert named_items(page, "support") == [(names.get(item), item) for item in loop.items[::-1][:10]]
    assert {name for name, _ in named_items(page, "listed")} >= {None, *ODD_NAMES}
    return names


def who_asks_twice_has_one_answer(page: Page) -> None:
    look_up(page, "nobody")
    look_up(page, USER)
    expect(look_up(page, USER)).to_be_visible()
    expect(page.locator(".q-spinner")).to_have_count(0)
    expect(page.locator("[data-test=chain]")).to_have_count(1)
    expect(page.get_by_text("Nothing is stored or published of user nobody")).to_have_count(0)


def named_items(page: Page, table: str) -> list[tuple[str | None, str]]:
    """The names of a table's items, where they have one, and the ids."""
    rows = page.locator(f"[data-test={table}]")
    place = rows.locator("thead th").all_text_contents().index("item") + 1
    cells = rows.locator(f"tbody tr td:nth-child({place})").all()
    parts = [[part.strip() for part in cell.locator("div").all_text_contents()] for cell in cells]
    return [(each[0] if len(each) > 1 else None, each[-1]) for each in parts]


def a_click_moves_the_list(page: Page, loop: Loop, names: dict[str, str], wait_for: Wait) -> None:
    loop.send(USER, loop.items[0])
    wait_for(lambda: loop.listed(EVENTS + 1), 120)
    shown, before = newest_two(loop.settings, "recommendations", USER)
    assert isinstance(shown, RecommendationScores)
    assert isinstance(before, RecommendationScores)
    assert before.support_size == EVENTS
    chain = look_up(page, USER)
    expect(chain).to_contain_text(f"{EVENTS + 1} events")
    places = {item.item_id: place for place, item in enumerate(before.items)}
    moves = []
    for place, item in enumerate(shown.items):
        risen = places.get(item.item_id, 10_000) - place
        word = f"up {risen}" if risen > 0 else f"down {-risen}" if risen < 0 else "same"
        moves.append(word if item.item_id in places else "new")
    assert column(page, "listed", "change") == moves[:10]
    expect(page.locator("[data-test=change]")).to_contain_text(
        f"After the click on {names[loop.items[0]]} ({loop.items[0]})"
        if loop.items[0] in names
        else f"After the click on {loop.items[0]} at"
    )
    counted = Counter(move.split()[0] for move in moves)
    expect(page.locator("[data-test=change]")).to_contain_text(f"{counted['up']} up, {counted['down']} down")


def the_plots_are_what_was_measured(page: Page, loop: Loop, wait_for: Wait) -> None:
    wait_for(lambda: all(plotted(page, "latency").values()), 60)

    def answered() -> bool:
        return scrape(loop.targets[:1])[0].up

    wait_for(answered)
    (adapt,) = scrape(loop.targets[:1])
    low, high = bounds(adapt, "innerloop_event_to_score_seconds")
    points = plotted(page, "latency")
    assert [at for at, _ in points["p50"]] == [at for at, _ in points["p99"]]
    for (_, p50), (_, p99) in zip(points["p50"], points["p99"], strict=True):
        assert 1000 * low <= p50 <= p99 <= 1000 * high
    lag, throughput = plotted(page, "lag"), plotted(page, "throughput")
    for at, value in [point for line in (*lag.values(), *throughput.values()) for point in line]:
        assert value >= 0
        assert time.time() - 3_600 <= at / 1000 <= time.time() + 1
    assert lag["ingest"]
    assert lag["adapt"]
    # A point is a second's: together they are what came since the console began, but for the looks between.
    for line in ("events", "requests", "scores"):
        assert 0 < sum(value for _, value in throughput[line]) <= 2 * loop.sent
    for name, to in (("events", "to Postgres"), ("requests", "to the list"), ("scores", "event to list")):
        expect(edge(page, name)).to_contain_text(re.compile(to + r": p50 [\d,]+(\.\d)? m?s, p99 [\d,]+(\.\d)? m?s"))


def bounds(process: Scraped, name: str) -> tuple[float, float]:
    """Between which all observations of a histogram lie."""
    found = process.values.items()
    buckets = sorted((float(dict(labels)["le"]), value) for (each, labels), value in found if each == f"{name}_bucket")
    low = max((bound for bound, count in buckets if count == 0), default=0.0)
    return low, min(bound for bound, count in buckets if count == buckets[-1][1])


def open_with_user(browser: Browser, where: str, width: int, height: int) -> Page:
    page, _ = open_page(browser, where, width, height, "dark")
    expect(look_up(page, USER)).to_contain_text("fresh")
    return page


def it_fits_a_phone_in_the_dark(browser: Browser, console: str) -> None:
    page = open_with_user(browser, console, 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "dark" in (page.locator("body").get_attribute("class") or "")
    photograph(page, "phone-dark")


def every_control_is_reached_by_keyboard(page: Page) -> None:
    controls = page.locator("button:enabled:visible, input:visible, a[href]:visible, select:visible")
    wanted = set(controls.evaluate_all("each => each.map((element, place) => (element.dataset.place = place) + '')"))
    assert len(wanted) >= 2
    page.evaluate("document.activeElement.blur()")
    reached: set[str] = set()
    for _ in range(2 * len(wanted) + 10):
        page.keyboard.press("Tab")
        place = page.evaluate("document.activeElement.dataset.place")
        if place is not None:
            reached.add(place)
            assert page.evaluate(FRAMED), page.evaluate("document.activeElement.outerHTML")
    assert reached == wanted
    while page.evaluate("document.activeElement.getAttribute('aria-label')") != "user id":
        page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing is stored or published of user nobody")).to_be_visible()


def test_every_control_is_reached_by_keyboard(idle_console: str, browser: Browser) -> None:
    every_control_is_reached_by_keyboard(open_page(browser, idle_console, 1280, 900, "light")[0])


def test_probes_and_lag_for_prometheus(idle_console: str, settings: Settings) -> None:
    assert answer(idle_console + "livez") == (200, "The loop turns.\n")
    shown = answer(idle_console + "metrics")[1]
    for group in (settings.kafka.ingest_group, settings.kafka.adapt_group):
        assert f'innerloop_lag_offsets{{group="{group}"' in shown
    looked = re.search(r"^innerloop_console_looked_timestamp_seconds (\S+)$", shown, re.MULTILINE)
    assert looked
    assert abs(time.time() - float(looked[1])) < 60


@pytest.mark.timeout(600)
def test_a_stranger_s_client_reads_the_same_list(loop: Loop, settings: Settings) -> None:
    """Kcat, which knows nothing of us but the topic's name."""
    kcat = program("kcat", "Debian's package kcat")
    command = [kcat, "-C", "-b", settings.kafka.bootstrap_servers, "-t", settings.topics.recommendations]
    done = subprocess.run(
        [*command, "-o", "beginning", "-e", "-q", "-f", "%k\t%s\n"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    last = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert loop.sent
    found = newest(settings, "recommendations", USER)
    assert msgspec.json.decode(last[USER], type=RecommendationScores) == found
