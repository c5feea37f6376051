from collections import Counter

from innerloop.evaluation.shop import Shop
from innerloop.worker.demo.names import named


def test_each_item_has_a_name_of_its_own_and_a_category_one_kind_of_thing() -> None:
    catalogue = Shop(1, items=2_000).catalogue()
    items = list(named(catalogue))
    assert [item.item_id for item in items] == catalogue["item_id"].to_list()
    assert len({item.name for item in items}) == len(items)
    kinds = {(item.category, item.name.rpartition(" ")[0]) for item in items}
    assert set(Counter(category for category, _ in kinds).values()) == {1}
    assert set(Counter(kind for _, kind in kinds).values()) == {1}
    assert list(named(Shop(1, items=2_000).catalogue())) == items, "the same whenever they are made up"
    assert [item.price for item in items] == catalogue["price"].to_list()
