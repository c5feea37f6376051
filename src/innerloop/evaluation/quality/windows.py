"""The windowed join of clicks and lists, as a state machine: batches of a sample in, closed windows out.

Knows no Kafka and no clock: what it is told is all there is, so the same batches give the same windows, and a batch
that is told again changes nothing.

- **A window** is [start, end) of event time, `window_ms` long. It closes when the watermark has passed its end by
  `grace_ms`; a click that comes later is counted as late and judged nowhere.
- **The watermark** is the least, over the partitions that sent something in the last `idle_ms`, of the newest event's
  time (bounded out-of-orderness with idleness, as Flink has it); when all are idle it goes on with the clock. Nothing
  closes in the first `idle_ms` after a start or a pause: some partitions have not been read then.
- **A click is judged** by the list of the highest order among its user's lists that were put on their topic before the
  click was put on its own, and whose newest event is older than the click. Either rule alone would do with true clocks:
  together, no list that knew the click can judge it, whichever clock is wrong.
- **A click on an ad** is judged by the probability that the newest such list had for the ad, and labelled when
  `label_ms` have passed: was the ad's clicked item bought by this user within them?
- **The placebo**: a click that an adapted list has judged is judged again by the list that another user had then, of
  the next user in the order of a hash whose list at the click (the same two rules) was an adapted one. Users are in a
  ring, kept as they come and go: no click looks at more than `_LOOKED_AT` of them, and one that finds none has no
  placebo. Lists that are no better than their placebo are good for everybody, not for their user.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from innerloop.evaluation.quality.figures import JudgedAd, JudgedClick, groups, lifts
from innerloop.evaluation.quality.record import JudgedArm, QualityWindow
from innerloop.evaluation.quality.state import (
    AdClick,
    Batch,
    Click,
    Listed,
    Progress,
    Purchase,
    Source,
    User,
)
from innerloop.holdout import place

_MOST = 256  # of each kind, of one user: more are a robot's
_LOOKED_AT = 64  # users of the ring, for one click
_RING_SEED = 20_260_103  # not the hold-out's: its users would all stand together
_OLD_LISTS = 4  # lists that know no event of an open window: republished ones may still judge what is on its way

Some = TypeVar("Some", bound=Listed)


@dataclass(frozen=True)
class WindowShape:
    """In milliseconds; `most_users` are remembered. A purchase within `label_ms` after the click is the click's."""

    window_ms: int
    grace_ms: int
    idle_ms: int
    most_users: int = 100_000
    label_ms: int = 86_400_000


