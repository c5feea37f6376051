"""W3C trace context from event to score: the header `traceparent`, https://www.w3.org/TR/trace-context/.

Where an exporter is configured in OpenTelemetry's own way (OTEL_EXPORTER_OTLP_ENDPOINT or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT), an event record with that header gets a span in ingest, the request names it as
its parent, adapt's span names the request's, and the score record carries adapt's. Without an exporter, or without the
header, nothing is done and nothing is paid. Spans say where a record lay, never whose it was.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

from innerloop.errors import SettingsError

HEADER = "traceparent"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Headers = list[tuple[str, str]]


def exporter_configured() -> bool:
    """Whether OpenTelemetry's environment names a collector."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


@contextmanager
def tracer(process: str) -> "Iterator[Tracer | None]":
    """A tracer whose spans are sent while the context lasts; None without a configured exporter.

    Raises SettingsError when one is configured and the packages that send to it are missing.
    """
    if not exporter_configured():
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise SettingsError(
            f"{' or '.join(_ENDPOINTS)} is set, but OpenTelemetry is not installed: install innerloop[telemetry]."
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"innerloop-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield Tracer(provider.get_tracer("innerloop"))
    finally:
        provider.shutdown()  # sends what is left


class Tracer:
    """Opens and closes the spans of a batch."""

    def __init__(self, opened_by: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._tracer, self._context = opened_by, TraceContextTextMapPropagator()

    def start(self, name: str, parents: Mapping[str, str], attributes: Mapping[str, str | int]) -> "Spans":
        """A span for each key (a user), child of its `traceparent`; one that is malformed begins a new trace."""
        spans = {
            key: self._tracer.start_span(
                name, context=self._context.extract({HEADER: parent}), attributes=dict(attributes)
            )
            for key, parent in parents.items()
        }
        return Spans(spans, self._context)


class Spans:
    """The open spans of a batch, by user."""

    def __init__(self, spans: Mapping[str, Any], context: Any) -> None:
        self._spans, self._context = spans, context

    def headers(self, key: str) -> Headers:
        """The header that makes what follows this user's child; none for a user who is not traced."""
        span = self._spans.get(key)
        if span is None:
            return []
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        carrier: dict[str, str] = {}
        self._context.inject(carrier, set_span_in_context(span))
        return list(carrier.items())

    def end(self) -> None:
        """Close all of them."""
        for span in self._spans.values():
            span.end()


NOT_TRACED = Spans({}, None)


def traceparents(headers: Iterable[tuple[str, list[tuple[str, bytes | None]] | None]]) -> dict[str, str]:
    """By key (a user), the newest `traceparent` among its records' headers, which are given in order."""
    found = {}
    for key, pairs in headers:
        for name, value in pairs or ():
            if name == HEADER and value:
                found[key] = value.decode("ascii", "replace")
    return found
