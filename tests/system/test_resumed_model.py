"""The embedded model (llama.cpp) cut and resumed: what the application gets, and how often it is the uncut text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from lloom_sidecar.protocol.continuation import continued
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.harness import Network, Node
from tests.harness.cut_streams import wait_can_resume

QUESTIONS = (
    "Tell me a story about a lighthouse keeper.",
    "Explain how bread is made, step by step.",
    "List ten animals with one sentence about each.",
    "Write Python code that sorts a list, with comments.",
)
TOKENS = 64

pytestmark = pytest.mark.soak


def asked(question: str) -> dict[str, Any]:
    return {
        "model": "smollm2:135m",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "seed": 1,
        "stream": True,
    }


def pieces(client: Node, body: dict[str, Any], kill: Network | None = None) -> tuple[list[str], str]:
    """(texts of the chunks, finish reason); with ``kill`` the executor that answers dies after a dozen of them."""
    found: list[str] = []
    finish = ""
    with (
        httpx.Client(timeout=120, trust_env=False) as http,
        http.stream("POST", f"{client.api}/v1/chat/completions", json=body, headers={"x-lloom-resume": "on"}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                finish = choice["finish_reason"] or finish
                if choice["delta"].get("content"):
                    found.append(choice["delta"]["content"])
            if kill is not None and len(found) == 12:
                victim = kill.node_of(answer.headers["x-lloom-executor"])
                victim.kill()
                kill = None
    return found, finish


def test_cut_and_resumed() -> None:
    with Network(validators=1, executors=2, clients=1, backend="builtin", flags=["--heartbeat", "1"]) as network:
        wait_can_resume(network, network.executors)
        client = network.client
        same = seams = 0
        for question in QUESTIONS:
            body = asked(question)
            whole, _ = pieces(client, body)
            again, _ = pieces(client, body)
            print(f"\n{question} asked twice: {'the same' if whole == again else 'DIFFERENT'}")
            for at in range(3, len(whole) - 3, 4):
                rest = continued(body, pb.OPERATION_CHAT, "".join(whole[:at])) | {"max_tokens": TOKENS - at}
                got, _ = pieces(client, rest)
                seams += 1
                if "".join(whole[:at] + got) == "".join(whole):
                    same += 1
                else:
                    print(f"  seam at {at}: {''.join(whole[at:])[:40]!r} became {''.join(got)[:40]!r}")
        print(f"{same} of {seams} seams: the text is the uncut one")
        whole, finish = pieces(client, asked(QUESTIONS[0]))
        got, got_finish = pieces(client, asked(QUESTIONS[0]), kill=network)
        print(f"killed in the middle: {'the uncut text' if ''.join(got) == ''.join(whole) else 'another text'}")
        assert "".join(got)[: len("".join(whole[:12]))] == "".join(whole[:12])
        assert len(got) > 12
        assert got_finish in ("stop", "length")
        assert finish
