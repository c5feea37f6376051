"""`innerloop dlq`: what was refused, why, and sending it back once the cause is cured."""

import sys
from collections import deque
from typing import Annotated

import typer
from rich.console import Console

from innerloop.config import Settings, load_settings
from innerloop.errors import Reason

from .logs import configure_logs

app = typer.Typer(no_args_is_help=True, help="See what was refused and why, and send it back.")

ReasonOption = Annotated[str | None, typer.Option(help=f"Only these: {', '.join(Reason)}.")]
SinceOption = Annotated[str | None, typer.Option(help="Refused at or after this time: 2026-01-31T12:00:00Z.")]
UntilOption = Annotated[str | None, typer.Option(help="Refused before this time.")]


@app.command("list")
def list_groups(*, as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False) -> None:
    """How many there are by reason and topic, since when, and how many of them were replayed."""
    import msgspec  # noqa: PLC0415 - each command imports what it runs

    from innerloop.streams.dead_letter_queue import DeadLetterQueue  # noqa: PLC0415

    from .dead_letters import grouped, table  # noqa: PLC0415

    groups = grouped(DeadLetterQueue(_settings()))
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(groups)).decode() + "\n")
    elif groups:
        Console().print(table(groups))
    else:
        typer.echo("There are no dead letters.")


@app.command()
def show(
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
) -> None:
    """Print dead letters with all they hold; what is no text is escaped, what is long is cut."""
    from innerloop.streams.dead_letter_queue import DeadLetterQueue  # noqa: PLC0415

    from .dead_letters import described, wanted  # noqa: PLC0415

    asked = wanted(reason, since, until)
    queue = DeadLetterQueue(_settings())
    newest = deque(filter(asked, queue.letters()), maxlen=limit)
    for letter in newest:
        typer.echo(described(letter, replayed=letter.place in queue.replayed) + "\n")
    if not newest:
        typer.echo("There are no such dead letters.")


@app.command()
def replay(
    reason: ReasonOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send dead letters back to the topics they came from, as they came, each once; those refused later are left."""
    from innerloop.streams.dead_letter_queue import Replayer  # noqa: PLC0415

    from .dead_letters import sentences, wanted  # noqa: PLC0415

    asked = wanted(reason, since, until)
    done = Replayer(_settings(), dry_run=dry_run).run(asked)
    for sentence in sentences(done, dry_run=dry_run):
        typer.echo(sentence)
    sys.exit(1 if done.gone or done.elsewhere else 0)


def _settings() -> Settings:
    settings = load_settings()
    configure_logs(settings, process="dlq")
    return settings
