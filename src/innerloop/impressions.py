"""What users were shown, as ingest keeps it: beside the support sets, of which an impression is no example.

Impressions are ten or more times as many as clicks, so they have a capacity of their own and push no click out. They
are ordered, deduplicated and capped as support sets are (`support.merge`), and written in the transaction that moves
the ledger, so they are kept exactly once. An impression asks for no adaptation: a list that was shown is no news. It
counts from its user's next click on.
"""

from dataclasses import dataclass

import numpy as np

from innerloop.store import support_sets
from innerloop.store.database import Transaction
from innerloop.support import Examples, Ints, Merged, SupportCache, SupportSets, gather, merge, newest


@dataclass(frozen=True)
class Shown:
    """The impressions of a batch: T distinct users, each impression's position among them [N], and the examples [N]."""

    users: list[str]
    positions: Ints
    examples: Examples

    def after(self, past: Ints) -> "Shown":
        """Those later than their user's `past` [T], epoch ms."""
        later = self.examples["time"] > past[self.positions]
        return Shown(self.users, self.positions[later], self.examples[later])


@dataclass(frozen=True)
class Written:
    """What a transaction that is not yet committed has written, and what became of each impression."""

    users: list[str]
    sets: SupportSets
    versions: Ints
    merged: Merged


class Impressions:
    """The impressions of each user, behind a write-through cache; a capacity of 0 keeps none."""

    def __init__(self, capacity: int, cached_users: int) -> None:
        self.capacity = capacity
        self._cached_users = cached_users
        self._cache: SupportCache | None = None  # made at the first impression: most shops never send one

    def write(self, connection: Transaction, shown: Shown) -> Written:
        """Merge and write within `connection`'s transaction; raises SupportConflictError as support_sets.write does."""
        sets, versions = self._read(connection, shown.users)
        merged = merge(sets, shown.positions, shown.examples, self.capacity)
        changed = np.flatnonzero(merged.changed)
        written = Written(
            [shown.users[row] for row in changed], gather(merged.sets, changed), versions[changed] + 1, merged
        )
        if written.users:
            support_sets.write(connection, written.users, written.sets, written.versions, table="impressions")
        return written

    def written(self, what: Written) -> None:
        """Its transaction was committed."""
        assert self._cache is not None  # noqa: S101 - `write` made it
        self._cache.put(what.users, what.sets, what.versions)

    def forget(self, users: list[str]) -> None:
        """Another writer has changed these users."""
        if self._cache is not None:
            self._cache.forget(users)

    def clear(self) -> None:
        """Believe nothing: another process may have written."""
        if self._cache is not None:
            self._cache.clear()

    def _read(self, connection: Transaction, users: list[str]) -> tuple[SupportSets, Ints]:
        """Stored impressions and versions of users, (empty, 0) for a new one."""
        if self._cache is None:
            self._cache = SupportCache(self._cached_users, self.capacity)
        missing = self._cache.missing(users)
        if missing:
            found, sets, versions = support_sets.read(connection, missing, table="impressions")
            self._cache.put(found, newest(sets, self.capacity), versions)
            unknown = self._cache.missing(missing)
            self._cache.put(unknown, SupportSets.empty(len(unknown)), np.zeros(len(unknown), np.int64))
        return self._cache.get(users)
