"""One trace from the application to the backend, through real nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Network
from tests.harness.otlp_receiver import OtlpReceiver
from tests.harness.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
APP_SPAN = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{APP_SPAN}-01"
PROMPT = "chunks=4 a-secret-of-the-application"


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def network(receiver: OtlpReceiver) -> Iterator[Network]:
    """The second client and the second executor send spans; the first of each know nothing of OpenTelemetry."""
    with Network(validators=1, executors=1, clients=1) as network:
        network.executors.append(network.add("executor", "--otlp-endpoint", receiver.url))
        network.clients.append(network.add("client", "--otlp-endpoint", receiver.url))
        for client in network.clients:
            network.wait_known(client)
        yield network


def ask(network: Network, client: int, executor: int, **headers: str) -> str | None:
    """What the executor's backend got as traceparent."""
    pin = {"x-lloom-pin-executor": network.executors[executor].peer}
    body = {"model": "scripted", "messages": [{"role": "user", "content": PROMPT}]}
    answer = network.clients[client].post("/v1/chat/completions", body, headers={**pin, **headers})
    assert answer.status_code == 200, answer.text
    found: str | None = network.backends[executor].requests()[-1]["traceparent"]
    return found


def test_without_opentelemetry_the_context_goes_through_untouched(network: Network) -> None:
    assert ask(network, 0, 0, traceparent=PARENT) == PARENT
    assert ask(network, 0, 0) is None
    assert ask(network, 0, 0, traceparent=PARENT.upper()) is None


def test_each_hop_is_a_span_of_the_applications_trace(network: Network, receiver: OtlpReceiver) -> None:
    at_backend = ask(network, 1, 1, traceparent=PARENT)
    spans = wait_until(
        lambda: (all_ := [s for s in receiver.spans() if s.trace_id.hex() == TRACE]) and len(all_) >= 3 and all_,
        "the spans to arrive",
        timeout_s=30,
    )
    by_parent = {span.parent_span_id.hex(): span for span in spans}
    chain = []
    parent = APP_SPAN
    while parent in by_parent:
        chain.append(by_parent[parent])
        parent = by_parent[parent].span_id.hex()
    assert [span.name for span in chain] == ["chat scripted", "lloom.attempt", "chat scripted"]
    assert at_backend == f"00-{TRACE}-{parent}-01"
    attributes = {one.key: one.value for one in chain[0].attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 4
    executor = {one.key: one.value.string_value for one in chain[1].attributes}["lloom.executor"]
    assert executor == network.executors[1].peer
    assert "a-secret" not in str(receiver.taken)


def test_a_node_that_ends_sends_its_last_spans(network: Network, receiver: OtlpReceiver) -> None:
    trace = "1" * 32
    ask(network, 1, 0, traceparent=f"00-{trace}-{APP_SPAN}-01")
    assert network.clients[1].stop() == 0
    assert [s.name for s in receiver.spans() if s.trace_id.hex() == trace] == ["lloom.attempt", "chat scripted"]
