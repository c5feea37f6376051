"""The support set: the newest examples of each task, at most `capacity`, ordered by event time, once per event id.

A set is a function of the distinct events seen, never of their order of arrival or of how they were batched: it is
the `capacity` newest by (time, hash). Pure numpy, no I/O; a whole batch of tasks is merged at once.

An event id always names the same event. Should a producer send one id with two contents, the one stored first stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXAMPLE = np.dtype([("time", "<i8"), ("hash", "<i8"), ("item", "<i8"), ("weight", "<f4"), ("type", "<i4")])
"""One example: event time (epoch ms), 64-bit hash of the event id, item number, weight, event type code. 32 bytes."""

Ints = NDArray[np.int64]
Examples = NDArray[np.void]


@dataclass(frozen=True)
class SupportSets:
    """Sets of several tasks, one after another: task t has `examples[starts[t]:starts[t + 1]]`."""

    starts: Ints  # [T + 1]
    examples: Examples  # [N] of EXAMPLE

    @property
    def sizes(self) -> Ints:  # [T]
        return self.starts[1:] - self.starts[:-1]  # np.diff takes ten times as long where there are few

    @property
    def newest(self) -> Ints:  # [T], epoch ms; 0 for an empty set
        times = np.zeros(len(self.starts) - 1, np.int64)
        some = self.sizes > 0
        times[some] = self.examples["time"][self.starts[1:][some] - 1]
        return times

    @classmethod
    def empty(cls, tasks: int = 0) -> "SupportSets":
        return cls(np.zeros(tasks + 1, np.int64), np.empty(0, EXAMPLE))


@dataclass(frozen=True)
class Merged:
    """`sets` after the merge (unchanged tasks included), which tasks changed, and what became of each event."""

    sets: SupportSets
    fresh: NDArray[np.bool_]  # [N], which examples of `sets` came with this merge
    changed: NDArray[np.bool_]  # [T]
    duplicates: int
    too_late: int


def merge(stored: SupportSets, tasks: Ints, events: Examples, capacity: int) -> Merged:
    """Merge `events[n]` into the set of task `tasks[n]`.

    An event whose id is already there, or twice in the batch, is a duplicate; one that is older than everything in a
    full set is too late. Both leave the set as it was.
    """
    order, duplicates = _distinct(tasks, events)
    tasks, events = tasks[order], events[order]
    known = _already_stored(stored, tasks, events["hash"])
    late = _below_full(stored, tasks, events, capacity) & ~known
    keep = ~(known | late)
    tasks, events = tasks[keep], events[keep]
    sets, fresh = _append(stored, tasks, events, capacity)
    changed = np.zeros(len(stored.starts) - 1, bool)
    changed[tasks] = True
    return Merged(sets, fresh, changed, duplicates + int(known.sum()), int(late.sum()))


def _distinct(tasks: Ints, events: Examples) -> tuple[Ints, int]:
    """Positions of distinct events sorted by (task, time, hash), and how many were repeated."""
    order = _by_task_and_time(tasks, events)
    suspects = np.flatnonzero(_repeated_values(events["hash"]))
    if not len(suspects):
        return order, 0
    # Among those with a hash that occurs twice: which repeat an earlier (by time) one of the same task?
    some = suspects[np.lexsort((events["time"][suspects], events["hash"][suspects], tasks[suspects]))]
    same = (np.diff(tasks[some]) == 0) & (np.diff(events["hash"][some]) == 0)
    repeated = np.zeros(len(order), bool)
    repeated[some[1:][same]] = True
    return order[~repeated[order]], int(same.sum())


def _by_task_and_time(tasks: Ints, events: Examples) -> Ints:
    """Sort positions by (task, time, hash): events mostly arrive in time order, so mostly the task alone decides."""
    small = tasks.astype(np.uint16) if len(tasks) and tasks.max() < 2**16 else tasks  # radix sort
    order = np.argsort(small, kind="stable")
    sorted_tasks, times, hashes = tasks[order], events["time"][order], events["hash"][order]
    late = (times[1:] < times[:-1]) | ((times[1:] == times[:-1]) & (hashes[1:] < hashes[:-1]))
    disordered = np.unique(sorted_tasks[1:][late & (np.diff(sorted_tasks) == 0)])
    if len(disordered):
        at = np.flatnonzero(np.isin(sorted_tasks, disordered))
        order[at] = order[at][np.lexsort((hashes[at], times[at], sorted_tasks[at]))]
    return order


def _repeated_values(values: Ints) -> NDArray[np.bool_]:
    """Which of the values occur more than once."""
    ordered = np.sort(values)
    repeated = np.unique(ordered[1:][np.diff(ordered) == 0])
    return np.isin(values, repeated) if len(repeated) else np.zeros(len(values), bool)


def _already_stored(stored: SupportSets, tasks: Ints, hashes: Ints) -> NDArray[np.bool_]:
    """Which (task, hash) pairs are in `stored`."""
    found = np.zeros(len(tasks), bool)
    known = np.sort(stored.examples["hash"])
    if not len(known):
        return found
    # Few hashes are stored for any task at all; only those are compared with their own task's examples.
    near = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    some = np.flatnonzero(near)
    sizes = stored.sizes[tasks[some]]
    owner = np.repeat(some, sizes)
    equal = stored.examples["hash"][ranges(stored.starts[tasks[some]], sizes)] == hashes[owner]
    found[owner[equal]] = True
    return found


def _below_full(stored: SupportSets, tasks: Ints, events: Examples, capacity: int) -> NDArray[np.bool_]:
    full = np.flatnonzero(stored.sizes[tasks] >= capacity)
    oldest = stored.examples[stored.starts[tasks[full]]]
    below = np.zeros(len(tasks), bool)
    time, than = events["time"][full], oldest["time"]
    below[full] = (time < than) | ((time == than) & (events["hash"][full] < oldest["hash"]))
    return below


def _append(stored: SupportSets, tasks: Ints, events: Examples, capacity: int) -> tuple[SupportSets, NDArray[np.bool_]]:
    """Stored and new examples of each task in one order, the newest `capacity` of them; which of them are new."""
    old, new = stored.sizes, np.bincount(tasks, minlength=len(stored.sizes)).astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(old + new)))
    source = np.concatenate((stored.examples, events))
    where = np.empty(starts[-1], np.int64)  # of each merged example in source
    where[ranges(starts[:-1], old)] = np.arange(len(stored.examples))
    where[ranges(starts[:-1] + old, new)] = np.arange(len(stored.examples), len(source))
    _sort_where_needed(where, source, starts, old, new)
    size = np.minimum(old + new, capacity)
    kept = where[ranges(starts[1:] - size, size)]
    sets = SupportSets(np.concatenate(([0], np.cumsum(size))), source.take(kept))
    return sets, kept >= len(stored.examples)


def _sort_where_needed(where: Ints, source: Examples, starts: Ints, old: Ints, new: Ints) -> None:
    """Sort the tasks whose new events do not all follow the stored ones: most do, and need no sorting."""
    both = np.flatnonzero((old > 0) & (new > 0))
    first_new = starts[:-1][both] + old[both]
    before, after = source.take(where[first_new - 1]), source.take(where[first_new])
    late = (after["time"] < before["time"]) | ((after["time"] == before["time"]) & (after["hash"] < before["hash"]))
    rows = both[late]
    sizes = (old + new)[rows]
    at = ranges(starts[:-1][rows], sizes)
    part = source.take(where[at])
    where[at] = where[at][np.lexsort((part["hash"], part["time"], np.repeat(rows, sizes)))]


def ranges(starts: Ints, sizes: Ints) -> Ints:
    """`starts[i], starts[i] + 1, ... sizes[i]` times, for all i one after another."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    shifts: Ints = np.repeat(starts - (ends - sizes), sizes)
    return np.arange(total, dtype=np.int64) + shifts


