"""Which impression a click belongs to, and which of those were bought in the end.

An impression is clicked when the same user clicks the same item after it within a window, `CLICK_WINDOW` unless a
release was learned with another; a click belongs to the
newest impression before it (last touch), so one click answers for one impression however often the item was shown. One
without a click is taken for a negative once the window has passed, and never changes again. It is bought when its click
is followed by a purchase within the attribution window of clicks, which may come much later and then relabels it.
"""

import numpy as np
import torch

from innerloop.learning.ads.attribution import DAY, HOUR, NEVER, Attribution, Bools, Ints, attribute
from innerloop.learning.ads.pairs import KINDS, Past
from innerloop.learning.ads.served import pad
from innerloop.support import SupportSets

CLICK_WINDOW = HOUR
"""Milliseconds; also the wait for a label, so that a label is final when it is first believed."""
_CLICK = 1  # event type code as stored


def attribute_clicks(
    users: Ints, items: Ints, times: Ints, impressions: Bools, clicks: Bools, *, window: int = CLICK_WINDOW
) -> Attribution:
    """When each impression was clicked; all arguments are [N], in any order, times in epoch ms.

    A click at the very time of an impression does not belong to it, so it may belong to the one before; one exactly
    `window` (ms) later does. Impressions of one item at one time share their click.
    """
    clicked = attribute(users, items, times, impressions, clicks, window=window).converted_at
    shown_again = attribute(users, items, times, impressions, impressions, window=NEVER).converted_at
    return Attribution(times, impressions, np.where(clicked <= shown_again, clicked, NEVER))


def attribute_purchases(users: Ints, items: Ints, clicks: Attribution, purchases: Bools, *, window: int = DAY) -> Ints:
    """When each impression of `attribute_clicks` was bought, NEVER where it was not or is none, [N] epoch ms."""
    clicked = clicks.clicks & (clicks.converted_at < NEVER)
    times = np.where(clicked, clicks.converted_at, clicks.times)  # a clicked impression counts from its click
    return attribute(users, items, times, clicked, purchases, window=window).converted_at


def shown_past(  # noqa: PLR0917 - impressions and events, each with where their items are
    shown: SupportSets,
    items: Ints,
    categories: Ints,
    did: SupportSets,
    did_items: Ints,
    device: torch.device | None = None,
    *,
    window: int = CLICK_WINDOW,
) -> Past:
    """The impressions of T tasks, padded, as `pairs.Past` has clicks: kind 0, converted when they were clicked.

    `items` [N] and `did_items` [M] number those of the impressions and of the events alike, -1 where unknown.
    """
    tasks = np.repeat(np.arange(len(shown.sizes)), shown.sizes)
    by = np.repeat(np.arange(len(did.sizes)), did.sizes)
    clicks = (did.examples["type"] == _CLICK) & (did_items >= 0)
    impressions = np.concatenate([items >= 0, np.zeros(len(by), bool)])
    found = attribute_clicks(
        np.concatenate([tasks, by]),
        np.concatenate([items, did_items]),
        np.concatenate([shown.examples["time"], did.examples["time"]]).astype(np.int64),
        impressions,
        np.concatenate([np.zeros(len(tasks), bool), clicks]),
        window=window,
    ).converted_at[: len(tasks)]
    return Past(
        items=pad(shown, np.where(items >= 0, items, -2 - np.arange(len(items))), -1, device),
        categories=pad(shown, categories, -1, device),
        kinds=pad(shown, np.zeros(len(tasks), np.int64), len(KINDS), device),
        times=pad(shown, shown.examples["time"].astype(np.int64), 0, device),
        converted_at=pad(shown, found, NEVER, device),
        mask=pad(shown, np.ones(len(tasks), np.int64), 0, device).bool(),
    )
