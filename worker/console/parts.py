"""Small parts of the console's page, and how it writes numbers."""

import math
from collections.abc import Sequence
from typing import Any

from nicegui import ui

COLOURS = {"ok": "positive", "warning": "warning", "stalled": "negative", "stopped": "negative"}
"""Of a group's status, best first."""
GREY = "#84898f"
# Readable on white and on black, and told apart by colour-blind people (Okabe and Ito, 2008).
PALETTE = ["#0072b2", "#e69f00", "#009e73"]
# The library's template language writes what is between the braces as text, never as markup.
_NAMED_CELL = """
<q-td :props="props">
  <div class="whitespace-normal break-words min-w-[8rem] max-w-[11rem] sm:max-w-[22rem]">
    {{ props.row.name || props.value }}
  </div>
  <div v-if="props.row.name" class="text-xs opacity-70">{{ props.value }}</div>
</q-td>
"""
_FAINT = {"color": GREY, "opacity": 0.25}
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
_LONG = 10 * _MINUTE
_FEW = 10


def heading(text: str, *, level: int) -> ui.label:
    """Level 1 is the page, 2 a step of the way, 3 a part of the page."""
    size = {1: "text-2xl", 2: "text-base", 3: "text-lg"}[level]
    return ui.label(text).classes(f"{size} font-bold").props(f"role=heading aria-level={min(level, 2)}")


class Table:
    """A table of the library's that is sent anew only when it has changed."""

    def __init__(
        self,
        title: str,
        *columns: str,
        numbers: Sequence[str] = (),
        test: str,
        page: int = 10,
        wrap: bool = False,
        empty: str = "None so far.",
    ) -> None:
        """A column `item` shows the row's `name`, where there is one, above the item's id. `empty` is for no rows."""
        named = [
            {"name": name, "label": name, "field": name, "align": "right" if name in numbers else "left"}
            for name in columns
        ]
        self._page = page
        self._table = ui.table(columns=named, rows=[], row_key="key", title=title, pagination=page)
        self._table.classes("w-full").props(f"dense flat bordered hide-pagination data-test={test}")
        self._table.props(f'no-data-label="{empty}"')
        if wrap:
            self._table.props("wrap-cells")
        if "item" in columns:
            self._table.add_slot("body-cell-item", _NAMED_CELL)

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Each row has a `key` of its own."""
        if rows == self._table.rows:
            return
        self._table.rows = rows
        if len(rows) > self._page:
            self._table.props(remove="hide-pagination")


class Plot:
    """Lines over time."""

    def __init__(self, title: str, lines: Sequence[str], *, dots: bool = False, test: str) -> None:
        options = {
            "title": {"text": title, "top": 0, "padding": 4, "textStyle": {"fontSize": 14, "color": GREY}},
            "animation": False,
            "aria": {"enabled": True},
            "color": PALETTE,
            "tooltip": {"trigger": "axis"},
            "legend": {"top": 26, "left": 0, "textStyle": {"color": GREY}},
            "grid": {"left": 56, "right": 16, "top": 60, "bottom": 28},
            "xAxis": {"type": "time", "splitNumber": 4, "axisLabel": {"hideOverlap": True, "color": GREY}},
            "yAxis": {"type": "value", "min": 0, "axisLabel": {"color": GREY}, "splitLine": {"lineStyle": _FAINT}},
            "series": [{"name": line, "type": "line", "showSymbol": dots, "data": []} for line in lines],
        }
        with ui.card().props("flat bordered").classes("w-full p-2"):
            self._chart = ui.echart(options).classes("w-full h-56").props(f"data-test={test}")

    def show(self, lines: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Points (epoch ms, value) by line."""
        for series, points in zip(self._chart.options["series"], lines, strict=True):
            series["data"] = points
        self._chart.update()


def as_rate(per_second: float) -> str:
    """Records per second; NaN is unknown."""
    if math.isnan(per_second):
        return "rate unknown"
    return f"{per_second:,.1f}/s" if 0 < per_second < _FEW else f"{per_second:,.0f}/s"


def as_seconds(seconds: float) -> str:
    """In milliseconds below one second, and roughly from ten minutes on; NaN is unknown."""
    if math.isnan(seconds):
        return "time unknown"
    if seconds >= _LONG:
        return as_span(seconds)
    return f"{seconds * 1000:,.0f} ms" if 0 < seconds < 1 else f"{seconds:,.1f} s"


def as_span(seconds: float) -> str:
    """Roughly, of what may be long ago."""
    for size, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= size:
            return f"{seconds / size:,.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def as_figure(value: float | None) -> str:
    """A share or a mean; empty where there is none."""
    return "" if value is None else f"{value:.3f}"
