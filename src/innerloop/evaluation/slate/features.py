"""What is known of each item on a list at the moment it is shown, from strictly earlier actions.

Of the list itself: position, price against the others, whether it goes up in price. Of the user's own past: what was
done to the item and when, where on the list the items are that were last looked at, for users go down a list, and how
the price compares with those that were looked at and chosen. Of everybody's past: how often the item was looked at, how
often chosen when shown, and what else is looked at in the same sessions.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from innerloop.evaluation.outcome import Floats, Ints

Features = NDArray[np.float32]

_MOST_POSITIONS = 100  # that have a weight of their own; those behind them share the last
_BEHIND, _AHEAD = 4, 8  # offsets from an anchor that have a weight of their own
_RECENT = 5
_KINDS = 8
_LEVELS = 3
_PRIOR_SHOWN = 20.0  # impressions' worth of the average choice rate that every item begins with
_PRIOR_LIST = 25.0  # one choice from a list of that length, before anything is known
_HOUR = 3_600_000  # ms
_HALF_LIFE = 6 * 3_600_000.0  # ms, of popularity
_SLOPES, _SIMILAR = 3, 2  # of position slopes those without, of population the one with the user's own actions
_SORTED = 0.9  # so many of the neighbours at least go up in price where a list is sorted by it


@dataclass(frozen=True, slots=True)
class Price:
    """What a chosen item cost: the logarithm, that over its list's mean, and the share of the list that is cheaper."""

    log: float
    level: float
    rank: float


@dataclass(frozen=True, slots=True)
class Action:
    """One earlier action of a user on an item; `chosen` where it chose from a list, at `price` where that is known."""

    time: int
    session: int
    item: int
    kind: int
    chosen: bool
    price: Price | None = None


@dataclass
class Population:
    """What everybody did so far."""

    looked: dict[int, tuple[float, int]] = field(default_factory=dict)  # decayed count, as of when
    shown: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    taken: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    together: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    total_shown: float = 0.0
    total_taken: float = 0.0
    newest: deque[tuple[int, int]] = field(default_factory=deque)  # (time, item) of the last hour's looks
    in_hour: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def add_look(self, item: int, time: int, recent: Sequence[int]) -> None:
        """Count an action on `item` in a session whose last distinct other items are `recent`."""
        count, since = self.looked.get(item, (0.0, time))
        self.looked[item] = (count * 2.0 ** (-(time - since) / _HALF_LIFE) + 1.0, time)
        self._forget(time)
        self.newest.append((time, item))
        self.in_hour[item] += 1
        for other in recent:
            self.together[item][other] += 1.0
            self.together[other][item] += 1.0

    def add_list(self, shown: Ints, taken: int) -> None:
        for item in shown.tolist():
            self.shown[item] += 1.0
        self.taken[taken] += 1.0
        self.total_shown += len(shown)
        self.total_taken += 1.0

    def popularity(self, items: Sequence[int], time: int) -> Floats:
        """Actions on each item, halved every six hours."""
        found = [self.looked.get(item, (0.0, time)) for item in items]
        return np.array([count * 2.0 ** (-(time - since) / _HALF_LIFE) for count, since in found])

    def last_hour(self, items: Sequence[int], time: int) -> Floats:
        """Actions on each item within the hour before `time`, which never goes back."""
        self._forget(time)
        return np.array([self.in_hour.get(item, 0) for item in items], np.float64)

    def _forget(self, time: int) -> None:
        while self.newest and self.newest[0][0] < time - _HOUR:
            item = self.newest.popleft()[1]
            self.in_hour[item] -= 1
            if not self.in_hour[item]:
                del self.in_hour[item]

    def choice_rate(self, items: Sequence[int]) -> Floats:
        """Log of (choices per impression, shrunk to the average) over the average."""
        average = (self.total_taken + 1.0) / (self.total_shown + _PRIOR_LIST)
        taken = np.array([self.taken.get(item, 0.0) for item in items])
        shown = np.array([self.shown.get(item, 0.0) for item in items])
        return np.asarray(np.log((taken / average + _PRIOR_SHOWN) / (shown + _PRIOR_SHOWN)), np.float64)

    def similarity(self, items: Sequence[int], recent: Sequence[int]) -> Floats:
        """Sum over `recent` of the cosine of the sessions in which both items occur."""
        found = np.zeros(len(items))
        for other in recent:
            near = self.together.get(other)
            if near:
                mass = sum(near.values())
                for at, item in enumerate(items):
                    if item in near and item != other:
                        found[at] += near[item] / np.sqrt(mass * sum(self.together[item].values()))
        return found