@dataclass
class QualityWindows:
    """`users` and `progress` are what it remembers: give them back and it goes on.

    `changed` names the users whose memory has changed since `take_changes`.
    """

    shape: WindowShape
    users: MutableMapping[str, User] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._clicked: dict[int, set[str]] = {}  # by window: who clicked in it
        self._ring = sorted(map(_place, self.users))
        self._on_ads: set[str] = set()  # who has a click on an ad that waits for its purchase
        for name, user in self.users.items():
            for click in user.clicks:
                self._clicked.setdefault(self._start(click.time), set()).add(name)
            if user.ad_clicks:
                self._on_ads.add(name)

    def hear(self, batch: Batch) -> None:
        """Remember what is in a batch."""
        if batch.at > self.progress.heard + self.shape.idle_ms:
            self.progress.awake = batch.at
        self.progress.heard = max(self.progress.heard, batch.at)
        if batch.source and batch.newest:
            source = self.progress.sources.setdefault(batch.source, Source(0, 0))
            source.newest, source.at = max(source.newest, batch.newest), max(source.at, batch.at)
        for name in batch.forgotten:
            self._forget(name)
        for listed in batch.lists:
            self._keep_list(self._user(listed.user_id, batch.at).lists, listed)
        for shown in batch.ads:
            self._keep_list(self._user(shown.user_id, batch.at).ads, shown)
        for purchase in batch.purchases:
            bought = self._user(purchase.user_id, batch.at).purchases
            if purchase not in bought:
                bought.append(purchase)
                del bought[:-_MOST]
        for click in batch.clicks:
            self._keep_click(click, batch.at)
        self._forget_oldest()

    def closable(self, now: int) -> list[int]:
        """The starts of the windows with clicks that can be closed, oldest first."""
        if now < self.progress.awake + self.shape.idle_ms:
            return []
        closed = self._closed_by(now)
        return sorted(start for start in self._clicked if start + self.shape.window_ms <= closed)

    def judge(self, start: int, now: int) -> QualityWindow:
        """The figures of a window. Changes nothing that a second time would not change alike."""
        end, clicks, placebos, unlisted = start + self.shape.window_ms, [], [], 0
        for name in sorted(self._clicked.get(start, ())):
            user = self.users[name]
            for click in user.clicks:
                if self._start(click.time) == start:
                    listed = held_against(click, user.lists)
                    unlisted += listed is None
                    if listed is not None:
                        clicks.append(_judged(click, listed, listed.arm))
                    if listed is not None and listed.arm == "adapted" and (other := self._of_another(click)):
                        placebos.append(_judged(click, other, "placebo"))
                    self._wait_for_purchase(user, click)
        wait = self.shape.label_ms
        ads = list(self._matured(self.progress.closed - wait, end - wait))
        by_arm, by_version = groups([*clicks, *placebos], ads)
        late, total = self.progress.late, len(clicks) + unlisted
        return QualityWindow(start, end, now, total, unlisted, late, by_arm, by_version, lifts(clicks))

    def close(self, start: int) -> None:
        """Done with a window that was judged; what only it needed is forgotten."""
        self.progress.closed, self.progress.late = start + self.shape.window_ms, 0
        for name in self._clicked.pop(start, ()):
            self._tidy(name)
        for name in sorted(self._on_ads):
            oldest = min((each.time for each in self.users[name].ad_clicks), default=None)
            if oldest is None:
                self._on_ads.discard(name)
            elif oldest < self.progress.closed - self.shape.label_ms:
                self._tidy(name)

    def take_changes(self) -> set[str]:
        """Whose memory has changed since the last time."""
        changed, self.changed = self.changed, set()
        return changed

    # --- time

    def _start(self, time: int) -> int:
        return time - time % self.shape.window_ms

    def _closed_by(self, now: int) -> int:
        """Windows that end at this time or before it can be closed."""
        sources = self.progress.sources.values()
        active = [each.newest for each in sources if each.at > now - self.shape.idle_ms]
        if active:
            watermark = min(active)
        else:
            idle_since = max((each.at for each in sources), default=now)
            watermark = max((each.newest for each in sources), default=0) + now - idle_since
        return self._start(max(self.progress.closed, watermark - self.shape.grace_ms))

    # --- what is remembered

    def _user(self, name: str, at: int) -> User:
        user = self.users.get(name)
        if user is None:
            user = self.users[name] = User()
            insort(self._ring, _place(name))
        user.seen_at = max(user.seen_at, at)
        self.changed.add(name)
        return user

    def _keep_list(self, lists: list[Some], listed: Some) -> None:
        if any(each.order == listed.order for each in lists):
            return
        lists.append(listed)
        if len(lists) > _MOST:
            lists.remove(min(lists, key=lambda each: each.published))

    def _keep_click(self, click: Click, at: int) -> None:
        user = self._user(click.user_id, at)
        if any(each.mark == click.mark for each in user.clicks):
            return
        start = self._start(click.time)
        if start + self.shape.window_ms <= self.progress.closed:
            self.progress.late += 1
        elif len(user.clicks) < _MOST:
            user.clicks.append(click)
            self._clicked.setdefault(start, set()).add(click.user_id)

    def _forget(self, name: str) -> None:
        if self.users.pop(name, None) is not None:
            self.changed.add(name)
            del self._ring[bisect_left(self._ring, _place(name))]
        self._on_ads.discard(name)
        for clicked in self._clicked.values():
            clicked.discard(name)

    def _forget_oldest(self) -> None:
        """A tenth at a time, or each new user would cost a look at all."""
        if len(self.users) > self.shape.most_users:
            by_age = sorted(self.users, key=lambda name: (self.users[name].seen_at, name))
            for name in by_age[: len(self.users) - self.shape.most_users * 9 // 10]:
                self._forget(name)

    def _tidy(self, name: str) -> None:
        """Drop what belongs to closed windows alone."""
        user, closed = self.users[name], self.progress.closed
        user.clicks = [each for each in user.clicks if self._start(each.time) >= closed]
        user.lists, user.ads = _useful(user.lists, closed), _useful(user.ads, closed)
        user.ad_clicks = [each for each in user.ad_clicks if each.time >= closed - self.shape.label_ms]
        needed = min((each.time for each in user.ad_clicks), default=closed)
        user.purchases = [each for each in user.purchases if each.time >= min(needed, closed)]
        self.changed.add(name)

    # --- the placebo

    def _of_another(self, click: Click) -> Listed | None:
        """The adapted list at the time of the click of the next user in the ring that had one."""
        own = bisect_left(self._ring, _place(click.user_id))
        for step in range(1, min(_LOOKED_AT + 1, len(self._ring))):
            _, other = self._ring[(own + step) % len(self._ring)]
            listed = held_against(click, self.users[other].lists)
            if listed is not None and listed.arm == "adapted":
                return listed
        return None

    # --- ads

    def _wait_for_purchase(self, user: User, click: Click) -> None:
        listed = None if click.ad_id is None else held_against(click, user.ads)
        if listed is None or click.ad_id not in listed.items or not listed.chances:
            return
        if any(each.mark == click.mark for each in user.ad_clicks):
            return
        chance = listed.chances[listed.items.index(click.ad_id)]
        waiting = AdClick(click.time, click.item_id, click.mark, listed.arm, listed.model_version, chance)
        user.ad_clicks.append(waiting)
        self._on_ads.add(click.user_id)
        self.changed.add(click.user_id)

    def _matured(self, after: int, before: int) -> Iterable[JudgedAd]:
        """Of the clicks on ads in [after, before) whether the purchase came."""
        for name in sorted(self._on_ads):
            user = self.users[name]
            for each in user.ad_clicks:
                if after <= each.time < before:
                    bought = any(_is_purchase_of(each, purchase, self.shape.label_ms) for purchase in user.purchases)
                    yield JudgedAd(each.arm, each.model_version, each.probability, bought)


def held_against(click: Click, lists: Sequence[Some]) -> Some | None:
    """The list that judges a click, None when there was none yet."""
    before = (each for each in lists if each.published < click.arrived and each.event_time < click.time)
    return max(before, key=lambda each: each.order, default=None)


def _place(name: str) -> tuple[float, str]:
    """Where a user is in the ring: not by name alone, since users whose names are neighbours may be alike."""
    return place(name, _RING_SEED), name


def _judged(click: Click, listed: Listed, arm: JudgedArm) -> JudgedClick:
    rank = listed.items.index(click.item_id) + 1 if click.item_id in listed.items else 0
    return JudgedClick(click.user_id, arm, listed.model_version, rank)


def _is_purchase_of(click: AdClick, purchase: Purchase, within: int) -> bool:
    return purchase.item_id == click.item_id and click.time < purchase.time <= click.time + within


def _useful(lists: list[Some], closed: int) -> list[Some]:
    """Those that know an event of an open window, and of the others the last few that were published."""
    old = sorted((each for each in lists if each.event_time < closed), key=lambda each: (each.published, each.order))
    return old[-_OLD_LISTS:] + [each for each in lists if each.event_time >= closed]
