"""The windows that `innerloop quality` has closed, as they come."""

import msgspec

from innerloop.config import Settings
from innerloop.errors import ServiceError
from innerloop.evaluation.quality.record import AtCutoff, Group, QualityWindow
from innerloop.streams.tail import Tail

_HOUR_MS = 3_600_000
_TWICE = 2  # a window may have been told more than once


class WindowReader:
    """Reads the newest windows there are, and then each new one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tail: Tail | None = None
        self._decode = msgspec.json.Decoder(QualityWindow).decode
        self._windows: dict[int, QualityWindow] = {}

    def close(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def read(self) -> tuple[QualityWindow, ...]:
        """Those of the hour before the newest one's end, each once, oldest first; what others wrote is left out.

        Raises ServiceError without the topic, or the right to read it.
        """
        last = _TWICE * (_HOUR_MS // (1000 * self._settings.quality.window_seconds) + 1)
        if self._tail is None:
            self._tail = Tail(self._settings, self._settings.topics.quality_windows, last=last)
        try:
            records = self._tail.new(last)
        except ServiceError:
            self.close()
            raise
        for record in records:
            try:
                window = self._decode(record.value or b"")
            except msgspec.MsgspecError:
                continue
            self._windows[window.window_start] = window
        return last_hour(self._windows)


def last_hour(windows: dict[int, QualityWindow]) -> tuple[QualityWindow, ...]:
    """Drop those that are more than an hour older than the newest; the others, oldest first."""
    newest = max((window.window_end for window in windows.values()), default=0)
    for start in [start for start, window in windows.items() if window.window_end <= newest - _HOUR_MS]:
        del windows[start]
    return tuple(windows[start] for start in sorted(windows))


def hit_rates(window: QualityWindow, k: int) -> dict[str, float]:
    """By arm with clicks, the share of them that was among the first `k`."""
    return {arm.arm: at.hit_rate for arm in window.arms if arm.clicks and (at := at_cutoff(arm, k))}


def at_cutoff(group: Group, k: int) -> AtCutoff | None:
    """The figures among the first `k`, where the window has them."""
    return next((at for at in group.at if at.k == k), None)
