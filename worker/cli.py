"""The `innerloop` command: translates the command line and hands over. Errors leave as one sentence."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from innerloop.config import Settings, load_settings
from innerloop.errors import InnerloopError, StopError

from . import evaluate
from .logs import configure_logs

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(evaluate.app, name="evaluate")
_ERR = Console(stderr=True)


def main() -> None:
    """Run the command line; an error of ours becomes one sentence and its exit code, never a traceback."""
    try:
        app()
    except StopError as error:
        _ERR.print(f"innerloop: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except InnerloopError as error:
        _ERR.print(f"innerloop: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(3)


def _settings(process: str) -> Settings:
    settings = load_settings()
    configure_logs(settings, process=process)
    return settings


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Keep the data here; without it, it is temporary.")] = None,
) -> None:
    """Run a real Kafka and a real PostgreSQL until Ctrl-C, and print the settings that point at them."""
    from .services import up as run  # noqa: PLC0415 - each command imports what it runs

    run(_settings("up"), data)


@app.command()
def config() -> None:
    """Print the settings in force, with secrets hidden."""
    Console().print_json(_settings("config").model_dump_json())


@app.command()
def migrate() -> None:
    """Bring the database to the newest table layout."""
    from innerloop.store.database import connect  # noqa: PLC0415
    from innerloop.store.migrate import migrate as run  # noqa: PLC0415

    run(connect(_settings("migrate").database))
    typer.echo("The tables are up to date.")


@app.command()
def topics() -> None:
    """Make the topics that are missing; those that exist are left as they are."""
    from innerloop.streams.topics import ensure_topics  # noqa: PLC0415

    made = ensure_topics(_settings("topics"))
    typer.echo(f"Made: {', '.join(made)}" if made else "All topics exist.")


@app.command()
def ingest(
    processes: Annotated[int, typer.Option(min=1, help="Members of the consumer group on this machine.")] = 1,
) -> None:
    """Store events as support sets and ask for adaptation, until SIGTERM."""
    settings = _settings("ingest")
    if processes > 1:
        _run_pool([["ingest"]] * processes)
    from .processes import run_ingest  # noqa: PLC0415

    run_ingest(settings)


@app.command()
def adapt(
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes; default one per device.")] = None,
    devices: Annotated[str, typer.Option(help="auto, cpu, or a list such as cuda:0,cuda:1.")] = "auto",
    member: Annotated[str | None, typer.Option(hidden=True)] = None,
    threads: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Adapt the users asked for and publish their scores, until SIGTERM."""
    settings = _settings("adapt")
    from .devices import shares  # noqa: PLC0415

    if member is None:
        _run_pool(
            [
                ["adapt", "--member", share.device, "--threads", str(share.threads)]
                for share in shares(devices, processes)
            ]
        )
    from .processes import run_adapt  # noqa: PLC0415

    run_adapt(settings, member or "cpu", threads)


def _run_pool(commands: list[list[str]]) -> None:
    from .pool import Pool  # noqa: PLC0415
    from .processes import stop_on_signals  # noqa: PLC0415

    stopping = stop_on_signals()
    sys.exit(Pool(commands).run(stopping))


@app.command()
def train(
    events: Annotated[Path | None, typer.Option(help="CSV, JSON Lines or Parquet; default: the database.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, for columns named differently.")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Use this first share of the file, by time.")] = 1.0,
) -> None:
    """Fit the encoder and the prior, and register a release that adapt loads by itself."""
    from .train import run_train  # noqa: PLC0415

    run_train(_settings("train"), events, _columns(column), share)


@app.command()
def replay(  # noqa: PLR0917 - a command's options
    file: Annotated[Path, typer.Argument(help="CSV, JSON Lines or Parquet.")],
    rate: Annotated[str, typer.Option(help="Events per second, or max.")] = "1000",
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, for columns named differently.")] = None,
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Skip this first share of the file.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many events.")] = None,
    shift_to_now: Annotated[bool, typer.Option(help="Move the times so that the newest event is of now.")] = False,  # noqa: FBT002
) -> None:
    """Send a file of events to the event topics, keyed by user."""
    from .replay import run_replay  # noqa: PLC0415

    run_replay(_settings("replay"), file, rate, _columns(column), start, limit, shift_to_now=shift_to_now)


@app.command()
def scores(user: Annotated[str, typer.Argument(help="The user's identifier.")]) -> None:
    """Print a user's current scores."""
    from .scores import show_scores  # noqa: PLC0415

    sys.exit(show_scores(_settings("scores"), user))


@app.command()
def lag(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,  # noqa: FBT002
) -> None:
    """Print how far each consumer group is behind, in offsets and in seconds."""
    from .lag import show_lag  # noqa: PLC0415

    show_lag(_settings("lag"), as_json=as_json)


@app.command()
def demo(  # noqa: PLR0917 - a command's options
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop after this long; default: Ctrl-C.")] = None,
    events: Annotated[Path | None, typer.Option(help="Real events instead of the synthetic shop.")] = None,
    history: Annotated[float, typer.Option(min=0.01, max=0.99, help="First share by time, to train on.")] = 0.5,
    rate: Annotated[str, typer.Option(help="Events per second, or max.")] = "500",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many rows of the file.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, for columns named differently.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the summary here as JSON.")] = None,
    data: Annotated[Path | None, typer.Option(help="Keep Kafka's and Postgres's data here.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Adapt processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the synthetic shop.")] = 0,
) -> None:
    """Watch the whole loop live: clicks in, adapted scores out, on a real Kafka and a real PostgreSQL."""
    from .demo import DemoOptions, run_demo  # noqa: PLC0415

    options = DemoOptions(
        seconds=seconds,
        events=events,
        history=history,
        rate=rate,
        limit=limit,
        columns=_columns(column),
        report=report,
        data=data,
        workers=workers,
        seed=seed,
    )
    settings = load_settings()
    configure_logs(settings.model_copy(update={"log_level": "warning"}), process="demo")
    sys.exit(run_demo(settings, options))


def _columns(pairs: list[str] | None) -> dict[str, str]:
    from innerloop.errors import SettingsError  # noqa: PLC0415

    mapping = {}
    for pair in pairs or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise SettingsError(f"--column {pair} is not ours=theirs: write for instance --column item_id=sku.")
        mapping[ours] = theirs
    return mapping
