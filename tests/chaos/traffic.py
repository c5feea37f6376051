"""A seeded stream of records: a hot user, repeats, late events, poison, misrouted keys, producers of unequal clocks.

Impressions are among them, and erasures: of users who do not come back, and of some who go on as if nothing had been.
"""

import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from world import ADS

from innerloop.config import Settings
from innerloop.streams import clients
from innerloop.streams.lost_brokers import has_lost_brokers
from innerloop.streams.publisher import Headers

HOT = "hot"
USERS = 20_000
HOT_SHARE = 0.2
REPEATED, LATE, POISON, MISROUTED, IN_WORDS = 0.02, 0.03, 0.003, 0.005, 0.02
IMPRESSIONS, OF_ADS = 0.05, 0.5
LEAVING, LEAVERS, ERASURES, FOR_GOOD = 0.02, 300, 0.0005, 0.5
LATE_MS = 3_600_000
ERASED_AHEAD_MS = 12 * 3_600_000
"""So far ahead that whatever a user did or will do is before it; the product believes a day."""
PRODUCERS = 3
SKEWS_MS = (-3_600_000, -45_000, -800, 0, 300, 20_000, 600_000)
"""How far a producer's clock may be off; the broker takes no record more than an hour ahead."""
_KINDS = ("click", "click", "click", "cart", "favorite", "purchase")
_REMEMBERED = 5_000
_LOOK_SECONDS = 0.25
_FLUSH_SECONDS = 120.0
_PATIENCE_SECONDS = 8.0
_MOST_ERRORS = 10
_PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
_LEAST_BACKLOG, _MOST_BACKLOG = 20_000, 80_000

Sent = tuple[str, str, bytes | None, int]
"""Topic, key, value, and partition, -1 where the key decides."""
TRACED = 0.05


