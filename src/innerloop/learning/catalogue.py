"""The items and ads that can be scored now: the release's, and those that have appeared since."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.heads import RESTORE, Head
from innerloop.learning.ranking import top_k
from innerloop.learning.releases import Release


class Catalogue:
    """Vectors of N items under a release, on one device, and where each item number of the database is among them."""

    def __init__(self, release: Release, device: torch.device) -> None:
        self.release, self.device = release, device
        self.head: Head = RESTORE[release.head.name]({name: t.to(device) for name, t in release.head.state().items()})
        self.item_ids = list(release.item_ids)
        self.vectors: Tensor = release.item_vectors.to(device)  # [N, d]
        self.read_up_to = 0
        """The items of the database have been read up to this number; some above it may be known too."""
        self._places = {item: place for place, item in enumerate(self.item_ids)}
        self._place_of = np.full(1024, -1, np.int64)  # by item number
        self.ad_ids: list[str] = []
        self._ad_places: list[int] = []

    def __len__(self) -> int:
        return len(self.item_ids)

    def add(self, items: Sequence[tuple[int, str]]) -> None:
        """Learn of items (number, identifier) of the database; one that the release lacks gets its fallback vector."""
        new = [item for _, item in items if item not in self._places]
        if new:
            for place, item in enumerate(new, len(self.item_ids)):
                self._places[item] = place
            self.item_ids += new
            self.vectors = torch.cat([self.vectors, self.release.vectors_for(new).to(self.device)])
        for number, item in items:
            if number >= len(self._place_of):
                self._place_of = np.concatenate([self._place_of, np.full(max(number, len(self._place_of)), -1)])
            self._place_of[number] = self._places[item]

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
    def ad_vectors(self) -> Tensor:
        return self.vectors[self._ad_places]  # [A, d]


def unadapted_list(release: Release, top: int) -> list[str]:
    """What everybody would be shown without adaptation: the items that the prior likes best."""
    with torch.inference_mode():
        best, _ = top_k(release.head.prior.unsqueeze(0), release.item_vectors, top)
    return [release.item_ids[place] for place in best[0].tolist()]
