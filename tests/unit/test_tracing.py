"""Trace context and spans: from an application's request over attempts to the executor and its backend."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.tracing import NO_SPAN, Tracing, check_traceparent
from lloom_sidecar.tracing.otel import OPERATION_NAMES, OtelTracing, exporting
from tests.harness.otlp_receiver import OtlpReceiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class TestTraceparent:
    @pytest.mark.parametrize("text", [PARENT, PARENT[:-1] + "0", "cc" + PARENT[2:]])
    def test_taken(self, text: str) -> None:
        assert check_traceparent(text) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "ff" + PARENT[2:],
            PARENT.upper(),
            PARENT[:-1],
            PARENT + "0",
            PARENT + "-more",
            PARENT + "\n",
            f" {PARENT}",
            f"00-{'0' * 32}-b7ad6b7169203331-01",
            f"00-{TRACE}-{'0' * 16}-01",
            PARENT.replace("-", "_"),
        ],
    )
    def test_dropped(self, text: str) -> None:
        assert check_traceparent(text) == ""


class TestWithoutOpenTelemetry:
    def test_the_context_goes_on_untouched(self) -> None:
        tracing = Tracing()
        for span in (tracing.request(1, "m", PARENT), tracing.served(1, "m", PARENT)):
            assert span.traceparent == span.attempt("peer").traceparent == PARENT
            span.first_byte()
            span.end("ok", input_tokens=1)
        tracing.close()
        assert NO_SPAN.traceparent == ""

    def test_a_node_does_not_import_it(self) -> None:
        code = (
            "import sys, lloom_sidecar.cli.run_node; print([m for m in sys.modules if m.startswith('opentelemetry')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class Recorder:
    def __init__(self, provider: TracerProvider | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = provider or TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = OtelTracing(provider)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


def span_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def id_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class TestSpans:
    def test_a_request_that_fails_over(self) -> None:
        client, executor = Recorder(), Recorder()
        span = client.tracing.request(pb.OPERATION_CHAT, "llama", PARENT)
        first = span.attempt("peer-1")
        first.end("peer_unreachable")
        second = span.attempt("peer-2")
        served = executor.tracing.served(pb.OPERATION_CHAT, "llama", second.traceparent)
        second.first_byte()
        served.end("ok", output_tokens=7)
        second.end("ok")
        span.end("ok", input_tokens=3, output_tokens=7)

        failed, answered, whole = client.spans
        (at_executor,) = executor.spans
        for one in (failed, answered, whole, at_executor):
            assert id_of(one).split("-")[1] == TRACE
        assert whole.name == at_executor.name == "chat llama"
        assert (whole.kind, at_executor.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
        assert whole.parent is not None
        assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
        for one in (failed, answered):
            assert one.parent is not None
            assert one.parent.span_id == span_id(whole)
        assert at_executor.parent is not None
        assert at_executor.parent.span_id == span_id(answered)
        assert at_executor.parent.is_remote
        assert served.traceparent == id_of(at_executor)
        assert dict(whole.attributes or {}) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "lloom",
            "gen_ai.request.model": "llama",
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 7,
        }
        assert dict(failed.attributes or {}) == {"lloom.executor": "peer-1", "error.type": "peer_unreachable"}
        assert failed.status.status_code is StatusCode.ERROR
        assert [event.name for event in answered.events] == ["lloom.first_byte"]
        assert whole.status.status_code is StatusCode.UNSET

    def test_without_a_context_each_request_is_a_trace_of_its_own(self) -> None:
        recorder = Recorder()
        spans = [recorder.tracing.request(pb.OPERATION_EMBEDDINGS, "m", text) for text in ("", "nonsense")]
        for span in spans:
            assert check_traceparent(span.traceparent)
            span.end("cancelled")
        assert len({id_of(one).split("-")[1] for one in recorder.spans}) == 2
        assert all(one.parent is None for one in recorder.spans)

    def test_what_is_not_sampled_is_handed_on_and_not_recorded(self) -> None:
        recorder = Recorder(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
        span = recorder.tracing.request(pb.OPERATION_CHAT, "m", PARENT)
        span.attempt("peer").end("ok")
        span.end("ok")
        assert recorder.spans == []
        assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", span.traceparent)

    def test_names_of_the_operations(self) -> None:
        assert [OPERATION_NAMES[o] for o in (pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS, pb.OPERATION_EMBEDDINGS)] == [
            "chat",
            "text_completion",
            "embeddings",
        ]
        recorder = Recorder()
        recorder.tracing.served(pb.OPERATION_QUOTE, "m", "").end("ok")
        assert recorder.spans[0].name == "query m"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def test_spans_arrive_at_an_otlp_receiver(receiver: OtlpReceiver) -> None:
    tracing = exporting(receiver.url, version="1.2", instance="12D3")
    tracing.request(pb.OPERATION_CHAT, "llama", PARENT).end("ok")
    tracing.close()
    (taken,) = receiver.taken
    resource = {one.key: one.value.string_value for one in taken.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "lloom-sidecar"
    assert (resource["service.version"], resource["service.instance.id"]) == ("1.2", "12D3")
    (span,) = taken.resource_spans[0].scope_spans[0].spans
    assert (span.name, span.trace_id.hex()) == ("chat llama", TRACE)