@dataclass(frozen=True)
class Layout:
    """Names and groups of the features for data with these kinds of action, these contexts and lists of that length."""

    kinds: Sequence[int]  # the commonest kinds of action in the training part, at most _KINDS
    levels: Sequence[tuple[int, int]]  # (context, level) with a slope of its own
    positions: int  # with a weight of their own

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Name and width of each group, in order."""
        offsets = _BEHIND + _AHEAD + 2
        return [
            ("position", self.positions),
            ("position slopes", 2 * _SLOPES),
            ("price", 3),
            ("sorted by price", 4),
            ("price against the looked at", 4),
            ("price against the chosen", 4),
            ("price level of the chosen", 4),
            ("recency", _RECENT),
            ("own counts", 4),
            ("last kind", len(self.kinds)),
            ("kinds", len(self.kinds)),
            ("offset to the last", offsets),
            ("offset to the last chosen", offsets),
            ("last in context", 8),
            ("population", 4),
            ("context", 3 * len(self.levels)),
        ]

    @property
    def groups(self) -> Ints:
        return np.repeat(np.arange(len(self.blocks)), [width for _, width in self.blocks])

    @property
    def of_nobody(self) -> Ints:
        """The columns that don't depend on the user's own actions: what is left of a list for someone unknown."""
        names = [(name, at) for name, width in self.blocks for at in range(width)]
        kept = {"position", "price", "sorted by price", "context"}
        return np.array(
            [
                column
                for column, (name, at) in enumerate(names)
                if name in kept
                or (name == "position slopes" and at < _SLOPES)
                or (name == "population" and at != _SIMILAR)
            ]
        )

    @property
    def size(self) -> int:
        return sum(width for _, width in self.blocks)


def common_levels(contexts: Ints, at_least: int = 100) -> list[tuple[int, int]]:
    """The commonest levels [at most 3 each] of each column of `contexts` [N, C] that occur often enough."""
    found = []
    for column in range(contexts.shape[1]):
        counts = np.bincount(contexts[:, column]) if len(contexts) else np.zeros(0, np.int64)
        order = np.argsort(-counts, kind="stable")[:_LEVELS]
        found += [(column, int(level)) for level in order if counts[level] >= at_least]
    return found


def common_kinds(actions: Ints, items: Ints) -> list[int]:
    """The commonest kinds of action on an item."""
    counts = np.bincount(actions[items >= 0]) if (items >= 0).any() else np.zeros(0, np.int64)
    return [int(kind) for kind in np.argsort(-counts, kind="stable")[:_KINDS] if counts[kind]]


def positions_of(lists: Sequence[Ints]) -> int:
    """How many positions of these lists have a weight of their own."""
    return min(_MOST_POSITIONS, max((len(some) for some in lists), default=1))


@dataclass(frozen=True)
class Slate:
    """One list: when, in which session, the items [P], their prices [P], and the levels of the contexts [C]."""

    time: int
    session: int
    items: Ints
    prices: Floats
    contexts: Ints


def features(layout: Layout, slate: Slate, history: Sequence[Action], population: Population) -> Features:
    """Features [P, F] of the items of a list, `history` being the user's own earlier actions on items, oldest first."""
    session = [one for one in history if one.session == slate.session]
    place = {item: at for at, item in reversed(list(enumerate(slate.items.tolist())))}
    recent = distinct(session)
    price = _price(slate.prices)
    slopes = _position_slopes(len(slate.items), bool(recent))
    parts = [
        _one_hot(np.minimum(np.arange(len(slate.items)), layout.positions - 1), layout.positions),
        slopes,
        price,
        _sorted_by_price(slopes, price),
        *_price_taste(slate, session, history, place),
        _recency(place, recent, len(slate.items)),
        _own_counts(place, session, history, slate),
        _kinds(layout.kinds, place, session[-1:], len(slate.items)),
        np.log1p(_kinds(layout.kinds, place, session, len(slate.items))),
        _offsets(place.get(recent[0]) if recent else None, len(slate.items)),
        _offsets(_last_chosen(place, session), len(slate.items)),
        _last_in_context(place, session, slate),
        _population(slate, recent, population),
        _contexts(layout, slate, np.stack([slopes[:, 0], price[:, 1], price[:, 0]], 1)),
    ]
    return np.concatenate(parts, 1).astype(np.float32)


