"""What quality is told (batches of a sample), and what it remembers of each user. Times are epoch milliseconds."""

import msgspec

from innerloop.scores import Arm


class Click(msgspec.Struct, frozen=True, array_like=True):
    """A click, when it was put on its topic, and a hash of its event_id."""

    user_id: str
    time: int
    arrived: int
    item_id: str
    ad_id: str | None
    mark: int


class Purchase(msgspec.Struct, frozen=True, array_like=True):
    user_id: str
    time: int
    item_id: str


class Listed(msgspec.Struct, frozen=True, array_like=True):
    """A list: of which events at the newest it knew, and when it was put on its topic."""

    user_id: str
    model_version: int
    support_version: int
    scored_at: int
    event_time: int
    published: int
    arm: Arm
    items: list[str]

    @property
    def order(self) -> tuple[int, int, int]:
        """As readers of scores have it: of two lists of a user the one with the higher order holds."""
        return self.model_version, self.support_version, self.scored_at


class AdsListed(Listed, frozen=True, array_like=True):
    """The same of ads; their probabilities of a purchase given a click, where they have them."""

    chances: list[float]


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Sampled records of one partition (`source`; empty for a mere look at the clock) in the order they had there.

    `at` is when they were read. `forgotten` are users whose scores were erased; what is in the batch came later.
    """

    source: str
    at: int
    forgotten: list[str] = []
    clicks: list[Click] = []
    purchases: list[Purchase] = []
    lists: list[Listed] = []
    ads: list[AdsListed] = []

    @property
    def newest(self) -> int:
        """The newest time of an event in it, 0 without one; no record is believed to be of a time after its arrival."""
        times = [min(c.time, c.arrived) for c in self.clicks] + [p.time for p in self.purchases]
        times += [min(each.event_time, each.published) for each in [*self.lists, *self.ads]]
        return max(times, default=0)


class AdClick(msgspec.Struct, frozen=True, array_like=True):
    """A click on an ad whose purchase is waited for."""

    time: int
    item_id: str
    mark: int
    arm: Arm
    model_version: int
    probability: float


class User(msgspec.Struct, array_like=True):
    """What is remembered of one user, each part in the order it came."""

    seen_at: int = 0
    lists: list[Listed] = []
    ads: list[AdsListed] = []
    clicks: list[Click] = []
    purchases: list[Purchase] = []
    ad_clicks: list[AdClick] = []


class Source(msgspec.Struct, array_like=True):
    """How far one partition is: the newest event's time, and when something last came of it."""

    newest: int
    at: int


class Progress(msgspec.Struct, array_like=True):
    """How far all is. Windows that end at `closed` or before it are closed."""

    closed: int = 0
    late: int = 0
    next_offset: int = 0
    heard: int = 0
    """When something last came, of whatever partition."""
    awake: int = 0
    """When something came after a pause, or for the first time: then no partition's silence means anything yet."""
    sources: dict[str, Source] = {}
