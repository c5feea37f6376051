"""What /metrics shows of quality: the newest closed window, for as long as there is none that is newer."""

import math
from collections.abc import Iterator

from prometheus_client import Gauge

from innerloop import metrics
from innerloop.evaluation.quality.record import Group, QualityWindow

Series = tuple[Gauge, tuple[str, ...]]

_VERSIONS = 2  # the newest ones: the release in use, and the one before it to compare with


class WindowGauges:
    """Shows one window. What the one before had and this one has not vanishes, and all with `clear`."""

    def __init__(self) -> None:
        self._shown: set[Series] = set()
        self._closed_at = 0

    def show(self, window: QualityWindow) -> None:
        """Set the gauges to this window."""
        found = dict(_figures(window))
        for (gauge, labels), value in found.items():
            gauge.labels(*labels).set(value)
        self._keep(set(found))
        self._closed_at = window.closed_at
        metrics.QUALITY_WINDOW_END.set(window.window_end / 1000)

    def clear(self) -> None:
        """Show no window."""
        self._keep(set())
        metrics.QUALITY_WINDOW_END.set(0)

    def clear_after(self, milliseconds: int, now: int) -> None:
        """Show no window if it was closed longer ago than this, epoch milliseconds."""
        if self._shown and now > self._closed_at + milliseconds:
            self.clear()

    def _keep(self, series: set[Series]) -> None:
        for gauge, labels in self._shown - series:
            gauge.remove(*labels)
        self._shown = series


def _figures(window: QualityWindow) -> Iterator[tuple[Series, float]]:
    for group in window.arms:
        yield from _of_arm(group)
    newest = sorted({each.model_version or 0 for each in window.versions})[-_VERSIONS:]
    for group in window.versions:
        if group.model_version in newest:
            labels = (group.arm, str(group.model_version))
            yield (metrics.QUALITY_VERSION_CLICKS, labels), group.clicks
            for at in group.at:
                yield (metrics.QUALITY_VERSION_HIT_RATE, (*labels, str(at.k))), at.hit_rate
    for lift in window.lift:
        for gauge, value in (
            (metrics.QUALITY_LIFT, lift.difference),
            (metrics.QUALITY_LIFT_LOW, lift.low),
            (metrics.QUALITY_LIFT_HIGH, lift.high),
        ):
            yield (gauge, (str(lift.k),)), value
    yield (metrics.QUALITY_UNJUDGED, ("without_list",)), window.without_list
    yield (metrics.QUALITY_UNJUDGED, ("late",)), window.late


def _of_arm(group: Group) -> Iterator[tuple[Series, float]]:
    yield (metrics.QUALITY_CLICKS, (group.arm,)), group.clicks
    yield (metrics.QUALITY_USERS, (group.arm,)), group.users
    for at in group.at:
        yield (metrics.QUALITY_HIT_RATE, (group.arm, str(at.k))), at.hit_rate
        yield (metrics.QUALITY_MRR, (group.arm, str(at.k))), at.mrr
    if group.ads is not None:
        auc, ratio = group.ads.auc, group.ads.predicted_over_observed
        yield (metrics.QUALITY_AD_CLICKS, (group.arm,)), group.ads.clicks
        yield (metrics.QUALITY_AD_AUC, (group.arm,)), math.nan if auc is None else auc
        yield (metrics.QUALITY_AD_CALIBRATION, (group.arm,)), math.nan if ratio is None else ratio
