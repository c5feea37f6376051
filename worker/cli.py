"""The `innerloop` command: translates the command line and hands over. Errors leave as one sentence."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from innerloop.config import Settings, load_settings
from innerloop.errors import InnerloopError, SettingsError, StopError

from . import dlq, evaluate
from .columns import Columns, columns_of
from .logs import configure_logs

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(dlq.app, name="dlq")
_ERR = Console(stderr=True)
_ACCEPT_GAP = "Where retention has passed us, go on with the oldest record there is; the gap is recorded."


def main() -> None:
    """Run the command line; an error of ours becomes one sentence and its exit code, never a traceback."""
    # OpenMP reads it once, when torch is loaded. Threads that spin until the last of them is done take the core that it
    # waits for wherever anything else runs: beside two busy processes the heads were forty times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except StopError as error:
        _ERR.print(f"innerloop: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except InnerloopError as error:
        _ERR.print(f"innerloop: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(3)


def _tell_version(wanted: bool) -> None:  # noqa: FBT001 - the signature is typer's
    if wanted:
        typer.echo(f"innerloop {importlib.metadata.version('innerloop')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True)] = False,  # noqa: FBT002
) -> None: ...


def _settings(process: str) -> Settings:
    settings = load_settings()
    configure_logs(settings, process=process)
    return settings


def _text(user: str) -> str:
    """The identifier; raises SettingsError for bytes that are no text, which Kafka keys and JSON can't hold."""
    try:
        user.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"{user!r} is no user: an identifier is UTF-8.") from None
    return user


def _settings_with_broker(process: str) -> Settings:
    """Raises ServiceError with the reason when no broker lets us in: what is asked later would only go unanswered."""
    from innerloop.streams.clients import require_broker  # noqa: PLC0415

    settings = _settings(process)
    require_broker(settings.kafka)
    return settings


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Keep the data here; without it, it is temporary.")] = None,
) -> None:
    """Run a real Kafka and a real PostgreSQL until Ctrl-C, and print the settings that point at them."""
    from .servers.services import up as run  # noqa: PLC0415 - each command imports what it runs

    run(_settings("up"), data)


@app.command()
def config() -> None:
    """Print the settings in force, with secrets hidden."""
    Console().print_json(_settings("config").model_dump_json())


@app.command()
def migrate(
    grant_to: Annotated[str | None, typer.Option(help="Let this role read and write the tables, no more.")] = None,
) -> None:
    """Bring the database to the newest table layout."""
    from innerloop.store.database import connect  # noqa: PLC0415
    from innerloop.store.migrate import grant  # noqa: PLC0415
    from innerloop.store.migrate import migrate as run  # noqa: PLC0415

    engine = connect(_settings("migrate").database)
    run(engine)
    typer.echo("The tables are up to date.")
    if grant_to is not None:
        grant(engine, grant_to)
        typer.echo(f"{grant_to} may read and write them.")


@app.command()
def topics() -> None:
    """Make the topics that are missing; those that exist are left as they are."""
    from innerloop.streams.topics import ensure_topics  # noqa: PLC0415

    made = ensure_topics(_settings_with_broker("topics"))
    typer.echo(f"Made: {', '.join(made)}" if made else "All topics exist.")


@app.command()
def ingest(
    processes: Annotated[int, typer.Option(min=1, help="Members of the consumer group on this machine.")] = 1,
    accept_gap: Annotated[bool, typer.Option("--accept-gap", help=_ACCEPT_GAP)] = False,  # noqa: FBT002
) -> None:
    """Store events as support sets and ask for adaptation, until SIGTERM."""
    settings = _settings("ingest")
    if processes > 1:
        _run_pool([["ingest", *_flag(accept_gap=accept_gap)]] * processes, settings)
    from .processes import run_ingest  # noqa: PLC0415

    run_ingest(settings, accept_gap=accept_gap)


@app.command()
def adapt(
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; default one on a CPU, up to 8 on each GPU.")
    ] = None,
    devices: Annotated[str, typer.Option(help="auto, cpu, or a list such as cuda:0,cuda:1.")] = "auto",
    member: Annotated[str | None, typer.Option(hidden=True)] = None,
    threads: Annotated[int, typer.Option(hidden=True)] = 0,
    accept_gap: Annotated[bool, typer.Option("--accept-gap", help=_ACCEPT_GAP)] = False,  # noqa: FBT002
) -> None:
    """Adapt the users asked for and publish their scores, until SIGTERM."""
    settings = _settings("adapt")
    from .devices import shares  # noqa: PLC0415

    if member is None:
        commands = [
            ["adapt", "--member", share.device, "--threads", str(share.threads), *_flag(accept_gap=accept_gap)]
            for share in shares(devices, processes, settings.topics.partitions)
        ]
        _run_pool(commands, settings)
    from .processes import run_adapt  # noqa: PLC0415

    run_adapt(settings, member or "cpu", threads, accept_gap=accept_gap)


def _flag(*, accept_gap: bool) -> list[str]:
    return ["--accept-gap"] if accept_gap else []


