"""What a release knows of ads: the head, and what everybody's events said of each item when it was made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from innerloop.learning.ads.ad_head import COLUMNS, INTENT, POPULATION, AdHead
from innerloop.learning.ads.attribution import DAY
from innerloop.learning.ads.click_model import ClickModel

_HEAD, _CLICKS = "head.", "clicks."
_WIDTH = len(POPULATION) + len(INTENT)


@dataclass(frozen=True)
class AdModel:
    """Purchase given click, or click, for N items in C categories, those of a release's encoder.

    The columns of `items` and `categories` are ad_head.POPULATION and INTENT. A category's row is what an item in it is
    given that nobody had met; the last row is for items without a category, or with a new one.
    """

    head: AdHead | None
    """None where purchases were too few to learn from: then there are `clicks`, which know none either."""
    items: Tensor  # [N, 12] float32
    categories: Tensor  # [C + 1, 12] float32
    rate: float
    """Everybody's conversion rate."""
    clicks: ClickModel | None = None
    """Where the history had impressions enough: then a list of ads is by click and purchase, or by click alone."""
    window: int = DAY
    """Milliseconds after a click in which a purchase belongs to it: what was learned with is served with."""

    def to(self, device: torch.device) -> "AdModel":
        """The same on a device."""
        state = {name: tensor.to(device) for name, tensor in self.state().items()}
        return AdModel.restore(state)

    def population(self, rows: Tensor, categories: Tensor) -> Tensor:
        """Columns [.., 12] of items by their row in the release, -1 for none, and their category's, -1 for none."""
        return _looked_up(self.items, self.categories, rows, categories)

    def shown_population(self, rows: Tensor, categories: Tensor) -> Tensor:
        """The same of impressions, for a model that has `clicks`; its items that were only shown have later rows."""
        assert self.clicks is not None  # noqa: S101 - asked by who saw it
        return _looked_up(self.clicks.items, self.clicks.categories, rows, categories)

    def state(self) -> dict[str, Tensor]:
        """Everything, by name."""
        numbers = {"items": self.items, "categories": self.categories}
        numbers["rate"] = torch.tensor([self.rate], dtype=torch.float64)
        numbers["window"] = torch.tensor([self.window])
        clicks = {} if self.clicks is None else self.clicks.state()
        numbers |= {f"{_CLICKS}{name}": tensor for name, tensor in clicks.items()}
        head = {} if self.head is None else self.head.state()
        return {f"{_HEAD}{name}": tensor for name, tensor in head.items()} | numbers

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "AdModel":
        """Raises KeyError when something is missing, ValueError, TypeError or RuntimeError when a number is none.

        The first releases knew no INTENT, in whose place zeros change nothing, and no window but a day.
        """
        if state["items"].shape[-1] == len(POPULATION):
            widened = ("items", "categories", *(f"{_HEAD}{name}" for name in AdHead.BY_COLUMN))
            state = state | {name: pad(state[name], (0, len(INTENT))) for name in widened}
        head = {name.removeprefix(_HEAD): tensor for name, tensor in state.items() if name.startswith(_HEAD)}
        of_clicks = {name.removeprefix(_CLICKS): tensor for name, tensor in state.items() if name.startswith(_CLICKS)}
        (rate,) = state["rate"].tolist()
        clicks = ClickModel.restore(of_clicks) if of_clicks else None
        window = int(state.get("window", torch.tensor([DAY])))
        purchases = AdHead.restore(head) if head else None
        return cls(purchases, state["items"], state["categories"], float(rate), clicks, window)

    def faults(self, items: int, categories: int) -> Iterator[str]:
        """What does not fit a release of so many items and categories, or is no number."""
        yield from _misshapen(
            {
                "population of items": (self.items, (items, _WIDTH)),
                "population of categories": (self.categories, (categories + 1, _WIDTH)),
            }
        )
        if self.head is not None:
            yield from _faults_of(self.head)
        if not 0.0 < self.rate < 1.0:
            yield "a conversion rate that is not between 0 and 1"
        if self.window <= 0:
            yield "an attribution window that is not positive"
        if self.clicks is not None:
            yield from self.clicks.faults(items, categories)
            if (self.head is None) != (self.clicks.head.purchase is None):
                yield "only one of its two purchase heads"
        elif self.head is None:
            yield "neither a purchase head nor a click head"


def _faults_of(head: AdHead) -> Iterator[str]:
    features, own = 1 + len(COLUMNS), len(head.own_variances)
    hidden, bias, out, offset = head.committee.tensors()
    members, units = (*hidden.shape, 0, 0)[:2]
    yield from _misshapen(
        {
            "centre": (head.centre, (len(COLUMNS),)),
            "scale": (head.scale, (len(COLUMNS),)),
            "weights": (head.weights, (features,)),
            "own columns": (head.own_columns, (max(own - 2, 0),)),
            "own variances": (head.own_variances, (max(own, 2),)),
            "hidden units": (hidden, (members, units, features)),
            "bias": (bias, (members, units)),
            "output": (out, (members, units)),
            "offset": (offset, (members,)),
            "calibration": (torch.tensor([head.calibration.slope, head.calibration.intercept]), (2,)),
        }
    )
    if not 0.0 <= head.linear_share <= 1.0:
        yield "a share of the linear logit that is not from 0 to 1"
    if bool(((head.own_columns < 1) | (head.own_columns >= features)).any()):
        yield "own columns that are no columns"
    if not bool((head.own_variances > 0).all()):
        yield "own variances that are not above 0"


def _misshapen(expected: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> Iterator[str]:
    """Which tensors, by name, have another shape than theirs, or numbers that are none."""
    for what, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
            yield f"{what} not finite of shape {shape}"


def _looked_up(items: Tensor, categories: Tensor, rows: Tensor, of_rows: Tensor) -> Tensor:
    """Rows of `items` [N, P], or where there is none (-1, or beyond) the row of the item's category [C + 1, P]."""
    known = (of_rows >= 0) & (of_rows < len(categories) - 1)
    unmet = categories[torch.where(known, of_rows, len(categories) - 1)]
    met = (rows >= 0) & (rows < len(items))
    return torch.where(met.unsqueeze(-1), items[torch.where(met, rows, 0)], unmet) if len(items) else unmet
