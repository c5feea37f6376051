"""The console's one page: what it shows and where. Live and read-only; plots and tables are the library's."""

from collections.abc import Callable
from datetime import UTC, datetime

from nicegui import ui

from innerloop.config import Settings
from innerloop.evaluation.quality.record import CUTOFFS, Group, QualityWindow
from innerloop.worker.lag_watch import GroupLag

from .lookup import Person, as_time
from .observer import Observer
from .parts import COLOURS, Plot, Table, as_figure, heading
from .person import PersonCard
from .quality import at_cutoff, hit_rates
from .sources import Live
from .stored import Stored
from .way import Way

_EVERY_SECONDS = 1.0
_PLOT_EVERY = 2
_LINES = {
    "lag": ("Lag, records", ("ingest", "adapt")),
    "latency": ("Event to list, ms", ("p50", "p99")),
    "throughput": ("Records a second", ("events", "requests", "scores")),
}
_ARMS = {"adapted": "adapted", "hold_out": "hold-out", "placebo": "placebo"}
_CUTOFF = 20
_BAD = {"stalled", "stopped"}
"""Partitions to be seen first."""
_FIGURES = [f"{name}@{k}" for k in CUTOFFS for name in ("hit", "mrr")]
_NOBODY_ASKED = "None is asked: name their host:port (http.port) in console.targets, for latency too."
# A shadow: the library takes the outline away with more force than any page has.
_FOCUS = """
:focus-visible:not(.q-field__native), .q-field--focused .q-field__control { box-shadow: 0 0 0 3px #e69f00 !important; }
"""


