"""The console's one page: what it shows and where. Live and read-only; plots and tables are the library's."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from nicegui import run, ui

from innerloop.config import Settings
from innerloop.errors import InnerloopError

from .console_history import History
from .console_lookup import Person, as_time
from .console_quality import hit_rates
from .console_sources import Snapshot, group_named
from .lag_watch import GroupLag

_EVERY_SECONDS = 1.0
_PLOT_EVERY = 2
_COLOURS = {"ok": "positive", "warning": "warning", "stalled": "negative", "stopped": "negative"}
# Readable on white and on black, and told apart by colour-blind people (Okabe and Ito, 2008).
_PALETTE = ["#0072b2", "#e69f00", "#009e73"]
_GREY = "#84898f"
_FAINT = {"color": _GREY, "opacity": 0.25}
_LINES = {
    "lag": ("Lag, records", ("ingest", "adapt")),
    "latency": ("Event to score, ms", ("p50", "p99")),
    "throughput": ("Records a second", ("events", "requests", "scores")),
}
_ARMS = {"adapted": "adapted", "hold_out": "hold-out", "placebo": "placebo"}
_CUTOFF = 20


class Page:
    """One viewer's page; it reads what `snapshot` and `history` give and asks for nothing else."""

    def __init__(
        self, settings: Settings, snapshot: Callable[[], Snapshot], history: History, find: Callable[[str], Person]
    ) -> None:
        self._settings, self._snapshot, self._history, self._find = settings, snapshot, history, find
        self._turns = 0
        self._example = ""

    def show(self) -> None:
        """Lay everything out, and keep it up to date."""
        with ui.column().classes("w-full max-w-screen-xl mx-auto gap-4 p-2"):
            self._header()
            self._way()
            with ui.grid().classes("w-full grid-cols-1 md:grid-cols-2 gap-4"):
                self._plots = {name: _plot(title, lines) for name, (title, lines) in _LINES.items()}
                self._rates = _plot(f"Hit rate at {_CUTOFF}, by window", tuple(_ARMS.values()), showSymbol=True)
            self._lookup()
            self._partitions = _table(
                "Partitions", "group", "topic", "partition", "behind", "seconds", "status", "owner"
            )
            self._releases = _table("Releases", "version", "created", "method", "items", "events", "hit@20")
            self._letters = _table("Dead letters", "reason", "topic", "letters", "replayed", "example")
            self._processes = _table("Processes", "process", "up", "owns", "model", "turned")
        self._turn()
        ui.timer(_EVERY_SECONDS, self._turn)

    # --- laying out

    def _header(self) -> None:
        with ui.row().classes("w-full items-center gap-3"):
            ui.label("Innerloop").classes("text-2xl font-bold").props("role=heading aria-level=1")
            self._status = ui.badge("").classes("text-sm p-2").props("aria-live=polite")
            self._at = ui.label("").classes("text-sm opacity-70")
        self._trouble = ui.label("").classes("text-negative").props("role=alert")

    def _way(self) -> None:
        """The way of the data, as it is: topics with what flows on them, processors with how far behind they are."""
        topics = self._settings.topics
        with ui.row().classes("w-full items-stretch gap-2 flex-col md:flex-row md:flex-nowrap"):
            self._events = _stop("Events", ", ".join(topics.events))
            _arrow()
            self._ingest = _stop("Ingest", "support sets in Postgres")
            _arrow()
            self._requests = _stop("Requests", topics.requests)
            _arrow()
            self._adapt = _stop("Adapt", "solve, find, rank")
            _arrow()
            self._scores = _stop("Scores", f"{topics.recommendations}, {topics.ads}")

    def _lookup(self) -> None:
        with ui.card().classes("w-full"):
            ui.label("A user").classes("text-lg font-bold").props("role=heading aria-level=2")
            with ui.row().classes("items-center gap-2"):
                self._user = ui.input("user id").props("stack-label").on("keydown.enter", self._find_user)
                ui.button("Look up", on_click=self._find_user)
            self._person = ui.column().classes("w-full")

    # --- keeping up to date

    def _turn(self) -> None:
        snapshot = self._snapshot()
        self._show_header(snapshot)
        self._show_way(snapshot)
        self._show_tables(snapshot)
        if self._turns % _PLOT_EVERY == 0:
            for name, (_, lines) in _LINES.items():
                self._show_plot(name, lines)
            self._show_rates(snapshot)
        self._turns += 1

    def _show_header(self, snapshot: Snapshot) -> None:
        worst = max((group.status for group in snapshot.groups), key=list(_COLOURS).index, default="stopped")
        self._status.set_text(worst)
        self._status.props(f"color={_COLOURS[worst]}")
        self._at.set_text(f"{datetime.fromtimestamp(snapshot.at, UTC):%H:%M:%S} UTC, {snapshot.stored.users:,} users")
        self._trouble.set_text(" ".join(snapshot.troubles))
        if snapshot.stored.some_user and not self._example:
            self._example = snapshot.stored.some_user
            self._user.props["placeholder"] = f"for instance {self._example}"
            self._user.update()

    def _show_way(self, snapshot: Snapshot) -> None:
        kafka, topics = self._settings.kafka, self._settings.topics
        self._events.set_text(_flow(snapshot, *topics.events))
        self._ingest.set_text(_behind(group_named(snapshot, kafka.ingest_group)))
        self._requests.set_text(_flow(snapshot, topics.requests))
        self._adapt.set_text(_behind(group_named(snapshot, kafka.adapt_group)))
        latency = (
            ""
            if math.isnan(snapshot.p50)
            else f"\np50 {snapshot.p50 * 1000:,.0f} ms, p99 {snapshot.p99 * 1000:,.0f} ms"
        )
        self._scores.set_text(_flow(snapshot, topics.recommendations, topics.ads) + latency)

    def _show_plot(self, name: str, lines: tuple[str, ...]) -> None:
        plot = self._plots[name]
        for place, line in enumerate(lines):
            plot.options["series"][place]["data"] = self._history.series(f"{name} {line}")
        plot.update()

    def _show_rates(self, snapshot: Snapshot) -> None:
        rates = [(window.window_end, hit_rates(window, _CUTOFF)) for window in snapshot.windows]
        for place, arm in enumerate(_ARMS):
            points = [(end, by_arm[arm]) for end, by_arm in rates if arm in by_arm]
            self._rates.options["series"][place]["data"] = points
        self._rates.update()

    def _show_tables(self, snapshot: Snapshot) -> None:
        self._partitions.rows = [
            {
                "key": f"{each.lag.group} {each.lag.topic} {each.lag.partition}",
                "group": each.lag.group,
                "topic": each.lag.topic,
                "partition": each.lag.partition,
                "behind": f"{each.lag.offsets:,}",
                "seconds": "unknown" if each.lag.seconds is None else f"{each.lag.seconds:,.1f}",
                "status": each.status,
                "owner": each.owner or "nobody",
            }
            for group in snapshot.groups
            for each in group.partitions
        ]
        self._releases.rows = [
            {
                "key": each.version,
                "version": each.version,
                "created": each.card.get("created", ""),
                "method": each.card.get("method", ""),
                "items": f"{each.card['data']['items']:,}",
                "events": f"{each.card['data']['events']:,}",
                "hit@20": _figure(each.card.get("metrics", {}).get("hit@20")),
            }
            for each in snapshot.stored.releases
        ]
        self._letters.rows = [
            {
                "key": f"{each.reason} {each.topic}",
                "reason": each.reason,
                "topic": each.topic,
                "letters": f"{each.letters:,}",
                "replayed": f"{each.replayed:,}",
                "example": each.example,
            }
            for each in snapshot.letters
        ]
        self._processes.rows = [
            {
                "key": each.target,
                "process": each.target,
                "up": "yes" if each.up else "no",
                "owns": f"{each.total('innerloop_partitions'):.0f}",
                "model": f"{each.total('innerloop_model_version'):.0f}",
                "turned": as_time(int(each.total("innerloop_last_turn_timestamp_seconds") * 1000)) if each.up else "",
            }
            for each in snapshot.processes
        ]

    # --- a user

    async def _find_user(self) -> None:
        user = (self._user.value or "").strip()
        self._person.clear()
        if not user:
            return
        with self._person:
            waits = ui.spinner()
            try:
                person = await run.io_bound(self._find, user)
            except InnerloopError as error:
                ui.label(str(error)).classes("text-negative").props("role=alert")
                return
            finally:
                waits.delete()
            if person is not None:  # the server stops
                _show_person(person)


