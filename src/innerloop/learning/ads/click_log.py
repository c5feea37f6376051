"""Past clicks as numbers: attributed to purchases, with what was known before each of them.

Training and judging describe a click by the same functions, as of its own moment; serving asks as of the release's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.ads.ad_head import OWN_CLICKS
from innerloop.learning.ads.attribution import HOUR, NEVER, Attribution, counted_before
from innerloop.learning.ads.pairs import KINDS, NAMES, Past, describe
from innerloop.learning.ads.rates import ContentPrior

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CAPACITY = 64  # events of a user that are looked at, as of a support set
_ROWS_AT_ONCE = 2048
_ROBOT = 10
_INTENT_STRENGTH = 20.0  # clicks that everybody's rate is worth to an item or a category


@dataclass(frozen=True)
class ConversionLog:
    """N events in order of time; names became numbers, an unknown category is -1."""

    users: Ints
    items: Ints
    categories: Ints
    kinds: Ints  # as in pairs.KINDS; anything else is len(KINDS)
    times: Ints  # epoch ms
    attribution: Attribution

    @property
    def clicks(self) -> Ints:
        """Which events are clicks: their places."""
        return np.flatnonzero(self.attribution.clicks)


@dataclass(frozen=True)
class Known:
    """What everybody's events said strictly before each of M moments: counts with a label, of all, [M] each."""

    trials: Floats
    successes: Floats


def known_counts(log: ConversionLog, keys: Ints, at: Ints, *, wait: int = HOUR) -> Known:
    """Matured clicks and conversions with the same key as event at[m], strictly before it; `keys` [N]."""
    return known_before(log, keys, keys[at], log.times[at], wait=wait)


def known_before(log: ConversionLog, keys: Ints, asked: Ints, now: Ints, *, wait: int = HOUR) -> Known:
    """Matured clicks and conversions with key asked[m] strictly before now[m], [M]; `keys` [N] are the events'."""
    clicks, converted = log.clicks, log.attribution.converted_at
    known_at = log.attribution.known_at(wait=wait)
    trials = counted_before(keys[clicks], known_at[clicks], asked, now)
    bought = clicks[converted[clicks] < NEVER]
    successes = counted_before(keys[bought], converted[bought], asked, now)
    return Known(trials.astype(np.float64), successes.astype(np.float64))


@dataclass(frozen=True)
class Population:
    """Of each of M moments: everybody's rate [M] and the columns ad_head.POPULATION and INTENT [M, 12]."""

    rate: Floats
    columns: Floats


def overall_rate(log: ConversionLog, at: Ints) -> Floats:
    """Everybody's conversion rate strictly before each moment, [M]."""
    return rate_before(log, log.times[at])


def rate_before(log: ConversionLog, now: Ints, *, wait: int = HOUR) -> Floats:
    """Everybody's conversion rate strictly before each of `now` [M], epoch ms."""
    nobody = np.zeros(len(now), np.int64)
    everybody = known_before(log, np.zeros(len(log.users), np.int64), nobody, now, wait=wait)
    return (everybody.successes + 1.0) / (everybody.trials + 30.0)


def population(log: ConversionLog, at: Ints, prior: ContentPrior) -> Population:
    """What is known of the items of events `at` [M] by everybody's strictly earlier events."""
    return population_of(log, log.items[at], log.categories[at], log.times[at], prior)


def population_of(
    log: ConversionLog, items: Ints, categories: Ints, now: Ints, prior: ContentPrior, *, wait: int = HOUR
) -> Population:
    """What is known of `items` in `categories`, both [M], by everybody's events strictly before `now` [M].

    An item of -1 is one that nobody has met: it has its category's rate.
    """
    rate = rate_before(log, now, wait=wait)
    category = known_before(log, log.categories, categories, now, wait=wait)
    item = known_before(log, log.items, items, now, wait=wait)
    category_rate = np.where(categories < 0, rate, prior.category_rates(category.successes, category.trials, rate))
    item_rate = prior.item_rates(item.successes, item.trials, category_rate)
    clicks = log.clicks
    all_clicks = np.searchsorted(log.times[clicks], now, "left")
    mine = counted_before(log.categories[clicks], log.times[clicks], categories, now)
    share = np.log((mine + 1.0) / (all_clicks + len(np.unique(log.categories))))
    clicked = np.log1p(counted_before(log.items[clicks], log.times[clicks], items, now))
    columns = [
        np.log(category_rate / rate),
        share,
        np.log1p(category.trials),
        np.log(item_rate / category_rate),
        clicked,
        np.log1p(item.trials),
        *_intent(log, log.categories, categories, now),
        *_intent(log, log.items, items, now),
    ]
    return Population(rate, np.stack(columns, 1))


