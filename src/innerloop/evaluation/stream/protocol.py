"""`stream`: foresee each user's next event in global time, over the whole catalogue, from strictly earlier events.

Time is cut into short blocks. At a block's start every arm has been shown all events before it; of the user whose next
event is asked for, everything strictly earlier is known, in the block too. So what moves with all users is at most a
block old, as it is in the service, and what is the user's own is exact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from innerloop.errors import SettingsError
from innerloop.evaluation.event_table import spanned
from innerloop.evaluation.item_table import read_items
from innerloop.evaluation.metrics import hit_rate, reciprocal_rank
from innerloop.evaluation.outcome import Bools, Floats, Ints, Outcome, Tell
from innerloop.evaluation.stream.arms import StreamArm
from innerloop.evaluation.stream.baselines import NAMES as BASELINES
from innerloop.evaluation.stream.baselines import baselines
from innerloop.evaluation.stream.log import read_table
from innerloop.evaluation.stream.options import StreamOptions
from innerloop.evaluation.stream.served import School, Served, judged
from innerloop.events import CODES
from innerloop.learning.releases import Release
from innerloop.learning.stream_log import StreamLog, stream_of
from innerloop.learning.training import LEAST_EVENTS
from innerloop.trends import SAME_VISIT_MS


@dataclass(frozen=True)
class Heard:
    """The rank [Q] of each moment's item on the list that was there, -1 where there was none."""

    ranks: Ints
    newest: Bools
    """Which moments [Q] had a list of the user's newest state: no event of theirs was still on its way."""

    @property
    def lists(self) -> Bools:
        """Which moments [Q] had a list."""
        return self.ranks >= 0

    @property
    def facts(self) -> dict[str, object]:
        """How many moments had a list, and the share of those lists that were of an older state."""
        count = int(self.lists.sum())
        return {"moments": count, "older_state": int((self.lists & ~self.newest).sum()) / max(1, count)}


