"""The support sets against sets written plainly: dictionaries, sorting, nothing clever."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from innerloop.support import EXAMPLE, Examples, Ints, SupportCache, SupportSets, emptied, gather, merge, ranges
from innerloop.support import newest as newest_of

# (task, time, hash, item): an event; its hash is its identity within the task.
Plain = tuple[int, int, int, int]
TASKS = 4


def examples(events: list[Plain]) -> Examples:
    made = np.zeros(len(events), EXAMPLE)
    for at, (_, time, hashed, item) in enumerate(events):
        made[at]["time"], made[at]["hash"], made[at]["item"] = time, hashed, item
        made[at]["weight"], made[at]["type"] = item / 2, item % 4 + 1
    return made


def tasks_of(events: list[Plain]) -> Ints:
    return np.array([task for task, *_ in events], np.int64)


def plain(sets: SupportSets) -> list[list[tuple[int, int, int]]]:
    """(time, hash, item) of each task."""
    rows = [(int(e["time"]), int(e["hash"]), int(e["item"])) for e in sets.examples]
    return [rows[start:end] for start, end in zip(sets.starts[:-1], sets.starts[1:], strict=True)]


def newest(events: list[Plain], capacity: int) -> list[list[tuple[int, int, int]]]:
    """The oracle: of each task's distinct events the newest `capacity`."""
    distinct: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(TASKS)]
    for task, time, hashed, item in events:
        distinct[task].setdefault(hashed, (time, hashed, item))
    return [sorted(each.values())[-capacity:] for each in distinct]


def after(batches: list[list[Plain]], capacity: int) -> SupportSets:
    sets = SupportSets.empty(TASKS)
    for batch in batches:
        sets = merge(sets, tasks_of(batch), examples(batch), capacity).sets
    return sets


small = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)


@st.composite
def histories(draw: st.DrawFn) -> list[Plain]:
    """Events with few times and few hashes, so that both often are equal; an id always has the same content."""
    content: dict[tuple[int, int], tuple[int, int]] = {}
    events = []
    for task, hashed, time, item in draw(
        st.lists(st.tuples(st.integers(0, TASKS - 1), small, st.integers(0, 12), st.integers(0, 99)), max_size=60)
    ):
        events.append((task, *_content(content, task, hashed, time, item)))
    return events


def _content(
    content: dict[tuple[int, int], tuple[int, int]], task: int, hashed: int, time: int, item: int
) -> tuple[int, int, int]:
    time, item = content.setdefault((task, hashed), (time, item))
    return time, hashed, item


def split(events: list[Plain], cuts: list[int]) -> list[list[Plain]]:
    places = sorted({0, len(events), *(cut % (len(events) + 1) for cut in cuts)})
    return [events[a:b] for a, b in itertools.pairwise(places)]


capacities = st.integers(1, 6) | st.just(64)
cuts = st.lists(st.integers(0, 100), max_size=5)


@settings(max_examples=300)
@given(histories(), st.randoms(use_true_random=False), st.lists(st.integers(0, 100), max_size=20), cuts, capacities)
def test_any_order_duplicates_and_batches_give_the_same_sets(
    events: list[Plain], shuffler: random.Random, again: list[int], cuts: list[int], capacity: int
) -> None:
    sent = events + [events[n % len(events)] for n in again if events]
    shuffler.shuffle(sent)
    sets = after(split(sent, cuts), capacity)
    assert plain(sets) == newest(events, capacity)
    assert plain(sets) == plain(after([events], capacity))
    assert sets.sizes.max(initial=0) <= capacity
    assert sets.newest.tolist() == [rows[-1][0] if rows else 0 for rows in newest(events, capacity)]


@settings(max_examples=300)
@given(histories(), histories(), capacities)
def test_every_event_is_stored_or_a_duplicate_or_too_late(
    before: list[Plain], events: list[Plain], capacity: int
) -> None:
    content = {(task, hashed): (time, item) for task, time, hashed, item in reversed(before)}
    events = [(task, *_content(content, task, hashed, time, item)) for task, time, hashed, item in events]
    stored = after([before], capacity)
    merged = merge(stored, tasks_of(events), examples(events), capacity)

    held = [{hashed for _, hashed, _ in rows} for rows in plain(stored)]
    duplicates = late = 0
    taken: list[set[int]] = [set() for _ in range(TASKS)]
    for task, time, hashed, _ in events:
        rows = plain(stored)[task]
        if hashed in held[task] or hashed in taken[task]:
            duplicates += 1
        elif len(rows) == capacity and (time, hashed) < rows[0][:2]:
            late += 1
            taken[task].add(hashed)  # a second one is a duplicate of the first
        else:
            taken[task].add(hashed)
    assert (merged.duplicates, merged.too_late) == (duplicates, late)
    assert merged.changed.tolist() == [a != b for a, b in zip(plain(stored), plain(merged.sets), strict=True)]
    assert plain(merged.sets) == newest(before + events, capacity)