def _intent(log: ConversionLog, keys: Ints, asked: Ints, now: Ints) -> Iterator[Floats]:
    """Of each kind of event but clicks: how many per click with key asked[m] strictly before now[m], [M] each.

    The log of the rate over everybody's, to which it is shrunk: 0 where nothing is known, or the log lacks the kind.
    """
    of_kind = [np.flatnonzero(log.kinds == kind) for kind in range(len(KINDS))]
    counts = [counted_before(keys[at], log.times[at], asked, now) for at in of_kind]
    totals = [1.0 + np.searchsorted(log.times[at], now, "left") for at in of_kind]
    for at, count, total in zip(of_kind[1:], counts[1:], totals[1:], strict=True):
        rate = total / totals[0]
        found = np.log((count / rate + _INTENT_STRENGTH) / (counts[0] + _INTENT_STRENGTH))
        yield np.where((asked >= 0) & (len(at) > 0), found, 0.0)


def content_prior(log: ConversionLog, before: int) -> ContentPrior:
    """How much a category's rate is worth to an item, from clicks that have matured before that time."""
    clicks = log.clicks[log.times[log.clicks] < before]
    bought = (log.attribution.converted_at[clicks] < before).astype(np.float64)
    # One user's clicks on one item share their fate: they count once.
    _, first, pair = np.unique(pair_numbers(log.users, log.items)[clicks], return_index=True, return_inverse=True)
    sold = (np.bincount(pair, bought) > 0).astype(np.float64)
    items, at, places = np.unique(log.items[clicks][first], return_index=True, return_inverse=True)
    trials, successes = np.bincount(places, minlength=len(items)), np.bincount(places, sold, len(items))
    categories = log.categories[clicks][first][at]
    unknown = categories.max(initial=0) + 1
    return ContentPrior.fit(
        np.where(categories < 0, unknown, categories), successes.astype(np.float64), trials.astype(np.float64)
    )


def pair_numbers(first: Ints, second: Ints) -> Ints:
    """One number for each pair of numbers from -1."""
    return (first + 1) * (int(second.max(initial=0)) + 2) + second + 1


def of_some_users(users: Ints, most: int, seed: int) -> Bools:
    """Which of N clicks or impressions of `users` [N] are drawn: all, or if they are more than `most`, about so many.

    All of a user's are, or none, users in random order. One with a tenth of `most`, and ten times as many as most users
    have, is taken for a robot and has none: the sample would be of hardly anybody else.
    """
    if len(users) <= most:
        return np.ones(len(users), bool)
    counts = np.bincount(users)
    order = np.random.default_rng(seed).permutation(len(counts))
    fits = counts[order] < max(most / _ROBOT, _ROBOT * float(np.median(counts[counts > 0])))
    drawn = np.zeros(len(counts), bool)
    drawn[order[fits & (np.cumsum(np.where(fits, counts[order], 0)) <= most)]] = True
    return drawn[users]


@dataclass(frozen=True)
class Windows:
    """The newest events of M support sets before their `ends` [M]: places [M, S], and which are there."""

    places: Ints
    mask: Bools
    ends: Ints


class Histories:
    """Finds the newest events of a user strictly before a time."""

    def __init__(self, log: ConversionLog, capacity: int = CAPACITY) -> None:
        self._log, self._capacity = log, capacity
        self._order = np.lexsort((np.arange(len(log.users)), log.users))
        self._users = log.users[self._order]

    def before(self, users: Ints, times: Ints) -> Windows:
        """The windows of users [M] strictly before times [M], newest first."""
        count = counted_before(self._log.users, self._log.times, users, times)
        back = np.arange(1, self._capacity + 1)
        places = (np.searchsorted(self._users, users) + count)[:, None] - back
        mask = back <= count[:, None]
        return Windows(self._order[np.maximum(places, 0)], mask, times)


