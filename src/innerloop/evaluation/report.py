"""The report of a protocol: report.json for programs, report.html for people, a table for the terminal."""

import html
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io
from plotly.colors import qualitative
from rich.table import Table

from innerloop.errors import SettingsError
from innerloop.evaluation.scoreboard import Row

_JSON, _PAGE = "report.json", "report.html"
_FEW_METRICS = 4  # more do not fit beside each other with their intervals
_DAY = re.compile(r"(?:(?P<of>.+), )?(?:\d{4}-\d{2}-\d{2}|day \d+)")
_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.plot { background: #fff; overflow-x: auto }
pre { overflow-x: auto }
"""


@dataclass(frozen=True)
class Report:
    """What `report.json` holds; `facts` is what the protocol says of itself."""

    protocol: str
    data: str
    release: str
    seconds: float
    rows: Sequence[Row]
    facts: Mapping[str, object]

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into `folder`, which is made. NaN becomes null.

        Raises SettingsError when they cannot be written.
        """
        content = {
            "protocol": self.protocol,
            "data": self.data,
            "release": self.release,
            "seconds": round(self.seconds, 3),
            "rows": [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows],
            "facts": _plain(self.facts),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _JSON).write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")
            (folder / _PAGE).write_text(self._page())
        except OSError as error:
            raise _unwritable(folder, error) from None

    def table(self) -> Table:
        """The slice over everything, one line an arm, one column a metric; of many metrics without the intervals."""
        rows = [row for row in self.rows if row.slice == "all"]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        table = Table(title=f"{self.protocol} on {self.data}", title_justify="left")
        table.add_column("arm")
        few = len(metrics) <= _FEW_METRICS
        for metric in metrics:
            table.add_column(f"{metric} [95%]" if few else metric, justify="right")
        cells = {(row.arm, row.metric): _cell(row) if few else _value(row) for row in rows}
        for arm in dict.fromkeys(row.arm for row in rows):
            table.add_row(arm, *(cells.get((arm, metric), "") for metric in metrics))
        return table

    def _page(self) -> str:
        parts = [f"<p>Release: {html.escape(self.release or 'none')}. Took {self.seconds:.0f} s.</p>"]
        metrics = list(dict.fromkeys(row.metric for row in self.rows))
        figures = [figure for metric in metrics for figure in _figures(self.rows, metric)]
        parts += [_drawn(figure, first=at == 0) for at, figure in enumerate(figures)]
        parts += [
            _section(name, [row for row in self.rows if row.slice == name])
            for name in dict.fromkeys(row.slice for row in self.rows)
        ]
        facts = html.escape(json.dumps(_plain(self.facts), indent=1, default=str))
        parts.append(f"<h2>How it was made</h2><pre>{facts}</pre>")
        title = html.escape(f"{self.protocol} on {self.data}")
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
        )


def require_writable(folder: Path) -> None:
    """Make the folder, and see that a report can be written there: not only after the hours that a run may take.

    Raises SettingsError when it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for file in (folder / _JSON, folder / _PAGE):
            if file.exists():
                file.open("a").close()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    why = error.strerror or type(error).__name__
    return SettingsError(f"The report cannot be written to {folder} ({why}): name another folder with --report.")


def _section(name: str, rows: Sequence[Row]) -> str:
    metrics = list(dict.fromkeys(row.metric for row in rows))
    cells = {(row.arm, row.metric): _cell(row) for row in rows}
    head = "".join(f"<th>{html.escape(metric)}</th>" for metric in ["arm", *metrics, "n"])
    counts = {row.arm: row.n for row in rows}
    body = "".join(
        f"<tr><td>{html.escape(arm)}</td>"
        + "".join(f"<td>{cells.get((arm, metric), '')}</td>" for metric in metrics)
        + f"<td>{n:,}</td></tr>"
        for arm, n in counts.items()
    )
    return f"<h2>{html.escape(name)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figures(rows: Sequence[Row], metric: str) -> Iterator[go.Figure]:
    """A figure over the slices, one over the days where there are some, and one over each target's days."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == metric:
            day = _DAY.fullmatch(row.slice)
            title = metric if day is None else f"{metric} by day" + (f", {day['of']}" if day["of"] else "")
            groups.setdefault(title, []).append(row)
    for title, mine in groups.items():
        yield _figure(mine, title)


def _figure(rows: Sequence[Row], title: str) -> go.Figure:
    """One trace an arm, with its interval."""
    figure = go.Figure()
    for arm in dict.fromkeys(row.arm for row in rows if " - " not in row.arm):
        mine = [row for row in rows if row.arm == arm]
        figure.add_scatter(
            name=arm,
            x=[row.slice for row in mine],
            y=[row.value for row in mine],
            mode="markers+lines",
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_plain(row.high - row.value) for row in mine],
                "arrayminus": [_plain(row.value - row.low) for row in mine],
            },
        )
    figure.update_layout(title=title, height=480, margin={"t": 50, "l": 50, "r": 10}, colorway=qualitative.Dark24)
    figure.update_xaxes(type="category")
    return figure


def _drawn(figure: go.Figure, *, first: bool) -> str:
    """As HTML; plotly's own script comes with the first."""
    drawn = plotly.io.to_html(figure, full_html=False, include_plotlyjs=first, config={"displaylogo": False})
    return f'<div class="plot">{drawn}</div>'


def _cell(row: Row) -> str:
    sign = "+" if " - " in row.arm else ""
    if math.isnan(row.low):
        return f"{_value(row)} [one user]"
    return f"{_value(row)} [{row.low:{sign}.4f}, {row.high:{sign}.4f}]"


def _value(row: Row) -> str:
    return f"{row.value:{'+' if ' - ' in row.arm else ''}.4f}"


def _plain(value: object) -> object:
    """What JSON can say of it: names as text, NumPy's numbers as numbers, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
