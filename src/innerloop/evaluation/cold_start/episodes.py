"""Episodes of cold-start tests: a user's ratings in random order, some to foresee, the others to learn from."""

from dataclasses import dataclass, replace

import numpy as np

from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.rating_model import Ratings

QUERIES = 10
FEWEST, MOST = 13, 100  # ratings of the users that the main table is about (Lee et al. 2019)


@dataclass(frozen=True)
class Episodes:
    """E episodes of at most L ratings each: the first `queries` to foresee, then the support, in order of shots.

    `users` [E] and `items` [E, L] are numbers, `values` [E, L] ratings (0 beyond `counts` [E]); `totals` [E] is how
    many ratings the user has, of which no more than L are kept.
    """

    users: Ints
    items: Ints
    values: Floats
    counts: Ints
    totals: Ints
    queries: int

    @property
    def support(self) -> Ints:
        """How many examples each has, [E]."""
        return self.counts - self.queries

    @property
    def asked(self) -> Floats:
        """The ratings to foresee, [E, queries]."""
        return self.values[:, : self.queries]

    def where(self, chosen: Bools | Ints) -> "Episodes":
        return Episodes(
            self.users[chosen],
            self.items[chosen],
            self.values[chosen],
            self.counts[chosen],
            self.totals[chosen],
            self.queries,
        )

    def with_support_of(self, donors: Ints) -> "Episodes":
        """Each episode with another's examples; `donors` [E] numbers episodes."""
        q = self.queries
        items = np.concatenate([self.items[:, :q], self.items[donors, q:]], 1)
        values = np.concatenate([self.values[:, :q], self.values[donors, q:]], 1)
        return replace(self, items=items, values=values, counts=self.counts[donors])


def draw_episodes(ratings: Ratings, *, seed: int, queries: int = QUERIES, most: int = MOST) -> Episodes:
    """One episode for every user with more than `queries` ratings, in order of the users' numbers."""
    order = np.lexsort((np.random.default_rng(seed).random(len(ratings.users)), ratings.users))
    users, first, totals = np.unique(ratings.users[order], return_index=True, return_counts=True)
    row = np.repeat(np.arange(len(users)), totals)
    place = np.arange(len(order)) - first[row]
    kept = place < most
    width = min(int(totals.max(initial=0)), most)
    items, values = np.zeros((len(users), width), np.int64), np.zeros((len(users), width))
    items[row[kept], place[kept]] = ratings.items[order][kept]
    values[row[kept], place[kept]] = ratings.values[order][kept]
    return Episodes(users, items, values, np.minimum(totals, most), totals, queries).where(totals > queries)


def other_users(episodes: Episodes, seed: int) -> Ints:
    """For each episode the number of another one, of a user with about as many examples; -1 when there is none.

    All episodes must be of different users.
    """
    count = len(episodes.users)
    if count <= 1:
        return np.full(count, -1)
    order = np.lexsort((np.random.default_rng(seed).random(count), episodes.counts))
    donors = np.empty(count, np.int64)
    donors[order] = np.roll(order, 1)
    return donors
