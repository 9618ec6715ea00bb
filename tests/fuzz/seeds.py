"""Where fuzzing starts: the golden files' bytes, a few by hand, and what earlier runs kept (``corpus/``).

A corpus is a text file per target, base64, one input a line: the smallest of those that reached something new.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lloom_sidecar.protocol import names
from lloom_sidecar.protocol.compression import compress
from lloom_sidecar.protocol.envelope import open_envelope
from lloom_sidecar.protocol.framing import frame

from .crashes import CRASHES

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
GOLDEN = HERE.parent / "golden"
MAX_KEPT = 60
"""Inputs that a corpus file keeps."""
MAX_KEPT_BYTES = 512


def _golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _hexes(value: Any) -> Iterator[bytes]:
    """Everything in a golden file that is hex of some length."""
    if isinstance(value, dict):
        for one in value.values():
            yield from _hexes(one)
    elif isinstance(value, list):
        for one in value:
            yield from _hexes(one)
    elif isinstance(value, str) and len(value) > 8 and len(value) % 2 == 0 and set(value) <= set("0123456789abcdef"):
        yield bytes.fromhex(value)


def _wire() -> list[bytes]:
    return list(_hexes(_golden("frames")))


def _hello() -> list[bytes]:
    return list(_hexes(_golden("hello")))


def _envelopes() -> list[bytes]:
    return list(_hexes(_golden("envelopes")))


def _payloads() -> list[bytes]:
    """What the golden envelopes say, without their signature."""
    found = []
    for raw in _envelopes():
        for kind in names.ALL_KINDS:
            try:
                found.append(open_envelope(raw, kind).payload)
            except Exception:  # noqa: BLE001 - of another kind, or no envelope at all
                continue
    return found


def _key_files() -> list[bytes]:
    network = _golden("network")
    texts = [one for one in _strings(network) if one.startswith(("lloom-invite", "format:"))]
    return [text.encode() for text in texts]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


HEADS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/chat/completions?x=%20 HTTP/1.1\r\nhost: [::1]:80\r\ncontent-length: 5\r\nconnection: close\r\n\r\n",
    b"POST http://a:1/b HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.0 503 \r\ncontent-length: 0\r\nconnection: keep-alive, x\r\n\r\n",
]
CHUNKED = [b"5\r\nhello\r\n0\r\n\r\n", b"1;a=b\r\nx\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\nGET", b"0\r\n\r\n"]
EVENTS = [
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\ndata: [DONE]\n\n',
    b'\xef\xbb\xbfdata:{"choices":[{"delta":{},"finish_reason":"stop"}]}\r\n\r\ndata: [DONE]\r\n\r\n',
    b": ping\r\revent: x\rdata: a\rdata: b\r\r",
]
PARTS = [
    b'data: {"id":"1","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":"a<st"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"op>"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n',
    b'data: {"choices":[{"text":"xa"}]}\n\ndata: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
]
BODIES = [
    b'{"model":"m","stream":true,"n":2,"max_tokens":5,"messages":[{"role":"user","content":"a"}]}',
    b'{"model":"m","stream":true,"prompt":"a","max_tokens":9,"stop":["x","yz"],"logprobs":null}',
    b'{"model":"m","prompt":["a"],"stream_options":{"include_usage":false},"best_of":1}',
    b'{"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"data:x"}}]}],"tools":[]}',
]
ADDRESSES = [
    b"/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
    b"/ip6/2001:db8::1/udp/4001/quic-v1",
    b"/dns4/v.example/tcp/443/p2p-circuit",
    b"/unix/tmp/a.sock",
    bytes.fromhex("04c0000201060fa1"),
]
CONFIGS = [
    b'grace = "30"\nroles = ["client"]\nbootstrap = ["/ip4/192.0.2.1/tcp/4001"]\n',
    b"[api]\nhost = 1\n",
    b'heartbeat = 1.5\nlog_level = "debug"\napi = "127.0.0.1:0"\n',
]

SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "frames": _wire,
    "control_frames": lambda: [frame(b"abc") + frame(b"x" * 200), b"\x80\x80\x80\x80\x80\x00", b"\xff\xff\xff\xff\x0f"],
    "answer_frames": _wire,
    "request_frames": _wire,
    "hello_frames": _hello,
    "catalogue": lambda: [*_hello(), *_wire()],
    "envelopes": _envelopes,
    "announcements": lambda: [*_envelopes(), *_payloads()],
    "statuses": _payloads,
    "statements": _payloads,
    "compressed": lambda: [
        *(bytes((len(one) % 256,)) + compress(one) for one in (b"a" * 300, b"", bytes(range(200)))),
        b"\x05" + gzip.compress(b"hello", mtime=0),
    ],
    "providers": lambda: [bytes.fromhex("4a280a2200240801122000") + bytes(31)],
    "addresses": lambda: ADDRESSES,
    "key_files": _key_files,
    "http_heads": lambda: HEADS,
    "request_bodies": lambda: CHUNKED,
    "response_bodies": lambda: CHUNKED,
    "sse": lambda: EVENTS,
    "bodies": lambda: BODIES,
    "resumed": lambda: [*EVENTS, *PARTS],
    "continuations": lambda: BODIES,
    "configs": lambda: CONFIGS,
}


def read_corpus(name: str) -> list[bytes]:
    """What earlier runs kept for a target."""
    file = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in file.read_text().split()] if file.exists() else []


def write_corpus(name: str, inputs: list[bytes]) -> None:
    """Keep the smallest of them."""
    kept = sorted({one for one in inputs if len(one) <= MAX_KEPT_BYTES}, key=lambda one: (len(one), one))[:MAX_KEPT]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.txt").write_text("".join(base64.b64encode(one).decode() + "\n" for one in kept if one))


@lru_cache
def inputs_of(name: str) -> list[bytes]:
    """Everything that a target is known to have met."""
    return [*SEEDS[name](), *read_corpus(name), *CRASHES.get(name, [])]
