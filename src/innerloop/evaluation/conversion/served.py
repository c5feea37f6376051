"""The arm `served` of the conversion protocol: purchase given click as adapt publishes it.

The ad model is learned of the events before the cut, as `innerloop train` does it, and stays as it was then: rates of
items, calibration and all. A click is foretold as of the user's newest event before it, which is when the list with its
chance was published; the other arms know of everybody's events, and of the time, up to the click itself.
"""

import numpy as np
import polars as pl
import torch
from torch import Tensor

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.ads.ad_head import Ads
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.click_log import CAPACITY, ConversionLog, Histories
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.ads.served import past_of
from innerloop.learning.ads.teaching import learn_ads
from innerloop.learning.encoder import Encoder
from innerloop.support import EXAMPLE, SupportSets

_TASKS_AT_ONCE = 1024


def served(log: ConversionLog, at: Ints, cut: int, *, window: int, seed: int) -> Floats | None:
    """Probabilities [M] of the clicks `at` [M]; None where the events before `cut` teach no ad model."""
    model, _ = learn_ads(_history(log, cut), _encoder(log), capacity=CAPACITY, seed=seed, window=window)
    if model is None:
        return None
    parts = [_chances(model, log, some) for some in np.array_split(at, len(at) // _TASKS_AT_ONCE + 1)]
    return np.concatenate(parts)


def _history(log: ConversionLog, cut: int) -> pl.DataFrame:
    before = int(np.searchsorted(log.times, cut, "left"))
    names = np.array([*KINDS, "other"])
    return pl.DataFrame(
        {
            "user_id": log.users[:before].astype(str),
            "item_id": log.items[:before].astype(str),
            "event_type": names[log.kinds[:before]],
            "event_time": log.times[:before],
        }
    )


def _encoder(log: ConversionLog) -> Encoder:
    """Of all items: one that nobody had met by the cut has its category's rates, as a new one has in serving."""
    items, categories = int(log.items.max()) + 1, int(log.categories.max(initial=-1)) + 1
    of_item = np.full(items, -1)
    of_item[log.items[::-1]] = log.categories[::-1]  # the first that was told
    names = [str(number) for number in range(items)]
    known = [str(number) for number in range(categories)]
    return Encoder(names, torch.zeros(items, 3), known, torch.zeros(categories, 1), torch.from_numpy(of_item))


def _chances(model: AdModel, log: ConversionLog, at: Ints) -> Floats:
    """As `AdScorer.probabilities`, whose catalogue numbers items as the log does."""
    windows = Histories(log).before(log.users[at], log.times[at])
    oldest_first = windows.mask[:, ::-1]
    places = windows.places[:, ::-1][oldest_first]
    sets = SupportSets(np.append(0, np.cumsum(oldest_first.sum(1))), np.zeros(len(places), EXAMPLE))
    sets.examples["time"], sets.examples["item"] = log.times[places], log.items[places]
    sets.examples["type"] = log.kinds[places] + 1
    past = past_of(sets, log.items[places], log.categories[places], window=model.window)
    asked = Ads(*(torch.from_numpy(of[at]).unsqueeze(1) for of in (log.items, log.categories)))

    def known(items: Tensor, categories: Tensor) -> Tensor:
        return model.population(items.clamp(min=-1), categories)

    now = torch.from_numpy(sets.newest + 1)
    of_past, of_asked = known(past.items, past.categories), known(asked.items, asked.categories)
    assert model.head is not None  # noqa: S101 - `learn_ads` has learned one
    found = model.head.probabilities(past, of_past, asked, of_asked, now, model.rate)
    return np.asarray(found[:, 0].numpy(), np.float64)
