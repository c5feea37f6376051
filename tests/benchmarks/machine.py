"""What every benchmark has in common: the machine it ran on, and how its rows are shown and kept.

The JSON of `--json FILE` is `{"machine": {...}, "rows": [{"name", "value", "unit", "note"?}, ...]}`. A row whose value
is null could not be measured, and its note says why: a figure is measured and verified, or it isn't there.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = Console()
_PACKAGES = ("confluent-kafka", "psycopg2-binary", "torch", "numpy", "msgspec")


def options(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, to which it adds its own sizes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows here")
    return parser


def describe(kafka: str, postgres: str) -> dict[str, object]:
    """The machine as it is now, with the versions of both services ("-" for one that is not used)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{_os_name()}, Linux {platform.release()}",
        "python": platform.python_version(),
        "kafka": kafka,
        "postgres": postgres,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
    }


class Report:
    """The rows of one benchmark, in the order in which they were measured."""

    def __init__(self, machine: dict[str, object]) -> None:
        self._machine = machine
        self._rows: list[dict[str, object]] = []

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        """A figure that was measured and verified."""
        self._append(name, float(f"{value:.4g}") if abs(value) < 1_000 else round(value), unit, note)

    def add_median(self, name: str, values: Sequence[float], unit: str, note: str = "") -> None:
        """The median of several runs, which the note lists."""
        runs = f"median of {', '.join(f'{value:,.0f}' for value in values)}" if len(values) > 1 else ""
        self.add(name, median(values), unit, "; ".join(filter(None, (runs, note))))

    def missing(self, name: str, unit: str, why: str) -> None:
        """A figure that could not be had, and the reason."""
        self._append(name, None, unit, why)

    def _append(self, name: str, value: float | None, unit: str, note: str) -> None:
        row: dict[str, object] = {"name": name, "value": value, "unit": unit}
        if note:
            row["note"] = note
        self._rows.append(row)
        CONSOLE.print(f"  {name}: {_shown(value)} {unit} {note}", markup=False, highlight=False)

    @property
    def complete(self) -> bool:
        """No row is missing."""
        return all(row["value"] is not None for row in self._rows)

    def finish(self, file: Path | None) -> int:
        """Show the table and write the JSON; the exit code, 1 when a row is missing."""
        CONSOLE.print(self._table())
        if file is not None:
            file.write_text(json.dumps({"machine": self._machine, "rows": self._rows}, indent=2) + "\n")
        return 0 if self.complete else 1

    def _table(self) -> Table:
        table = Table(caption=f"{self._machine['cores']} cores of {self._machine['cpu']}, {self._machine['date']}")
        table.add_column("figure", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("unit")
        table.add_column("note")
        for row in self._rows:
            table.add_row(str(row["name"]), _shown(row["value"]), str(row["unit"]), str(row.get("note", "")))
        return table


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "missing"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _commit() -> str:
    """The commit measured, marked when the checkout differs from it; "-" outside a checkout."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude", "*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "-"
