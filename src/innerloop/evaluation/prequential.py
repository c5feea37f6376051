"""Judging lists by what the users did next: first look at the event, then let the list change.

Each click is held against three lists that were there before it:

    adapted     the newest list of the user who clicked
    unadapted   the list for a user of whom nothing is known
    placebo     the newest list of another user, drawn at random: as fresh and as varied, but somebody else's
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class HitRates:
    """Counts of clicks that were on the list, by arm. A click of a user without a list counts in no arm."""

    seed: int = 0
    clicks: int = 0
    without_list: int = 0
    adapted: int = 0
    unadapted: int = 0
    placebo: int = 0
    _rng: np.random.Generator = field(init=False, repr=False)
    _users: list[str] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def observe(
        self, user_id: str, item_id: str, newest: Mapping[str, Sequence[str]], unadapted: Sequence[str]
    ) -> None:
        """Count one click, given every user's newest list and the one unadapted list.

        `newest` may gain users between calls but loses none. With no other user the click isn't counted either.
        """
        other = self._another(user_id, newest)
        if user_id not in newest or other is None:
            self.without_list += 1
            return
        self.clicks += 1
        self.adapted += item_id in newest[user_id]
        self.unadapted += item_id in unadapted
        self.placebo += item_id in newest[other]

    def rates(self) -> dict[str, float]:
        """Hits per counted click by arm; 0 before the first click."""
        clicks = max(1, self.clicks)
        return {arm: getattr(self, arm) / clicks for arm in ("adapted", "unadapted", "placebo")}

    def _another(self, user_id: str, newest: Mapping[str, Sequence[str]]) -> str | None:
        """Draw a user other than this one, each equally likely."""
        if len(self._users) != len(newest):
            self._users = list(newest)
        if len(self._users) <= (user_id in newest):
            return None
        while True:
            other = self._users[int(self._rng.integers(len(self._users)))]
            if other != user_id:
                return other