class Records:
    """The records themselves, drawn from one generator: the same seed, the same records but for their times."""

    def __init__(self, settings: Settings, rng: random.Random, *, users: int, items: int) -> None:
        self._topics, self._partitions = settings.topics, settings.topics.partitions
        self._too_large = settings.ingest.max_record_bytes + 1
        self._rng, self._users, self._items = rng, users, items
        self._remembered: list[Sent] = []
        self._number = 0
        self._until = int(time.time() * 1000) + ERASED_AHEAD_MS

    def draw(self, now_ms: int) -> Sent:
        """The next record, by a producer whose clock says `now_ms`."""
        rng, kind = self._rng, self._rng.random()
        if kind < REPEATED and self._remembered:
            return rng.choice(self._remembered)
        user = HOT if rng.random() < HOT_SHARE else f"user-{int(self._users * rng.random() ** 2)}"
        if kind > 1 - POISON:
            return self._clicks(user, self._poison(user, now_ms))
        if rng.random() < LEAVING:
            user = f"leaver-{rng.randrange(LEAVERS)}"
        time_ms = now_ms - (rng.randrange(LATE_MS) if rng.random() < LATE else 0)
        sent = self._erasure(user, now_ms) if rng.random() < ERASURES else self._event(user, time_ms)
        self._remember(sent)
        return sent

    def _erasure(self, user: str, now_ms: int) -> Sent:
        until = now_ms
        if self._rng.random() < FOR_GOOD:
            user, until = f"leaver-{self._rng.randrange(LEAVERS)}", self._until
        whole = json.dumps({"user_id": user, "requested_at": until}).encode()
        return self._topics.erasures, user, self._rng.choice([whole, whole, whole, b"{", b"[]", b""]), -1

    def _event(self, user: str, time_ms: int) -> Sent:
        if self._rng.random() < IMPRESSIONS:
            return self._impression(user, time_ms)
        rng, self._number = self._rng, self._number + 1
        event_type = rng.choice(_KINDS)
        when = f'"{_in_words(time_ms)}"' if rng.random() < IN_WORDS else time_ms
        value = (
            f'{{"event_id":"e{self._number}","event_type":"{event_type}","user_id":"{user}",'
            f'"item_id":"i{rng.randrange(self._items)}","event_time":{when}}}'
        )
        topic = self._topics.purchases if event_type == "purchase" else self._topics.clicks
        partition = rng.randrange(self._partitions) if rng.random() < MISROUTED else -1
        return topic, user, value.encode(), partition

    def _impression(self, user: str, time_ms: int) -> Sent:
        self._number += 1
        shown = self._rng.randrange(ADS) if (ad := self._rng.random() < OF_ADS) else self._rng.randrange(self._items)
        event = {
            "event_id": f"e{self._number}",
            "event_type": "impression",
            "user_id": user,
            "item_id": f"i{shown}",
            "event_time": time_ms,
            **({"ad_id": f"ad-{shown}"} if ad else {}),  # always of the same item, or lists would change unseen
        }
        topic = self._topics.clicks if self._rng.random() < MISROUTED else self._topics.impressions
        return topic, user, json.dumps(event).encode(), -1

    def _remember(self, sent: Sent) -> None:
        if len(self._remembered) < _REMEMBERED:
            self._remembered.append(sent)
        else:
            self._remembered[self._rng.randrange(_REMEMBERED)] = sent

    def _clicks(self, user: str, value: bytes | None) -> Sent:
        return self._topics.clicks, user, value, -1

    def _poison(self, user: str, now_ms: int) -> bytes | None:
        good: dict[str, Any] = {
            "event_id": f"p{self._number}",
            "event_type": "click",
            "user_id": user,
            "item_id": "i0",
            "event_time": now_ms,
        }
        wrong: list[dict[str, Any]] = [
            {"event_type": "wave"},
            {"event_time": "yesterday"},
            {"event_time": -1},
            {"event_time": now_ms + 10 * 365 * 86_400_000},
            {"user_id": 7},
            {"user_id": ""},
            {"user_id": "a\0b"},
            {"item_id": "x" * 300},
            {"event_id": None},
            {"price": "dear"},
        ]
        whole = json.dumps(good).encode()
        bad: list[bytes | None] = [
            None,
            b"",
            b"{",
            b"[]",
            b"\xff\xfe\x00",
            whole[:-1],
            whole[:-1] + b',"session_id":"\xc3\x28"}',
            b" " * self._too_large,
            *(json.dumps(good | change).encode() for change in wrong),
        ]
        return self._rng.choice(bad)


def _in_words(time_ms: int) -> str:
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z"


@dataclass
class Arrived:
    """What the broker has told of one partition's records: how many are there, and the highest offset of any.

    `known_before` are those whose first sending was there already, by their sequence number; of these it tells none.
    """

    count: int = 0
    highest: int = -1
    known_before: int = 0


