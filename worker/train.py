"""`innerloop train`: history in, a registered release out."""

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from innerloop.config import Settings
from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import read_events
from innerloop.learning.releases import Release, save
from innerloop.learning.training import train
from innerloop.store import history, releases
from innerloop.store.database import Database, connect, require_tables, transaction
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import require_topics


def run_train(settings: Settings, file: Path | None, columns: Mapping[str, str], share: float) -> None:
    """Train on the first `share` of `file`, or on the support sets in the database, and register the release."""
    engine = connect(settings.database)
    require_tables(engine)
    require_topics(settings, [settings.topics.releases])  # now, not after the training
    if file is None:
        with transaction(engine) as connection:
            events = history.read_history(connection)
    else:
        events = read_events(file, columns=columns)
        events = events.head(int(len(events) * share))
    release, location = train_release(settings, engine, events)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in release.card.metrics.items())
    Console().print(f"Release {release.version} at {location}: {metrics}.", markup=False, highlight=False)


def train_release(settings: Settings, engine: Database, events: pl.DataFrame) -> tuple[Release, Path]:
    """Train, save, register and announce the next release; the release and its card's path."""
    if events.is_empty():
        raise SettingsError("There are no events to train on: replay some first, or name a file with --events.")
    with transaction(engine) as connection:
        version = releases.next_version(connection)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=False,
    ) as bar:
        release = train(
            events,
            settings=settings.learning,
            weights=settings.support.weights,
            capacity=settings.support.capacity,
            version=version,
            progress=_told(bar),
        )
    location = save(release, settings.learning.releases_dir.absolute())
    register(settings, engine, release, location)
    return release, location


def register(settings: Settings, engine: Database, release: Release, location: Path) -> None:
    """A row in the database, which adapt reads, and a record on the release topic for everyone else."""
    card = msgspec.json.decode(location.read_bytes())
    with transaction(engine) as connection:
        releases.register(connection, release.version, card, str(location))
    publisher = Publisher(settings.kafka)
    record = msgspec.json.encode({**card, "model": "recommendations", "location": str(location)})
    publisher.send(settings.topics.releases, "recommendations", record)
    publisher.flush(10.0)


def _told(bar: Progress) -> Callable[[str, float], None]:
    task = bar.add_task("training", total=1.0)

    def tell(what: str, share: float) -> None:
        bar.update(task, description=what, completed=share)

    return tell
