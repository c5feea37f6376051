"""Whether a process lives and is ready, by its loop's own progress rather than by its being there."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

import structlog

_LOG = structlog.get_logger(__name__)
_LOOK_SECONDS = 1.0


class Turning(Protocol):
    """What `streams.loop.Loop` tells of itself."""

    @property
    def turned_at(self) -> float:
        """When it last turned, by the monotonic clock."""

    @property
    def joined(self) -> bool:
        """Whether the group has given it its partitions, none included, and all of them are claimed."""


@dataclass(frozen=True)
class Verdict:
    """An answer to a probe, with a sentence for people."""

    good: bool
    why: str


class Health:
    """Judges a loop. A loop that waits for an outage still turns, and lives; one that hangs in a call does not.

    `watch` starts a thread that writes the stacks of all threads to `stacks`, once each time the loop gets stuck.
    """

    def __init__(
        self,
        loop: Turning,
        stuck_after_seconds: float,
        *,
        unclaimed: Callable[[], str | None] = lambda: None,
        stacks: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unclaimed` says in a sentence which partitions the loop cannot claim yet, and why."""
        self._loop, self._unclaimed, self._stuck_after, self._clock = loop, unclaimed, stuck_after_seconds, clock
        self._stacks = stacks or sys.stderr
        self._dumped = False
        self._over: str | None = None
        self._stopped = threading.Event()

    def over(self, why: str) -> None:
        """The loop has ended, on purpose: nothing is stuck, and nothing is ready any more."""
        self._over = why

    @property
    def live(self) -> Verdict:
        """Red when the loop has not turned for `stuck_after_seconds`."""
        if self._over is not None:
            return Verdict(good=True, why=f"Stopped: {self._over}")
        seconds = self._clock() - self._loop.turned_at
        if seconds > self._stuck_after:
            return Verdict(good=False, why=f"The loop has not turned for {seconds:.0f} s; its stacks are in the log.")
        return Verdict(good=True, why="The loop turns.")

    @property
    def ready(self) -> Verdict:
        """Red until what the group gave is claimed (the model is warm by then), while the loop is stuck, and after."""
        live = self.live
        if not live.good or self._over is not None:
            return Verdict(good=False, why=live.why)
        if not self._loop.joined:
            why = self._unclaimed() or "The consumer group has not given this process its partitions yet."
            return Verdict(good=False, why=why)
        return Verdict(good=True, why="In its group, and warm.")

    def look(self) -> None:
        """Dump the stacks when the loop has become stuck since it last turned."""
        live = self.live
        if live.good:
            self._dumped = False
        elif not self._dumped:
            self._dumped = True
            _LOG.error("stuck", why=live.why)
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def watch(self) -> None:
        """Look once a second, in a thread of its own, until `stop`."""
        threading.Thread(target=self._watch, name="health", daemon=True).start()

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            self.look()

    def stop(self) -> None:
        self._stopped.set()
