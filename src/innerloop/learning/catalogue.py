"""The items and ads that can be scored now: the release's, and those that have appeared since."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.candidates import Categories
from innerloop.learning.heads import RESTORE, Head
from innerloop.learning.ranking import best_by
from innerloop.learning.releases import Release


class _Table:
    """Rows that others are put behind, with room for as many again: items come one by one."""

    def __init__(self, empty: Tensor) -> None:
        self._buffer, self._count = empty, 0

    @property
    def rows(self) -> Tensor:
        return self._buffer[: self._count]

    def extend(self, rows: Tensor) -> None:
        before, self._count = self._count, self._count + len(rows)
        if self._count > len(self._buffer):
            room = rows.new_empty(2 * self._count - before, rows.shape[1])
            self._buffer = torch.cat([self._buffer[:before], room])
        self._buffer[before : self._count] = rows


class Catalogue:
    """Vectors of N items under a release, on one device, and where each item number of the database is among them.

    What the catalogue `before` knew of the database is known here too, and its items stay at their places: what is
    counted by place outlives a release.
    """

    def __init__(self, release: Release, device: torch.device, before: Self | None = None) -> None:
        self.release, self.device = release, device
        self.head: Head = RESTORE[release.head.name]({name: t.to(device) for name, t in release.head.state().items()})
        self.item_ids: list[str] = []
        self._table = _Table(release.item_vectors[:0].to(device))
        self.sequence = None if release.sequence is None else release.sequence.on(device)
        self._sequence_table = None if self.sequence is None else _Table(self.sequence.vectors[:0].to(device))
        self._places: dict[str, int] = {}
        self._category_numbers = {name: number for number, name in enumerate(release.encoder.categories)}
        self._categories = Categories(np.empty(0, np.int64))
        self.read_up_to = 0
        """The items of the database have been read up to this number; some above it may be known too."""
        self._place_of = np.full(1024, -1, np.int64)  # by item number
        self.ad_ids: list[str] = []
        self._ad_places: list[int] = []
        if before is not None:
            learned = dict(zip(release.item_ids, release.encoder.item_category_names(), strict=True))
            self._append([(item, learned.get(item, of)) for item, of in before.named()])
            self.read_up_to, self._place_of = before.read_up_to, before._place_of.copy()  # noqa: SLF001 - of its kind
            self.ad_ids, self._ad_places = before.ad_ids, before._ad_places  # noqa: SLF001
        self._append(list(zip(release.item_ids, release.encoder.item_category_names(), strict=True)))

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def vectors(self) -> Tensor:
        return self._table.rows  # [N, d]

    @property
    def sequence_vectors(self) -> Tensor:
        """The vectors [N, e] of the sequence model, in a release that has one."""
        assert self._sequence_table is not None  # noqa: S101 - asked for by who saw `sequence`
        return self._sequence_table.rows

    def places_of_release(self) -> NDArray[np.int64]:
        """Where the release's own items are, [M]."""
        return np.array([self._places[item] for item in self.release.item_ids], np.int64)

    @property
    def categories(self) -> Categories:
        return self._categories

    def named(self) -> list[tuple[str, str | None]]:
        """Every item with its category, in order of place."""
        names = [None, *self._category_numbers]
        return [(item, names[c + 1]) for item, c in zip(self.item_ids, self._categories.of_place.tolist(), strict=True)]

    def add(self, items: Sequence[tuple[int, str, str | None]]) -> None:
        """Learn of items (number, identifier, category) of the database; a new one gets its fallback vector."""
        self._append([(item, category) for _, item, category in items])
        for number, item, _ in items:
            if number >= len(self._place_of):
                self._place_of = np.concatenate([self._place_of, np.full(max(number, len(self._place_of)), -1)])
            self._place_of[number] = self._places[item]

    def _append(self, items: Sequence[tuple[str, str | None]]) -> None:
        new = {item: category for item, category in reversed(items) if item not in self._places}
        if not new:
            return
        names = list(reversed(new))
        categories = [new[name] for name in names]
        self._places.update({item: place for place, item in enumerate(names, len(self.item_ids))})
        self.item_ids += names
        self._table.extend(self.release.vectors_for(names, categories).to(self.device))
        if self._sequence_table is not None:
            self._sequence_table.extend(self.release.sequence_vectors_for(names, categories).to(self.device))
        numbers = self._category_numbers
        of_new = [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in categories]
        self._categories = Categories(np.concatenate([self._categories.of_place, np.array(of_new, np.int64)]))

    def places(self, numbers: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where items are in `vectors`, -1 for a number that `add` has not seen."""
        known = numbers < len(self._place_of)
        return np.where(known, self._place_of[np.where(known, numbers, 0)], -1)

    def set_ads(self, ads: Sequence[tuple[str, int]]) -> None:
        """Replace the active ads (ad identifier, item number)."""
        places = self.places(np.array([number for _, number in ads], np.int64)).tolist()
        known = [(ad, place) for (ad, _), place in zip(ads, places, strict=True) if place >= 0]
        self.ad_ids = [ad for ad, _ in known]
        self._ad_places = [place for _, place in known]

    @property
    def ad_items(self) -> list[str]:
        """The item that each active ad is for."""
        return [self.item_ids[place] for place in self._ad_places]

    @property
    def ad_places(self) -> list[int]:
        """Where that item is in `vectors`."""
        return self._ad_places

    @property
    def ad_vectors(self) -> Tensor:
        return self.vectors[self._ad_places]  # [A, d]


def unadapted_list(release: Release, top: int) -> list[str]:
    """What everybody would be shown without adaptation: the items that the prior likes best."""
    with torch.inference_mode():
        best, _ = best_by(release.head, release.head.prior.unsqueeze(0), release.item_vectors, top)
    return [release.item_ids[place] for place in best[0].tolist()]
