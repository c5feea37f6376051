"""`innerloop train`: history in, a registered release out."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from innerloop.config import Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.evaluation.event_table import read_events
from innerloop.evaluation.item_table import read_items
from innerloop.events import IMPRESSION, MAX_IDENTIFIER_BYTES
from innerloop.learning.processes import from_first, join_processes, leave_processes, processes, rank
from innerloop.learning.releases import Release, save
from innerloop.learning.sequence_training import forget_checkpoint
from innerloop.learning.training import train
from innerloop.store import history, releases
from innerloop.store.database import Database, connect, require_tables, transaction
from innerloop.streams.publisher import Publisher
from innerloop.streams.topics import require_topics

from .train_items import items_on_topic

_LOG = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """What to train on.

    The first `share` of the file `events`, without one the support sets in the database; and what the file `items` says
    of items, without one the catalogue topic.
    """

    events: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0
    items: Path | None = None


def run_train(settings: Settings, source: Source, checkpoint: Path | None = None) -> None:
    """Train, and register the release.

    Under torchrun the processes share the training; the first one reads the history and registers the release.
    """
    join_processes()
    try:
        _train(settings, source, checkpoint)
    finally:
        leave_processes()


def _train(settings: Settings, source: Source, checkpoint: Path | None) -> None:
    engine = connect(settings.database)
    require_tables(engine)
    require_topics(settings, [settings.topics.releases])  # now, not after the training
    events = _agreed_on(lambda: _history(engine, source))
    items = _agreed_on(lambda: _items(settings, source, events))
    if rank() > 0:
        _trained(settings, events, 0, checkpoint, items)
        return
    release, location = train_release(settings, engine, events, checkpoint, items)
    metrics = ", ".join(f"{name} {_written(value)}" for name, value in release.card.metrics.items())
    Console().print(f"Release {release.version} at {location}: {metrics}.", markup=False, highlight=False)
    if release.ranker is not None and not release.ranker.taught:
        Console().print(
            "Its ranker is the one that suits any shop: there are too few events yet to teach a better one."
        )


def _written(value: float) -> str:
    """Counts as such."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"


def _history(engine: Database, source: Source) -> pl.DataFrame:
    now = int(time.time() * 1000)
    if source.events is None:
        with transaction(engine) as connection:
            return _until(now, history.read_history(connection))
    events = _until(now, _namable(read_events(source.events, columns=source.columns)))
    return events.head(int(len(events) * source.share))


def _until(now: int, events: pl.DataFrame) -> pl.DataFrame:
    """Those that have happened by `now` (epoch ms).

    One from a clock that runs ahead would make all others old: popularity would have faded, and clicks that wait for
    their purchase would count as not bought. Once its time has come it is learned from, too.
    """
    taken = events.filter(pl.col("event_time") <= now)
    if len(taken) < len(events):
        _LOG.warning(
            "events dated ahead of this machine's clock are left out",
            events=len(events) - len(taken),
            newest=str(pl.from_epoch(events["event_time"], "ms").max()),
        )
    return taken


def _namable(events: pl.DataFrame) -> pl.DataFrame:
    """Those that ingest would take by their identifiers: a list must not name an item that no event can."""
    texts = [pl.col(name) for name in ("user_id", "item_id")]
    fits = [(text.str.len_bytes() <= MAX_IDENTIFIER_BYTES) & ~text.str.contains("\0", literal=True) for text in texts]
    taken = events.filter(*fits)
    if len(taken) < len(events):
        _LOG.warning(
            "events whose user_id or item_id is longer than 256 bytes or has a NUL are left out",
            events=len(events) - len(taken),
        )
    return taken


def _items(settings: Settings, source: Source, events: pl.DataFrame) -> pl.DataFrame:
    """What is said of items; an empty table where nothing is."""
    met = set(events.filter(pl.col("event_type") != IMPRESSION)["item_id"])
    items = items_on_topic(settings, met) if source.items is None else read_items(source.items, met)
    if len(items):
        known = sum(item in met for item in items["item_id"])
        _LOG.info("items are described", met=known, others=len(items) - known)
    return items


def _agreed_on(read: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """The first process's table, in all of them: while they read, the database grows."""
    if processes() == 1:
        return read()

    def packed() -> bytes:
        buffer = io.BytesIO()
        read().write_ipc(buffer)
        return buffer.getvalue()

    return pl.read_ipc(io.BytesIO(from_first(packed)))


def train_release(
    settings: Settings,
    engine: Database,
    events: pl.DataFrame,
    checkpoint: Path | None = None,
    items: pl.DataFrame | None = None,
) -> tuple[Release, Path]:
    """Train, save, register and announce the next release; the release and its card's path.

    A training that was stopped goes on from the directory `checkpoint`, which is emptied once the release is there.
    Raises ServiceError when another training was done meanwhile: its release stays as it is.
    """
    with transaction(engine) as connection:
        version = releases.next_version(connection)
    release = _trained(settings, events, version, checkpoint, items)
    with transaction(engine) as connection:
        releases.registering(connection)
        if releases.next_version(connection) != version:
            raise ServiceError(
                f"Another training has registered release {version} meanwhile, so that this one was not saved: train "
                "again, one at a time."
            )
        location = save(release, settings.learning.releases_dir.absolute())
        releases.register(connection, version, _card(location), str(location))
    _announce(settings, _card(location), location)
    if checkpoint is not None:
        forget_checkpoint(checkpoint)
    return release, location


def _trained(
    settings: Settings, events: pl.DataFrame, version: int, checkpoint: Path | None, items: pl.DataFrame | None = None
) -> Release:
    if events.is_empty():
        raise SettingsError("There are no events to train on: replay some first, or name a file with --events.")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=False,
        disable=rank() > 0,
    ) as bar:
        return train(
            events,
            settings=settings.learning,
            weights=settings.support.weights,
            capacity=settings.support.capacity,
            impressions=settings.support.impressions,
            version=version,
            items=items,
            progress=_told(bar),
            checkpoint=checkpoint,
        )


def register(settings: Settings, engine: Database, release: Release, location: Path) -> None:
    """A row in the database, which adapt reads, and a record on the release topic for everyone else."""
    with transaction(engine) as connection:
        releases.register(connection, release.version, _card(location), str(location))
    _announce(settings, _card(location), location)


def _card(location: Path) -> dict[str, Any]:
    card: dict[str, Any] = msgspec.json.decode(location.read_bytes())
    return card


def _announce(settings: Settings, card: Mapping[str, Any], location: Path) -> None:
    publisher = Publisher(settings.kafka)
    record = msgspec.json.encode({**card, "model": "recommendations", "location": str(location)})
    publisher.send(settings.topics.releases, "recommendations", record)
    publisher.flush(10.0)


def _told(bar: Progress) -> Callable[[str, float], None]:
    task = bar.add_task("training", total=1.0)

    def tell(what: str, share: float) -> None:
        bar.update(task, description=what, completed=share)

    return tell