@settings(max_examples=300)
@given(histories(), histories(), capacities)
def test_fresh_are_the_examples_that_this_merge_brought(
    before: list[Plain], events: list[Plain], capacity: int
) -> None:
    content = {(task, hashed): (time, item) for task, time, hashed, item in reversed(before)}
    events = [(task, *_content(content, task, hashed, time, item)) for task, time, hashed, item in events]
    stored = after([before], capacity)
    merged = merge(stored, tasks_of(events), examples(events), capacity)
    held = [{hashed for _, hashed, _ in rows} for rows in plain(stored)]
    expected = [hashed not in held[task] for task, rows in enumerate(plain(merged.sets)) for _, hashed, _ in rows]
    assert merged.fresh.dtype == bool
    assert merged.fresh.tolist() == expected
    again = merge(merged.sets, tasks_of(events), examples(events), capacity)
    assert not again.fresh.any(), "what is redelivered is told once"


@given(histories(), histories(), capacities)
def test_a_merge_leaves_its_arguments_as_they_were(before: list[Plain], events: list[Plain], capacity: int) -> None:
    stored = after([before], capacity)
    starts, rows, new, tasks = stored.starts.copy(), stored.examples.copy(), examples(events), tasks_of(events)
    merge(stored, tasks, new, capacity)
    assert (stored.starts == starts).all()
    assert (stored.examples == rows).all()
    assert (new == examples(events)).all()
    assert (tasks == tasks_of(events)).all()


def test_examples_keep_all_they_say() -> None:
    events = [(1, 5, -(2**63), 2**31 - 1), (1, 5, 2**63 - 1, 7), (3, 2, 9, 6), (1, 4, 3, 5)]
    kept = merge(SupportSets.empty(TASKS), tasks_of(events), examples(events), 8).sets
    for name in EXAMPLE.names or ():
        assert (kept.examples[name] == examples([events[3], events[0], events[1], events[2]])[name]).all()


def test_equal_times_are_ordered_by_hash_whatever_came_first() -> None:
    events = [(0, 7, hashed, 1) for hashed in (5, -5, 0, -(2**63), 2**63 - 1)]
    for order in (events, events[::-1]):
        assert [hashed for _, hashed, _ in plain(after([[e] for e in order], 3))[0]] == [0, 5, 2**63 - 1]


def test_a_capacity_of_one_keeps_the_newest() -> None:
    sets = after([[(0, 5, 1, 1), (0, 9, 2, 2), (0, 7, 3, 3)], [(0, 8, 4, 4)], [(0, 10, 5, 5)]], 1)
    assert plain(sets)[0] == [(10, 5, 5)]


def test_an_event_that_fell_out_does_not_come_back() -> None:
    """A redelivered event that the cap has pushed out is too late, not new."""
    sets = after([[(0, time, time, time) for time in range(10)]], 4)
    merged = merge(sets, tasks_of([(0, 2, 2, 2)]), examples([(0, 2, 2, 2)]), 4)
    assert (merged.duplicates, merged.too_late, bool(merged.changed.any())) == (0, 1, False)


def test_the_content_that_was_stored_first_stays() -> None:
    sets = after([[(0, 5, 1, 100)], [(0, 9, 1, 200)]], 4)
    assert plain(sets)[0] == [(5, 1, 100)]


def test_one_task_does_not_see_anothers_identifiers() -> None:
    merged = merge(after([[(0, 5, 1, 1)]], 4), tasks_of([(1, 5, 1, 1)]), examples([(1, 5, 1, 1)]), 4)
    assert merged.duplicates == 0
    assert merged.changed.tolist() == [False, True, False, False]


def test_more_tasks_than_a_small_number_holds() -> None:
    """Task numbers over 65535 are sorted another way than those below."""
    tasks = np.array([70_000, 3, 69_999, 70_000, 3], np.int64)
    events = examples([(0, 5, 1, 1), (0, 9, 2, 2), (0, 1, 3, 3), (0, 4, 4, 4), (0, 8, 5, 5)])
    sets = merge(SupportSets.empty(70_001), tasks, events, 4).sets
    assert sets.sizes[[3, 69_999, 70_000]].tolist() == [2, 1, 2]
    assert sets.examples["hash"].tolist() == [5, 2, 3, 4, 1]


