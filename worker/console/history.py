"""The last hour of what the console has seen, thinned for plotting."""

from collections import deque
from collections.abc import Mapping

_HOUR_SECONDS = 3_600.0
POINTS = 240
"""As many as a plot of a phone's or a desktop's width can show."""


class History:
    """Numbers by name over the last hour, one set for each look."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Mapping[str, float]]] = deque()

    def add(self, at: float, values: Mapping[str, float]) -> None:
        """Take the values seen at this time (epoch seconds); what is an hour older is forgotten."""
        self._looks.append((at, values))
        while self._looks[0][0] < at - _HOUR_SECONDS:
            self._looks.popleft()

    def series(self, name: str) -> list[tuple[int, float]]:
        """At most about `POINTS` points (epoch ms, mean of the looks of one step); where nothing was known, none.

        Steps lie at fixed times, so that a plot moves along instead of dancing.
        """
        if not self._looks:
            return []
        step = max(1.0, (self._looks[-1][0] - self._looks[0][0]) / POINTS)
        found: dict[int, list[float]] = {}
        for at, values in self._looks:
            value = values.get(name)
            if value is not None and value == value:  # noqa: PLR0124 - not NaN
                found.setdefault(int(at / step), []).append(value)
        return [(int((place + 0.5) * step * 1000), sum(some) / len(some)) for place, some in found.items()]
