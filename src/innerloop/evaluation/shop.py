"""A synthetic shop: the same seed gives the same events, and why adapting to a user pays is known.

Items. Item i belongs to category c(i), has a place z_i on the unit sphere of R^16 near its category's centre m_c,
an attraction a_i and a price:

    z_i = unit(m_c(i) + item_spread * n),   n ~ N(0, I/16)
    a_i = -skew * log(1 + rank_i)           a random ranking: few items draw most clicks
    price_i = level_c(i) * exp(0.4 * n)     rounded to cents

Seven items in ten are there from the start, the others are launched at even intervals over `launch_days`.

Users. A user has two interests (categories) and a personal direction p_u. Sessions begin as a Poisson process; each
belongs to a new user with probability `new_users`, else to a known one in proportion to how active that user is
(log-normal). Before a session, with probability `drift`, one interest is replaced: what was learnt then grows stale.

Sessions. A session is about one interest k (the first in 70%), and clicks items independently:

    s = unit(m_k + personal * p_u),   P(click i) ~ exp(a_i + focus * z_i . s)   over the items launched by then

so that a few clicks tell the interest, the interest tells the next clicks, and the attraction alone (the unadapted
ranking) tells much less. The number of clicks is geometric, the gaps are exponential (30 s). With probability
`ad_share` a click is on one of the active ads, P(ad) ~ exp(focus * z_item(ad) . s); an ad promotes one item and is
replaced after `ad_hours`. A click is followed by a purchase with probability `purchase_rate`, 1 to 10 minutes later.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_HOUR = 3_600_000
_PLACES = 16
_FIRST_INTEREST = 0.7
_SESSIONS = 256  # drawn together: large enough for numpy to be quick, small against the run of time

SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "event_type": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "event_time": pl.Int64(),
    "session_id": pl.String(),
    "category": pl.String(),
    "price": pl.Float64(),
    "quantity": pl.Int64(),
    "ad_id": pl.String(),
}


@dataclass(frozen=True)
class Process:
    """The numbers of the generating process; see the module's text. Shares and probabilities are in [0, 1]."""

    categories: int = 40
    item_spread: float = 0.7
    skew: float = 0.8
    focus: float = 8.0
    personal: float = 0.5
    clicks_per_session: float = 6.0
    sessions_per_hour: float = 100.0
    new_users: float = 0.1
    drift: float = 0.1
    launch_days: float = 30.0
    purchase_rate: float = 0.06
    ads: int = 20
    ad_share: float = 0.08
    ad_hours: float = 24.0


