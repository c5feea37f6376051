"""`innerloop evaluate PROTOCOL`: run one protocol over a data set and write its scoreboard."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from innerloop.config import MOST_SEED, SEQUENCES
from innerloop.errors import SettingsError
from innerloop.evaluation.stream.options import PRESETS, in_words, usual

from .columns import Columns, columns_of

if TYPE_CHECKING:
    from innerloop.evaluation.outcome import Outcome, Tell
    from innerloop.evaluation.stream.protocol import Live

app = typer.Typer(no_args_is_help=True, help="Measure every arm and the baselines on past data.")

Data = Annotated[Path, typer.Option(help="A file of events or ratings, or a folder with such files.")]
Folder = Annotated[Path, typer.Option(help="report.json and report.html go here.")]
Draws = Annotated[int, typer.Option(min=20, help="Draws of the bootstrap.")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="The same seed gives the same figures.")]


@dataclass(frozen=True)
class _Job:
    protocol: str
    data: Path
    report: Path
    draws: int
    seed: int

    def judge(self, run: "Callable[[Tell], Outcome]") -> None:
        """Run the protocol under a progress bar, then show and write its report. Raises SettingsError."""
        from innerloop.evaluation.report import Report, require_writable  # noqa: PLC0415 - each command imports what it runs
        from innerloop.evaluation.scoreboard import rows  # noqa: PLC0415

        require_writable(self.report)
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
        report = Report(self.protocol, str(self.data), outcome.release, seconds, found, outcome.facts)
        console = Console()
        console.print(report.table())  # first: should the disk be full by now, the figures are not lost
        report.write(self.report)
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
def cold_start(data: Data, report: Folder, draws: Draws = 500, seed: Seed = 0, column: Columns = None) -> None:
    """Ratings of users and items that were never trained on, after a few ratings each."""
    from innerloop.evaluation.cold_start import protocol as cold_start  # noqa: PLC0415

    columns = columns_of(column)
    job = _Job("cold-start", data, report, draws, seed)
    job.judge(lambda tell: cold_start.run(data, seed=seed, tell=tell, columns=columns))


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
    column: Columns = None,
) -> None:
    """Every user's last item among the whole catalogue, after the items before it."""
    from innerloop.evaluation.sequence import protocol as sequence  # noqa: PLC0415
    from innerloop.evaluation.sequence.course import Options  # noqa: PLC0415

    options = Options(encoder=encoder, dimension=dimension, epochs=epochs, users=users)
    columns = columns_of(column)
    job = _Job("sequence", data, report, draws, seed)
    job.judge(lambda tell: sequence.run(data, seed=seed, tell=tell, options=options, columns=columns))


Share = Annotated[float, typer.Option(help="Share of the time span that trains; what comes after it is scored.")]


@app.command("slate")
def slate(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    train_share: Share = 0.5,
    most: Annotated[int, typer.Option(min=1, help="The most choices that are scored, evenly spread.")] = 50_000,
    column: Columns = None,
) -> None:
    """The items shown at a click-out, ranked from strictly earlier actions."""
    from innerloop.evaluation.slate import protocol as slate  # noqa: PLC0415

    columns = columns_of(column)
    job = _Job("slate", data, report, draws, seed)
    given = partial(slate.run, data, train_share=train_share, most=most, columns=columns)
    job.judge(lambda tell: given(seed=seed, tell=tell))


@app.command("conversion")
def conversion(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    train_share: Share = 0.7,
    window_hours: Annotated[float, typer.Option(help="A purchase this long after a click still belongs to it.")] = 24.0,
    column: Columns = None,
) -> None:
    """The chance that a click is followed by a purchase of its item within the attribution window."""
    from innerloop.evaluation.conversion import protocol as conversion  # noqa: PLC0415

    columns = columns_of(column)
    job = _Job("conversion", data, report, draws, seed)
    given = partial(conversion.run, data, window_hours=window_hours, train_share=train_share, columns=columns)
    job.judge(lambda tell: given(seed=seed, tell=tell))


_PRESETS = ". ".join(f"{name}: {in_words(options)}" for name, options in PRESETS.items())


@app.command("stream")
def stream(  # noqa: PLR0917 - options by name
    data: Data,
    report: Folder,
    draws: Draws = 500,
    seed: Seed = 0,
    preset: Annotated[
        str | None, typer.Option(help=f"Options below, bundled; one that is given as well holds. {_PRESETS}.")
    ] = None,
    column: Columns = None,
    history: Annotated[Path | None, typer.Option(help="Earlier events to train on and warm up with.")] = None,
    items: Annotated[Path | None, typer.Option(help="A file of what is said of items, as for train.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Type of event to foresee; may be given again.", show_default=usual("targets")),
    ] = None,
    remove_seen: Annotated[
        bool | None,
        typer.Option(help="Leave out what the user has had an event with.", show_default=usual("remove_seen")),
    ] = None,
    within_session: Annotated[
        bool | None,
        typer.Option(help="Ask only inside a session.", show_default=usual("within_session")),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Ask at every so-manieth moment.", show_default=usual("every")),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(min=1, help="Events at the start that are only learned from.", show_default=usual("warm_up")),
    ] = None,
    hits: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Cut-off of a hit rate; may be given again.", show_default=usual("hits")),
    ] = None,
    reciprocal: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Cut-off of an MRR; may be given again.", show_default=usual("reciprocal")),
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option(help=f"Sequence model: {', '.join(SEQUENCES)}.", show_default=usual("sequence")),
    ] = None,
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
    columns = columns_of(column)
    job = _Job("stream", data, report, draws, seed)
    if not math.isfinite(rate):
        raise SettingsError(f"A rate of {rate} events per second is none: give a number from 1.")
    live = _live(rate) if through_kafka else None
    given = partial(stream.run, data, options, history=history, items=items, columns=columns, live=live)
    job.judge(lambda tell: given(seed=seed, tell=tell))


def _live(rate: float) -> "Live":
    from .through_kafka import own_services, through_kafka  # noqa: PLC0415

    own_services()  # now, not after the training
    return lambda log, rows, release, options: through_kafka(log, rows, release, options, rate=rate)
