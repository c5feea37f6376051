"""What an item that nobody has met is known by: how well users' sets find those they came to like.

    python tests/benchmarks/unseen_items.py --events FILE --items FILE

A fifth of the items is held out: their events are taken from the history that a release is learned of. Each user's
newest examples then rank the items held out by the head alone, and those that the user did meet are to be found.
Three releases: items have nothing but their identifier, the category, or all that the second file says of them.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from innerloop.config import LearningSettings, SupportSettings
from innerloop.evaluation.event_table import read_actions
from innerloop.evaluation.item_table import read_items
from innerloop.learning.episodes import log_of
from innerloop.learning.releases import Release
from innerloop.learning.training import hit_rate, train

_HELD_OUT = 0.2
_AT_ONCE = 4_096


def _release(history: pl.DataFrame, items: pl.DataFrame | None) -> Release:
    support = SupportSettings()
    settings = LearningSettings(sequence="off")
    return train(history, settings=settings, weights=support.weights, capacity=support.capacity, version=1, items=items)


def _ranks(
    release: Release, history: pl.DataFrame, asked: pl.DataFrame, held: list[str], names: list[str | None]
) -> torch.Tensor:
    """The rank [Q] of each asked item among those held out, by its user's newest examples; 0 is best."""
    support = SupportSettings()
    users = history["user_id"].unique().sort()
    # One more event for each user: what is known just before it is all there is.
    ends = pl.DataFrame({"user_id": users, "item_id": release.item_ids[0], "event_type": "click"}).with_columns(
        event_time=pl.lit(history["event_time"].max()) + 1
    )
    log = log_of(pl.concat([history.select(ends.columns), ends]), support.weights, release.item_ids)
    last = torch.cat([log.first[1:] != log.first[:-1], torch.tensor([True])]).nonzero().squeeze(1)
    vectors = release.vectors_for(held, names)
    scores = torch.cat(
        [
            release.head.score(release.head.adapt(log.support(some, release.item_vectors, support.capacity)), vectors)
            for some in torch.split(last, _AT_ONCE)
        ]
    )
    user = torch.from_numpy(users.search_sorted(asked["user_id"]).to_numpy().astype(np.int64))
    item = torch.from_numpy(pl.Series(held).search_sorted(asked["item_id"]).to_numpy().astype(np.int64))
    found = []
    for mine, wanted in zip(torch.split(user, _AT_ONCE), torch.split(item, _AT_ONCE), strict=True):
        row = scores[mine]
        own = row.gather(1, wanted.unsqueeze(1))
        found.append((row > own).sum(1) + ((row == own).sum(1) - 1) // 2)
    return torch.cat(found)


def main() -> None:
    """Print a row for each of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    items = read_items(options.items)
    events = read_actions(options.events)
    events = events.select(name for name in events.columns if name != "category")
    met = events["item_id"].unique().sort()
    held = met.sample(fraction=_HELD_OUT, seed=options.seed).sort().to_list()
    of_held = pl.col("item_id").is_in(held)
    history = events.filter(~of_held)
    asked = events.filter(of_held & pl.col("user_id").is_in(history["user_id"].unique().to_list()))
    with_category = history.join(
        items.select("item_id", "category").unique("item_id", keep="last"), on="item_id", how="left"
    )
    with_category = with_category.sort("event_time", maintain_order=True)
    of_item = dict(items.select("item_id", "category").iter_rows())
    categories: list[str | None] = [of_item.get(item) for item in held]
    none: list[str | None] = [None] * len(held)
    table = Table("known by", "HR@20", "HR@50", "mean rank", title=f"{len(asked)} events of {len(held)} items held out")
    for name, past, described, names in (
        ("identifier", history, None, none),
        ("category", with_category, None, categories),
        ("all that is said", with_category, items, categories),
    ):
        ranks = _ranks(_release(past, described), past, asked, held, names)
        mean = float(ranks.double().mean()) / len(held)
        table.add_row(name, f"{hit_rate(ranks, 20):.4f}", f"{hit_rate(ranks, 50):.4f}", f"{mean:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
