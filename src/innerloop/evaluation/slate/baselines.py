"""Baselines of the stream protocol as baselines of the slate protocol: the items shown, by their scores.

Each is shown the actions on items up to the moment and asked for what comes next after the user's newest items; of its
answer only the items of the list count. What it has no opinion on stays as shown.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from innerloop.evaluation.baselines.ials import ImplicitFactors
from innerloop.evaluation.baselines.sasrec import SasRec
from innerloop.evaluation.baselines.visits import Visits
from innerloop.evaluation.baselines.vsknn import SessionNeighbours
from innerloop.evaluation.outcome import Floats, Ints
from innerloop.evaluation.slate.log import SlateLog
from innerloop.evaluation.slate.replay import CAPACITY
from innerloop.learning.stream_log import StreamLog, stream_of

ARMS = frozenset(arm.name for arm in (SessionNeighbours, ImplicitFactors, SasRec))
_BLOCK_SECONDS = 1.0


def stream_scores(log: SlateLog, rows: Ints, shown: Sequence[Ints], *, seed: int) -> dict[str, list[Floats]]:
    """By arm, scores [P] of each of the lists `shown` [Q] at `rows` [Q] of the log; equal ones in the order shown."""
    stream, number, place = _stream(log, seed)
    items, at = _padded(shown, number), place[rows]
    arms = (
        SessionNeighbours(stream, Visits(stream)),
        ImplicitFactors(stream, seed=seed),
        SasRec(stream, seed=seed),
    )
    found: dict[str, list[Floats]] = {}
    for arm in arms:
        scores, before = np.zeros(items.shape), 0
        for upto, some in stream.blocks(stream.times[at], _BLOCK_SECONDS):
            arm.observe(before, upto)
            before = upto
            scores[some] = arm.scores_of(at[some], stream.before(at[some], CAPACITY)[0], items[some])
        found[arm.name] = [_with_order(row[: len(some)]) for row, some in zip(scores, shown, strict=True)]
    return found


def _stream(log: SlateLog, seed: int) -> tuple[StreamLog, Ints, Ints]:
    """The actions on items as a stream; the stream's number of each item, -1 for none; and each row's place in it."""
    rows = np.flatnonzero(log.items >= 0)
    # Text of one length has the order of its numbers. A stream shuffles what shares a time: the category, which none
    # of these arms looks at, says which action is which.
    table = pl.DataFrame(
        {
            "event_type": pl.Series(["click"], dtype=pl.String).new_from_index(0, len(rows)),
            "user_id": _names(log.users[rows]),
            "item_id": _names(log.items[rows]),
            "session_id": _names(log.sessions[rows]),
            "category": _names(np.arange(len(rows))),
            "event_time": _told_apart(log)[rows],
        }
    )
    stream = stream_of(table, seed=seed)
    place = np.full(len(log), -1)
    place[rows[stream.categories]] = np.arange(len(rows))
    number = np.full(1 + max(int(some.max(initial=0)) for some in (log.items, *log.shown)), -1)
    number[np.unique(log.items[rows])] = np.arange(len(stream.item_ids))
    return stream, number, place


def _told_apart(log: SlateLog) -> Ints:
    """The times, but of a session's numbered steps of one time each a millisecond behind the one before.

    The stream knows nothing of steps, and what shares a time knows nothing of each other there.
    """
    times, newest = log.times.copy(), dict[int, int]()
    for row in np.flatnonzero(log.stepped).tolist():
        session = int(log.sessions[row])
        times[row] = newest[session] = max(int(times[row]), newest.get(session, int(times[row]) - 1) + 1)
    return times


def _names(numbers: Ints) -> pl.Series:
    return pl.Series(numbers).cast(pl.String).str.zfill(len(str(int(numbers.max(initial=0)))))


def _padded(shown: Sequence[Ints], number: Ints) -> Ints:
    """The lists [Q, P] in the stream's numbers, -1 for an item that nobody ever acted on, and behind the end."""
    items = np.full((len(shown), max(len(some) for some in shown)), -1)
    for row, some in zip(items, shown, strict=True):
        row[: len(some)] = number[some]
    return items


def _with_order(scores: Floats) -> Floats:
    order = np.lexsort((-np.arange(len(scores)), scores))
    found = np.empty(len(scores))
    found[order] = np.arange(len(scores))
    return found