@dataclass(frozen=True)
class Asked:
    """M moments: what is asked about, and when (epoch ms), [M] each."""

    items: Ints
    categories: Ints
    times: Ints


def own_columns(log: ConversionLog, at: Ints, windows: Windows, rate: Floats, *, lag: int = 0) -> Floats:
    """Columns pairs.NAMES [M, ..] of the clicks `at` [M] after these windows, as known `lag` ms before."""
    return own_columns_of(log, Asked(log.items[at], log.categories[at], log.times[at]), windows, rate, lag=lag)


def own_columns_of(
    log: ConversionLog, asked: Asked, windows: Windows, rate: Floats, *, lag: int = 0, wait: int = HOUR
) -> Floats:
    """Columns pairs.NAMES [M, ..] of what is asked [M] after these windows of the log, as known `lag` ms before."""
    parts = []
    for first in range(0, len(asked.times), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        places = windows.places[rows]
        past = Past(
            items=torch.from_numpy(log.items[places]),
            categories=torch.from_numpy(log.categories[places]),
            kinds=torch.from_numpy(log.kinds[places]),
            times=torch.from_numpy(log.times[places]),
            converted_at=torch.from_numpy(log.attribution.converted_at[places]),
            mask=torch.from_numpy(windows.mask[rows]),
        )
        now = [torch.from_numpy(v[rows])[:, None] for v in (asked.items, asked.categories, asked.times)]
        rates = torch.from_numpy(rate[rows]).float()[:, None]
        parts.append(describe(past, now[0], now[1], now[2], rates, lag=lag, wait=wait)[:, 0].double().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, len(NAMES)))


class Adaptable(Protocol):
    """What `adapted` needs of a head."""

    def adapt(self, features: Tensor, labels: Tensor, weights: Tensor) -> Tensor: ...


def adapted(  # noqa: PLR0917 - what is asked, by whom, after what
    log: ConversionLog,
    head: Adaptable,
    support: Tensor,
    rows: Ints,
    windows: Windows,
    asked: Tensor,
    *,
    wait: int = HOUR,
) -> Floats:
    """Logits [M] by the weights that each window's clicks give, with the labels as known strictly before its end.

    `asked` [M, K] and `support` [P, K] are `AdHead.own_features`. `rows` [N] says which of the log's events has
    which row of the support; -1 are left out.
    """
    parts = []
    for first in range(0, len(asked), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        part = Windows(windows.places[some], windows.mask[some], windows.ends[some])
        numbers, *known = known_clicks(log, rows, part, wait=wait)
        labels, weights = (torch.from_numpy(of) for of in known)
        theirs = head.adapt(support[torch.from_numpy(numbers)], labels, weights)
        parts.append((asked[some] * theirs).sum(1).numpy())
    return np.concatenate(parts)


def known_clicks(log: ConversionLog, rows: Ints, windows: Windows, *, wait: int = HOUR) -> tuple[Ints, Bools, Bools]:
    """The newest clicks of each window that have a label strictly before its end, [M, at most OWN_CLICKS] each.

    Which row of `rows` [N] each is (0 where there is none), whether it had converted, and which are there.
    """
    places, when = windows.places, windows.ends[:, None]
    numbers = rows[places]
    positive = log.attribution.converted_at[places] < when
    mask = windows.mask & (numbers >= 0) & (positive | (log.times[places] + wait < when))
    order = np.argsort(~mask, axis=1, kind="stable")[:, :OWN_CLICKS]  # the newest that count
    numbers = np.maximum(np.take_along_axis(numbers, order, 1), 0)
    return numbers, np.take_along_axis(positive, order, 1), np.take_along_axis(mask, order, 1)


def rows_of(log: ConversionLog, at: Ints) -> Ints:
    """For each event of the log [N] which of the events `at` [P] it is, -1 for none of them."""
    rows = np.full(len(log.users), -1, np.int64)
    rows[at] = np.arange(len(at))
    return rows
