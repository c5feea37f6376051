"""The windows that `innerloop quality` has closed, as they come."""

from collections.abc import Iterator

import msgspec

from innerloop.config import Settings
from innerloop.evaluation.quality_record import QualityWindow
from innerloop.streams.tail import Tail

KEPT = 200
"""Windows: more than an hour of them, a minute each."""


class WindowReader:
    """Reads the newest windows there are, and then each new one. Raises ServiceError without the topic."""

    def __init__(self, settings: Settings) -> None:
        self._tail = Tail(settings, settings.topics.quality_windows, last=KEPT)
        self._decode = msgspec.json.Decoder(QualityWindow).decode

    def close(self) -> None:
        self._tail.close()

    def new(self) -> Iterator[QualityWindow]:
        """Those that came since the last call; what others wrote is left out."""
        for value in self._tail.new():
            try:
                yield self._decode(value)
            except msgspec.MsgspecError:
                continue


def hit_rates(window: QualityWindow, k: int) -> dict[str, float]:
    """By arm with clicks, the share of them that was among the first `k`."""
    return {arm.arm: at.hit_rate for arm in window.arms if arm.clicks for at in arm.at if at.k == k}
