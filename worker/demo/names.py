"""What the synthetic shop calls its items: made up, but always the same, and each kind of thing one category."""

from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
import polars as pl

from innerloop.config import Settings
from innerloop.shop_items import Item
from innerloop.streams.publisher import Publisher

_THINGS = (
    *("Trail running shoe", "Rain jacket", "Wool sweater", "Linen shirt", "Denim jeans", "Leather belt"),
    *("Hiking backpack", "Travel suitcase", "Canvas tote", "Sunglasses", "Wrist watch", "Silver ring"),
    *("Coffee grinder", "Espresso cup", "Cast iron pan", "Chef's knife", "Cutting board", "Water bottle"),
    *("Desk lamp", "Office chair", "Bookshelf", "Floor rug", "Bed linen", "Bath towel"),
    *("Wireless headphones", "Bluetooth speaker", "Phone case", "Laptop stand", "Mechanical keyboard", "Webcam"),
    *("Yoga mat", "Dumbbell", "Bicycle helmet", "Camping tent", "Sleeping bag", "Garden hose"),
    *("Flower pot", "Board game", "Wooden puzzle", "Face cream"),
)
_SECONDS = 30.0


def named(catalogue: pl.DataFrame) -> Iterator[Item]:
    """The items of a catalogue with `item_id`, `category` and `price`, numbered within their category."""
    categories = sorted(catalogue["category"].unique().to_list())
    things = {category: _THINGS[place % len(_THINGS)] for place, category in enumerate(categories)}
    numbers: Counter[str] = Counter()
    for item, category, price in catalogue.select("item_id", "category", "price").iter_rows():
        numbers[things[category]] += 1
        yield Item(item, f"{things[category]} {numbers[things[category]]}", category, price)


def publish_items(settings: Settings, items: Iterable[Item]) -> None:
    """Write them to their topic, as a shop would. Raises RetryError when the broker does not take them."""
    publisher = Publisher(settings.kafka)
    for item in items:
        publisher.send(settings.topics.items, item.item_id, msgspec.json.encode(item))
    publisher.flush(_SECONDS)