def distinct(session: Sequence[Action], most: int = _RECENT) -> list[int]:
    """The last distinct items, newest first."""
    return list(dict.fromkeys(one.item for one in reversed(session)))[:most]


def price_ranks(prices: Floats) -> Floats:
    """The share of the list that is cheaper, [P]; a half where unknown."""
    if np.isnan(prices).any() or len(prices) == 0:
        return np.full(len(prices), 0.5)
    order = np.searchsorted(np.sort(prices), prices, side="left")
    return np.asarray(order / max(1, len(prices) - 1), np.float64)


def _one_hot(at: Ints, width: int) -> Floats:
    return np.asarray(at[:, None] == np.arange(width), np.float64)


def _position_slopes(count: int, any_recent: bool) -> Floats:  # noqa: FBT001 - a fact, not a mode
    position = np.arange(count)
    slopes = np.stack([np.log1p(position), position / 10.0, (position == 0).astype(float)], 1)
    return np.concatenate([slopes, slopes * any_recent], 1)


def price_of(prices: Floats, at: int) -> Price | None:
    """The price of the item at that place of a list; None where the list's prices aren't known."""
    if np.isnan(prices).any():
        return None
    logs = _logs(prices)
    return Price(float(logs[at]), float(logs[at] - logs.mean()), float(price_ranks(prices)[at]))


def _logs(prices: Floats) -> Floats:
    """Logarithms of known prices; what costs nothing is as the cheapest that does."""
    least = prices[prices > 0].min(initial=np.inf)
    return np.log(np.maximum(prices, least)) if np.isfinite(least) else np.zeros(len(prices))


def _price(prices: Floats) -> Floats:
    """Log of the price over the list's mean, rank, and whether none is cheaper."""
    if np.isnan(prices).any():
        return np.zeros((len(prices), 3))
    logs = _logs(prices)
    return np.stack([logs - logs.mean(), price_ranks(prices), (prices == prices.min()).astype(float)], 1)


def _sorted_by_price(slopes: Floats, price: Floats) -> Floats:
    """Position and price once more where the list goes up in price, for there the first is the cheapest."""
    logs = price[:, 0]
    upwards = len(logs) > 1 and bool(logs.any()) and float((np.diff(logs) >= 0).mean()) > _SORTED
    return np.stack([slopes[:, 0], slopes[:, 2], price[:, 1], logs], 1) * upwards


def _price_taste(
    slate: Slate, session: Sequence[Action], history: Sequence[Action], place: dict[int, int]
) -> tuple[Floats, Floats, Floats]:
    """How far each price is from those looked at on this list, and from those chosen before: in money and in level."""
    prices, count = slate.prices, len(slate.items)
    nothing = np.zeros((count, 4))
    if np.isnan(prices).any():
        return nothing, nothing, nothing
    logs, own = _logs(prices), [one.price for one in history if one.price is not None]
    on_list = [float(logs[place[one.item]]) for one in session if one.item in place]
    last = [float(logs[place[one.item]]) for one in session[-1:] if one.item in place]
    return (
        _away([(logs, last), (logs, on_list)]),
        _away([(logs, [one.log for one in own]), (logs, [one.log for one in own[-1:]])]),
        _away([(price_ranks(prices), [one.rank for one in own]), (logs - logs.mean(), [one.level for one in own])]),
    )


