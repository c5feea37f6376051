"""Users who click, and the lists published for them, as quality reads them: no ingest and no adapt is needed."""

import json
import random
import time
from typing import Any

from innerloop.config import Settings
from innerloop.streams import clients

Record = dict[str, Any]

WINDOW_MS, DAY_MS = 60_000, 86_400_000
ITEMS = [f"item-{n}" for n in range(40)]
ADS = [f"ad-{n}" for n in range(8)]


class Shop:
    """Users who click, and lists published for them.

    `now` is when things are put on their topics, a little before now or Kafka would clean them away; events are told
    `behind` that, as a replay has it.
    """

    def __init__(self, settings: Settings, users: int = 60, seed: int = 0) -> None:
        self.settings, self.rng = settings, random.Random(seed)
        self.users = [f"user-{n}" for n in range(users)]
        self.versions = dict.fromkeys(self.users, 0)
        self.began = self.now = (int(time.time()) - 1_800) // 60 * 60_000
        self.behind = 2 * DAY_MS
        self.events: list[Record] = []
        self.producer = clients.producer(settings.kafka)

    def go_on(self, steps: int) -> None:
        """As many clicks, each followed by a list and now and then by a purchase; about two thirds of a second each."""
        rng = self.rng
        for _ in range(steps):
            self.now += rng.randrange(1, 1_400)
            user, ad = rng.choice(self.users), rng.choice([None, *ADS])
            item = f"of {ad}" if ad else rng.choice(ITEMS)
            late = rng.choice([0, 0, 0, 5_000])
            self.event("click", user, item, self.now - late, ad)
            if rng.random() < 0.3:
                self.event("purchase", user, item, self.now + 50)
            if rng.random() < 0.8:
                self.lists(user, self.now - late, self.now + rng.choice([20, 200, 2_000]))
        self.producer.flush(10)

    def event(self, kind: str, user: str, item: str, at: int, ad: str | None = None) -> None:
        event = {
            "event_id": f"e{len(self.events)}",
            "event_type": kind,
            "user_id": user,
            "item_id": item,
            "event_time": at - self.behind,
        }
        if ad:
            event["ad_id"] = ad
        topic = self.settings.topics.purchases if kind == "purchase" else self.settings.topics.clicks
        self.events.append(event)
        self.producer.produce(topic, json.dumps(event), user, timestamp=self.now)

    def lists(self, user: str, event_time: int, published: int) -> None:
        self.versions[user] += 1
        arm = "hold_out" if int(user.split("-")[1]) % 3 == 0 else "adapted"
        head = {
            "user_id": user,
            "model_version": 1 + (self.now - self.began) // 100_000,
            "support_version": self.versions[user],
            "support_size": self.versions[user],
            "event_time": event_time - self.behind,
            "scored_at": published - 5,
            "method": "none" if arm == "hold_out" else "bayes",
            "arm": arm,
        }
        chosen = self.rng.sample(ITEMS, 25)
        items = [{"item_id": item, "score": 1.0} for item in chosen]
        ads = [{"ad_id": ad, "item_id": f"of {ad}", "score": round(self.rng.random(), 3)} for ad in ADS[:6]]
        records = (
            (self.settings.topics.recommendations, {**head, "model": "recommendations", "items": items}),
            (self.settings.topics.ads, {**head, "model": "ads", "ads": ads, "kind": "purchase_given_click"}),
        )
        for topic, record in records:
            self.producer.produce(topic, json.dumps(record), user, timestamp=published)

    def a_day_later(self) -> None:
        """What comes now is told a day after the first events, so that the first clicks on ads get their labels."""
        self.behind = self.now - self.began + self.behind - DAY_MS

    def last_window(self) -> int:
        newest: int = max(e["event_time"] for e in self.events if e["event_type"] == "click")
        return newest // WINDOW_MS * WINDOW_MS

    def pass_time(self, seconds: int) -> None:
        """Nothing but one event of one user on each partition, later."""
        self.now += 1_000 * seconds
        event = {"event_type": "cart", "item_id": "x", "event_time": self.now - self.behind}
        for partition in range(4):
            named = {
                **event,
                "event_id": f"pass-{self.now}-{partition}",
                "user_id": "passer-by",
                "event_type": "purchase",
            }
            self.producer.produce(
                self.settings.topics.purchases, json.dumps(named), "passer-by", partition=partition, timestamp=self.now
            )
        self.producer.flush(10)
