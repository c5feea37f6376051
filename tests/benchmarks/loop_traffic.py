"""Both ends of the loop as the benchmark sees them: a shop that sends events, and a subscriber that reads scores.

Both run as threads of the benchmark's process, write down times on one monotonic clock, and are joined afterwards, by
user and event time: an event is answered by the first list whose newest event is it or a later one of the user. That
attribution is exact because each user's event times here are all different.
"""

import threading
import time
from array import array

import numpy as np
import polars as pl

from innerloop.client import ScoreReader
from innerloop.config import Settings
from innerloop.scores import RecommendationScores
from innerloop.streams import clients

_STEP_SECONDS = 0.001


class Shop:
    """Sends clicks of random users on random items at a constant rate, without lingering.

    An event is produced when it is handed to the Kafka client; one that is late because this process was is sent at
    once, and its clock starts then: `sent_per_s` of the report says whether the pace was kept.
    """

    def __init__(self, settings: Settings, users: int, items: int) -> None:
        self._producer = clients.producer(settings.kafka, linger_ms=0)
        self._topic, self._items = settings.topics.clicks, items
        self._names = [f"user-{number}" for number in range(users)]
        self._last = [0] * users
        self._rng = np.random.default_rng(0)
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._users, self._times, self._sent = array("q"), array("q"), array("d")

    def run(self, rate: float, seconds: float) -> None:
        """Send for this long; returns when the last event is at the broker."""
        count = int(rate * seconds)
        users = self._rng.integers(0, len(self._names), count).tolist()
        items = self._rng.integers(0, self._items, count).tolist()
        began, done = time.monotonic(), 0
        while done < count:
            due = min(count, int((time.monotonic() - began) * rate) + 1)
            for at in range(done, due):
                self._send(users[at], items[at])
            done = due
            self._producer.poll(0)
            if time.monotonic() - began > 2 * seconds:
                break  # the pace cannot be kept by far
            time.sleep(_STEP_SECONDS)
        self._producer.flush(30.0)

    def _send(self, user: int, item: int) -> None:
        when = max(int(time.time() * 1000), self._last[user] + 1)
        self._last[user] = when
        self._number += 1
        value = (
            f'{{"event_id":"evt-{self._number:012d}","event_type":"click","user_id":"{self._names[user]}",'
            f'"item_id":"item-{item}","event_time":{when}}}'
        )
        self._users.append(user)
        self._times.append(when)
        self._sent.append(time.monotonic())
        while True:
            try:
                self._producer.produce(self._topic, value, self._names[user])
            except BufferError:
                self._producer.poll(0.01)
            else:
                return

    def taken(self) -> pl.DataFrame:
        """What was sent since the last call: user, event_time (epoch ms), sent (monotonic seconds), in that order."""
        columns = {"user": np.array(self._users), "event_time": np.array(self._times), "sent": np.array(self._sent)}
        self._clear()
        return pl.DataFrame(columns, schema={"user": pl.Int64, "event_time": pl.Int64, "sent": pl.Float64})


class Subscriber:
    """Follows the recommendations with the client we ship; a list is read when the client hands it over, decoded."""

    def __init__(self, settings: Settings) -> None:
        self._reader = ScoreReader(settings, model="recommendations")
        self._thread = threading.Thread(target=self._follow, name="subscriber", daemon=True)
        self._rows: list[tuple[int, int, int, float]] = []
        self.shortest = 2**31
        """The fewest items of any list read."""

    def start(self) -> None:
        self._reader.wait_until_current(30.0)
        self._thread.start()

    def _follow(self) -> None:
        for record in self._reader:
            now = time.monotonic()
            if isinstance(record, RecommendationScores):
                self._rows.append((int(record.user_id[5:]), record.event_time, record.scored_at, now))
                self.shortest = min(self.shortest, len(record.items))

    def __len__(self) -> int:
        return len(self._rows)

    def taken(self) -> pl.DataFrame:
        """What was read since the last call: user, event_time and scored_at (epoch ms), read (monotonic seconds)."""
        rows, self._rows = self._rows, []
        schema = {"user": pl.Int64, "event_time": pl.Int64, "scored_at": pl.Int64, "read": pl.Float64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def close(self) -> None:
        self._reader.stop()
        self._thread.join(5.0)
        self._reader.close()


def answered(events: pl.DataFrame, lists: pl.DataFrame) -> pl.DataFrame:
    """The events, each with the first of `lists` that its user got for it or a later event; nulls where none came."""
    first = lists.unique(["user", "event_time"], keep="first", maintain_order=True).sort("event_time")
    return events.sort("event_time").join_asof(
        first, on="event_time", by="user", strategy="forward", coalesce=True, check_sortedness=False
    )