def _away(pairs: Sequence[tuple[Floats, Sequence[float]]]) -> Floats:
    """For each pair of values [P] and references, values less the references' mean, and how far that is; else 0."""
    columns = []
    for values, references in pairs:
        away = values - np.mean(references) if references else np.zeros(len(values))
        columns += [away, np.abs(away)]
    return np.stack(columns, 1)


def _recency(place: dict[int, int], recent: Sequence[int], count: int) -> Floats:
    found = np.zeros((count, _RECENT))
    for rank, item in enumerate(recent):
        if item in place:
            found[place[item], rank] = 1.0
    return found


def _own_counts(place: dict[int, int], session: Sequence[Action], history: Sequence[Action], slate: Slate) -> Floats:
    """Log counts in this session, in earlier ones and of choices, and freshness (1 at once, a half after a minute)."""
    counts = np.zeros((count := len(slate.items), 4))
    for one in history:
        at = place.get(one.item)
        if at is None:
            continue
        counts[at, 0 if one.session == slate.session else 1] += 1.0
        counts[at, 2] += one.chosen
        counts[at, 3] = 2.0 ** (-(slate.time - one.time) / 60_000.0)
    counts[:, :3] = np.log1p(counts[:, :3])
    return counts if session or history else np.zeros((count, 4))


def _kinds(kinds: Sequence[int], place: dict[int, int], actions: Sequence[Action], count: int) -> Floats:
    found = np.zeros((count, len(kinds)))
    column = {kind: at for at, kind in enumerate(kinds)}
    for one in actions:
        if one.item in place and one.kind in column:
            found[place[one.item], column[one.kind]] += 1.0
    return found


def _last_in_context(place: dict[int, int], session: Sequence[Action], slate: Slate) -> Floats:
    """On the last item alone: how long ago, how much of the session was about it, where it is, chosen before or not."""
    found = np.zeros((len(slate.items), 8))
    if not session or session[-1].item not in place:
        return found
    item, at = session[-1].item, place[session[-1].item]
    mine = [one for one in session if one.item == item]
    idle = np.log1p((slate.time - session[-1].time) / 1000.0)
    chosen = any(one.chosen for one in mine)
    run = next((n for n, one in enumerate(reversed(session)) if one.item != item), len(session))
    found[at] = [
        idle / 3.0,
        max(0.0, idle - 3.0),
        np.log1p(len(mine)),
        len(mine) / len(session),
        np.log1p(run),
        chosen,
        chosen * idle / 3.0,
        np.log1p(at),
    ]
    return found


def _last_chosen(place: dict[int, int], session: Sequence[Action]) -> int | None:
    return next((place[one.item] for one in reversed(session) if one.chosen and one.item in place), None)


def _offsets(anchor: int | None, count: int) -> Floats:
    """Which of the offsets from the anchor, those further away together; nothing without an anchor."""
    width = _BEHIND + _AHEAD + 2
    if anchor is None:
        return np.zeros((count, width))
    offset = np.clip(np.arange(count) - anchor, -_BEHIND - 1, _AHEAD)
    return _one_hot(offset + _BEHIND + 1, width)


def _population(slate: Slate, recent: Sequence[int], population: Population) -> Floats:
    items = slate.items.tolist()
    popular = population.popularity(items, slate.time)
    similar = np.log1p(10.0 * population.similarity(items, recent))
    rate = population.choice_rate(items)
    most = (popular == popular.max()) & (popular > 0) if len(popular) else np.zeros(0)
    return np.stack([np.log1p(popular), rate, similar, most.astype(float)], 1)


def _contexts(layout: Layout, slate: Slate, base: Floats) -> Floats:
    parts = [base * (slate.contexts[column] == level) for column, level in layout.levels]
    return np.concatenate(parts, 1) if parts else np.zeros((len(base), 0))
