"""The clicks of the ingest benchmark, and what must be stored once all of them are in.

Users are drawn with probability proportional to rank^-1.2 over 200,000, items by a Zipf law over 50,000; identifiers
are strings. Event times advance a millisecond per event; 3% of the events are late by up to 1,000 s (at a million
events: the length of the stream), 1% repeat one of the last 10,000 records byte for byte.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from innerloop.config import Settings
from innerloop.streams.event_producer import EventProducer

USERS, USER_EXPONENT = 200_000, 1.2
ITEMS, ITEM_EXPONENT = 50_000, 1.3
LATE, DUPLICATED = 0.03, 0.01
LATE_MS = 1_000_000
_DUPLICATE_WITHIN = 10_000
_NEWEST_MS = 1_750_000_000_000
"""A fixed time: the same seed gives the same records on any day."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stored:
    """What support sets hold: users, examples, and the sum of the examples' event times (epoch ms)."""

    users: int
    examples: int
    times: int


@dataclass(frozen=True)
class Clicks:
    """Record n is event `source[n]`; of event e: user, item and time (epoch ms) number e."""

    source: Ints
    users: Ints
    items: Ints
    times: Ints

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def draw(cls, count: int, seed: int = 0) -> "Clicks":
        """Make `count` records."""
        rng = np.random.default_rng(seed)
        share = np.arange(1, USERS + 1) ** -USER_EXPONENT
        late = rng.random(count) < LATE
        back = rng.integers(1, _DUPLICATE_WITHIN, count)
        at = np.arange(count)
        source = np.where(rng.random(count) < DUPLICATED, np.maximum(at - back, 0), at)
        times = _NEWEST_MS - count + at - np.where(late, rng.integers(0, LATE_MS, count), 0)
        users = rng.choice(USERS, count, p=share / share.sum())
        return cls(source, users, rng.zipf(ITEM_EXPONENT, count) % ITEMS, times)

    def records(self) -> list[tuple[str, bytes]]:
        """(key, value) of every record."""
        users = [f"user-{user}" for user in self.users.tolist()]
        values = [
            b'{"event_id":"evt-%012d","event_type":"click","user_id":"%s","item_id":"item-%d","event_time":%d}'
            % (number, user.encode(), item, time)
            for number, (user, item, time) in enumerate(
                zip(users, self.items.tolist(), self.times.tolist(), strict=True)
            )
        ]
        return [(users[event], values[event]) for event in self.source.tolist()]

    def expected(self, capacity: int) -> Stored:
        """The oracle, by another way than the product's: of each user the newest `capacity` distinct events.

        Which of two events with equal times is kept does not change their sum.
        """
        events = np.unique(self.source)
        users, times = self.users[events], self.times[events]
        order = np.lexsort((-times, users))
        users, times = users[order], times[order]
        first = np.flatnonzero(np.concatenate(([True], np.diff(users) > 0)))
        sizes = np.diff(np.concatenate((first, [len(users)])))
        rank = np.arange(len(users)) - np.repeat(first, sizes)
        kept = rank < capacity
        return Stored(len(first), int(kept.sum()), int(times[kept].sum()))


def send(settings: Settings, clicks: Clicks) -> None:
    """Put every record onto the clicks topic, keyed by user."""
    producer = EventProducer(settings)
    for user, value in clicks.records():
        producer.send(user, "click", value)
    producer.finish(120.0)
