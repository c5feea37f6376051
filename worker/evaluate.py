"""`innerloop evaluate PROTOCOL`: run one protocol over a data set and write its scoreboard."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from innerloop.evaluation.outcome import Outcome, Tell

app = typer.Typer(no_args_is_help=True, help="Measure every arm and the baselines on past data.")

Data = Annotated[Path, typer.Option(help="A file of events or ratings, or a folder with such files.")]
Folder = Annotated[Path, typer.Option(help="report.json and report.html go here.")]
Draws = Annotated[int, typer.Option(min=20, help="Draws of the bootstrap.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same figures.")]


@dataclass(frozen=True)
class _Job:
    protocol: str
    data: Path
    report: Path
    draws: int
    seed: int

    def judge(self, run: "Callable[[Tell], Outcome]") -> None:
        """Run the protocol under a progress bar, then write and show its report."""
        from innerloop.evaluation.report import Report  # noqa: PLC0415 - each command imports what it runs
        from innerloop.evaluation.scoreboard import rows  # noqa: PLC0415

        started = time.monotonic()
        with _bar() as bar:
            task = bar.add_task(self.protocol, total=1.0)
            outcome = run(
                lambda what, share: bar.update(task, description=f"{self.protocol}: {what}", completed=0.98 * share)
            )
            bar.update(task, description=f"{self.protocol}: intervals", completed=0.98)
            found = rows(outcome, draws=self.draws, seed=self.seed)
            bar.update(task, completed=1.0)
        seconds = time.monotonic() - started
        written = Report(self.protocol, str(self.data), outcome.release, seconds, found, outcome.facts)
        written.write(self.report)
        console = Console()
        console.print(written.table())
        console.print(f"Written: {self.report}/report.json and report.html.", markup=False, highlight=False)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@app.command("cold-start")
def cold_start(data: Data, report: Folder, draws: Draws = 500, seed: Seed = 0) -> None:
    """Ratings of users and items that were never trained on, after a few ratings each."""
    from innerloop.evaluation.protocols import cold_start  # noqa: PLC0415

    job = _Job("cold-start", data, report, draws, seed)
    job.judge(lambda tell: cold_start.run(data, seed=seed, tell=tell))
