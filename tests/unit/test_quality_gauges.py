"""What /metrics says of the newest closed window, and of what it must fall silent."""

import asyncio
import math
from typing import Any

import msgspec
from faust.types import TP
from prometheus_client import REGISTRY

from innerloop import schemas
from innerloop.config import Settings
from innerloop.evaluation.quality.record import Group, QualityWindow
from innerloop.worker.quality.app import Quality
from innerloop.worker.quality.gauges import WindowGauges

EXAMPLE = msgspec.json.decode(schemas.read("examples/quality_window.two_arms.json"), type=QualityWindow)
MINUTE = 60_000


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"innerloop_quality_{name}", labels)


def series() -> set[str]:
    """Every series of quality with labels that is shown."""
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return {f"{s.name}{sorted(s.labels.items())}" for s in samples if "_quality_" in s.name and s.labels}


def without(arm: str) -> QualityWindow:
    arms = [each for each in EXAMPLE.arms if each.arm != arm]
    versions = [each for each in EXAMPLE.versions if each.arm != arm]
    return msgspec.structs.replace(EXAMPLE, arms=arms, versions=versions, lift=[])


def test_the_gauges_say_what_the_newest_window_said() -> None:
    gauges = WindowGauges()
    gauges.show(EXAMPLE)
    for arm, rate, clicks, users in (("adapted", 0.25, 600, 310), ("hold_out", 0.1, 400, 240)):
        assert shown("hit_rate", arm=arm, k="10") == rate
        assert (shown("clicks", arm=arm), shown("users", arm=arm)) == (clicks, users)
        assert shown("version_hit_rate", arm=arm, model_version="7", k="10") == rate
        assert shown("version_clicks", arm=arm, model_version="7") == clicks
    assert [shown(name, k="20") for name in ("lift", "lift_low", "lift_high")] == [0.2, 0.145, 0.251]
    assert (shown("ad_auc", arm="adapted"), shown("ad_clicks", arm="adapted")) == (0.71, 40)
    assert (shown("unjudged_clicks", why="late"), shown("unjudged_clicks", why="without_list")) == (1, 4)
    assert shown("window_end_timestamp_seconds") == EXAMPLE.window_end / 1000
    gauges.clear()


def test_a_figure_that_a_window_has_not_is_none() -> None:
    gauges, (adapted, *_) = WindowGauges(), EXAMPLE.arms
    assert adapted.ads is not None
    ads = msgspec.structs.replace(adapted.ads, auc=None)
    gauges.show(msgspec.structs.replace(EXAMPLE, arms=[msgspec.structs.replace(adapted, ads=ads)]))
    assert math.isnan(shown("ad_auc", arm="adapted") or 0.0)
    assert shown("ad_auc", arm="hold_out") is None
    gauges.clear()


def test_what_the_newest_window_has_not_vanishes() -> None:
    gauges = WindowGauges()
    gauges.show(EXAMPLE)
    gauges.show(without("hold_out"))
    assert shown("hit_rate", arm="adapted", k="10") == 0.25
    assert not any("hold_out" in each or "lift" in each for each in series())
    gauges.clear()
    assert not series()
    assert shown("window_end_timestamp_seconds") == 0


def test_only_the_two_newest_versions_are_told_apart() -> None:
    def of(version: int) -> Group:
        return msgspec.structs.replace(EXAMPLE.versions[0], model_version=version)

    gauges = WindowGauges()
    gauges.show(msgspec.structs.replace(EXAMPLE, versions=[of(8), of(10), of(9)]))
    assert [shown("version_clicks", arm="adapted", model_version=str(n)) for n in (8, 9, 10)] == [None, 600, 600]
    gauges.clear()


def test_a_window_is_the_newest_for_some_time_only() -> None:
    gauges = WindowGauges()
    gauges.show(EXAMPLE)
    gauges.clear_after(MINUTE, EXAMPLE.closed_at + MINUTE)
    assert shown("clicks", arm="adapted") == 600
    gauges.clear_after(MINUTE, EXAMPLE.closed_at + MINUTE + 1)
    assert not series()


def test_who_loses_the_sample_shows_no_window_any_more_and_is_not_ready() -> None:
    quality: Any = Quality(Settings(), {"events.clicks": 4})
    sample = TP(f"{Settings().kafka.quality_group}-sample", 0)

    async def move() -> None:
        await quality._assigned(quality.app, {sample})
        await quality._settled(quality.app)
        quality._gauges.show(EXAMPLE)
        assert quality.joined
        await quality._revoked(quality.app, {sample})
        assert not quality.joined
        assert series(), "most rebalances give the same partition back"
        await quality._assigned(quality.app, {TP("events.clicks", 0)})

    asyncio.run(move())
    assert not series()