class Shop:
    """A shop of `items` items that begins with `users` known users at `start` (epoch ms).

    `history` and `stream` go on from where the last call of either stopped.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        users: int = 2_000,
        items: int = 5_000,
        start: int = 1_750_000_000_000,
        process: Process | None = None,
    ) -> None:
        self.process = process or Process()
        self._rng = np.random.default_rng(seed)
        self._start = start
        self._now = float(start)
        self._events = self._sessions = 0
        self._make_items(items)
        self._interests: Ints = np.empty((0, 2), np.int64)
        self._personal: Floats = np.empty((0, _PLACES), np.float32)
        self._activity: NDArray[np.float64] = np.empty(0)
        self._add_users(users)
        self._ads: Ints = self._rng.integers(0, self._at_start, self.process.ads)  # [A] promoted items
        self._later = _frame()  # begun in an earlier batch, due in a later one
        self._kept = _frame()  # due, left over by `history`

    def history(self, events: int) -> pl.DataFrame:
        """Return the next `events` events in order of time, with the columns of `SCHEMA`."""
        parts: list[pl.DataFrame] = []
        missing = events
        while missing > 0:
            batch = self._next()
            parts.append(batch.head(missing))
            self._kept = batch.slice(missing)
            missing -= parts[-1].height
        return pl.concat(parts) if parts else _frame()

    def stream(self) -> Iterator[pl.DataFrame]:
        """Endless batches in order of time, with the columns of `SCHEMA`; `messages` makes records of them."""
        while True:
            yield self._next()

    def catalogue(self) -> pl.DataFrame:
        """Every item, launched or not: item_id, category, price, launched (epoch ms)."""
        columns = {"item_id": self._item_ids, "category": self._category_names[self._category]}
        return pl.DataFrame(columns | {"price": self._price, "launched": self._launched})

    def _make_items(self, items: int) -> None:
        p, rng = self.process, self._rng
        self._centres = _unit(rng.standard_normal((p.categories, _PLACES)))  # [C, k]
        self._category = rng.integers(0, p.categories, items)
        spread = p.item_spread * rng.standard_normal((items, _PLACES)) / np.sqrt(_PLACES)
        self._places = _unit(self._centres[self._category] + spread)  # [N, k]
        self._attraction = (-p.skew * np.log1p(rng.permutation(items))).astype(np.float32)
        level = rng.lognormal(3.0, 0.8, p.categories)
        self._price = np.round(level[self._category] * rng.lognormal(0.0, 0.4, items), 2)
        self._at_start = max(1, items * 7 // 10)
        late = np.arange(1, items - self._at_start + 1) * (p.launch_days * 24 * _HOUR / max(1, items - self._at_start))
        self._launched = np.concatenate([np.zeros(self._at_start), late]).astype(np.int64) + self._start
        self._item_ids = np.array([f"item-{i:05d}" for i in range(items)], dtype=object)
        self._category_names = np.array([f"category-{c:02d}" for c in range(p.categories)], dtype=object)

    def _add_users(self, count: int) -> None:
        rng = self._rng
        interests = rng.integers(0, self.process.categories, (count, 2))
        self._interests = np.concatenate([self._interests, interests])
        self._personal = np.concatenate([self._personal, _unit(rng.standard_normal((count, _PLACES)))])
        self._activity = np.concatenate([self._activity, rng.lognormal(0.0, 1.0, count)])

    def _next(self) -> pl.DataFrame:
        if self._kept.height:
            due, self._kept = self._kept, _frame()
            return due
        while True:
            events = pl.concat([self._later, self._sessions_begin()]).sort("event_time", maintain_order=True)
            due = events.filter(pl.col("event_time") < int(self._now))
            self._later = events.slice(due.height)
            if due.height:
                ids = pl.Series("event_id", [f"e{self._events + i:09d}" for i in range(due.height)])
                self._events += due.height
                return due.with_columns(ids)

    def _sessions_begin(self) -> pl.DataFrame:
        """Draw `_SESSIONS` sessions that begin from now on, with all their events; moves the clock."""
        p, rng = self.process, self._rng
        begins = self._now + np.cumsum(rng.exponential(_HOUR / p.sessions_per_hour, _SESSIONS))
        on_sale = int(np.searchsorted(self._launched, self._now, side="right"))
        self._replace_ads(begins[-1] - self._now, on_sale)
        self._now = float(begins[-1])
        users = self._choose_users()
        taste = self._session_tastes(users)  # [B, k]
        clicks = rng.geometric(1.0 / p.clicks_per_session, _SESSIONS)
        session = np.repeat(np.arange(_SESSIONS), clicks)  # [E]
        gaps = rng.exponential(30_000.0, session.size)
        first = np.concatenate([[0], np.cumsum(clicks)[:-1]])
        since = np.cumsum(gaps)
        times = begins[session] + since - since[first][session]
        items, ads = self._clicked(taste, session, on_sale)
        frame = self._frame_of(users, session, times, items, ads)
        self._sessions += _SESSIONS
        return frame

    def _replace_ads(self, elapsed: float, on_sale: int) -> None:
        expired = self._rng.random(self._ads.size) < elapsed / (self.process.ad_hours * _HOUR)
        self._ads[expired] = self._rng.integers(0, on_sale, int(expired.sum()))

    def _choose_users(self) -> Ints:
        """Draw the users of the next sessions, [B]; interests drift here."""
        rng, known = self._rng, len(self._activity)
        fresh = rng.random(_SESSIONS) < (self.process.new_users if known else 1.0)
        weights = np.cumsum(self._activity)
        users = np.searchsorted(weights, rng.random(_SESSIONS) * (weights[-1] if known else 0.0), side="right")
        self._add_users(int(fresh.sum()))
        users[fresh] = known + np.arange(fresh.sum())
        drifted = users[rng.random(_SESSIONS) < self.process.drift]
        which = rng.integers(0, 2, drifted.size)
        self._interests[drifted, which] = rng.integers(0, self.process.categories, drifted.size)
        return users.astype(np.int64)

    def _session_tastes(self, users: Ints) -> Floats:
        """Draw an interest for each session: s = unit(m_k + personal * p_u), [B, k]."""
        interest = self._interests[users, (self._rng.random(users.size) > _FIRST_INTEREST).astype(np.int64)]
        return _unit(self._centres[interest] + self.process.personal * self._personal[users])

    def _clicked(self, taste: Floats, session: Ints, on_sale: int) -> tuple[Ints, Ints]:
        """Items [E] of the clicks of each session, and the slot of the ad clicked or -1, [E]."""
        p, rng = self.process, self._rng
        fit = p.focus * (taste @ self._places[:on_sale].T)  # [B, N]
        items = _draw(fit + self._attraction[:on_sale], session, rng)
        ads = np.full(session.size, -1)
        if self._ads.size:
            chosen = rng.random(session.size) < p.ad_share
            ads[chosen] = _draw(fit[:, self._ads], session, rng)[chosen]
            items[chosen] = self._ads[ads[chosen]]
        return items, ads

    def _frame_of(self, users: Ints, session: Ints, times: NDArray[np.float64], items: Ints, ads: Ints) -> pl.DataFrame:
        """Clicks and the purchases that follow some of them; an ad's name says what it promotes."""
        rng = self._rng
        bought = np.flatnonzero(rng.random(items.size) < self.process.purchase_rate)
        rows = np.concatenate([np.arange(items.size), bought])
        late = np.concatenate([times, times[bought] + rng.uniform(60_000, 600_000, bought.size)])
        purchase = np.arange(rows.size) >= items.size
        item, slot = items[rows], np.where(purchase, -1, ads[rows])
        names = pl.DataFrame(
            {
                "event_id": np.full(rows.size, ""),
                "event_type": np.where(purchase, "purchase", "click"),
                "user_id": pl.Series(users[session[rows]]),
                "item_id": pl.Series(self._item_ids[item], dtype=pl.String),
                "event_time": late.astype(np.int64),
                "session_id": pl.Series(self._sessions + session[rows]),
                "category": pl.Series(self._category_names[self._category[item]], dtype=pl.String),
                "price": self._price[item],
                "quantity": pl.Series(np.where(purchase, 1, 0)),
                "ad_id": pl.Series(item),
            }
        )
        return names.with_columns(
            pl.format("user-{}", pl.col("user_id").cast(pl.String).str.zfill(6)).alias("user_id"),
            pl.format("session-{}", "session_id").alias("session_id"),
            pl.when(pl.Series(purchase)).then(1).cast(pl.Int64).alias("quantity"),
            pl.when(pl.Series(slot >= 0)).then(pl.format("ad-for-{}", "item_id")).alias("ad_id"),
        ).cast(SCHEMA)  # type: ignore[arg-type]


def messages(events: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """One record for each row, without the fields that are null: what goes on the topics."""
    for row in events.iter_rows(named=True):
        yield {name: value for name, value in row.items() if value is not None}


def _frame() -> pl.DataFrame:
    return pl.DataFrame(schema=SCHEMA)


def _unit(vectors: NDArray[Any]) -> Floats:
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _draw(logits: Floats, session: Ints, rng: np.random.Generator) -> Ints:
    """For each entry e of `session` [E] one column of `logits` [B, N] with softmax probability of row session[e].

    One search over the rows laid end to end: row b owns the stretch [b, b + 1) of the running sum.
    """
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    running = np.cumsum(odds, axis=1, dtype=np.float64)
    running /= running[:, -1:]
    running += np.arange(len(logits))[:, None]
    at = np.searchsorted(running.ravel(), session + rng.random(session.size), side="right")
    columns: Ints = np.minimum(at - session * logits.shape[1], logits.shape[1] - 1).astype(np.int64)
    return columns
