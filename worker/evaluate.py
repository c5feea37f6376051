"""`innerloop evaluate PROTOCOL`: run one protocol over a data set and write its scoreboard."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from innerloop.errors import SettingsError

if TYPE_CHECKING:
    from innerloop.evaluation.outcome import Outcome, Tell
    from innerloop.evaluation.stream.protocol import Live

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
    from innerloop.evaluation.cold_start import protocol as cold_start  # noqa: PLC0415

    job = _Job("cold-start", data, report, draws, seed)
    job.judge(lambda tell: cold_start.run(data, seed=seed, tell=tell))


@app.command("sequence")
def sequence(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    encoder: Annotated[
        str, typer.Option(help="History encoder under the heads: attention, gru or pooled.")
    ] = "attention",
    dimension: Annotated[int, typer.Option(min=2, help="Coordinates of an item's vector.")] = 96,
    epochs: Annotated[int, typer.Option(min=1, help="The most epochs of that encoder.")] = 14,
    users: Annotated[int, typer.Option(min=1, help="The most users that are tested, drawn at random.")] = 50_000,
) -> None:
    """Every user's last item among the whole catalogue, after the items before it."""
    from innerloop.evaluation.sequence import protocol as sequence  # noqa: PLC0415
    from innerloop.evaluation.sequence.course import Options  # noqa: PLC0415

    options = Options(encoder=encoder, dimension=dimension, epochs=epochs, users=users)
    job = _Job("sequence", data, report, draws, seed)
    job.judge(lambda tell: sequence.run(data, seed=seed, tell=tell, options=options))


Share = Annotated[float, typer.Option(help="Share of the time span that trains; what comes after it is scored.")]


@app.command("slate")
def slate(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    train_share: Share = 0.5,
    most: Annotated[int, typer.Option(min=1, help="The most choices that are scored, evenly spread.")] = 50_000,
) -> None:
    """The items shown at a click-out, ranked from strictly earlier actions."""
    from innerloop.evaluation.slate import protocol as slate  # noqa: PLC0415

    job = _Job("slate", data, report, draws, seed)
    job.judge(lambda tell: slate.run(data, seed=seed, tell=tell, train_share=train_share, most=most))


@app.command("conversion")
def conversion(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    train_share: Share = 0.7,
    window_hours: Annotated[float, typer.Option(help="A purchase this long after a click still belongs to it.")] = 24.0,
) -> None:
    """The chance that a click is followed by a purchase of its item within the attribution window."""
    from innerloop.evaluation.conversion import protocol as conversion  # noqa: PLC0415

    job = _Job("conversion", data, report, draws, seed)
    job.judge(
        lambda tell: conversion.run(data, seed=seed, tell=tell, window_hours=window_hours, train_share=train_share)
    )


@app.command("stream")
def stream(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    preset: Annotated[str | None, typer.Option(help="globo or taobao: the options below, bundled.")] = None,
    history: Annotated[Path | None, typer.Option(help="Earlier events to train on and warm up with.")] = None,
    items: Annotated[Path | None, typer.Option(help="A file of what is said of items, as for train.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Type of event to foresee; may be given again.")] = None,
    remove_seen: Annotated[bool | None, typer.Option(help="Leave out what the user has had an event with.")] = None,
    within_session: Annotated[bool | None, typer.Option(help="Ask only inside a session.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Ask at every so-manieth moment.")] = None,
    warm_up: Annotated[int | None, typer.Option(min=1, help="Events at the start that are only learned from.")] = None,
    hits: Annotated[list[int] | None, typer.Option(min=1, help="Cut-off of a hit rate; may be given again.")] = None,
    reciprocal: Annotated[list[int] | None, typer.Option(min=1, help="Cut-off of an MRR; may be given again.")] = None,
    sequence: Annotated[str | None, typer.Option(help="Sequence model: auto, off, pooled, gru or attention.")] = None,
    through_kafka: Annotated[bool, typer.Option(help="Also send the events through the real loop.")] = False,  # noqa: FBT002
    rate: Annotated[float, typer.Option(min=1, help="Events per second through the loop.")] = 500.0,
) -> None:
    """Each user's next event among the whole catalogue, in global time, from strictly earlier events."""
    from innerloop.evaluation.stream import protocol as stream  # noqa: PLC0415
    from innerloop.evaluation.stream.options import options_of  # noqa: PLC0415

    if history is not None and warm_up is not None:
        raise SettingsError("--history is what is learned from before anything is asked: leave out --warm-up.")
    options = options_of(
        preset,
        targets=tuple(target) if target else None,
        remove_seen=remove_seen,
        within_session=within_session,
        every=every,
        warm_up=warm_up,
        hits=tuple(hits) if hits else None,
        reciprocal=tuple(reciprocal) if reciprocal else None,
        sequence=sequence,
    )
    job = _Job("stream", data, report, draws, seed)
    live = _live(rate) if through_kafka else None
    job.judge(lambda tell: stream.run(data, options, history=history, items=items, seed=seed, tell=tell, live=live))


def _live(rate: float) -> "Live":
    from .through_kafka import own_services, through_kafka  # noqa: PLC0415

    own_services()  # now, not after the training
    return lambda log, rows, release, options: through_kafka(log, rows, release, options, rate=rate)