def _show_person(person: Person) -> None:
    if person.support_version is None and person.recommendations is None:
        ui.label(f"Nothing is stored or published of user {person.user_id}.")
        return
    ui.label(_chain(person)).classes("whitespace-pre-line").props("data-test=chain")
    with ui.grid().classes("w-full grid-cols-1 md:grid-cols-2 gap-4"):
        support = _table("Support set, newest first", "time", "event", "item", "category")
        support.rows = [
            {"key": place, "time": each.time, "event": each.event_type, "item": each.item, "category": each.category}
            for place, each in enumerate(person.support)
        ]
        listed = _table("Recommendations", "rank", "item", "category", "score", "since the list before")
        listed.rows = [
            {
                "key": item.item_id,
                "rank": place,
                "item": item.item_id,
                "category": person.categories.get(item.item_id, ""),
                "score": f"{item.score:.4f}",
                "since the list before": _moved(person, item.item_id),
            }
            for place, item in enumerate(person.recommendations.items if person.recommendations else [], 1)
        ]
    if person.ads is not None:
        ads = _table(f"Ads ({person.ads.kind})", "rank", "ad", "item", "score")
        ads.rows = [
            {"key": ad.ad_id, "rank": place, "ad": ad.ad_id, "item": ad.item_id, "score": f"{ad.score:.4f}"}
            for place, ad in enumerate(person.ads.ads, 1)
        ]