def _run_pool(commands: list[list[str]], settings: Settings) -> None:
    from .pool import Pool  # noqa: PLC0415
    from .processes import require_services, stop_on_signals  # noqa: PLC0415

    stopping, http = stop_on_signals(), settings.http
    require_services(settings)  # asked here, what is missing is told once
    ports = range(http.port, http.port + len(commands)) if http.port else ()
    sys.exit(Pool(commands, ports=ports, host=http.host).run(stopping))


@app.command()
def quality() -> None:
    """Measure in windows what adaptation is worth, against the hold-out, until SIGTERM."""
    from .quality.app import run_quality  # noqa: PLC0415

    run_quality(_settings("quality"))


@app.command()
def train(
    events: Annotated[Path | None, typer.Option(help="CSV, JSON Lines or Parquet; default: the database.")] = None,
    column: Columns = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Use this first share of the file, by time.")] = 1.0,
    items: Annotated[Path | None, typer.Option(help="What is said of items; default: the catalogue topic.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Resume the sequence model's training from here.")] = None,
) -> None:
    """Fit the encoder, the prior, the sequence model and the ranker, and register a release that adapt loads by itself.

    With several processes: torchrun --nproc-per-node 2 -m innerloop.worker train.
    """
    from .train import Source, run_train  # noqa: PLC0415

    run_train(_settings("train"), Source(events, columns_of(column), share, items), checkpoint)


@app.command()
def replay(  # noqa: PLR0917 - a command's options
    file: Annotated[Path, typer.Argument(help="CSV, JSON Lines or Parquet.")],
    rate: Annotated[str, typer.Option(help="Events per second, or max.")] = "1000",
    column: Columns = None,
    start: Annotated[float, typer.Option(min=0.0, max=1.0, help="Skip this first share of the file.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many events.")] = None,
    shift_to_now: Annotated[bool, typer.Option(help="Move the times so that the newest event is of now.")] = False,  # noqa: FBT002
) -> None:
    """Send a file of events to the event topics, keyed by user."""
    from .replay import run_replay  # noqa: PLC0415

    run_replay(_settings("replay"), file, rate, columns_of(column), start, limit, shift_to_now=shift_to_now)


@app.command()
def scores(user: Annotated[str, typer.Argument(help="The user's identifier.")]) -> None:
    """Print a user's current scores."""
    from .scores import show_scores  # noqa: PLC0415

    sys.exit(show_scores(_settings_with_broker("scores"), _text(user)))


@app.command()
def lag(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,  # noqa: FBT002
    watch: Annotated[bool, typer.Option("--watch", help="Once a second until Ctrl-C.")] = False,  # noqa: FBT002
) -> None:
    """Print how far each consumer group is behind, in offsets and in seconds, and what that means."""
    from .lag import show_lag, watch_lag  # noqa: PLC0415

    settings = _settings_with_broker("lag")
    if watch:
        watch_lag(settings)
    sys.exit(show_lag(settings, as_json=as_json))


@app.command()
def console(
    host: Annotated[str | None, typer.Option(help="Default: console.host, loopback.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: console.port, 8080.")] = None,
) -> None:
    """Serve one live page over the whole loop, read-only, until SIGTERM."""
    settings = _settings("console")
    given = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    from .console.serve import run_console  # noqa: PLC0415

    run_console(settings.model_copy(update={"console": settings.console.model_copy(update=given)}))


@app.command()
def erase(
    users: Annotated[list[str], typer.Argument(help="The users' identifiers.", metavar="USER...")],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for ingest and adapt.")] = 30.0,
) -> None:
    """Forget users: support sets deleted, scores tombstoned, what is replayed of them dropped; prints the receipts."""
    from .erase import run_erase  # noqa: PLC0415

    run_erase(_settings("erase"), [_text(user) for user in users], timeout)


@app.command()
def demo(  # noqa: PLR0917 - a command's options
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop after this long; default: Ctrl-C.")] = None,
    events: Annotated[Path | None, typer.Option(help="Real events instead of the synthetic shop.")] = None,
    history: Annotated[float, typer.Option(min=0.01, max=0.99, help="First share by time, to train on.")] = 0.5,
    rate: Annotated[str, typer.Option(help="Events per second, or max.")] = "500",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many rows of the file.")] = None,
    column: Columns = None,
    report: Annotated[Path | None, typer.Option(help="Write the summary here as JSON.")] = None,
    data: Annotated[Path | None, typer.Option(help="Keep Kafka's and Postgres's data here.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Adapt processes.")] = 2,
    console: Annotated[bool, typer.Option(help="Show the live page as well.")] = True,  # noqa: FBT002
    seed: Annotated[int, typer.Option(help="Of the synthetic shop.")] = 0,
) -> None:
    """Watch the whole loop live: clicks in, adapted scores out, on a real Kafka and a real PostgreSQL."""
    from .demo.run import DemoOptions, run_demo  # noqa: PLC0415

    options = DemoOptions(
        seconds=seconds,
        events=events,
        history=history,
        rate=rate,
        limit=limit,
        columns=columns_of(column),
        report=report,
        data=data,
        workers=workers,
        console=console,
        seed=seed,
    )
    settings = load_settings()
    configure_logs(settings.model_copy(update={"log_level": "warning"}), process="demo")
    sys.exit(run_demo(settings, options))
