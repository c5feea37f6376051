"""One user, from the database to the score topics: whether what is published is made of what is stored."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from innerloop.client import Record, newest, newest_two
from innerloop.config import Settings
from innerloop.events import CODES
from innerloop.scores import AdScores, RecommendationScores
from innerloop.store import items, releases, support_sets
from innerloop.store.database import Database, transaction

from .names import Names

_TYPES = {code: name for name, code in CODES.items()}


@dataclass(frozen=True)
class Example:
    """One event of a support set, as people read it."""

    time: str
    event: str
    item: str
    """Its id."""
    category: str


@dataclass(frozen=True)
class Person:
    """What is stored of a user, and what is published; versions are None where there is nothing."""

    user_id: str
    support: tuple[Example, ...]
    """Newest first."""
    support_version: int | None
    model_version: int | None
    """Of the release in force."""
    recommendations: RecommendationScores | None
    before: RecommendationScores | None
    """The list before, where the topic still has it."""
    ads: AdScores | None
    categories: dict[str, str]
    """Of the items listed."""
    names: dict[str, str]
    """Of the items shown, where the shop has told them."""
    notice: str
    """What is to be said of names that are not known."""

    def called(self, item: str) -> str:
        """An item in a sentence: its name, if known, and its id."""
        return f"{self.names[item]} ({item})" if item in self.names else item

    @property
    def fresh(self) -> bool:
        """Whether the list names the very support set and release that are in force."""
        shown = self.recommendations
        return (
            shown is not None
            and shown.support_version == self.support_version
            and shown.model_version == self.model_version
        )

    @property
    def moved(self) -> dict[str, int | None]:
        """Item -> how many places it has risen since the list before; None for one that is new on it."""
        if self.recommendations is None or self.before is None:
            return {}
        places = {item.item_id: place for place, item in enumerate(self.before.items)}
        return {
            item.item_id: places[item.item_id] - place if item.item_id in places else None
            for place, item in enumerate(self.recommendations.items)
        }

    @property
    def gone(self) -> list[str]:
        """Items of the list before that are no longer on it, best first."""
        if self.recommendations is None or self.before is None:
            return []
        kept = {item.item_id for item in self.recommendations.items}
        return [item.item_id for item in self.before.items if item.item_id not in kept]


def look_up(settings: Settings, engine: Database, names: Names, user_id: str) -> Person:
    """Read everything about a user. Raises RetryError and ServiceError."""
    with ThreadPoolExecutor(max_workers=2) as pool:  # each reads the user's whole partition of its topic
        lists, its_ads = (
            pool.submit(newest_two, settings, "recommendations", user_id),
            pool.submit(newest, settings, "ads", user_id),
        )
        (shown, before), ads = lists.result(), its_ads.result()
    with transaction(engine) as connection:
        _, sets, versions = support_sets.read(connection, [user_id])
        release = releases.newest(connection)
        rows = items.items_numbered(connection, np.unique(sets.examples["item"]).tolist())
        known = {number: (item, category) for number, item, category in rows}
        categories = items.categories_of(connection, _items(shown))
    return Person(
        user_id=user_id,
        support=tuple(_example(known, each) for each in sets.examples[::-1]),
        support_version=int(versions[0]) if len(versions) else None,
        model_version=release.version if release else None,
        recommendations=shown if isinstance(shown, RecommendationScores) else None,
        before=before if isinstance(before, RecommendationScores) else None,
        ads=ads if isinstance(ads, AdScores) else None,
        categories=categories,
        names=names.of([*(item for item, _ in known.values()), *_items(shown), *_items(before), *_items(ads)]),
        notice=names.notice,
    )


def _items(record: Record | None) -> list[str]:
    """What a list names, best first."""
    if record is None:
        return []
    return [each.item_id for each in (record.ads if isinstance(record, AdScores) else record.items)]


def _example(known: dict[int, tuple[str, str | None]], example: np.void) -> Example:
    item, category = known[int(example["item"])]
    return Example(as_time(int(example["time"])), _TYPES[int(example["type"])], item, category or "")


def as_time(epoch_ms: int) -> str:
    """As people read it, UTC."""
    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"
