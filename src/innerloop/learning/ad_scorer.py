"""From support sets to lists of ads by the chance that a click is followed by a purchase.

Everything is told as of the task's newest event, labels of clicks included: a purchase relabels the clicks before it
whenever it came, and the same state gives the same probabilities.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.ads.ad_head import Ads
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.served import past_of
from innerloop.learning.catalogue import Catalogue
from innerloop.support import SupportSets, gather

Ints = NDArray[np.int64]
MOST = 128
"""Ads of one task whose chances are computed: of more, those that the ranking head likes best."""
_TASKS_AT_ONCE = 256
_PAIRS_AT_ONCE = 2_000_000  # of an example and an ad: some 100 MB
_LEAST = 1e-6  # as many digits as are published: a probability is never 0 or 1


class AdScorer:
    """An ad model over a catalogue of the same release."""

    def __init__(self, model: AdModel, catalogue: Catalogue) -> None:
        self._model, self._catalogue = model.to(catalogue.device), catalogue
        self._release_rows = {item: row for row, item in enumerate(catalogue.release.item_ids)}
        self._rows: Ints = np.empty(0, np.int64)  # by place in the catalogue, -1 for an item the release lacks

    def best(self, sets: SupportSets, k: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest active ads of each task [T, k] by number, and the chances that their clicks convert.

        All active ads are asked about, or `among` [T, m] by number.
        """
        if among is None:
            among = torch.arange(len(self._catalogue.ad_ids)).expand(len(sets.sizes), -1)
        ads, width = among.shape[1], max(1, int(sets.sizes.max(initial=0)))
        chunk = max(1, min(_TASKS_AT_ONCE, _PAIRS_AT_ONCE // (width * max(ads, width))))
        numbers = torch.empty(len(among), min(k, ads), dtype=torch.int64)
        chances = torch.empty(len(among), min(k, ads))
        order = np.argsort(sets.sizes, kind="stable")  # sets of one size together: there is little to pad
        for first in range(0, len(among) if ads else 0, chunk):
            tasks = order[first : first + chunk]
            some = torch.from_numpy(tasks)
            values, places = self.probabilities(gather(sets, tasks), among[some]).cpu().topk(min(k, ads))
            numbers[some], chances[some] = among[some].gather(1, places), values.float()
        return numbers, chances

    def probabilities(self, sets: SupportSets, among: Tensor) -> Tensor:
        """Purchase given click of the ads `among` [T, A], by number, by each task, [T, A] float64 in (0, 1)."""
        catalogue = self._catalogue
        places = catalogue.places(sets.examples["item"])
        past = past_of(sets, places, self._categories(places), device=catalogue.device)
        shown = np.array(catalogue.ad_places, np.int64)[among.numpy()]
        ads = Ads(self._tensor(shown), self._tensor(self._categories(shown)))
        now = self._tensor(sets.newest + 1)  # not the clock's: the same set gives the same at any time
        found = self._model.head.probabilities(
            past,
            self._population(past.items, past.categories),
            ads,
            self._population(ads.items, ads.categories),
            now,
            self._model.rate,
        )
        return found.clamp(_LEAST, 1.0 - _LEAST)

    def _population(self, places: Tensor, categories: Tensor) -> Tensor:
        rows = self._tensor(self._rows_of_places())
        if not len(rows):
            return self._model.population(torch.full_like(places, -1), categories)
        return self._model.population(torch.where(places >= 0, rows[places.clamp(min=0)], -1), categories)

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
        return torch.from_numpy(values).to(self._catalogue.device)
