"""The arms of the conversion protocol that are the service itself: purchase given click as adapt publishes it.

The ad model is learned of the events so far, as `innerloop train` does it every night, and stays as it was then: rates
of items, calibration and all. A click is foretold as of the user's newest event before it, which is when the list with
its chance was published; the arm `live` knows of everybody's events, and of the time, up to the click itself.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from torch import Tensor

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.learning.ads.ad_head import Ads
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.ads.attribution import DAY
from innerloop.learning.ads.click_log import CAPACITY, ConversionLog, Histories, Windows
from innerloop.learning.ads.pairs import KINDS
from innerloop.learning.ads.served import past_of
from innerloop.learning.ads.teaching import learn_ads
from innerloop.learning.encoder import Encoder
from innerloop.support import EXAMPLE, SupportSets

_TASKS_AT_ONCE = 1024


def served(
    log: ConversionLog, at: Ints, asked: Mapping[str, tuple[Ints, Ints]], cut: int, *, window: int, seed: int
) -> dict[str, Floats]:
    """Probabilities [M] of the clicks `at` [M], none of which is before `cut` (epoch ms), by arm.

    `asked` names for each arm whose events are looked at, and before which time, [M] each. No arm where the events
    before the cut teach no ad model; where later ones don't, the model of the day before stays.
    """
    histories, encoder, model = Histories(log), _encoder(log), None
    found = {arm: np.empty(len(at)) for arm in asked}
    day = (log.times[at] - cut) // DAY
    for number in np.unique(day).tolist():
        history = _history(log, cut + number * DAY)
        model = learn_ads(history, encoder, capacity=CAPACITY, seed=seed, window=window)[0] or model
        if model is None:
            return {}
        rows = np.flatnonzero(day == number)
        for some in np.array_split(rows, len(rows) // _TASKS_AT_ONCE + 1):
            for arm, (users, times) in asked.items():
                found[arm][some] = _chances(model, log, at[some], histories.before(users[some], times[some]))
    return found


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


def _chances(model: AdModel, log: ConversionLog, at: Ints, windows: Windows) -> Floats:
    """As `AdScorer.probabilities`, whose catalogue numbers items as the log does, to users with these events."""
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