def gather(sets: SupportSets, tasks: Ints) -> SupportSets:
    """The sets of some tasks, in the order asked for."""
    return _taken(sets, sets.starts[tasks], sets.sizes[tasks])


def emptied(sets: SupportSets, tasks: Sequence[bool]) -> SupportSets:
    """The sets of all tasks, those of the marked ones without examples."""
    return _taken(sets, sets.starts[:-1], np.where(tasks, 0, sets.sizes))


def newest(sets: SupportSets, capacity: int) -> SupportSets:
    """The newest `capacity` of each set: what is stored may be longer when the capacity was lowered since."""
    if sets.sizes.max(initial=0) <= capacity:
        return sets
    sizes = np.minimum(sets.sizes, capacity)
    return _taken(sets, sets.starts[1:] - sizes, sizes)


def _taken(sets: SupportSets, starts: Ints, sizes: Ints) -> SupportSets:
    """Of each of T tasks `sizes[t]` examples of `sets` from `starts[t]` on."""
    return SupportSets(np.concatenate(([0], np.cumsum(sizes))), sets.examples.take(ranges(starts, sizes)))


class SupportCache:
    """A bounded write-through cache of support sets by user, with the version of each.

    Memory is `users * capacity * 32` bytes plus about 150 bytes a user. The least recently used quarter makes room.
    """

    def __init__(self, users: int, capacity: int) -> None:
        self._users, self._capacity = users, capacity
        self._slots: dict[str, int] = {}
        self._names: list[str | None] = [None] * users
        self._free = list(range(users - 1, -1, -1))
        self._examples = np.zeros((users, capacity), EXAMPLE)
        self._sizes = np.zeros(users, np.int64)
        self._versions = np.zeros(users, np.int64)
        self._used = np.zeros(users, np.int64)
        self._clock = 0

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        """Forget everything, as after a write whose outcome is unknown."""
        self._slots.clear()
        self._names = [None] * self._users
        self._free = list(range(self._users - 1, -1, -1))

    def forget(self, users: list[str]) -> None:
        """Forget these users: another writer has changed them."""
        for user in users:
            slot = self._slots.pop(user, None)
            if slot is not None:
                self._names[slot] = None
                self._free.append(slot)

    def missing(self, users: list[str]) -> list[str]:
        """Those of `users` that must be read first; the others are marked as used, so that they stay."""
        slots = [self._slots.get(user, -1) for user in users]
        self._clock += 1
        self._used[[slot for slot in slots if slot >= 0]] = self._clock
        return [user for user, slot in zip(users, slots, strict=True) if slot < 0]

    def get(self, users: list[str]) -> tuple[SupportSets, Ints]:
        """Sets and versions [T] of users that are all present; KeyError otherwise."""
        slots = np.fromiter((self._slots[user] for user in users), np.int64, len(users))
        self._clock += 1
        self._used[slots] = self._clock
        sizes = self._sizes[slots]
        flat = self._examples.reshape(-1).take(ranges(slots * self._capacity, sizes))
        return SupportSets(np.concatenate(([0], np.cumsum(sizes))), flat), self._versions[slots]

    def put(self, users: list[str], sets: SupportSets, versions: Ints) -> None:
        """Store the sets and versions of `users`. Sets beyond the cache's bound are not kept."""
        new = [user for user in users if user not in self._slots]
        if len(new) > len(self._free):
            self._evict(len(new))
        for user in new:
            slot = self._free.pop()
            self._slots[user] = slot
            self._names[slot] = user
        slots = np.fromiter((self._slots[user] for user in users), np.int64, len(users))
        self._clock += 1
        self._used[slots] = self._clock
        self._store(slots, sets)
        self._versions[slots] = versions

    def _store(self, slots: Ints, sets: SupportSets) -> None:
        """Copy whole rows, which is several times faster than copying examples to where they go."""
        self._sizes[slots] = sets.sizes
        if not len(sets.examples):
            return
        columns = np.arange(self._capacity)
        where = np.minimum(sets.starts[:-1, None] + columns, len(sets.examples) - 1)
        rows = sets.examples.take(where).view(np.int64)
        self._examples.view(np.int64)[slots] = rows

    def _evict(self, needed: int) -> None:
        taken = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        count = min(len(taken), max(needed, self._users // 4))
        oldest = taken[np.argpartition(self._used[taken], count - 1)[:count]] if count < len(taken) else taken
        self.forget([name for slot in oldest if (name := self._names[slot]) is not None])
