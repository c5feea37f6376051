import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, start_http_server

from innerloop.worker.scrape import Latency, Scraped, quantile, scrape
from innerloop.worker.watched_process import free_ports

BUCKETS = (0.01, 0.02, 0.05, 0.1, 1.0)


@pytest.fixture
def process() -> Iterator[tuple[str, Histogram]]:
    """A process that shows a histogram of latencies."""
    registry = CollectorRegistry()
    histogram = Histogram("innerloop_event_to_score_seconds", "As ours", buckets=BUCKETS, registry=registry)
    (port,) = free_ports(1)
    server, thread = start_http_server(port, "127.0.0.1", registry)
    assert isinstance(thread, threading.Thread)
    yield f"127.0.0.1:{port}", histogram
    server.shutdown()
    server.server_close()


def test_percentiles_are_of_what_came_since_the_last_look(process: tuple[str, Histogram]) -> None:
    target, histogram = process
    latency = Latency()
    for _ in range(100):
        histogram.observe(0.9)
    assert latency.since(scrape([target]), 0.5)[0] == pytest.approx(0.55, abs=0.01)
    for _ in range(100):
        histogram.observe(0.015)
    p50, p99 = latency.since(scrape([target]), 0.5, 0.99)
    assert p50 == pytest.approx(0.015)
    assert p99 == pytest.approx(0.0199)
    assert math.isnan(latency.since(scrape([target]), 0.5)[0])


def test_a_process_that_starts_anew_counts_from_zero() -> None:
    def of(count: float) -> list[Scraped]:
        name = "innerloop_event_to_score_seconds_bucket"
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {(name, (("le", "0.1"),)): count}
        return [Scraped("here:1", up=True, values=values)]

    latency = Latency()
    latency.since(of(100.0), 0.5)
    assert latency.since(of(10.0), 0.5)[0] == pytest.approx(0.05)


def test_a_quantile_is_within_its_bucket_of_the_exact_one() -> None:
    rng = np.random.default_rng(3)
    values = rng.gamma(2.0, 0.02, 5_000)
    buckets = {bound: float((values <= bound).sum()) for bound in (*BUCKETS, math.inf)}
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = float(np.quantile(values, share))
        low = max([0.0, *(bound for bound in BUCKETS if bound < exact)])
        high = min(bound for bound in (*BUCKETS, math.inf) if bound >= exact)
        assert low <= quantile(buckets, share) <= high


def test_a_process_that_does_not_answer_is_shown_as_such() -> None:
    (port,) = free_ports(1)
    assert [(each.up, each.total("anything")) for each in scrape([f"127.0.0.1:{port}"])] == [(False, 0.0)]
    assert scrape([]) == []
