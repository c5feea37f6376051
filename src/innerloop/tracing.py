"""W3C trace context from event to score: the header `traceparent`, https://www.w3.org/TR/trace-context/.

Where an exporter is configured in OpenTelemetry's own way (OTEL_EXPORTER_OTLP_ENDPOINT or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT), an event record with that header gets a span in ingest, the request names it as
its parent, adapt's span names the request's, and the score records carry adapt's. Without an exporter, or without the
header, nothing is done and nothing is paid. Spans say how large the batch was, never whose the record was.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from innerloop.errors import SettingsError

HEADER = "traceparent"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Headers = list[tuple[str, str | bytes | None]]


class Spans:
    """The open spans of a batch, by user."""

    def __init__(self, spans: Mapping[str, Any]) -> None:
        self._spans = spans

    def headers(self, user: str) -> Headers:
        """The header that makes what follows this user's child; none for a user who is not traced."""
        span = self._spans.get(user)
        if span is None:
            return []
        context = span.get_span_context()
        return [(HEADER, f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")]


NOT_TRACED = Spans({})


class Traces:
    """Opens the spans of batches; without a tracer none."""

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer

    @contextmanager
    def spans(self, name: str, parents: Callable[[], Mapping[str, str]], records: int) -> Iterator[Spans]:
        """A span for each user, child of its `traceparent`, as long as the context lasts.

        `parents` is only asked when there is a tracer. A malformed one begins a new trace, as the standard has it.
        """
        if self._tracer is None:
            yield NOT_TRACED
            return
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - only where it is installed
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        context = TraceContextTextMapPropagator()
        open_spans = {
            user: self._tracer.start_span(
                name,
                context=context.extract({HEADER: parent}),
                kind=SpanKind.CONSUMER,
                attributes={"messaging.system": "kafka", "messaging.batch.message_count": records},
            )
            for user, parent in parents().items()
        }
        try:
            yield Spans(open_spans)
        finally:
            for span in open_spans.values():
                span.end()


@contextmanager
def exported_traces(process: str) -> Iterator[Traces]:
    """Traces whose spans are sent to the configured collector while the context lasts, if there is one.

    Raises SettingsError when one is configured and the packages that send to it are missing.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        yield Traces()
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
        yield Traces(provider.get_tracer("innerloop"))
    finally:
        provider.shutdown()  # sends what is left


def newest_parents(
    records: Iterable[tuple[bytes | None, Sequence[tuple[str, str | bytes | None]] | None]],
) -> dict[str, str]:
    """By key (the user), the last `traceparent` among the headers of its records, which are given in order."""
    found = {}
    for key, headers in records:
        for name, value in headers or ():
            if name == HEADER and key and isinstance(value, bytes):
                found[key.decode(errors="replace")] = value.decode("ascii", "replace")
    return found
