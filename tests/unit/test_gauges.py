"""The thread that measures: what one gauge meets is not the others' business. Lag itself is in tests/integration."""

import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from innerloop.config import HttpSettings, KafkaSettings, Settings
from innerloop.errors import ServiceError
from innerloop.worker import gauges

NOWHERE = Settings(
    kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1"), http=HttpSettings(port=9)
)  # a reader is made, which reads nothing


def until(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_gauge_that_cannot_be_read_leaves_the_others_alone_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_EVERY_SECONDS", 0.01)
    looked: Counter[str] = Counter()

    def breaks(_: object) -> None:
        looked["breaks"] += 1
        raise ValueError("nobody thought of this")

    def away(_: object) -> None:
        looked["away"] += 1
        raise ServiceError("no broker answers")

    def works(_: object) -> None:
        looked["works"] += 1

    with capture_logs() as lines, gauges.measured(NOWHERE, breaks, away, works):
        until(lambda: looked["works"] > 5)
    assert looked["breaks"] > 5
    assert looked["away"] > 5
    assert [line["why"] for line in lines] == ["ValueError('nobody thought of this')", "no broker answers"]


def test_a_driver_that_does_not_tell_the_load_leaves_memory_and_lag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML refuses it for part of a GPU, and torch raises what it likes where the driver's library is missing."""

    def refused(_: str) -> int:
        raise RuntimeError("NVML: Not Supported")

    monkeypatch.setattr(gauges, "_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(torch.cuda, "utilization", refused)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7_000)
    looked: Counter[str] = Counter()
    with gauges.measured(NOWHERE, *gauges.gpu_gauges("cuda:9"), lambda _: looked.update(lag=1)):
        until(lambda: looked["lag"] > 3)
    assert REGISTRY.get_sample_value("innerloop_gpu_memory_bytes", {"device": "cuda:9"}) == 7_000
    assert REGISTRY.get_sample_value("innerloop_gpu_busy_ratio", {"device": "cuda:9"}) is None