class Traffic(threading.Thread):
    """Sends until told to stop, as fast as `backlog` (records not stored yet) lets it."""

    def __init__(
        self, settings: Settings, seed: int, *, items: int, most_per_second: float, users: int = USERS
    ) -> None:
        super().__init__(name="traffic", daemon=True)
        self._rng = random.Random(seed)
        self._records = Records(settings, self._rng, users=users, items=items)
        self._kafka, self._topic = settings.kafka, settings.topics.clicks
        self._producers = [self._new_producer() for _ in range(PRODUCERS)]
        self._skews = [self._rng.choice(SKEWS_MS) for _ in range(PRODUCERS)]
        self.most_per_second, self.rate = most_per_second, min(4_000.0, most_per_second)
        self.sent = self.renewed = 0
        self.again = 0
        """Records sent a second time, by another producer: of these both may be on the topics."""
        self.arrived: dict[tuple[str, int], Arrived] = defaultdict(Arrived)
        self._lost: list[Message] = []
        self._waiting = [(0, 0.0)] * PRODUCERS
        self.backlog: Callable[[], int | None] = lambda: None
        self.errors: list[str] = []
        self._halt = threading.Event()

    def set_clock(self, rng: random.Random) -> str:
        """One producer's clock jumps."""
        producer = rng.randrange(PRODUCERS)
        self._skews[producer] = rng.choice([skew for skew in SKEWS_MS if skew != self._skews[producer]])
        return f"producer {producer} by {self._skews[producer]} ms"

    def run(self) -> None:
        try:
            due, looked = time.monotonic(), 0.0
            while not self._halt.is_set():
                count = max(1, int(self.rate * 0.02))
                self._send(count)
                due = max(due + count / self.rate, time.monotonic() - 0.5)
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._adapt_rate()
                    self._renew()
                self._halt.wait(max(0.0, due - time.monotonic()))
            until = time.monotonic() + _FLUSH_SECONDS
            while (left := sum(producer.flush(1) for producer in self._producers)) and time.monotonic() < until:
                self._renew()
            if left:
                self.errors.append(f"{left} records of the producer never arrived.")
        except (KafkaException, BufferError) as error:
            self.errors.append(f"The producer failed: {error}.")

    def finish(self) -> None:
        """Stop sending, and wait until all has arrived."""
        self._halt.set()
        self.join(150)

    def _send(self, count: int) -> None:
        now = int(time.time() * 1000)
        for _ in range(count):
            number = self._rng.randrange(PRODUCERS)
            clock = now + self._skews[number]
            headers: Headers | None = [("trace", str(self.sent))] if self._rng.random() < TRACED else None
            self._produce(number, self._records.draw(clock), clock, headers)
        self.sent += count
        for producer in self._producers:
            producer.poll(0)

    def _produce(self, number: int, sent: Sent, clock: int, headers: Headers | None) -> None:
        topic, key, value, partition = sent
        producer, told = self._producers[number], partial(self._told, number)
        while True:
            try:
                producer.produce(
                    topic, value, key, partition=partition, timestamp=clock, headers=headers, on_delivery=told
                )
            except BufferError:
                producer.poll(0.1)
            else:
                return

    def _adapt_rate(self) -> None:
        """Some backlog is right: enough that batches are large, not so much that it never ends."""
        backlog = self.backlog()
        if backlog is None:
            return
        if backlog > _MOST_BACKLOG:
            self.rate = max(self.most_per_second / 20, self.rate * 0.9)
        elif backlog < _LEAST_BACKLOG:
            self.rate = min(self.most_per_second, self.rate * 1.05)

    def _new_producer(self) -> Producer:
        return clients.producer(self._kafka, linger_ms=5)

    def _renew(self) -> None:
        """A producer that only gets fuller may have lost its brokers: then another one sends what it still has."""
        now = time.monotonic()
        for number, producer in enumerate(self._producers):
            count, since = self._waiting[number]
            if not count or len(producer) < count:
                self._waiting[number] = len(producer), now
            elif now - since > _PATIENCE_SECONDS:
                self._waiting[number] = len(producer), now
                if has_lost_brokers(producer, self._kafka, self._topic):
                    self._replace(number)

    def _replace(self, number: int) -> None:
        lost, self._producers[number] = self._producers[number], self._new_producer()
        lost.purge()
        lost.flush(_PATIENCE_SECONDS)  # tells of each record that it did not arrive
        self.renewed += 1
        self.again += len(self._lost)
        for message in self._lost:
            sent = message.topic() or "", (message.key() or b"").decode(), message.value(), message.partition() or 0
            headers: Headers = [*dict(message.headers() or []).items()]
            self._produce(number, sent, message.timestamp()[1], headers)
        self._lost = []

    def _told(self, number: int, error: KafkaError | None, message: Message) -> None:
        if error is None:
            place, offset = self.arrived[message.topic() or "", message.partition() or 0], message.offset()
            place.count += 1
            place.known_before += offset is None or offset < 0
            place.highest = max(place.highest, -1 if offset is None else offset)
        elif error.code() in _PURGED:
            self._lost.append(message)
        elif len(self.errors) < _MOST_ERRORS:
            self.errors.append(f"A record of producer {number} did not arrive: {error}.")
