"""Spans by OpenTelemetry; of the extra ``otel``.

Contexts are passed explicitly, never by OpenTelemetry's current context: the tasks of a nursery share one.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSdkSpan

from . import Span, Tracing, check_traceparent

OPERATION_NAMES: Final = {1: "chat", 2: "text_completion", 3: "embeddings", 4: "responses", 5: "messages"}
"""The wire's operation -> ``gen_ai.operation.name``."""
PROVIDER: Final = "lloom"
MAX_WAITING_SPANS: Final = 2048
CLOSE_TIMEOUT_MS: Final = 3000


class OtelSpan(Span):
    """A span that is recorded, or, when it was not sampled, only handed on."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Tracer, span: OtelSdkSpan) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
        self._tracer = tracer
        self._span = span

    def attempt(self, executor: str) -> Span:
        """A child span."""
        span = self._tracer.start_span(
            "lloom.attempt",
            context=set_span_in_context(self._span),
            kind=SpanKind.CLIENT,
            attributes={"lloom.executor": executor},
        )
        return OtelSpan(self._tracer, span)

    def first_byte(self) -> None:
        """An event of the span."""
        self._span.add_event("lloom.first_byte")

    def end(self, code: str, *, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """End it with usage, and the code as ``error.type``."""
        if input_tokens is not None:
            self._span.set_attribute("gen_ai.usage.input_tokens", input_tokens)
        if output_tokens is not None:
            self._span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        if code != "ok":
            self._span.set_attribute("error.type", code)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class OtelTracing(Tracing):
    """Makes the spans; they go to ``provider``'s processors."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lloom")

    def request(self, operation: int, model: str, traceparent: str) -> Span:
        """``chat MODEL``, of kind CLIENT."""
        return self._begin(operation, model, traceparent, SpanKind.CLIENT)

    def served(self, operation: int, model: str, traceparent: str) -> Span:
        """``chat MODEL``, of kind SERVER."""
        return self._begin(operation, model, traceparent, SpanKind.SERVER)

    def close(self) -> None:
        """Flush and shut down."""
        self._provider.force_flush(CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _begin(self, operation: int, model: str, traceparent: str, kind: SpanKind) -> Span:
        name = OPERATION_NAMES.get(operation, "query")
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": name,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
        }
        span = self._tracer.start_span(
            f"{name} {model}", context=_context_of(traceparent), kind=kind, attributes=attributes
        )
        return OtelSpan(self._tracer, span)


def make_provider(exporter: SpanExporter, *, version: str, instance: str) -> TracerProvider:
    """A provider whose spans go to ``exporter`` in batches, from a thread of their own. ``instance``: the peer id.

    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_TRACES_SAMPLER are heeded.
    """
    resource = Resource.create({"service.version": version, "service.instance.id": instance})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # nobody said another
        resource = resource.merge(Resource({"service.name": "lloom-sidecar"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING_SPANS))
    return provider


def exporting(endpoint: str | None, *, version: str, instance: str) -> OtelTracing:
    """Tracing whose spans go to an OTLP receiver over HTTP.

    Args:
        endpoint: its base URL, such as http://127.0.0.1:4318; None = what the OTEL_EXPORTER_OTLP_ variables say.

    Raises ImportError when the exporter is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=None if endpoint is None else f"{endpoint}/v1/traces")
    return OtelTracing(make_provider(exporter, version=version, instance=instance))


def _context_of(traceparent: str) -> Context | None:
    if not check_traceparent(traceparent):
        return Context()  # a new trace, whatever the current context is
    _, trace_id, span_id, flags = traceparent.split("-")
    remote = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(remote), Context())
