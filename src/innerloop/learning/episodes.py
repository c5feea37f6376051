"""Past events as tasks: for any event, the support set that its task had just before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from innerloop.learning.heads import Episodes, Support

_UNKNOWN_KIND = 1.0


@dataclass(frozen=True)
class Log:
    """E events sorted by task, then time. `first` is the row where the event's own task begins."""

    tasks: Tensor  # [E] int64
    items: Tensor  # [E] int64, rows of `item_ids`
    weights: Tensor  # [E] float32
    times: Tensor  # [E] int64 milliseconds
    first: Tensor  # [E] int64
    item_ids: list[str]

    def support(self, rows: Tensor, vectors: Tensor, capacity: int) -> Support:
        """Gather what was known just before each event of rows [T]: the `capacity` newest examples; vectors [N, d]."""
        at, mask = self.before(rows, capacity)
        newest = self.times[at[:, :1]]
        return Support(
            features=vectors[self.items[at]],
            labels=torch.ones(at.shape),
            weights=torch.where(mask, self.weights[at], 0.0),
            ages=torch.where(mask, (newest - self.times[at]) / 1000.0, 0.0).float(),
            mask=mask,
        )

    def before(self, rows: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Find the rows [T, S] of the events before each of rows [T], newest first, and which exist, [T, S] bool."""
        at = rows.unsqueeze(1) - 1 - torch.arange(capacity)
        mask = at >= self.first[rows].unsqueeze(1)
        return torch.where(mask, at, rows.unsqueeze(1)), mask


def episodes_of(log: Log, rows: Tensor, vectors: Tensor, capacity: int, *, negatives: int, seed: int) -> Episodes:
    """What came next, of rows [T] given what was before, among `negatives` items drawn as often as they are met.

    The logits are corrected by the log of those odds (Bengio and Senecal 2008), so popular items aren't punished.
    """
    generator = torch.Generator().manual_seed(seed)
    odds = torch.bincount(log.items, minlength=len(vectors)).float()
    odds /= odds.sum()
    drawn = torch.multinomial(odds, len(rows) * negatives, replacement=True, generator=generator)
    items = torch.cat([log.items[rows].unsqueeze(1), drawn.view(len(rows), negatives)], 1)  # [T, 1 + K]
    return Episodes(
        support=log.support(rows, vectors, capacity),
        features=vectors[items],
        labels=torch.zeros(len(rows), dtype=torch.int64),
        mask=torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), items[:, 1:] != items[:, :1]], 1),
        loss="softmax",
        offsets=-odds[items].log(),
    )


def log_of(events: pl.DataFrame, weights: Mapping[str, float], item_ids: Sequence[str]) -> Log:
    """Keep the events of an event table (see evaluation/event_table.py) whose items are among `item_ids`.

    A kind of event that `weights` doesn't name has weight 1; a kind with weight 0 is left out.
    """
    numbers = pl.DataFrame(
        {"item_id": item_ids, "item": range(len(item_ids))}, schema={"item_id": pl.String, "item": pl.Int64}
    )
    weight = pl.col("event_type").replace_strict(dict(weights), default=_UNKNOWN_KIND, return_dtype=pl.Float32)
    rows = (
        events.select("user_id", "item_id", "event_time", weight.alias("weight"))
        .filter(pl.col("weight") > 0)
        .join(numbers, on="item_id", how="inner", maintain_order="left")
        .with_columns(pl.col("user_id").rank("dense").cast(pl.Int64).alias("task") - 1)
        .sort("task", "event_time", maintain_order=True)
    )
    tasks = rows["task"].to_torch()
    begins = torch.searchsorted(tasks, tasks)
    return Log(
        tasks=tasks,
        items=rows["item"].to_torch(),
        weights=rows["weight"].to_torch(),
        times=rows["event_time"].to_torch(),
        first=begins,
        item_ids=list(item_ids),
    )