def _chain(person: Person) -> str:
    """The versions that prove, or disprove, that the list is made of what is stored."""
    shown = person.recommendations
    stored = f"Postgres: support set version {person.support_version}, {len(person.support)} events."
    if shown is None:
        return f"{stored}\nKafka: no list yet."
    published = (
        f"Kafka: list of support version {shown.support_version}, model {shown.model_version}, by {shown.method}, "
        f"scored {as_time(shown.scored_at)}, newest event {as_time(shown.event_time)}."
    )
    verdict = (
        "Fresh: the list was made of exactly what is stored, by the release in force."
        if person.fresh
        else f"Behind: the release in force is {person.model_version}; the list names an older state."
    )
    return f"{stored}\n{published}\n{verdict}"


def _moved(person: Person, item: str) -> str:
    if not person.moved:
        return ""
    places = person.moved[item]
    if places is None:
        return "new"
    return f"up {places}" if places > 0 else f"down {-places}" if places < 0 else "same"


# --- parts


def _stop(name: str, about: str) -> ui.label:
    with ui.card().classes("flex-1 p-3 gap-1"):
        ui.label(name).classes("font-bold").props("role=heading aria-level=2")
        ui.label(about).classes("text-xs opacity-70 break-all")
        return ui.label("").classes("text-sm whitespace-pre-line").props(f"data-test={name.lower()}")


def _arrow() -> None:
    for icon, shown in (("arrow_downward", "md:hidden"), ("arrow_forward", "max-md:hidden")):
        ui.icon(icon).classes(f"self-center opacity-60 {shown}").props("aria-hidden=true")


def _plot(title: str, lines: tuple[str, ...], *, showSymbol: bool = False) -> ui.echart:  # noqa: N803 - echarts' name
    options = {
        "title": {"text": title, "textStyle": {"fontSize": 14, "color": _GREY}},
        "animation": False,
        "aria": {"enabled": True},
        "color": _PALETTE,
        "tooltip": {"trigger": "axis"},
        "legend": {"top": 24, "textStyle": {"color": _GREY}},
        "grid": {"left": 56, "right": 16, "top": 56, "bottom": 28},
        "xAxis": {"type": "time", "splitNumber": 4, "axisLabel": {"hideOverlap": True, "color": _GREY}},
        "yAxis": {"type": "value", "min": 0, "axisLabel": {"color": _GREY}, "splitLine": {"lineStyle": _FAINT}},
        "series": [{"name": line, "type": "line", "showSymbol": showSymbol, "data": []} for line in lines],
    }
    with ui.card().classes("w-full p-2"):
        return ui.echart(options).classes("w-full h-56")


def _table(title: str, *columns: str) -> ui.table:
    named = [{"name": name, "label": name, "field": name, "align": "left"} for name in columns]
    return ui.table(columns=named, rows=[], row_key="key", title=title, pagination=10).classes("w-full").props("dense")


def _flow(snapshot: Snapshot, *topics: str) -> str:
    found = [snapshot.flows[topic] for topic in topics if topic in snapshot.flows]
    return f"{sum(each.per_second for each in found):,.0f}/s\n{sum(each.total for each in found):,} in all"


def _behind(group: GroupLag | None) -> str:
    return "unknown" if group is None else f"{group.status}\n{group.offsets:,} behind, {group.seconds:,.1f} s"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