Live = Callable[[StreamLog, Ints, Release, StreamOptions], Heard]
"""Sends a log through the service and judges the moments just before its rows."""
_SIZES = {"0": (0, 0), "1-2": (1, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21+": (21, 2**62)}
_DAY = 86_400_000
_DIFFERENCES = (("through-kafka", "default"), ("through-kafka, newest state", "default"))


def moments(log: StreamLog, options: StreamOptions, start: int) -> Ints:
    """Rows from `start` on that are asked for, in order. Raises SettingsError when there is none."""
    rows = np.arange(len(log))
    asked = np.isin(log.kinds, [CODES[name] for name in options.targets])
    if options.within_session:
        asked &= _same_session(log)
    if options.remove_seen:
        asked &= ~log.seen_before(rows)
    kept = rows[asked][options.every - 1 :: options.every]
    kept = kept[kept >= start]
    if not len(kept):
        raise SettingsError("No event of the data is asked for: choose other targets, or a shorter warm-up.")
    return kept


def _same_session(log: StreamLog) -> Bools:
    """Whether the user's event before is of the same session, [N]; of the same visit where no session is known."""
    if not _has_sessions(log):
        return log.within_visit(np.arange(len(log)))
    before = log.by_user[np.maximum(log.earlier - 1, 0)]
    same: Bools = (log.earlier > log.first) & (log.sessions[before] == log.sessions) & (log.sessions >= 0)
    return same


def _has_sessions(log: StreamLog) -> bool:
    return bool((log.sessions >= 0).any())


def run(
    data: Path,
    options: StreamOptions,
    *,
    history: Path | None = None,
    items: Path | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    tell: Tell,
    live: Live | None = None,
) -> Outcome:
    """Train on what is before the first moment asked for, then ask every arm at every moment. Raises SettingsError.

    `items` is a file of what the shop says of its items: of those to come, too, as its catalogue does.
    `columns` maps names of events, as in `event_table.read_events`.

    `live` sends the same events through the service and tells the ranks on the lists that came back. Both then keep to
    the first release, so that what differs is the way and not the model.
    """
    if live is not None:
        options = replace(options, train_every_hours=math.inf)
    table = read_table(data, history=history, columns=columns)
    log = stream_of(table.events, seed=seed)
    start = _enough(table.own_from if history is not None else _warm_up(log, options), log)
    rows = moments(log, options, start)
    school = School(table.events, options, seed, None if items is None else read_items(items, set(log.item_ids)))
    release = school.release(start, lambda what, share: tell(what, 0.2 * share))
    served = Served(log, school, release, options)
    answers = served.answers(rows, seed=seed, tell=lambda share: tell("ours", 0.2 + 0.4 * share))
    theirs = baselines(log, options, seed=seed)
    for number, arm in enumerate(theirs):
        tell(arm.name, 0.6 + 0.3 * number / len(theirs))
        answers[arm.name] = _asked(arm, log, rows, options)
    facts: dict[str, object] = {
        "releases": served.releases,
        "described_items": len(release.encoder.described_ids),
        "warm_up": f"the {start} events of --history" if history is not None else start,
        "sessions": "as in the data" if _has_sessions(log) else f"visits that end after {SAME_VISIT_MS // 60_000} min",
    }
    if live is not None:
        tell("through Kafka", 0.9)
        heard = live(log, rows, release, options)
        answers["through-kafka"] = heard.ranks
        answers["default, same moments"] = np.where(heard.lists, answers["default"], -1)
        for name in ("through-kafka", "default"):
            answers[f"{name}, newest state"] = np.where(heard.newest, answers[name], -1)
        facts["through_kafka"] = heard.facts
    return _outcome(log, rows, options, answers=answers, release=release, facts=facts)


def _enough(start: int, log: StreamLog) -> int:
    """The row from which on is judged. Raises SettingsError where too few come before it to train on."""
    # Not what shares the first one's time: releases are trained on what is strictly earlier.
    earlier = int(np.searchsorted(log.times, log.times[start], "left")) if start < len(log) else start
    if earlier < LEAST_EVENTS:
        raise SettingsError(
            f"Of {len(log)} events {earlier} are earlier than the first that is judged, and training needs "
            f"{LEAST_EVENTS} or more: give a longer file, earlier events with --history, or a longer --warm-up."
        )
    return start


def _warm_up(log: StreamLog, options: StreamOptions) -> int:
    """Rows at the start that are only learned from. Raises SettingsError when that is all of them."""
    most = options.most_warm_up
    if options.warm_up is None or (most is not None and options.warm_up > most * len(log)):
        return round(len(log) * options.warm_up_share)
    if options.warm_up >= len(log):
        raise SettingsError(
            f"A warm-up of {options.warm_up} events leaves none of the {len(log)} there are: give a shorter one."
        )
    return options.warm_up


def _asked(arm: StreamArm, log: StreamLog, rows: Ints, options: StreamOptions) -> Ints:
    """The rank [Q] of each moment's item by an arm that is asked at the moment itself."""
    found, shown = np.zeros(len(rows), np.int64), 0
    for upto, some in log.blocks(log.times[rows], options.block_seconds):
        arm.observe(shown, upto)
        shown = upto
        support, _ = log.before(rows[some], options.capacity)
        items, scores = arm.candidates(rows[some], support)
        found[some] = judged(log, rows[some], options, (items, scores), lambda named: named)
    return found


def _outcome(
    log: StreamLog,
    rows: Ints,
    options: StreamOptions,
    *,
    answers: Mapping[str, Ints],
    release: Release,
    facts: dict[str, object],
) -> Outcome:
    means = {arm: _metrics(found, options) for arm, found in answers.items()}
    return Outcome(
        users=log.users[rows],
        baselines=frozenset(BASELINES),
        means=means,
        differences=_DIFFERENCES,
        slices=_slices(log, rows, options),
        release=f"{release.version} ({release.card.method}, trained on {release.card.data.events} events)",
        facts={
            "options": asdict(options),
            "moments": len(rows),
            "times": spanned(log.times),
            "trained once, before the first moment": ["bayes, anil, cavia, maml and reptile alone", "sasrec"],
            "trained again": {
                "default, none, placebo, stale": f"every {options.train_every_hours:g} hours",
                "ials": "every 6 hours",
                "other baselines": "counted event by event",
            },
            "settings of baselines": "as published, not chosen on this data",
            "served": "default, none, placebo and stale lists are those published at the user's event before",
            **facts,
        },
    )


def _metrics(found: Ints, options: StreamOptions) -> dict[str, Floats]:
    asked = np.where(found >= 0, 1.0, np.nan)
    hits = {f"hr@{k}": hit_rate(found, k) * asked for k in options.hits}
    return hits | {f"mrr@{k}": reciprocal_rank(found, k) * asked for k in options.reciprocal}


def _slices(log: StreamLog, rows: Ints, options: StreamOptions) -> dict[str, Bools]:
    sizes, days = log.support_sizes(rows), log.times[rows] // _DAY
    found = {"new to the user": ~log.seen_before(rows)}
    found |= {f"support {name}": (sizes >= low) & (sizes <= high) for name, (low, high) in _SIZES.items()}
    found |= {_date(day): days == day for day in np.unique(days).tolist()}
    if len(options.targets) > 1:
        kinds = {target: log.kinds[rows] == CODES[target] for target in options.targets}
        found |= kinds | {f"{t}, {name}": of & some for t, of in kinds.items() for name, some in found.items()}
    return found


def _date(day: int) -> str:
    return datetime.fromtimestamp(day * _DAY / 1000, UTC).date().isoformat()