class Page:
    """One viewer's page; it reads what the observer has and asks for nothing else."""

    def __init__(self, settings: Settings, observer: Observer, find: Callable[[str], Person]) -> None:
        self._settings, self._observer, self._find = settings, observer, find
        self._turns = 0

    def show(self) -> None:
        """Lay everything out, and keep it up to date."""
        ui.add_css(_FOCUS)
        with ui.column().classes("w-full max-w-screen-xl mx-auto gap-4 p-2"):
            self._header()
            self._way = Way(self._settings)
            with ui.grid().classes("w-full grid-cols-1 md:grid-cols-2 gap-4"):
                self._plots = {name: Plot(title, lines, test=f"plot-{name}") for name, (title, lines) in _LINES.items()}
                title = f"Hit rate at {_CUTOFF}, by window"
                self._rates = Plot(title, tuple(_ARMS.values()), dots=True, test="plot-hit-rate")
            self._person = PersonCard(self._find)
            self._tables()
        self._turn()
        ui.timer(_EVERY_SECONDS, self._turn)

    def _header(self) -> None:
        with ui.row().classes("w-full items-center gap-3"):
            heading("Innerloop", level=1)
            self._status = ui.badge("").classes("text-sm p-2").props("aria-live=polite data-test=status")
            self._at = ui.label("").classes("text-sm opacity-70").props("data-test=at")
        self._trouble = ui.label("").classes("text-negative").props("role=alert data-test=trouble")

    def _tables(self) -> None:
        with ui.column().classes("w-full gap-1"):
            self._quality = Table(
                "Quality, newest window",
                *("arm", "model", "users", "clicks", *_FIGURES, "ad clicks", "purchases", "auc", "predicted/observed"),
                numbers=["model", "users", "clicks", *_FIGURES, "ad clicks", "purchases", "auc", "predicted/observed"],
                test="quality-table",
            )
            self._lift = ui.label("").classes("text-sm whitespace-pre-line").props("data-test=lift")
        with ui.grid().classes("w-full grid-cols-1 lg:grid-cols-2 gap-4"):
            numbers = ["version", "items", "events", "hit@20"]
            self._releases = Table(
                "Releases",
                "version",
                "created",
                "method",
                "items",
                "events",
                "hit@20",
                numbers=numbers,
                test="releases",
            )
            self._processes = Table(
                "Processes",
                *("process", "up", "owns", "model", "turned"),
                numbers=["owns", "model"],
                test="processes",
                empty="Waiting." if self._settings.console.targets else _NOBODY_ASKED,
            )
        self._letters = Table(
            "Dead letters",
            *("reason", "topic", "letters", "replayed", "example"),
            numbers=["letters", "replayed"],
            test="letters",
            wrap=True,
        )
        self._partitions = Table(
            "Partitions and their owners",
            *("group", "topic", "partition", "behind", "age", "status", "owner"),
            numbers=["partition", "behind", "age"],
            test="partitions",
            page=50,
        )

    # --- keeping up to date

    def _turn(self) -> None:
        live, stored = self._observer.live, self._observer.stored
        self._show_header(live, stored)
        self._way.show(live, stored)
        self._person.suggest(stored.some_user)
        self._show_live_tables(live, stored)
        self._show_stored_tables(stored)
        if self._turns % _PLOT_EVERY == 0:
            for name, (_, lines) in _LINES.items():
                self._plots[name].show([self._observer.history.series(f"{name} {line}") for line in lines])
            self._show_rates(stored)
        self._turns += 1

    def _show_header(self, live: Live, stored: Stored) -> None:
        worst = max((group.status for group in live.groups), key=list(COLOURS).index, default="stopped")
        self._status.set_text(worst)
        self._status.props(f"color={COLOURS[worst]}")
        users = f"{stored.users:,} users" if stored.exact else f"about {stored.users:,} users (estimated)"
        self._at.set_text(f"{datetime.fromtimestamp(live.at, UTC):%H:%M:%S} UTC, {users}")
        troubles = self._observer.troubles
        self._trouble.set_text(" ".join(troubles))
        self._trouble.set_visibility(bool(troubles))

    def _show_rates(self, stored: Stored) -> None:
        rates = [(window.window_end, hit_rates(window, _CUTOFF)) for window in stored.windows]
        self._rates.show([[(end, by_arm[arm]) for end, by_arm in rates if arm in by_arm] for arm in _ARMS])

    def _show_live_tables(self, live: Live, stored: Stored) -> None:
        groups = [*live.groups, *([stored.quality] if stored.quality else [])]
        rows = [row for group in groups for row in _partition_rows(group)]
        self._partitions.show(sorted(rows, key=lambda row: row["status"] not in _BAD))
        self._processes.show(
            [
                {
                    "key": each.target,
                    "process": each.target,
                    "up": "yes" if each.up else "no",
                    "owns": f"{each.total('innerloop_partitions'):.0f}",
                    "model": f"{each.total('innerloop_model_version'):.0f}",
                    "turned": as_time(int(each.total("innerloop_last_turn_timestamp_seconds") * 1000))
                    if each.up
                    else "",
                }
                for each in live.processes
            ]
        )

    def _show_stored_tables(self, stored: Stored) -> None:
        self._show_quality(stored.windows[-1] if stored.windows else None)
        self._releases.show(
            [
                {
                    "key": each.version,
                    "version": each.version,
                    "created": each.card.get("created", "")[:19].replace("T", " "),
                    "method": each.card.get("method", ""),
                    "items": f"{each.card['data']['items']:,}",
                    "events": f"{each.card['data']['events']:,}",
                    "hit@20": as_figure(each.card.get("metrics", {}).get("hit@20")),
                }
                for each in stored.releases
            ]
        )
        self._letters.show(
            [
                {
                    "key": f"{each.reason} {each.topic}",
                    "reason": each.reason,
                    "topic": each.topic,
                    "letters": f"{each.letters:,}",
                    "replayed": f"{each.replayed:,}",
                    "example": each.example,
                }
                for each in stored.letters
            ]
        )

    def _show_quality(self, window: QualityWindow | None) -> None:
        if window is None:
            return
        self._quality.show([_quality_row(group) for group in [*window.arms, *window.versions]])
        lifts = "\n".join(
            f"Lift of the adapted over the hold-out, hit rate at {lift.k}: {lift.difference:+.3f}"
            f" (95%: {lift.low:+.3f} to {lift.high:+.3f})."
            for lift in window.lift
        )
        when = f"Clicks from {as_time(window.window_start)} to {as_time(window.window_end)}: {window.clicks:,}."
        self._lift.set_text(f"{when}\n{lifts}" if lifts else f"{when} No lift: one arm has no clicks.")


def _partition_rows(group: GroupLag) -> list[dict[str, object]]:
    return [
        {
            "key": f"{each.lag.group} {each.lag.topic} {each.lag.partition}",
            "group": each.lag.group,
            "topic": each.lag.topic,
            "partition": each.lag.partition,
            "behind": f"{each.lag.offsets:,}",
            "age": "unknown" if each.lag.seconds is None else f"{each.lag.seconds:,.1f} s",
            "status": each.status,
            "owner": each.owner or "nobody",
        }
        for each in group.partitions
    ]


def _quality_row(group: Group) -> dict[str, object]:
    model = "all" if group.model_version is None else str(group.model_version)
    row: dict[str, object] = {"key": f"{group.arm} {model}", "arm": _ARMS[group.arm], "model": model}
    row |= {"users": f"{group.users:,}", "clicks": f"{group.clicks:,}"}
    for k in CUTOFFS:
        if group.clicks and (at := at_cutoff(group, k)):
            row |= {f"hit@{k}": as_figure(at.hit_rate), f"mrr@{k}": as_figure(at.mrr)}
    if group.ads is not None:
        row |= {"ad clicks": f"{group.ads.clicks:,}", "purchases": f"{group.ads.purchases:,}"}
        row |= {"auc": as_figure(group.ads.auc), "predicted/observed": as_figure(group.ads.predicted_over_observed)}
    return row
