"""Goes through a log in order of time: before each choice, what was known of it; after it, what it taught.

Actions of one and the same time know nothing of each other: all lists of a time are described before any of its
actions is counted. Where the file numbers the steps of a session, the earlier steps of the same session are earlier.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from innerloop.evaluation.slate.features import Action, Population, Slate, distinct, price_of
from innerloop.evaluation.slate.log import SlateLog

HOUR, DAY = 3_600_000, 86_400_000
CAPACITY = 64  # actions of a user that are kept, as of a support set


@dataclass(frozen=True)
class Choice:
    """A list from which column `chosen` was taken by `user`, at row `row` of the log, after these own actions."""

    row: int
    user: int
    slate: Slate
    chosen: int
    history: list[Action]
    other: list[Action]  # of another user: the placebo
    other_user: int | None
    first: bool  # nothing was done before in this session


@dataclass
class Replay:
    """Walks once over `log`; `population` is as it was strictly before the choice that was last given out."""

    log: SlateLog
    seed: int
    population: Population = field(default_factory=Population)

    def choices(self) -> Iterator[Choice]:
        """Every choice from a list that shows it, in order of time."""
        log, rng = self.log, np.random.default_rng(self.seed)
        own: dict[int, list[Action]] = defaultdict(list)
        active: list[int] = []  # users with any action on an item, in order of their first
        sessions: set[int] = set()
        for _, group in groupby(range(len(log)), key=log.times.__getitem__):
            rows = list(group)
            done: dict[int, list[Action]] = defaultdict(list)  # earlier steps of this very time, by session
            for row in rows:
                session = int(log.sessions[row])
                if is_choice(log, row):
                    other = _someone_else(int(log.users[row]), active, rng)
                    earlier = done[session] if log.stepped[row] else []
                    yield self._choice(row, own, earlier, other, first=session not in sessions)
                if log.stepped[row]:
                    sessions.add(session)
                    done[session] += self._actions(row)
            for row in rows:
                self._count(row, own, active)
                sessions.add(int(log.sessions[row]))

    def _choice(
        self, row: int, own: dict[int, list[Action]], done: list[Action], other: int | None, *, first: bool
    ) -> Choice:
        log, user, session = self.log, int(self.log.users[row]), int(self.log.sessions[row])
        slate = Slate(int(log.times[row]), session, log.shown[row], log.prices[row], log.contexts[row])
        history = [*own.get(user, []), *done][-CAPACITY:]
        theirs = own.get(other, []) if other is not None else []
        moved = [replace(a, session=session if a.session == theirs[-1].session else -1) for a in theirs]
        chosen = _place(log, row)
        return Choice(row, user, slate, chosen, history, moved, other, first)

    def _actions(self, row: int) -> list[Action]:
        """The action on an item at this row, or none."""
        log = self.log
        if log.items[row] < 0:
            return []
        time, session, item = int(log.times[row]), int(log.sessions[row]), int(log.items[row])
        chosen = is_choice(log, row)
        price = price_of(log.prices[row], _place(log, row)) if chosen else None
        return [Action(time, session, item, int(log.actions[row]), chosen, price)]

    def _count(self, row: int, own: dict[int, list[Action]], active: list[int]) -> None:
        user = int(self.log.users[row])
        history = own[user]
        for action in self._actions(row):
            if not history:
                active.append(user)
            recent = distinct([one for one in history if one.session == action.session])
            repeated = recent[:1] == [action.item]
            others = [] if repeated else [item for item in recent if item != action.item]
            self.population.add_look(action.item, action.time, others)
            if action.chosen:
                self.population.add_list(self.log.shown[row], action.item)
            history.append(action)
            del history[:-CAPACITY]


def is_choice(log: SlateLog, row: int) -> bool:
    """Whether a list was shown, and the item acted on is on it."""
    return len(log.shown[row]) > 0 and bool((log.shown[row] == log.items[row]).any())


def _place(log: SlateLog, row: int) -> int:
    """Where on its list the chosen item is."""
    return int(np.flatnonzero(log.shown[row] == log.items[row])[0])


def until(history: list[Action], time: int) -> list[Action]:
    """What of the history had happened by `time`."""
    return [one for one in history if one.time <= time]


def _someone_else(user: int, active: list[int], rng: np.random.Generator) -> int | None:
    """Someone else of the hundred who came last, None when there is nobody."""
    others = [one for one in active[-100:] if one != user]
    return others[int(rng.integers(len(others)))] if others else None