@given(histories(), st.lists(st.integers(0, TASKS - 1), max_size=8))
def test_gather_takes_sets_in_the_order_asked_for(events: list[Plain], asked: list[int]) -> None:
    sets = after([events], 5)
    assert plain(gather(sets, np.array(asked, np.int64))) == [plain(sets)[task] for task in asked]


@given(histories(), st.lists(st.booleans(), min_size=TASKS, max_size=TASKS))
def test_emptied_sets_are_empty_and_the_others_as_they_were(events: list[Plain], marked: list[bool]) -> None:
    sets = after([events], 4)
    assert plain(emptied(sets, marked)) == [[] if mark else own for own, mark in zip(plain(sets), marked, strict=True)]


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 5)), max_size=10))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    starts, sizes = (np.array([pair[at] for pair in pairs], np.int64) for at in (0, 1))
    assert ranges(starts, sizes).tolist() == [n for start, size in pairs for n in range(start, start + size)]


# --- the cache

USERS, CAPACITY = 8, 3
names = st.lists(st.integers(0, 30).map(str), max_size=USERS // 2, unique=True)


def sets_of(sizes: list[int], seed: int) -> SupportSets:
    starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    made = examples([(0, seed + n, seed * 7 + n, n) for n in range(int(starts[-1]))])
    return SupportSets(starts, made)


class CacheAgainstDict(RuleBasedStateMachine):
    """What `get` gives is what was last put; what a batch needs is there once it has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = SupportCache(USERS, CAPACITY)
        self.table: dict[str, tuple[list[tuple[int, int, int]], int]] = {}
        self.seed = 0

    def _put(self, users: list[str], sizes: list[int]) -> None:
        self.seed += 1
        sets, versions = sets_of(sizes, self.seed), np.arange(len(users)) + 100 * self.seed
        self.cache.put(users, sets, versions)
        rows = plain(sets)
        self.table.update({u: (rows[n], int(versions[n])) for n, u in enumerate(users)})

    @rule(users=names, data=st.data())
    def a_batch(self, users: list[str], data: st.DataObject) -> None:
        """As ingest does: what is missing is read in two parts, then all is got, then some is written."""
        missing = self.cache.missing(users)
        assert set(missing) <= set(users)
        half = data.draw(st.integers(0, len(missing)))
        sizes = st.integers(0, CAPACITY)
        for part in (missing[:half], missing[half:]):
            self._put(part, data.draw(st.lists(sizes, min_size=len(part), max_size=len(part))))
        assert self.cache.missing(users) == []
        self._check(users)
        written = data.draw(st.lists(st.sampled_from(users), unique=True)) if users else []
        self._put(written, data.draw(st.lists(sizes, min_size=len(written), max_size=len(written))))
        self._check(users)

    def _check(self, users: list[str]) -> None:
        sets, versions = self.cache.get(users)
        assert plain(sets) == [self.table[user][0] for user in users]
        assert versions.tolist() == [self.table[user][1] for user in users]

    @rule(users=names)
    def forget(self, users: list[str]) -> None:
        self.cache.forget(users)
        assert self.cache.missing(users) == users

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert len(self.cache) == 0

    @invariant()
    def what_is_there_is_right(self) -> None:
        assert len(self.cache) <= USERS
        present = [user for user in self.table if user in self.cache._slots]
        before = self.cache._clock, self.cache._used.copy()
        self._check(present)
        self.cache._clock, self.cache._used = before  # looking is not using


CacheAgainstDict.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestCache = CacheAgainstDict.TestCase


def test_a_user_who_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        SupportCache(4, 2).get(["nobody"])


def test_the_least_recently_used_make_room() -> None:
    cache = SupportCache(8, CAPACITY)
    for user in "abcdefgh":
        cache.put([user], sets_of([1], 1), np.array([1]))
    assert cache.missing(["a", "b"]) == []  # used: c and d are the oldest now
    cache.put(["i"], sets_of([1], 2), np.array([1]))
    assert cache.missing(list("abcdefghi")) == ["c", "d"]


def test_sets_from_before_the_capacity_was_lowered_are_cut_to_their_newest() -> None:
    stored = sets_of([CAPACITY + 4, 0, 2, CAPACITY], 1)
    assert plain(newest_of(stored, CAPACITY)) == [rows[-CAPACITY:] for rows in plain(stored)]
    assert plain(newest_of(stored, 1)) == [rows[-1:] for rows in plain(stored)]
    assert newest_of(stored, CAPACITY + 4) is stored
