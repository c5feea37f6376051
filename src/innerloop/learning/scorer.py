"""From support sets to lists, under one release: adapt, find candidates, rank them. Service and judges both use this.

With a ranker in the release: the head adapts to each task's examples and likes some items; together with the task's own
items and what everybody does just now they are the candidates, and the ranker says how likely each is the next. Without
one a list is what the adapted head likes best.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.ad_scorer import MOST as MOST_ADS
from innerloop.learning.ad_scorer import AdLists, AdScorer
from innerloop.learning.candidates import FEATURES, LIKED, PLAIN, Candidates, Pool, Recent, first_of, gather
from innerloop.learning.catalogue import Catalogue
from innerloop.learning.devices import moved, one_thread
from innerloop.learning.foreseer import Foreseer
from innerloop.learning.heads import Head, Support
from innerloop.learning.item_index import ItemSearch
from innerloop.learning.ranker import Ranker
from innerloop.learning.ranking import best_by, scores_of
from innerloop.learning.releases import Release
from innerloop.metrics import STEP_SECONDS
from innerloop.scores import AdsKind
from innerloop.support import SupportSets, ranges
from innerloop.trends import Activity, Trends

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
_RANKED_AT_ONCE = {"cpu": 8_192, "cuda": 1 << 20}  # on a CPU what lies between the layers stays in the cache
_PLACE_BITS = 32  # more than any catalogue's places need
_HEAD, _LIFT = FEATURES.index("head"), FEATURES.index("head_lift")


@dataclass(frozen=True)
class Lists:
    """Best places [T, k] of T tasks, best first, and their scores; -1 and -inf where there are fewer than k."""

    places: Ints
    scores: Floats


class Scorer:
    """A release on a device, the items there are, and what everybody does just now.

    With more than `index_above` items the ones that the head likes best are found by an index; None: always exactly.
    """

    def __init__(self, release: Release, device: torch.device, *, index_above: int | None = None) -> None:
        self.catalogue = Catalogue(release, device)
        self.trends = Trends()
        self._index_above = index_above
        self._search = ItemSearch(index_above)
        self._ads = self._ad_scorer()
        self._ranker = self._new_ranker()
        self._foreseer = self._new_foreseer()

    def use(self, release: Release) -> None:
        """Score by another release from now on; items keep their places, and the trends go on.

        All vectors are others now: the search is exact until they are indexed.
        """
        self.catalogue = Catalogue(release, self.catalogue.device, self.catalogue)
        self._search.close()
        self._search = ItemSearch(self._index_above)
        self._ads = self._ad_scorer()
        self._ranker = self._new_ranker()
        if self._foreseer is not None:
            self._foreseer.close()
        self._foreseer = self._new_foreseer()

    @property
    def method(self) -> str:
        """What made the lists: the head's name, and that a ranker had the last word."""
        name = self.catalogue.head.name + ("" if self._foreseer is None else "+sequence")
        return name if self.catalogue.release.ranker is None else f"{name}+ranker"

    @property
    def ads_kind(self) -> AdsKind:
        """What ads are scored by: the chance of click and purchase, of one of the two, or a ranking alone."""
        return "ranking" if self._ads is None else self._ads.kind

    @property
    def ads_by_click(self) -> bool:
        """Whether `ad_lists` looks at what was shown."""
        return self._ads is not None and self._ads.by_click

    def observe(self, activity: Activity) -> None:
        """Take in what everybody did; items by their numbers, all of which `catalogue.add` has seen."""
        known = activity.copy()
        known["item"] = self.catalogue.places(activity["item"])
        previous = activity["previous"]
        known["previous"] = np.where(previous >= 0, self.catalogue.places(np.maximum(previous, 0)), -1)
        self.trends.observe(known[known["item"] >= 0])

    def parameters(self, sets: SupportSets) -> Tensor:
        """The adapted head of each task, [T, d]."""
        return self.catalogue.head.adapt(padded(sets, self.catalogue))

    def lists(self, sets: SupportSets, k: int, *, seen: SupportSets | None = None) -> Lists:
        """The k best items of each task, without those of its set in `seen`."""
        if not len(sets.sizes):  # as adapt asks when a batch's users were all erased: no model has to expect that
            return Lists(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        with torch.inference_mode():
            with STEP_SECONDS.labels("solve").time(), one_thread():
                parameters = self.parameters(sets)
            left_out = None if seen is None else self.recent(seen).places
            if self._ranker is None:
                excluded = None if left_out is None else moved(torch.from_numpy(left_out), parameters.device)
                with STEP_SECONDS.labels("score").time():
                    return self._liked(parameters, k, excluded)
            # As many as are asked for must be left when those that were seen are out.
            found = self.candidates(sets, parameters, k + (np.zeros_like(sets.sizes) if seen is None else seen.sizes))
            with STEP_SECONDS.labels("rank").time(), one_thread():
                return self._ranked(found, k, left_out)

    def lists_by(self, head: Head, sets: SupportSets, k: int) -> Lists:
        """The k best items of each task by another head alone."""
        with torch.inference_mode():
            parameters = head.adapt(padded(sets, self.catalogue))
            return _lists(*best_by(head, parameters, self.catalogue.vectors, k))

    def ads(self, sets: SupportSets, k: int) -> tuple[Ints, Floats]:
        """The numbers and scores of `ad_lists` for tasks that were shown nothing."""
        found = self.ad_lists(sets, k)
        return found.numbers, found.scores

    def ad_lists(self, sets: SupportSets, k: int, shown: SupportSets | None = None) -> AdLists:
        """The k best active ads of each task, by their number in `catalogue.ad_ids`, and their scores.

        With an ad model in the release the scores are probabilities, else they only rank: see `ads_kind`. `shown` are
        the same tasks' impressions: see `ads_by_click`.
        """
        with torch.inference_mode():
            if self._ads is not None:
                with STEP_SECONDS.labels("ads").time():
                    among = self._ads_liked(sets)
                    with one_thread():
                        return self._ads.best(sets, shown, k, among)
            if not self.catalogue.ad_ids:
                return AdLists(np.empty((len(sets.sizes), 0), np.int64), np.empty((len(sets.sizes), 0), np.float32))
            best, scores = best_by(self.catalogue.head, self.parameters(sets), self.catalogue.ad_vectors, k)
        return AdLists(best.cpu().numpy(), scores.float().cpu().numpy())

    def _ad_scorer(self) -> AdScorer | None:
        model = self.catalogue.release.ads
        return None if model is None else AdScorer(model, self.catalogue)

    def _ads_liked(self, sets: SupportSets) -> Tensor | None:
        """The active ads that the adapted heads like best, [T, m] by number; None when there are few ads."""
        if len(self.catalogue.ad_ids) <= MOST_ADS:
            return None
        return best_by(self.catalogue.head, self.parameters(sets), self.catalogue.ad_vectors, MOST_ADS)[0].cpu()

    def recent(self, sets: SupportSets) -> Recent:
        return Recent.of(sets, self.catalogue.places(sets.examples["item"]))

    def candidates(self, sets: SupportSets, parameters: Tensor, least: Ints | None = None) -> Candidates:
        """Candidates of each task with all their features, given the adapted heads [T, d].

        At least `least` [T] of each, if the catalogue has as many.
        """
        wanted = np.full(len(sets.sizes), LIKED) if least is None else np.maximum(least, LIKED)
        catalogue = self.catalogue
        recent = self.recent(sets)
        now = np.where(sets.sizes > 0, sets.newest, self.trends.newest)
        foreseen, liked = None, np.empty((len(sets.sizes), 0), np.int64)
        if self._foreseer is None or catalogue.release.ranker is None:
            # One search of the catalogue is enough to serve: the sequence model's finds more. Lessons see both.
            with STEP_SECONDS.labels("score").time():
                liked = first_of(self._liked(parameters, int(wanted.max(initial=0))).places, wanted)
        if self._foreseer is not None:
            with STEP_SECONDS.labels("sequence").time():
                foreseen = self._foreseer.foresee(recent, wanted)
        pool = Pool(self.trends, catalogue.categories, self.trends.popularity.most)
        extra = None if foreseen is None else foreseen.liked
        with STEP_SECONDS.labels("candidates").time():
            found = gather(recent, now, pool, liked, len(catalogue), foreseen=extra)
            places = moved(torch.from_numpy(found.places), catalogue.device)
            rows = moved(torch.from_numpy(found.rows()), catalogue.device)
            scores, prior = _scores(catalogue.head, parameters, rows, catalogue.vectors, places)
            found.features[:, _HEAD] = scores.cpu().numpy()
            found.features[:, _LIFT] = (scores - prior).cpu().numpy()
        if self._foreseer is not None and foreseen is not None:
            with STEP_SECONDS.labels("sequence").time():
                self._foreseer.describe(foreseen, found)
        return found

    def _new_ranker(self) -> Ranker | None:
        ranker = self.catalogue.release.ranker
        return None if ranker is None else ranker.on(self.catalogue.device)

    def _new_foreseer(self) -> Foreseer | None:
        release = self.catalogue.release
        has_any = release.ranker is None or len(release.ranker.mean) > PLAIN
        return None if release.sequence is None or not has_any else Foreseer(self.catalogue, self._index_above)

    def _liked(self, parameters: Tensor, k: int, excluded: Tensor | None = None) -> Lists:
        """What the adapted heads like best."""
        head, vectors = self.catalogue.head, self.catalogue.vectors
        return _lists(*self._search.best(head, parameters, vectors, k, excluded))

    def _ranked(self, found: Candidates, k: int, seen: Ints | None) -> Lists:
        device, rows = self.catalogue.device, found.rows()
        scores = self._ranked_by(found)
        where = moved(torch.from_numpy(rows), device), moved(torch.from_numpy(found.columns()), device)
        shape = len(found.sizes), max(k, int(found.sizes.max(initial=0)))
        table = torch.full(shape, -torch.inf, device=device)
        table[where] = scores
        table = table.log_softmax(1).exp()
        at = torch.full(shape, -1, device=device)
        at[where] = moved(torch.from_numpy(found.places), device)
        if seen is not None:
            table[_contained(at, moved(torch.from_numpy(seen), device))] = -torch.inf
        table[at < 0] = -torch.inf
        best, columns = table.topk(k)
        return _lists(at.gather(1, columns), best)

    def _ranked_by(self, found: Candidates) -> Tensor:
        """What the ranker says of each candidate, [M]."""
        assert self._ranker is not None  # noqa: S101 - asked by `lists`
        parts = torch.split(torch.from_numpy(found.features), _RANKED_AT_ONCE[self.catalogue.device.type])
        return torch.cat([self._ranker(moved(part, self.catalogue.device)) for part in parts])


def _lists(places: Tensor, scores: Tensor) -> Lists:
    places = torch.where(scores > -torch.inf, places, -1)
    return Lists(places.cpu().numpy(), scores.float().cpu().numpy())


def _scores(head: Head, parameters: Tensor, rows: Tensor, vectors: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [M] of what is at `places` [M] of vectors [N, d], by the parameters [T, P] of `rows` and the prior."""
    if head.linear:
        return scores_of(parameters, rows, vectors, places, head.prior)
    vectors = vectors[places]
    sizes = torch.bincount(rows, minlength=len(parameters)).tolist()
    with one_thread():
        prior = head.score(head.prior.unsqueeze(0), vectors).squeeze(0)
        tasks = zip(parameters, torch.split(vectors, sizes), strict=True)
        scores = [head.score(own.unsqueeze(0), theirs.unsqueeze(0)).squeeze(0) for own, theirs in tasks]
    return torch.cat(scores), prior


def _contained(places: Tensor, seen: Tensor) -> Tensor:
    """Which of places [T, C] are among the same task's seen [T, S]; -1 is padding."""
    task = torch.arange(len(places), device=places.device).unsqueeze(1) << _PLACE_BITS
    return (places >= 0) & torch.isin(task + places, torch.where(seen >= 0, task + seen, -1))


def padded(sets: SupportSets, catalogue: Catalogue) -> Support:
    """The sets as a head wants them: what the catalogue lacks, or weighs nothing, is masked as padding is."""
    sizes = sets.sizes
    width = max(1, int(sizes.max(initial=0)))
    at = ranges(np.arange(len(sizes)) * width, sizes)
    shape = (len(sizes), width)
    places, weights, ages = np.full(shape, -1), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    places.reshape(-1)[at] = catalogue.places(sets.examples["item"])
    weights.reshape(-1)[at] = sets.examples["weight"]
    # Age counts from the newest event that says something, not from now: the same set gives the same scores any time.
    ages.reshape(-1)[at] = (np.repeat(_newest_that_counts(sets), sizes) - sets.examples["time"]) / 1000.0
    where = moved(torch.from_numpy(places), catalogue.device)
    mask = (where >= 0) & moved(torch.from_numpy(weights > 0), catalogue.device)  # as `episodes.log_of` leaves them out
    return Support(
        features=catalogue.vectors[where.clamp(min=0)],
        labels=mask.to(torch.float32),
        weights=moved(torch.from_numpy(weights), catalogue.device) * mask,
        ages=moved(torch.from_numpy(ages), catalogue.device),
        mask=mask,
    )


def _newest_that_counts(sets: SupportSets) -> Ints:
    """The time of each task's newest example [T] whose weight is above 0."""
    says = sets.examples["weight"] > 0
    if says.all():
        return sets.newest
    newest = np.zeros(len(sets.sizes), np.int64)
    np.maximum.at(newest, np.repeat(np.arange(len(newest)), sets.sizes)[says], sets.examples["time"][says])
    return newest
