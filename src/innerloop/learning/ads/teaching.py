"""Learning a release's ad model from a history, calibrated and measured on its later clicks.

1. The clicks whose window has ended have final labels; those of as many users as have `_MOST` together are described,
   robots apart (`of_some_users`). The last three tenths of them are held out.
2. A head is learned on the earlier ones whose labels were final when the held-out ones began.
3. On the first half of the held-out clicks are chosen how much users differ, and, for the figures, the calibration;
   the figures are those of the second half.
4. The head that is kept is learned on all of them. The slope of its calibration is that of the first head on all
   held-out clicks, the intercept its own on these: learned on three times the clicks, it lies elsewhere.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from innerloop.events import CODES
from innerloop.learning.ads.ad_head import AdHead, best_variance
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.attribution import DAY, NEVER, attribute
from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.click_log import (
    CAPACITY,
    ConversionLog,
    Histories,
    Ints,
    adapted,
    content_prior,
    of_some_users,
    own_columns,
    population,
    population_of,
    rate_before,
    rows_of,
)
from innerloop.learning.ads.figures import auc, calibration_error
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.encoder import Encoder

_MOST = 20_000
_HELD_OUT = 0.3
_LEAST_CLICKS, _LEAST_SOLD = 100, 10  # of each part


@dataclass(frozen=True)
class _Clicks:
    """Clicks with final labels, in order of time: what was known before each, and what came of it."""

    log: ConversionLog
    places: Ints  # [N], in the log
    columns: Tensor  # [N, C]
    labels: Tensor  # [N] float64
    histories: Histories

    def logits(self, head: AdHead, some: slice) -> Tensor:
        """Uncalibrated logits of some of them, each after what its user had done before."""
        at, features = self.places[some], head.own_features(self.columns)
        windows = self.histories.before(self.log.users[at], self.log.times[at])
        rows = rows_of(self.log, self.places)
        return torch.from_numpy(adapted(self.log, head, features, rows, windows, features[some]))


def learn_ads(
    history: pl.DataFrame, encoder: Encoder, *, capacity: int, seed: int, window: int = DAY
) -> tuple[AdModel | None, dict[str, float]]:
    """Learn from an event table in order of time, for the items and categories of the encoder, who knows them all.

    `capacity` is that of the support sets, `window` that of attribution (ms). Also returns the figures on held-out
    clicks by name. (None, {}) when there are too few clicks or purchases. The same history and seed give the same model
    on the same machine.
    """
    log = log_of(history, encoder, window=window)
    clicks = _final_clicks(log, window, min(capacity, CAPACITY), seed)
    if clicks is None:
        return None, {}
    cut = round(len(clicks.labels) * (1.0 - _HELD_OUT))
    before = int(np.searchsorted(log.times[clicks.places], log.times[clicks.places[cut]] - window))
    middle = cut + (len(clicks.labels) - cut) // 2
    parts = slice(0, before), slice(cut, middle), slice(middle, None)
    if not all(_enough(clicks.labels[part]) for part in parts):
        return None, {}
    early = AdHead.fit(clicks.columns[:before], clicks.labels[:before], seed=seed)
    variance, _ = best_variance(
        early, clicks.labels, lambda heads, some: [clicks.logits(head, some) for head in heads], parts[1]
    )
    held_out = slice(cut, None)
    logits, labels = clicks.logits(early.with_variance(variance), held_out), clicks.labels[held_out]
    figures = _figures(logits, labels, middle - cut)
    head = AdHead.fit(clicks.columns, clicks.labels, seed=seed).with_variance(variance)
    calibration = Platt.fit(logits, labels).recentred(clicks.logits(head, held_out), labels)
    return replace(_model(log, replace(head, calibration=calibration), encoder), window=window), figures


def without_purchases(history: pl.DataFrame, encoder: Encoder, *, window: int = DAY) -> AdModel:
    """What everybody's events say of each item, without a head: for a click head where purchases are too few."""
    return replace(_model(log_of(history, encoder, window=window), None, encoder), window=window)


def log_of(history: pl.DataFrame, encoder: Encoder, *, window: int = DAY) -> ConversionLog:
    """An item's category is the one it has in serving, its newest."""
    names = pl.Series(encoder.item_ids, dtype=pl.String)
    items = (
        history["item_id"]
        .cast(pl.String)
        .replace_strict(names, np.arange(len(names)), return_dtype=pl.Int64)
        .to_numpy()
    )
    users = (history["user_id"].cast(pl.String).rank("dense").cast(pl.Int64) - 1).to_numpy()
    codes = {name: CODES[name] - 1 for name in KINDS}
    kinds = (
        history["event_type"]
        .cast(pl.String)
        .replace_strict(codes, default=len(KINDS), return_dtype=pl.Int64)
        .to_numpy()
    )
    times = history["event_time"].to_numpy().astype(np.int64)
    bought = attribute(users, items, times, kinds == 0, kinds == KINDS.index("purchase"), window=window)
    return ConversionLog(users, items, encoder.item_categories.numpy()[items], kinds, times, bought)


def _final_clicks(log: ConversionLog, window: int, capacity: int, seed: int) -> _Clicks | None:
    """Those whose window ends within the log, of users drawn at random; None when there are too few."""
    at = log.clicks[log.times[log.clicks] <= log.times[-1] - window]
    at = at[of_some_users(log.users[at], _MOST, seed)]
    labels = torch.from_numpy((log.attribution.converted_at[at] < NEVER).astype(np.float64))
    if not _enough(labels):
        return None
    histories = Histories(log, capacity)
    # All that is learned here are the prior's two strengths: of the part before what is held out.
    everybody = population(log, at, content_prior(log, _held_out_from(log, at)))
    own = own_columns(log, at, histories.before(log.users[at], log.times[at]), everybody.rate)
    return _Clicks(log, at, torch.from_numpy(np.concatenate([own, everybody.columns], 1)), labels, histories)


def _held_out_from(log: ConversionLog, at: Ints) -> int:
    """When the held-out part of the clicks `at` begins."""
    return int(log.times[at[round(len(at) * (1.0 - _HELD_OUT))]])


def _enough(labels: Tensor) -> bool:
    return len(labels) >= _LEAST_CLICKS and _LEAST_SOLD <= float(labels.sum()) < len(labels)


def _model(log: ConversionLog, head: AdHead | None, encoder: Encoder) -> AdModel:
    """With what is known behind the last event."""
    end = int(log.times[-1]) + 1
    prior = content_prior(log, end)

    def known(asked: Ints, of: Ints) -> Tensor:
        found = population_of(log, asked, of, np.full(len(asked), end), prior)
        return torch.from_numpy(found.columns).float()

    numbers = np.append(np.arange(len(encoder.categories)), -1)
    return AdModel(
        head,
        known(np.arange(len(encoder.item_ids)), encoder.item_categories.numpy()),
        known(np.full(len(numbers), -1), numbers),
        float(rate_before(log, np.array([end]))[0]),
    )


def _figures(logits: Tensor, labels: Tensor, calibrating: int) -> dict[str, float]:
    """Of the clicks after the first `calibrating` ones, on which the calibration is fitted."""
    y = labels[calibrating:]
    p = Platt.fit(logits[:calibrating], labels[:calibrating])(logits[calibrating:])
    return {
        "ads_clicks": float(len(y)),
        "ads_purchases": float(y.sum()),
        "ads_auc": auc(p, y),
        "ads_log_loss": float(torch.nn.functional.binary_cross_entropy(p, y)),
        "ads_calibration_error": calibration_error(p, y),
        "ads_predicted_over_observed": float(p.sum() / y.sum()),
    }
