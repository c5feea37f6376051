"""What shops estimate conversion by today: rates, counts, and a hashed online logistic regression."""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.ads.attribution import HOUR, NEVER, counted_before
from innerloop.learning.ads.click_log import ConversionLog, known_counts, overall_rate, pair_numbers
from innerloop.learning.ads.logistic import fit_shared
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.ads.rates import ContentPrior, shrunk

_HASHES = 1 << 16
_STEP = 0.1
_USER_STRENGTH, _ITEM_STRENGTH = 5.0, 20.0
_CLIP = 5.0


def item_rate(log: ConversionLog, at: Ints, prior: ContentPrior) -> Floats:
    """The item's own rate, shrunk to everybody's, [M]."""
    known = known_counts(log, log.items, at)
    return shrunk(known.successes, known.trials, overall_rate(log, at), prior.item_strength)


def category_rate(log: ConversionLog, at: Ints, prior: ContentPrior) -> Floats:
    """The rate of the item's category, shrunk to everybody's, [M]; everybody's where it has none."""
    known = known_counts(log, log.categories, at)
    overall = overall_rate(log, at)
    found = shrunk(known.successes, known.trials, overall, prior.category_strength)
    return np.where(log.categories[at] >= 0, found, overall)


def counts(log: ConversionLog, at: Ints) -> Floats:
    """Log counts and smoothed log rates of user, item, category and user with category, before each moment, [M, 20].

    Counts of each kind of event: of the user with the item, of the user in the category, of the user.
    """
    rate = overall_rate(log, at)
    pair = pair_numbers(log.users, log.categories)
    columns = []
    strengths = [
        (log.users, _USER_STRENGTH),
        (log.items, _ITEM_STRENGTH),
        (log.categories, _ITEM_STRENGTH),
        (pair, _USER_STRENGTH),
    ]
    for keys, strength in strengths:
        known = known_counts(log, keys, at)
        columns += [np.log(shrunk(known.successes, known.trials, rate, strength) / rate), np.log1p(known.trials)]
    for keys in (pair_numbers(log.users, log.items), pair, log.users):
        for kind in range(len(KINDS)):
            some = np.flatnonzero(log.kinds == kind)
            columns.append(np.log1p(counted_before(keys[some], log.times[some], keys[at], log.times[at])))
    return np.stack(columns, 1)


def fit_and_predict(train: Floats, labels: Floats, asked: Floats) -> Floats:
    """Probabilities [M] by logistic regression from `train` [N, F] with `labels` [N], one learned ridge penalty."""
    centre, scale = train.mean(0), np.where(train.std(0) > 0, train.std(0), np.inf)

    def design(columns: Floats) -> torch.Tensor:
        standard = np.clip((columns - centre) / scale, -_CLIP, _CLIP)
        return torch.from_numpy(np.concatenate([np.ones((len(columns), 1)), standard], 1))

    groups = torch.ones(1 + train.shape[1], dtype=torch.int64)
    groups[0] = 0
    weights = fit_shared(design(train), torch.from_numpy(labels), groups).mean
    return np.asarray(torch.sigmoid(design(asked) @ weights).numpy(), np.float64)


@dataclass
class _Hashed:
    """Logistic regression with AdaGrad (Duchi et al. 2011) over hashed indicators (Weinberger et al. 2009)."""

    weights: Floats
    squares: Floats

    def predict(self, places: Ints) -> float:
        return float(1.0 / (1.0 + np.exp(-np.clip(self.weights[places].sum(), -30, 30))))

    def learn(self, places: Ints, label: float) -> None:
        gradient = self.predict(places) - label
        self.squares[places] += gradient**2
        self.weights[places] -= _STEP * gradient / np.sqrt(self.squares[places])


def online_logistic(log: ConversionLog, at: Ints) -> Floats:
    """Predictions [M] of every click `at`, learned from each click once its label is known, late conversions again."""
    model = _Hashed(np.zeros(_HASHES), np.full(_HASHES, 1e-2))
    places = {int(n): _indicators(log, int(n)) for n in log.clicks}
    model.weights[places[int(log.clicks[0])][0]] = -3.0  # the intercept: conversions are rare
    known = log.attribution.known_at()
    waiting: list[tuple[int, int]] = [(int(known[n]), int(n)) for n in log.clicks]
    waiting += [(int(log.attribution.converted_at[n]), int(n)) for n in log.clicks if _late(log, int(n))]
    heapq.heapify(waiting)
    asked, found = set(at.tolist()), {}
    for n in log.clicks.tolist():
        now = int(log.times[n])
        while waiting and waiting[0][0] < now:
            when, m = heapq.heappop(waiting)
            model.learn(places[m], float(log.attribution.converted_at[m] <= when))
        if n in asked:
            found[n] = model.predict(places[n])
    return np.array([found[n] for n in at.tolist()])


def _late(log: ConversionLog, n: int) -> bool:
    converted = int(log.attribution.converted_at[n])
    return converted < NEVER and converted > int(log.times[n]) + HOUR


def _indicators(log: ConversionLog, n: int) -> Ints:
    user, item, category = log.users[n], log.items[n], log.categories[n]
    hour = log.times[n] // HOUR % 24
    names = ["1", f"u{user}", f"i{item}", f"c{category}", f"h{hour}", f"u{user}c{category}"]
    return np.array([0, *(1 + xxhash.xxh64_intdigest(name.encode()) % (_HASHES - 1) for name in names[1:])], np.int64)
