"""The way of the data, drawn as it is: processors, between them the topics with what flows and waits, and how long."""

import math
import time

from nicegui import ui

from innerloop.config import Settings
from innerloop.worker.lag_watch import GroupLag

from .parts import COLOURS, as_rate, as_seconds, as_span, heading
from .sources import SCORED, STORED, WHOLE, Flow, Live, Percentiles, group_named
from .stored import Stored

# Four steps with three ways between them from left to right, what branches off below; on a phone all is one column.
_COLUMNS = "w-full gap-x-3 gap-y-2 grid-cols-1 lg:grid-cols-[1fr_1.1fr_1fr_1.1fr_1fr_1.1fr_1fr]"
_UNDER = {"ingest": "lg:col-start-3", "adapt": "lg:col-start-5", "readers": "lg:col-start-7"}


_ARROW, _UNSEEN = "text-3xl text-primary shrink-0", "aria-hidden=true"


class Way:
    """Laid out where it is made; `show` keeps it up to date."""

    def __init__(self, settings: Settings) -> None:
        self._settings, topics = settings, settings.topics
        with ui.grid().classes(_COLUMNS):
            _step("Shop", "clicks, purchases, impressions", "shop")
            self._events = _Edge("events", ", ".join(topics.ingested))
            self._ingest = _step("Ingest", "support sets in Postgres", "ingest")
            self._requests = _Edge("requests", topics.requests)
            self._adapt = _step("Adapt", "solves, finds, ranks", "adapt")
            self._scores = _Edge("scores", f"{topics.recommendations}, {topics.ads}")
            _step("Readers", "each from its own copy", "readers")
            with _branch("ingest"):
                self._letters = _Edge("letters", f"from Ingest, {topics.dead_letters}", icon="arrow_downward")
                _step("Dead letters", "what could not be read", "dead-letters")
            with _branch("adapt"):
                self._releases = _Edge("releases", "to Adapt, releases", icon="arrow_upward")
                _step("Train", "writes releases", "train")
            with _branch("readers"):
                self._quality = _Edge("quality", "clicks, purchases, lists", icon="arrow_downward")
                _step("Quality", f"tells {topics.quality_windows}", "quality")

    def show(self, live: Live, stored: Stored) -> None:
        kafka, topics = self._settings.kafka, self._settings.topics
        ingest, adapt = group_named(live, kafka.ingest_group), group_named(live, kafka.adapt_group)
        self._events.show(_flow(live, *topics.ingested), _behind(ingest), _latency(live, STORED, "to Postgres"))
        self._requests.show(_flow(live, topics.requests), _behind(adapt), _latency(live, SCORED, "to the list"))
        lists = _flow(live, topics.recommendations, topics.ads)
        self._scores.show(lists, "lag: each reader's own", _latency(live, WHOLE, "event to list"))
        _show_group(self._ingest, ingest)
        _show_group(self._adapt, adapt)
        self._show_letters(live, stored)
        self._show_releases(live, stored)
        self._show_quality(live, stored)

    def _show_letters(self, live: Live, stored: Stored) -> None:
        letters = sum(group.letters for group in stored.letters)
        left = letters - sum(group.replayed for group in stored.letters)
        last = max((group.last for group in stored.letters), default=None)
        self._letters.show(
            as_rate(_flow(live, self._settings.topics.dead_letters).per_second),
            f"{letters:,} letters, {left:,} not replayed",
            "none yet" if last is None else f"the last {as_span(time.time() - last / 1000)} ago",
        )

    def _show_releases(self, live: Live, stored: Stored) -> None:
        if not stored.releases:
            self._releases.show("no release yet", "", "")
            return
        newest = stored.releases[0].version
        used = [each.total("innerloop_model_version") for each in live.processes if each.up]
        used = [version for version in used if version]
        behind = sum(version != newest for version in used)
        self._releases.show(
            f"{newest} in force",
            f"{behind} of {len(used)} processes behind" if used else "",
            f"made {stored.releases[0].card.get('created', '')[:16].replace('T', ' ')}",
        )

    def _show_quality(self, live: Live, stored: Stored) -> None:
        topics = self._settings.topics
        read = _flow(live, topics.clicks, topics.purchases, topics.recommendations, topics.ads)
        late = (window.closed_at - window.window_end for window in stored.windows[-1:])
        closed = "".join(f"windows close after {as_seconds(each / 1000)}" for each in late)
        lag = "not running" if stored.quality is None else _behind(stored.quality)
        self._quality.show(as_rate(read.per_second), lag, closed)


class _Edge:
    """A topic on its way from one step to the next."""

    def __init__(self, name: str, about: str, *, icon: str = "") -> None:
        """With an icon it stands upright also where the way lies."""
        lies = "" if icon else " lg:flex-col lg:text-center"
        with ui.element("div").classes(f"flex flex-nowrap items-center gap-3 min-w-0{lies}") as edge:
            edge.props(f"data-test=edge-{name}")
            ui.icon(icon or "arrow_downward").classes(f"{_ARROW}{'' if icon else ' lg:hidden'}").props(_UNSEEN)
            with ui.element("div").classes("min-w-0 w-full leading-snug"):
                ui.label(about).classes("text-xs opacity-70 break-words")
                self._rate = ui.label().classes("font-bold whitespace-pre-line")
                if not icon:
                    _arrow_across()
                self._lag = ui.label().classes("text-xs").props("data-test=lag")
                self._latency = ui.label().classes("text-xs opacity-80").props("data-test=latency")

    def show(self, rate: "str | Flow", lag: str, latency: str) -> None:
        text = rate if isinstance(rate, str) else f"{as_rate(rate.per_second)}\n{rate.total:,} in all"
        self._rate.set_text(text)
        self._lag.set_text(lag)
        self._latency.set_text(latency)


def _arrow_across() -> None:
    with ui.element("div").classes("flex max-lg:hidden flex-nowrap items-center w-full").props(_UNSEEN):
        ui.element("div").classes("grow border-t-2 border-[var(--q-primary)]")
        ui.icon("chevron_right").classes("text-3xl text-primary shrink-0 -ml-4")


def _branch(under: str) -> ui.element:
    return ui.element("div").classes(f"flex flex-col gap-2 {_UNDER[under]}")


def _step(name: str, about: str, test: str) -> ui.badge:
    """A processor; gives the badge of its status, which is not seen while it is empty."""
    with ui.card().props(f"flat bordered data-test={test}").classes("w-full p-3 gap-1 justify-center"):
        with ui.row().classes("items-center gap-2"):
            heading(name, level=2)
            badge = ui.badge("")
            badge.set_visibility(False)
        ui.label(about).classes("text-xs opacity-70 break-words")
    return badge


def _show_group(badge: ui.badge, group: GroupLag | None) -> None:
    badge.set_visibility(group is not None)
    if group is not None:
        badge.set_text(group.status)
        badge.props(f"color={COLOURS[group.status]}")


def _flow(live: Live, *topics: str) -> Flow:
    found = [live.flows[topic] for topic in topics if topic in live.flows]
    return Flow(sum(each.total for each in found), sum((each.per_second for each in found), 0.0 if found else math.nan))


def _behind(group: GroupLag | None) -> str:
    return "lag unknown" if group is None else f"{group.offsets:,} behind, {as_seconds(group.seconds)}"


def _latency(live: Live, way: str, to: str) -> str:
    found = live.latencies.get(way, Percentiles())
    if math.isnan(found.p50):
        return f"{to}: nothing in the last minute"
    return f"{to}: p50 {as_seconds(found.p50)}, p99 {as_seconds(found.p99)}"
