"""From support sets to lists of ads by the chance that a click is followed by a purchase.

With a click head in the release the lists are by the chance that a shown ad is clicked and then bought, or, where
purchases were too few to learn from, that it is clicked; what users were shown counts, too.

Everything is told as of the task's newest event, labels of clicks included: a purchase relabels the clicks before it
whenever it came, and the same state gives the same probabilities.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.ads.ad_head import POPULATION, Ads
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.click_log import CAPACITY
from innerloop.learning.ads.impressions import shown_past
from innerloop.learning.ads.pairs import Past, describe
from innerloop.learning.ads.served import past_of
from innerloop.learning.catalogue import Catalogue
from innerloop.learning.devices import moved
from innerloop.scores import AdsKind
from innerloop.support import SupportSets, gather, newest

Ints = NDArray[np.int64]
MOST = 128
"""Ads of one task whose chances are computed: of more, those that the ranking head likes best."""
_TASKS_AT_ONCE = 256
_PAIRS_AT_ONCE = 2_000_000  # of an example and an ad: some 100 MB
_LEAST = 1e-6  # as many digits as are published: a probability is never 0 or 1


@dataclass(frozen=True)
class AdLists:
    """Ads by their number, best first, and their scores, [T, k] each; of click and purchase, also both factors."""

    numbers: Ints
    scores: NDArray[np.float32]
    click: NDArray[np.float32] | None = None
    purchase_given_click: NDArray[np.float32] | None = None


class AdScorer:
    """An ad model over a catalogue of the same release."""

    def __init__(self, model: AdModel, catalogue: Catalogue) -> None:
        self._model, self._catalogue = model.to(catalogue.device), catalogue
        only_shown = [] if model.clicks is None else model.clicks.only_shown
        self._release_rows = {item: row for row, item in enumerate([*catalogue.release.item_ids, *only_shown])}
        self._rows: Ints = np.empty(0, np.int64)  # by place in the catalogue, -1 for an item the release lacks

    @property
    def kind(self) -> AdsKind:
        """What the scores are."""
        if self._model.clicks is None:
            return "purchase_given_click"
        return "click" if self._model.clicks.head.purchase is None else "click_and_purchase"

    @property
    def by_click(self) -> bool:
        """Whether lists are by click: then `best` wants what was shown."""
        return self._model.clicks is not None

    def best(self, sets: SupportSets, shown: SupportSets | None, k: int, among: Tensor | None = None) -> AdLists:
        """The k best active ads of each task, and the chances that make them so.

        All active ads are asked about, or `among` [T, m] by number. `shown` are the same tasks' impressions.
        """
        if among is None:
            among = torch.arange(len(self._catalogue.ad_ids)).expand(len(sets.sizes), -1)
        shown = SupportSets.empty(len(sets.sizes)) if shown is None else shown
        ads, width = among.shape[1], max(1, int((sets.sizes + shown.sizes).max(initial=0)))
        chunk = max(1, min(_TASKS_AT_ONCE, _PAIRS_AT_ONCE // (width * max(ads, width))))
        numbers = torch.empty(len(among), min(k, ads), dtype=torch.int64)
        parts = torch.empty(3 if self.kind == "click_and_purchase" else 1, len(among), min(k, ads))
        order = np.argsort(sets.sizes, kind="stable")  # sets of one size together: there is little to pad
        for first in range(0, len(among) if ads else 0, chunk):
            tasks = order[first : first + chunk]
            some = torch.from_numpy(tasks)
            found = self._parts(gather(sets, tasks), gather(shown, tasks), among[some]).cpu()  # [1 or 3, T, m]
            places = found[0].topk(min(k, ads)).indices
            numbers[some] = among[some].gather(1, places)
            parts[:, some] = found.gather(2, places.expand(len(found), -1, -1)).float()
        return AdLists(numbers.numpy(), *parts.numpy())

    def _parts(self, sets: SupportSets, shown: SupportSets, among: Tensor) -> Tensor:
        """The score of the ads `among` [T, A] and, if it is a product, what of: [1 or 3, T, A] float64."""
        if not self.by_click:
            return self.probabilities(sets, among).unsqueeze(0)
        click, purchase = self.chances(sets, shown, among)
        return click.unsqueeze(0) if purchase is None else torch.stack([click * purchase, click, purchase])

    def chances(self, sets: SupportSets, shown: SupportSets, among: Tensor) -> tuple[Tensor, Tensor | None]:
        """Click, and purchase given click, of the ads `among` [T, A] if shown, each [T, A] float64 in (0, 1).

        There is no second with the kind `click`.
        """
        assert self._model.clicks is not None  # noqa: S101 - asked by who saw `by_click`
        model, clicks, device = self._model, self._model.clicks, self._catalogue.device
        did, places = self._past(sets)
        shown_places = self._catalogue.places(shown.examples["item"])
        categories, window = self._categories(shown_places), clicks.window
        seen = shown_past(shown, shown_places, categories, sets, places, device, window=window)
        rates = [torch.tensor(rate, dtype=torch.float32, device=device) for rate in (model.rate, clicks.rate)]

        def columns(items: Tensor, categories: Tensor, times: Tensor) -> Tensor:
            rows = self._rows_at(items)
            of_events = describe(did, items, categories, times, rates[0].expand(items.shape))
            shares = rates[1].expand(items.shape)
            of_impressions = describe(seen, items, categories, times, shares, wait=window)
            everybody = model.population(rows, categories), model.shown_population(rows, categories)
            return torch.cat([of_events, everybody[0][..., : len(POPULATION)], of_impressions, everybody[1]], -1)

        now = self._tensor(sets.newest + 1)  # as of the newest event: later impressions count from the next on
        click, purchase = clicks.head.probabilities(columns, seen, self._asked(among), now, wait=window)
        return _probability(click), None if purchase is None else _probability(purchase)

    def probabilities(self, sets: SupportSets, among: Tensor) -> Tensor:
        """Purchase given click of the ads `among` [T, A], by number, by each task, [T, A] float64 in (0, 1)."""
        assert self._model.head is not None  # noqa: S101 - there is one unless lists are by click
        sets = newest(sets, CAPACITY)  # as it was taught
        past, ads = self._past(sets)[0], self._asked(among)
        now = self._tensor(sets.newest + 1)  # not the clock's: the same set gives the same at any time
        found = self._model.head.probabilities(
            past,
            self._population(past.items, past.categories),
            ads,
            self._population(ads.items, ads.categories),
            now,
            self._model.rate,
        )
        return _probability(found)

    def _past(self, sets: SupportSets) -> tuple[Past, Ints]:
        """The tasks' events, and where their items are."""
        places = self._catalogue.places(sets.examples["item"])
        categories, window = self._categories(places), self._model.window
        return past_of(sets, places, categories, window=window, device=self._catalogue.device), places

    def _asked(self, among: Tensor) -> Ads:
        places = np.array(self._catalogue.ad_places, np.int64)[among.numpy()]
        return Ads(self._tensor(places), self._tensor(self._categories(places)))

    def _population(self, places: Tensor, categories: Tensor) -> Tensor:
        return self._model.population(self._rows_at(places), categories)

    def _rows_at(self, places: Tensor) -> Tensor:
        """The release's rows of items at these places, -1 for none."""
        rows = self._tensor(self._rows_of_places())
        return torch.where(places >= 0, rows[places.clamp(min=0)], -1) if len(rows) else torch.full_like(places, -1)

    def _rows_of_places(self) -> Ints:
        """The release's row of every place; the catalogue may have grown since."""
        newer = self._catalogue.item_ids[len(self._rows) :]
        if newer:
            self._rows = np.append(self._rows, [self._release_rows.get(item, -1) for item in newer])
        return self._rows

    def _categories(self, places: Ints) -> Ints:
        of_place = self._catalogue.categories.of_place
        return np.where(places >= 0, of_place[places], -1) if len(of_place) else np.full(places.shape, -1)

    def _tensor(self, values: Ints) -> Tensor:
        return moved(torch.from_numpy(values), self._catalogue.device)


def _probability(found: Tensor) -> Tensor:
    return found.clamp(_LEAST, 1.0 - _LEAST)
