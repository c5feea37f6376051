import numpy as np

from innerloop.learning.ads.attribution import DAY, HOUR, NEVER
from innerloop.learning.ads.served import past_of
from innerloop.support import EXAMPLE, SupportSets

_CLICK, _CART, _PURCHASE = 1, 2, 4


def _sets(*tasks: list[tuple[int, int, int]]) -> SupportSets:
    rows = [(time, at, item, 1.0, kind) for at, task in enumerate(tasks) for time, item, kind in task]
    return SupportSets(np.cumsum([0, *map(len, tasks)]), np.array(rows, EXAMPLE))


def test_a_purchase_relabels_the_clicks_of_its_own_task_and_item_within_the_window() -> None:
    sets = _sets(
        [(0, 7, _CLICK), (HOUR, 8, _CLICK), (2 * HOUR, 7, _PURCHASE)],
        [],
        [(0, 7, _CLICK), (HOUR, 7, _CART)],
        [(0, 7, _CLICK), (DAY + 1, 7, _PURCHASE)],
    )
    items = sets.examples["item"].astype(np.int64)
    past = past_of(sets, items, items % 2)
    assert past.converted_at.tolist() == [
        [2 * HOUR, NEVER, NEVER],
        [NEVER, NEVER, NEVER],
        [NEVER, NEVER, NEVER],
        [NEVER, NEVER, NEVER],
    ]
    assert past.mask.sum(1).tolist() == [3, 0, 2, 2]
    assert past.kinds[0].tolist() == [0, 0, 3]
    assert past.categories[0].tolist() == [1, 0, 1]
    assert past_of(sets, items, items % 2, window=DAY + 1).converted_at[3, 0] == DAY + 1


def test_items_outside_the_catalogue_are_not_taken_for_one_another() -> None:
    sets = _sets([(0, 7, _CLICK), (HOUR, 8, _PURCHASE)])
    past = past_of(sets, np.array([-1, -1]), np.array([-1, -1]))
    assert (past.converted_at == NEVER).all()
    assert past.items[0, 0] != past.items[0, 1]
    assert (past.items < 0).all()


def test_no_tasks_at_all() -> None:
    past = past_of(SupportSets.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    assert past.items.shape == (0, 1)
