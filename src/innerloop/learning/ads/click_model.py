"""What a release knows of clicks on what is shown: the head, and what everybody's impressions said of each item."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from innerloop.learning.ads.ad_head import POPULATION
from innerloop.learning.ads.click_head import COLUMNS_SHOWN, ClickHead
from innerloop.learning.ads.impressions import CLICK_WINDOW

_HEAD = "head."


@dataclass(frozen=True)
class ClickModel:
    """Of the N items of a release's encoder and the M that were only ever shown, in C categories.

    The columns of `items` and `categories` are ad_head.POPULATION, of impressions and their clicks. A category's row is
    what an item in it is given that nobody had been shown; the last is for items without a category, or with a new one.
    """

    head: ClickHead
    items: Tensor  # [N + M, 6] float32
    categories: Tensor  # [C + 1, 6] float32
    only_shown: list[str]  # M items: never clicked, which says a lot of them
    rate: float
    """Everybody's click-through rate."""
    window: int = CLICK_WINDOW
    """Milliseconds after an impression in which a click belongs to it, and after which none is one."""

    def state(self) -> dict[str, Tensor]:
        """Everything, by name."""
        names = torch.frombuffer(bytearray(msgspec.json.encode(self.only_shown)), dtype=torch.uint8)
        found = {"items": self.items, "categories": self.categories, "only_shown": names}
        found["rate"] = torch.tensor([self.rate], dtype=torch.float64)
        found["window"] = torch.tensor([self.window])
        return {f"{_HEAD}{name}": tensor for name, tensor in self.head.state().items()} | found

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "ClickModel":
        """Raises KeyError when something is missing, or what `releases.load` knows for damaged."""
        head = {name.removeprefix(_HEAD): tensor for name, tensor in state.items() if name.startswith(_HEAD)}
        names = msgspec.json.decode(state["only_shown"].cpu().numpy().tobytes(), type=list[str])
        (rate,) = state["rate"].tolist()
        window = int(state.get("window", torch.tensor([CLICK_WINDOW])))  # the first releases knew no other
        return cls(ClickHead.restore(head), state["items"], state["categories"], names, float(rate), window)

    def faults(self, items: int, categories: int) -> Iterator[str]:
        """What does not fit a release of so many items and categories, or is no number."""
        features, own = 1 + len(COLUMNS_SHOWN), self.head.own_variances.numel()
        expected = {
            "items": (self.items, (items + len(self.only_shown), len(POPULATION))),
            "categories": (self.categories, (categories + 1, len(POPULATION))),
            "centres": (self.head.centre, (features - 1,)),
            "scales": (self.head.scale, (features - 1,)),
            "click weights": (self.head.click, (features,)),
            "own columns": (self.head.own_columns, (max(own - 2, 0),)),
            "own variances": (self.head.own_variances, (max(own, 2),)),
            "calibrations": (self.head.state()["calibrations"], (1 if self.head.purchase is None else 2, 2)),
        }
        if self.head.purchase is not None:
            expected["purchase weights"] = self.head.purchase, (features,)
        for what, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                yield f"{what} of its click head not finite of shape {shape}"
        if not 0.0 < self.rate < 1.0:
            yield "a click-through rate that is not between 0 and 1"
        if self.window <= 0:
            yield "a click window that is not positive"
        if bool(((self.head.own_columns < 1) | (self.head.own_columns >= features)).any()):
            yield "own columns of its click head that are no columns"
        if not bool((self.head.own_variances > 0).all()):
            yield "own variances of its click head that are not above 0"
