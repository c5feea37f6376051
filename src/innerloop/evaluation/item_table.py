"""Reading what a shop says of its items from a file, into the table that training takes (`learning.described`)."""

from collections.abc import Collection
from pathlib import Path

import polars as pl

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import as_text, find_columns, identifiers_of, read_table, refuse_lists

_NAMES = {
    "item_id": ("item_id", "itemid", "product_id", "article_id", "sku"),
    "category": ("category", "category_id", "categoryid", "category_code"),
    "price": ("price",),
    "text": ("text", "name", "title", "description"),
}


def read_items(path: Path | str, met: Collection[str] | None = None) -> pl.DataFrame:
    """Read a .csv, .jsonl / .ndjson or .parquet file: item_id and, where it has them, category, price and text.

    Raises SettingsError when the file is missing or unreadable, says nothing of its items, has lists in a column, or
    has none of the items `met`: then its identifiers are others.
    """
    path = Path(path)
    raw = read_table(path, "items")
    found = find_columns(
        raw, {}, path, names=_NAMES, required=["item_id"], table="the table of items", advice="rename one"
    )
    refuse_lists(raw, found.values(), path)
    if len(found) == 1:
        raise SettingsError(f"{path} says nothing of its items: it needs a column category, price, text or name.")
    identifiers = {name: identifiers_of(raw[found[name]]) for name in ("item_id", "category") if name in found}
    nothing = pl.Series([None] * raw.height)
    table = pl.DataFrame(
        {
            "item_id": identifiers["item_id"],
            "category": identifiers.get("category", nothing).cast(pl.String),
            "price": (raw[found["price"]] if "price" in found else nothing).cast(pl.Float64, strict=False),
            "text": as_text(raw[found["text"]]) if "text" in found else nothing.cast(pl.String),
        }
    )
    table = table.drop_nulls("item_id")
    if met is not None and not any(item in met for item in table["item_id"]):
        example = f"{next(iter(table['item_id']), 'none')} there and {next(iter(met), 'none')} here"
        raise SettingsError(f"{path} describes no item that anybody met ({example}): compare the identifiers.")
    return table
