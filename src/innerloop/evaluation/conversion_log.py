"""Past events for the conversion protocol: numbered, attributed, with what was known before each of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import read_events
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.ads.attribution import HOUR, NEVER, Attribution, attribute, counted_before
from innerloop.learning.ads.pairs import KINDS, NAMES, Past, describe
from innerloop.learning.ads.rates import ContentPrior

CAPACITY = 64  # events of a user that are looked at, as of a support set
_ROWS_AT_ONCE = 2048
_OTHER = len(KINDS)
_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


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


def read_log(path: Path, *, window: int) -> ConversionLog:
    """Read a file of events, or every such file of a folder; the attribution window in ms.

    Raises SettingsError without clicks or without purchases.
    """
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise SettingsError(f"{path} holds no file of events: name a CSV, JSONL or Parquet file.")
    table = pl.concat([read_events(file) for file in files], how="diagonal_relaxed")
    table = table.sort("event_time", maintain_order=True)
    kinds = np.array([KINDS.index(k) if k in KINDS else _OTHER for k in table["event_type"].to_list()], np.int64)
    for kind in ("click", "purchase"):
        if not (kinds == KINDS.index(kind)).any():
            raise SettingsError(f"{path} has no event of type {kind}: conversion needs clicks and purchases.")
    users, items = _codes(table["user_id"]), _codes(table["item_id"])
    categories = _codes(table["category"]) if "category" in table.columns else np.full(len(kinds), -1)
    times = table["event_time"].to_numpy()
    attribution = attribute(users, items, times, kinds == 0, kinds == KINDS.index("purchase"), window=window)
    return ConversionLog(users, items, categories, kinds, times, attribution)


def _codes(column: pl.Series) -> Ints:
    known = column.drop_nulls().unique().sort()
    codes = column.replace_strict(known, np.arange(len(known)), default=-1, return_dtype=pl.Int64)
    return codes.to_numpy()


@dataclass(frozen=True)
class Known:
    """What everybody's events said strictly before each of M moments: counts with a label, of all, [M] each."""

    trials: Floats
    successes: Floats


def known_counts(log: ConversionLog, keys: Ints, at: Ints, *, wait: int = HOUR) -> Known:
    """Matured clicks and conversions with the same key as event at[m], strictly before it; `keys` [N]."""
    clicks, now = log.clicks, log.times[at]
    converted = log.attribution.converted_at
    known_at = log.attribution.known_at(wait=wait)
    trials = counted_before(keys[clicks], known_at[clicks], keys[at], now)
    bought = clicks[converted[clicks] < NEVER]
    successes = counted_before(keys[bought], converted[bought], keys[at], now)
    return Known(trials.astype(np.float64), successes.astype(np.float64))


@dataclass(frozen=True)
class Population:
    """Of each of M moments: everybody's rate [M] and the columns ad_head.POPULATION [M, 6]."""

    rate: Floats
    columns: Floats


def overall_rate(log: ConversionLog, at: Ints) -> Floats:
    """Everybody's conversion rate strictly before each moment, [M]."""
    everybody = known_counts(log, np.zeros(len(log.users), np.int64), at)
    return (everybody.successes + 1.0) / (everybody.trials + 30.0)


def population(log: ConversionLog, at: Ints, prior: ContentPrior) -> Population:
    """What is known of the items of events `at` [M] by everybody's strictly earlier events."""
    rate = overall_rate(log, at)
    category, item = known_counts(log, log.categories, at), known_counts(log, log.items, at)
    unknown = log.categories[at] < 0
    category_rate = np.where(unknown, rate, prior.category_rates(category.successes, category.trials, rate))
    item_rate = prior.item_rates(item.successes, item.trials, category_rate)
    clicks, now = log.clicks, log.times[at]
    all_clicks = np.searchsorted(log.times[clicks], now, "left")
    mine = counted_before(log.categories[clicks], log.times[clicks], log.categories[at], now)
    share = np.log((mine + 1.0) / (all_clicks + len(np.unique(log.categories))))
    clicked = np.log1p(counted_before(log.items[clicks], log.times[clicks], log.items[at], now))
    columns = [
        np.log(category_rate / rate),
        share,
        np.log1p(category.trials),
        np.log(item_rate / category_rate),
        clicked,
        np.log1p(item.trials),
    ]
    return Population(rate, np.stack(columns, 1))


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


@dataclass(frozen=True)
class Windows:
    """The newest events of M support sets before their `ends` [M]: places [M, CAPACITY], and which are there."""

    places: Ints
    mask: Bools
    ends: Ints


class Histories:
    """Finds the newest events of a user strictly before a time."""

    def __init__(self, log: ConversionLog) -> None:
        self._log = log
        self._order = np.lexsort((np.arange(len(log.users)), log.users))
        self._starts = np.searchsorted(log.users[self._order], np.arange(log.users.max(initial=0) + 2))

    def before(self, users: Ints, times: Ints) -> Windows:
        """The windows of users [M] strictly before times [M], newest first."""
        count = counted_before(self._log.users, self._log.times, users, times)
        back = np.arange(1, CAPACITY + 1)
        places = (self._starts[users] + count)[:, None] - back
        mask = back <= count[:, None]
        return Windows(self._order[np.maximum(places, 0)], mask, times)


def own_columns(log: ConversionLog, at: Ints, windows: Windows, rate: Floats, *, lag: int = 0) -> Floats:
    """Columns pairs.NAMES [M, ..] of the clicks `at` [M] after these windows, as known `lag` ms before."""
    parts = []
    for first in range(0, len(at), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        some, places = at[rows], windows.places[rows]
        past = Past(
            items=torch.from_numpy(log.items[places]),
            categories=torch.from_numpy(log.categories[places]),
            kinds=torch.from_numpy(log.kinds[places]),
            times=torch.from_numpy(log.times[places]),
            converted_at=torch.from_numpy(log.attribution.converted_at[places]),
            mask=torch.from_numpy(windows.mask[rows]),
        )
        asked = [torch.from_numpy(v[some])[:, None] for v in (log.items, log.categories, log.times)]
        rates = torch.from_numpy(rate[rows]).float()[:, None]
        parts.append(describe(past, asked[0], asked[1], asked[2], rates, lag=lag)[:, 0].double().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, len(NAMES)))
