"""What quality reads of the topics: a sample of the users, of each record what the judge needs."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import xxhash

from innerloop.config import Settings
from innerloop.errors import DeadLetterError
from innerloop.evaluation.quality.record import CUTOFFS
from innerloop.evaluation.quality.state import AdsListed, Batch, Click, Listed, Purchase
from innerloop.events import decode
from innerloop.holdout import in_hold_out, in_sample
from innerloop.scores import AdScores, Arm, RecommendationScores

_LOOK_SECONDS = 0.2
_SLOWLY = 0.99  # how much of a rate is still believed after a look that saw less: a share falls at once, rises slowly


@dataclass(frozen=True)
class Record:
    """One record as it lies on its topic; `appended` is when it was put there, epoch milliseconds."""

    key: bytes | None
    value: bytes | None
    appended: int


@dataclass
class Sampler:
    """Which users are looked at: as many as the set rate allows, about half of the records from the hold-out.

    `shares` are of the adapted users and of the hold-out. `part` is the part of the partitions that this process owns:
    all processes together keep to the rate.
    """

    hold_out: float
    per_second: float
    clock: Callable[[], float] = time.monotonic
    shares: list[float] = field(default_factory=lambda: [1.0, 1.0])

    def __post_init__(self) -> None:
        self._seen, self._rates, self._since = [0, 0], [0.0, 0.0], self.clock()

    def takes(self, user_id: bytes) -> bool:
        """Whether a record of this user is looked at; each is counted."""
        arm = in_hold_out(user_id, self.hold_out)
        self._seen[arm] += 1
        return in_sample(user_id, self.shares[arm])

    def adjust(self, part: float) -> None:
        """Set the shares by what was seen since the last time, at most five times a second."""
        seconds = self.clock() - self._since
        if seconds < _LOOK_SECONDS:
            return
        self._rates = [max(n / seconds, _SLOWLY * r) for n, r in zip(self._seen, self._rates, strict=True)]
        self._seen, self._since = [0, 0], self.clock()
        adapted, held = self._rates
        allowed = self.per_second * part
        for_held = min(held, allowed - min(adapted, allowed / 2))
        self.shares = [
            min(1.0, (allowed - for_held) / adapted) if adapted else 1.0,
            min(1.0, for_held / held) if held else 1.0,
        ]


class Reader:
    """Turns records of one kind of topic into a batch; one that can't be read is left out, and counted."""

    def __init__(self, settings: Settings) -> None:
        topics = settings.topics
        self._kinds = {
            topics.clicks: self._event,
            topics.purchases: self._event,
            topics.recommendations: self._list,
            topics.ads: self._ads,
        }
        self._lists = msgspec.json.Decoder(RecommendationScores).decode
        self._ads_lists = msgspec.json.Decoder(AdScores).decode
        self.unreadable = 0

    def batch(self, topic: str, partition: int, records: Iterable[Record], at: int) -> Batch:
        """The batch of these records of one partition."""
        batch = Batch(f"{topic}/{partition}", at, [], [], [], [], [])
        for record in records:
            try:
                self._kinds[topic](record, batch)
            except (msgspec.MsgspecError, DeadLetterError, UnicodeDecodeError, RecursionError):
                self.unreadable += 1  # ingest's dead letter, or a stranger's record: neither is judged
        return batch

    def _event(self, record: Record, batch: Batch) -> None:
        event = decode(record.value)
        when = event.time_ms
        if event.event_type == "click":
            mark = xxhash.xxh3_64_intdigest(event.event_id.encode())
            batch.clicks.append(Click(event.user_id, when, record.appended, event.item_id, event.ad_id, mark))
        elif event.event_type == "purchase":
            batch.purchases.append(Purchase(event.user_id, when, event.item_id))

    def _list(self, record: Record, batch: Batch) -> None:
        if record.value is None:
            batch.forgotten.append((record.key or b"").decode())
            return
        scores = self._lists(record.value)
        items = [each.item_id for each in scores.items[: max(CUTOFFS)]]
        batch.lists.append(Listed(*_facts(scores, record), items))

    def _ads(self, record: Record, batch: Batch) -> None:
        if record.value is None:
            return  # the topic of recommendations says so, too
        scores = self._ads_lists(record.value)
        chances = {
            "purchase_given_click": [each.score for each in scores.ads],
            "click_and_purchase": [each.purchase_given_click or 0.0 for each in scores.ads],
        }.get(scores.kind, [])
        batch.ads.append(AdsListed(*_facts(scores, record), [each.ad_id for each in scores.ads], chances))


def _facts(scores: RecommendationScores | AdScores, record: Record) -> tuple[str, int, int, int, int, int, Arm]:
    version, support = scores.order
    return scores.user_id, version, support, scores.scored_at, scores.event_time, record.appended, scores.arm
