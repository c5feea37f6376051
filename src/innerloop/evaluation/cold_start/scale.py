"""The scale of ratings: arms see them in one unit whatever it is, figures are told in the file's own."""

from dataclasses import dataclass

import numpy as np

from innerloop.errors import SettingsError
from innerloop.evaluation.cold_start.ratings import RatingData
from innerloop.evaluation.outcome import Floats

_MOST_EXPONENT = 50


@dataclass(frozen=True)
class Scale:
    """Arms see ratings divided by `unit`. Gains are counted from `least`, at most 0; no rating is above `most`.

    What models start from and baselines' ridges are meant for ratings whose standard deviation is about 1.
    """

    unit: float
    least: float
    most: float

    @classmethod
    def of(cls, data: RatingData) -> "Scale":
        """The unit is the standard deviation in training. Raises SettingsError where all ratings there are the same."""
        values = data.training.values
        if len(np.unique(values)) < 2:  # noqa: PLR2004 - one is no scale
            raise SettingsError(
                "meta_training has no two different ratings that no test file has: there is nothing to learn."
            )
        most = max(float(ratings.values.max()) for ratings in (data.training, *data.tests.values()))
        return cls(float(values.std()), min(float(values.min()), 0.0), most)

    def gains(self, ratings: Floats) -> dict[str, Floats]:
        """By metric, what the nDCG takes each of the `ratings` to be worth, at least 0."""
        gain = np.maximum(ratings - self.least, 0.0)
        return {"ndcg": gain} | ({"ndcg-exp": np.exp2(gain) - 1.0} if self.exponential else {})

    @property
    def exponential(self) -> bool:
        """Whether sums of 2^gain can be told apart: a double has 53 bits."""
        return self.most - self.least < _MOST_EXPONENT
