"""A W3C trace from an event's header to its score's, and to a collector that speaks OTLP."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from test_adapt import World, wait_for

from innerloop.config import Settings
from innerloop.store.database import connect
from innerloop.streams import clients
from innerloop.streams.batch import record_of
from innerloop.streams.publisher import Headers
from innerloop.streams.topics import ensure_topics
from innerloop.worker import processes

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # the standard's own example
EVENT = {"event_type": "click", "item_id": "i1", "event_time": 1_750_000_000_000}
USER, OTHER = "traced", "not traced"


class Collector(BaseHTTPRequestHandler):
    """Keeps what is sent to it."""

    requests: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        self.requests.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    requests: list[ExportTraceServiceRequest] = []
    server = HTTPServer(("127.0.0.1", 0), type("Collector", (Collector,), {"requests": requests}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> Iterator[World]:
    ensure_topics(settings)
    engine = connect(settings.database)
    made = World(settings, engine, tmp_path)
    made.register(1)
    yield made
    engine.dispose()


@pytest.fixture
def loop(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Ingest and adapt, each in a thread; what it gives stops them, which sends what spans are left."""
    asked = threading.Event()
    monkeypatch.setattr(processes, "stop_on_signals", lambda: asked.is_set)
    threads = [
        threading.Thread(target=processes.run_ingest, args=(world.settings,)),
        threading.Thread(target=processes.run_adapt, args=(world.settings, "cpu", 1)),
    ]
    for thread in threads:
        thread.start()

    def stop() -> None:
        asked.set()
        for thread in threads:
            thread.join(30)

    yield stop
    stop()


def test_a_trace_goes_from_the_event_to_its_score_and_to_the_collector(
    world: World, loop: Callable[[], None], collected: list[ExportTraceServiceRequest]
) -> None:
    producer = clients.producer(world.settings.kafka)
    traced: Headers = [("traceparent", f"00-{TRACE}-{PARENT}-01".encode())]
    for user, headers in ((USER, traced), (OTHER, None)):
        value = json.dumps({**EVENT, "event_id": user, "user_id": user})
        producer.produce(world.settings.topics.clicks, value, user, headers=headers)
    assert producer.flush(10) == 0
    wait_for(lambda: (world.of(USER) and world.of(OTHER)) or None)
    loop()

    records = [record_of(message) for message in world.log(world.settings.topics.recommendations)]
    found = {record.key: dict(record.headers) for record in records}
    assert "traceparent" not in found[OTHER.encode()]
    shown = found[USER.encode()]["traceparent"] or b""
    version, trace, span, flags = shown.decode().split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")

    spans = {
        each.name: each
        for request in collected
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for each in scope.spans
    }
    ingest, adapt = spans["innerloop.ingest"], spans["innerloop.adapt"]
    assert ingest.trace_id.hex() == adapt.trace_id.hex() == TRACE
    assert ingest.parent_span_id.hex() == PARENT
    assert adapt.parent_span_id == ingest.span_id
    assert adapt.span_id.hex() == span, "who reads the score goes on from adapt's span"
    assert USER not in str(spans), "never whose record it was"
