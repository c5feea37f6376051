import math
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, start_http_server

from innerloop.worker.scrape import Latency, Scraped, answers, quantile, scrape
from innerloop.worker.servers.watched_process import free_ports

NAME = "innerloop_event_to_score_seconds"
BUCKETS = (0.01, 0.02, 0.05, 0.1, 1.0)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Histogram]]:
    """A process that shows a histogram of latencies, and may take its time."""
    monkeypatch.setattr("innerloop.worker.scrape._SECONDS", 30.0)
    registry = CollectorRegistry()
    histogram = Histogram(NAME, "As ours", buckets=BUCKETS, registry=registry)
    (port,) = free_ports(1)
    server, thread = start_http_server(port, "127.0.0.1", registry)
    assert isinstance(thread, threading.Thread)
    yield f"127.0.0.1:{port}", histogram
    server.shutdown()
    server.server_close()


def test_percentiles_are_of_what_came_since_the_last_look(process: tuple[str, Histogram]) -> None:
    target, histogram = process
    latency = Latency(NAME, looks=2)
    histogram.observe(0.01)
    latency.add(scrape([target]))
    assert math.isnan(latency.percentiles(0.5)[0])  # of before the first look
    for _ in range(100):
        histogram.observe(0.9)
    latency.add(scrape([target]))
    assert latency.percentiles(0.5) == [pytest.approx(0.55, abs=0.01)]
    for _ in range(100):
        histogram.observe(0.015)
    latency.add(scrape([target]))
    assert latency.percentiles(0.5, 0.99, looks=1) == [pytest.approx(0.015), pytest.approx(0.0199)]
    assert latency.percentiles(0.5, 0.75) == [pytest.approx(0.02), pytest.approx(0.55, abs=0.01)]  # of both looks
    latency.add(scrape([target]))
    assert math.isnan(latency.percentiles(0.5, looks=1)[0])
    assert latency.percentiles(0.99) == [pytest.approx(0.0199)]  # the first look is forgotten


def test_a_process_that_starts_anew_counts_from_zero() -> None:
    def of(count: float) -> list[Scraped]:
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {(f"{NAME}_bucket", (("le", "0.1"),)): count}
        return [Scraped("here:1", up=True, values=values)]

    latency = Latency(NAME, looks=60)
    latency.add([])
    latency.add(of(100.0))
    latency.add(of(10.0))
    assert latency.percentiles(0.5, looks=1) == [pytest.approx(0.05)]


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


def test_a_process_that_is_killed_in_mid_answer_or_is_somebody_else_is_shown_as_not_up() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n"
    for said in (head + b"innerloop_partitions 1.0\n", b"HTTP/1.0 200 OK\r\n\r\n\xff{", b"SSH-2.0-dropbear\r\n"):
        with saying(said) as target:
            assert [each.up for each in scrape([target])] == [False]
            assert not answers(f"http://{target}/livez") or said.startswith(b"HTTP")


@pytest.mark.parametrize("target", ["localhost", "localhost:", "localhost:99999", ":1", ""])
def test_what_is_no_address_is_shown_as_not_up(target: str) -> None:
    assert [each.up for each in scrape([target])] == [False]


@contextmanager
def saying(content: bytes) -> Iterator[str]:
    """A server that hangs up after these bytes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            self.request.sendall(content)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
