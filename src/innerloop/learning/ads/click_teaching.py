"""Learning a release's click model from impressions, calibrated and measured on its later ones.

Where purchases are too few they are left out: of both heads below there is only the click's.

1. The impressions whose click and purchase windows have ended have final labels; those of as many users as have `MOST`
   together are described, robots apart (`of_some_users`). The last three tenths of them are held out.
2. Both heads are learned on the earlier ones whose labels were final when the held-out ones began.
3. On the first half of the held-out ones are chosen how much users differ, and, for the figures, the calibrations; the
   figures are those of the second half.
4. The heads that are kept are learned on all of them; their calibrations are those of the first heads on all held-out
   impressions: the click's on all of these, the purchase's on the clicked ones.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from innerloop.events import CODES, IMPRESSION
from innerloop.learning.ads.ad_head import POPULATION, VARIANCES
from innerloop.learning.ads.attribution import DAY, HOUR, NEVER, Attribution, attribute
from innerloop.learning.ads.calibration import Platt
from innerloop.learning.ads.click_head import ClickHead
from innerloop.learning.ads.click_log import (
    Asked,
    ConversionLog,
    Histories,
    Ints,
    adapted,
    content_prior,
    of_some_users,
    own_columns_of,
    population_of,
    rate_before,
    rows_of,
)
from innerloop.learning.ads.click_model import ClickModel
from innerloop.learning.ads.figures import auc, calibration_error
from innerloop.learning.ads.impressions import CLICK_WINDOW, attribute_clicks, attribute_purchases
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.encoder import Encoder

MOST = 40_000
_HELD_OUT = 0.3
_LEAST_IMPRESSIONS, _LEAST_CLICKED, _LEAST_SOLD = 200, 20, 5  # of each part


@dataclass(frozen=True)
class ShownLog:
    """What users did, and what they were shown, numbered alike: see `shown_log`."""

    did: ConversionLog
    shown: ConversionLog
    """Its events are impressions, which convert when they are clicked."""
    bought_at: Ints  # [N] of the impressions, epoch ms; NEVER
    only_shown: list[str]
    """Items that nobody did anything with; they are numbered behind those of the encoder."""
    windows: tuple[int, int]
    """In which a purchase belongs to a click, and a click to an impression (ms): also the waits for these labels."""


@dataclass(frozen=True)
class _Impressions:
    """Impressions with final labels, in order of time: what was known before each, and what came of it."""

    log: ShownLog
    places: Ints  # [N], in the log of impressions
    columns: Tensor  # [N, 2C]
    clicked: Tensor  # [N] float64
    bought: Tensor | None  # [N] float64; None: purchases aren't learned
    histories: Histories

    def fit(self, some: slice) -> ClickHead:
        """A head learned on some of them."""
        bought = None if self.bought is None else self.bought[some]
        return ClickHead.fit(self.columns[some], self.clicked[some], bought)

    def click_logits(self, head: ClickHead, some: slice) -> Tensor:
        """Uncalibrated logits of some of them, each after what its user had been shown and done before."""
        shown, at, features = self.log.shown, self.places[some], head.own_features(self.columns)
        windows = self.histories.before(shown.users[at], shown.times[at])
        rows, wait = rows_of(shown, self.places), self.log.windows[1]
        return torch.from_numpy(adapted(shown, head, features, rows, windows, features[some], wait=wait))

    def enough(self, some: slice) -> bool:
        """Whether a part of them can be learned from or judged by."""
        clicked = self.clicked[some]
        return (
            len(clicked) >= _LEAST_IMPRESSIONS
            and _LEAST_CLICKED <= float(clicked.sum()) < len(clicked)
            and (self.bought is None or _LEAST_SOLD <= float(self.bought[some].sum()) < float(clicked.sum()))
        )


@dataclass(frozen=True)
class _Foretold:
    """Held-out impressions in order of time: uncalibrated logits of a head, and what came of them, [H] each."""

    click: Tensor
    clicked: Tensor
    purchase: tuple[Tensor, Tensor] | None
    """Of a purchase given a click, and whether there was one."""

    @classmethod
    def by(cls, head: ClickHead, known: _Impressions, some: slice) -> "_Foretold":
        purchase = None if known.bought is None else (head.purchase_logits(known.columns[some]), known.bought[some])
        return cls(known.click_logits(head, some), known.clicked[some], purchase)

    def calibrations(self, some: slice) -> tuple[Platt, Platt]:
        """Fitted on some of them: the click's on all of these, the purchase's on the clicked ones."""
        return Platt.fit(self.click[some], self.clicked[some]), Platt.fit(*self._of_clicked(some))

    def recentred(self, click: Platt, purchase: Platt) -> tuple[Platt, Platt]:
        """Calibrations of a head learned on less, as these logits need them."""
        return click.recentred(self.click, self.clicked), purchase.recentred(*self._of_clicked(slice(None)))

    def _of_clicked(self, some: slice) -> tuple[Tensor, Tensor]:
        """Of those that were clicked the purchase's logits and labels; none where purchases aren't learned."""
        if self.purchase is None:
            return self.click[:0], self.clicked[:0]
        logits, bought = (part[some][self.clicked[some] > 0] for part in self.purchase)
        return logits, bought


def learn_clicks(
    history: pl.DataFrame,
    impressions: pl.DataFrame,
    encoder: Encoder,
    *,
    capacities: tuple[int, int],
    seed: int,
    windows: tuple[int, int] = (DAY, CLICK_WINDOW),
    purchases: bool = True,
) -> tuple[ClickModel | None, dict[str, float]]:
    """Learn from event tables in order of time, for the items and categories of the encoder, which knows the history's.

    `capacities` are those of the support sets and of the impressions kept beside them, `windows` those in which a
    purchase belongs to a click and a click to an impression (ms). `purchases` says whether these are learned, too.

    Also returns the figures on held-out impressions by name. (None, {}) when there are too few impressions, clicks on
    them, or, where they are learned, purchases.
    """
    if impressions.is_empty():
        return None, {}
    log = shown_log(history, impressions, encoder, windows=windows)
    wait = sum(windows) if purchases else windows[1]
    known = _final(log, capacities, seed, wait, purchases=purchases)
    count = len(known.places)
    if not known.enough(slice(None)):
        return None, {}
    times = known.log.shown.times[known.places]
    cut = round(count * (1.0 - _HELD_OUT))
    middle = cut + (count - cut) // 2
    before = int(np.searchsorted(times, times[cut] - wait))
    if not all(known.enough(part) for part in (slice(0, before), slice(cut, middle), slice(middle, None))):
        return None, {}
    early = known.fit(slice(0, before))
    early = early.with_variance(_best_variance(early, known, slice(cut, middle)))
    held_out = slice(cut, None)
    foretold = _Foretold.by(early, known, held_out)
    head = known.fit(slice(None)).with_variance(float(early.own_variances[0]))
    # How steep they are is told by a head that hadn't seen these impressions, where they lie by the one that is kept.
    click, purchase = _Foretold.by(head, known, held_out).recentred(*foretold.calibrations(slice(None)))
    head = replace(head, click_calibration=click, purchase_calibration=purchase)
    return _model(known.log, head, encoder), _figures(foretold, middle - cut)


def shown_log(
    history: pl.DataFrame,
    impressions: pl.DataFrame,
    encoder: Encoder,
    *,
    windows: tuple[int, int] = (DAY, CLICK_WINDOW),
) -> ShownLog:
    """Number the events of both tables alike, and attribute clicks and purchases to impressions."""
    known = set(encoder.item_ids)
    only_shown = sorted(set(impressions["item_id"].cast(pl.String).to_list()) - known)
    category_rows = encoder.category_rows_of(_newest_categories(impressions, only_shown)).numpy()
    of_item = np.concatenate([encoder.item_categories.numpy(), category_rows])
    table = pl.concat([_columns(history), _columns(impressions)]).sort("event_time", maintain_order=True)
    names = pl.Series([*encoder.item_ids, *only_shown], dtype=pl.String)
    items = table["item_id"].replace_strict(names, np.arange(len(names)), return_dtype=pl.Int64).to_numpy()
    users = (table["user_id"].rank("dense").cast(pl.Int64) - 1).to_numpy()
    codes = {name: CODES[name] - 1 for name in KINDS} | {IMPRESSION: -1}
    kinds = table["event_type"].replace_strict(codes, default=len(KINDS), return_dtype=pl.Int64).to_numpy()
    times = table["event_time"].to_numpy().astype(np.int64)
    seen, clicks, purchases = kinds == -1, kinds == 0, kinds == KINDS.index("purchase")
    clicked = attribute_clicks(users, items, times, seen, clicks, window=windows[1])
    bought_at = attribute_purchases(users, items, clicked, purchases, window=windows[0])
    sold = attribute(users, items, times, clicks, purchases, window=windows[0])

    def part(rows: Ints, kinds: Ints, found: Attribution) -> ConversionLog:
        told = Attribution(times[rows], found.clicks[rows], found.converted_at[rows])
        return ConversionLog(users[rows], items[rows], of_item[items[rows]], kinds[rows], times[rows], told)

    did, shown = np.flatnonzero(~seen), np.flatnonzero(seen)
    return ShownLog(
        part(did, kinds, sold), part(shown, np.zeros_like(kinds), clicked), bought_at[shown], only_shown, windows
    )


def _columns(table: pl.DataFrame) -> pl.DataFrame:
    names = ("user_id", "item_id", "event_type")
    return table.select(*(pl.col(name).cast(pl.String) for name in names), pl.col("event_time").cast(pl.Int64))


def _newest_categories(table: pl.DataFrame, items: list[str]) -> list[str | None]:
    if "category" not in table.columns:
        return [None] * len(items)
    found = dict(table.drop_nulls("category").select("item_id", "category").iter_rows())
    return [found.get(item) for item in items]


def _final(log: ShownLog, capacities: tuple[int, int], seed: int, wait: int, *, purchases: bool) -> _Impressions:
    """Those whose labels are final within the log, `wait` ms after them, of users drawn at random."""
    shown = log.shown
    end = max(int(part.times[-1]) for part in (log.did, shown))
    at = np.flatnonzero(shown.times <= end - wait)
    at = at[of_some_users(shown.users[at], MOST, seed)]
    histories, exposures = Histories(log.did, capacities[0]), Histories(shown, max(1, capacities[1]))
    asked = Asked(shown.items[at], shown.categories[at], shown.times[at])
    held_out_from = int(asked.times[round(len(at) * (1.0 - _HELD_OUT))]) if len(at) else 0
    parts = []
    for part, history, delay in ((log.did, histories, HOUR), (shown, exposures, log.windows[1])):
        # All that is learned here are the prior's two strengths: of the part before what is held out.
        prior = content_prior(part, held_out_from)
        everybody = population_of(part, asked.items, asked.categories, asked.times, prior, wait=delay)
        windows = history.before(shown.users[at], asked.times)
        own = own_columns_of(part, asked, windows, everybody.rate, wait=delay)
        parts += [own, everybody.columns[:, : len(POPULATION)]]
    labels = [(when[at] < NEVER).astype(np.float64) for when in (shown.attribution.converted_at, log.bought_at)]
    clicked, bought = map(torch.from_numpy, labels)
    columns = torch.from_numpy(np.concatenate(parts, 1))
    return _Impressions(log, at, columns, clicked, bought if purchases else None, exposures)


def _best_variance(head: ClickHead, known: _Impressions, some: slice) -> float:
    """How much users differ in what they click, judged by log-loss on some of the impressions."""
    foretold = [known.click_logits(head.with_variance(variance), some) for variance in VARIANCES]
    losses = [float(binary_cross_entropy_with_logits(logits, known.clicked[some])) for logits in foretold]
    return VARIANCES[min(range(len(losses)), key=losses.__getitem__)]


def _model(log: ShownLog, head: ClickHead, encoder: Encoder) -> ClickModel:
    """With what is known behind the last event."""
    shown = log.shown
    end = max(int(part.times[-1]) for part in (log.did, shown)) + 1
    prior = content_prior(shown, end)

    def known(asked: Ints, of: Ints) -> Tensor:
        everybody = population_of(shown, asked, of, np.full(len(asked), end), prior, wait=log.windows[1])
        return torch.from_numpy(everybody.columns[:, : len(POPULATION)]).float()

    rows = np.arange(len(encoder.item_ids) + len(log.only_shown))
    of_item = np.full(len(rows), -1)
    of_item[: len(encoder.item_ids)] = encoder.item_categories.numpy()
    of_item[shown.items] = shown.categories
    numbers = np.append(np.arange(len(encoder.categories)), -1)
    return ClickModel(
        head,
        known(rows, of_item),
        known(np.full(len(numbers), -1), numbers),
        log.only_shown,
        float(rate_before(shown, np.array([end]), wait=log.windows[1])[0]),
        log.windows[1],
    )


def _figures(foretold: _Foretold, calibrating: int) -> dict[str, float]:
    """Of the impressions after the first `calibrating` ones, on which the calibrations are fitted.

    Click (`ads_click_*`), and click and purchase over all impressions, clicked or not (`ads_ctcvr_*`).
    """
    click, purchase = foretold.calibrations(slice(0, calibrating))
    last = slice(calibrating, None)
    p = click(foretold.click[last])
    judged = {"click": (p, foretold.clicked[last])}
    if foretold.purchase is not None:
        logits, bought = foretold.purchase
        judged["ctcvr"] = p * purchase(logits[last]), bought[last]
    found = {"ads_impressions": float(len(p))}
    for name, (chances, y) in judged.items():
        found |= {
            f"ads_{name}_positives": float(y.sum()),
            f"ads_{name}_auc": auc(chances, y),
            f"ads_{name}_log_loss": float(binary_cross_entropy(chances, y)),
            f"ads_{name}_calibration_error": calibration_error(chances, y),
            f"ads_{name}_predicted_over_observed": float(chances.sum() / y.sum()),
        }
    return found
