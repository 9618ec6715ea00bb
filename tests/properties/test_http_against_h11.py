"""The same bytes to our server and to h11: same requests, whatever the cutting; what h11 refuses we refuse.

Where we are stricter, ``STRICTER`` says why.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import h11
import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lloom_sidecar.http.chunked import ResponseDechunker
from lloom_sidecar.http.errors import BadResponseError, IncompleteBodyError, RequestRefusedError
from lloom_sidecar.http.heads import HEAD_END, parse_request_head, parse_response_head
from lloom_sidecar.http.limits import HttpLimits
from lloom_sidecar.http.listeners import open_unix_listener
from lloom_sidecar.http.server import Request, Response, serve

EXAMPLES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
LIMITS = HttpLimits(max_body_bytes=10_000)

H = b"GET / HTTP/1.1\r\nHost: a\r\n"
C = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
STRICTER: list[tuple[str, bytes, str]] = [
    # what our answer says, an example that h11 takes, why we do not
    ("line that does not end with CRLF", H + b"X: a\nY: b\r\n\r\n", "bare LF is how requests are smuggled"),
    ("not valid HTTP/1.1", H + b"X: a\r\n b\r\n\r\n", "obs-fold: RFC 9112 5.2 has a server refuse it"),
    ("not valid HTTP/1.1", H + b"X: a\x1bb\r\n\r\n", "control characters in values: RFC 9110 5.5"),
    ("Only HTTP/1.1 and HTTP/1.0", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", "other versions are answered 505"),
    ("Content-Length is not one number", H + b"Content-Length: 1, 1\r\n\r\na", "RFC 9110 8.6 allows it"),
    ("both Content-Length and", C[:-2] + b"Content-Length: 1\r\n\r\n0\r\n\r\n", "RFC 9112 6.1: an error"),
    ("does not exist in HTTP/1.0", C.replace(b"1.1", b"1.0") + b"0\r\n\r\n", "RFC 9112 6.1: faulty framing"),
    ("invalid Host header", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "the guard decides by it"),
    ("target is invalid", b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", "RFC 9112 3.2"),
    ("has a fragment", b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", "RFC 9112 3.2: no form has one"),
    ("authority is invalid", b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", "as the Host; no userinfo"),
    ("percent escape", b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n", "what cannot be decoded is routed nowhere"),
    ("not UTF-8", b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", "the same"),
    ("has a NUL", b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", "the same"),
    ("expectation", H + b"Expect: x\r\n\r\n", "RFC 9110 10.1.1: 417"),
    ("chunk-size line", C + b"1 \r\na\r\n0\r\n\r\n", "RFC 9112 7.1; 16 digits, 256 bytes"),
    ("trailers are invalid", C + b"0\r\nX: a\n\r\n", "as headers: no bare LF, no obs-fold"),
    ("body is over", C + b"2711\r\n" + b"a" * 10_001 + b"\r\n0\r\n\r\n", "the limit of this test's server"),
    ("body is larger than", H + b"Content-Length: 10001\r\n\r\n" + b"a" * 10_001, "the limit of this test's server"),
]  # fmt: skip


@dataclass
class Outcome:
    """What became of one connection's bytes."""

    requests: list[tuple[str, bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    refusal: str | None = None


def by_h11(data: bytes) -> Outcome:
    outcome = Outcome()
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1_000_000)
    parser.receive_data(data)
    request: Any = None
    body = b""
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                outcome.requests.append((request.method.decode(), bytes(request.target), list(request.headers), body))
                parser.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                parser.send(h11.EndOfMessage())
                if parser.our_state is not h11.DONE:
                    return outcome
                parser.start_next_cycle()
            else:
                return outcome
    except h11.RemoteProtocolError as exc:
        outcome.refusal = str(exc)
        return outcome


async def by_us(path: str, pieces: Sequence[bytes], outcomes: dict[str, Outcome], name: str) -> Outcome:
    outcome = outcomes[name] = Outcome()
    answer = b""
    async with await trio.open_unix_socket(path) as stream:
        for piece in pieces:
            if piece:
                try:
                    await stream.send_all(piece)
                except trio.BrokenResourceError:
                    break
                await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            while True:
                scope.deadline = trio.current_time() + 0.002
                try:
                    data = await stream.receive_some(65536)
                except trio.BrokenResourceError:
                    break  # sent on after an answer that closed the connection
                if not data:
                    break
                answer += data
    statuses = re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answer)
    if statuses and statuses[-1] not in (b"200", b"100"):
        outcome.refusal = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"]
    return outcome


def run_all(data: bytes, cuttings: Sequence[Sequence[int]]) -> list[Outcome]:
    current: list[Outcome] = []
    outcomes: dict[str, Outcome] = {}
    errors: list[BaseException] = []

    async def handler(request: Request, response: Response) -> None:
        body = await request.body()
        outcomes["now"].requests.append((request.method, request.target, request.headers, body))
        await response.send(200, (), b"")

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "s")
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: serve(
                        [open_unix_listener(path)],
                        handler,
                        limits=LIMITS,
                        on_error=lambda exc, request: errors.append(exc),
                        task_status=task_status,
                    )
                )
                for cuts in cuttings:
                    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
                    pieces = [data[a:b] for a, b in pairwise(edges)]
                    current.append(await by_us(path, pieces, outcomes, "now"))
                nursery.cancel_scope.cancel()

    trio.run(main)
    assert errors == []
    return current


TOKENS = st.sampled_from([b"GET", b"POST", b"OPTIONS", b"BREW"])
TARGETS = st.sampled_from([b"/", b"/v1/chat/completions?a=b", b"/%C3%A4%20", b"http://other:1/x", b"*", b"/a//b;c"])
FIELDS = st.sampled_from(
    [b"Accept: */*", b"X-A:  b \t", b"x-a:", b"Connection: keep-alive", b"Connection: close", b"X: \xe4\tb",
     b"Expect: 100-continue", b"Cookie: a=b; c=d"]
)  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """The head's last lines, the blank line, and the body."""
    kind = draw(st.sampled_from(["none", "length", "chunked"]))
    content = draw(st.binary(max_size=30))
    if kind == "none":
        return b"\r\n"
    if kind == "length":
        return b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    chunks = b"".join(
        b"%x%b\r\n%b\r\n" % (len(part), draw(st.sampled_from([b"", b";a=b", b";c"])), part)
        for part in (content[:7], content[7:])
        if part
    )
    trailers = draw(st.sampled_from([b"", b"X-Sum: 1\r\n"]))
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailers + b"\r\n"


@st.composite
def valid_requests(draw: st.DrawFn) -> bytes:
    lines = [
        draw(TOKENS) + b" " + draw(TARGETS) + b" HTTP/1.1",
        b"Host: localhost:4880",
        *draw(st.lists(FIELDS, max_size=3)),
    ]
    return b"".join(line + b"\r\n" for line in lines) + draw(bodies())


SPICES = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b"\x80", b"#", b"%", b"0", b"5", b",", b"+", b";", b"\r\n ",
     b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n",
     b"Transfer-Encoding: gzip\r\n", b"HTTP/1.0", b"HTTP/2.0", b"\x1b", b"Expect: y\r\n", b"X : y\r\n", b"\r\n\r\n"]
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    data = draw(source)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        if draw(st.booleans()):
            # At a line's start most spices mean more.
            at = data.find(b"\n", at) + 1
        drop = draw(st.integers(0, 2))
        data = data[:at] + draw(st.one_of(st.just(b""), SPICES)) + data[at + drop :]
    return data


STREAMS = mutated(st.lists(valid_requests(), min_size=1, max_size=3).map(b"".join))
CUTS = st.lists(st.integers(0, 400), max_size=6)


@EXAMPLES
@given(STREAMS, CUTS)
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nX: a\nb\r\n\r\n", [3])
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\na", [])
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [])
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1 \r\na\r\n0\r\n\r\n", [])
@example(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", [])
def test_same_requests_whatever_the_cutting(data: bytes, cuts: list[int]) -> None:
    whole, *others = run_all(data, [[], cuts, range(0, len(data), 1) if len(data) < 120 else [len(data) // 2]])
    for other in others:
        assert other == whole
    reference = by_h11(data)
    assert whole.requests == reference.requests[: len(whole.requests)]
    if reference.refusal is not None and len(whole.requests) == len(reference.requests):
        # h11 may see the end of a request only in bytes that we still wait for; otherwise we refuse as well.
        assert whole.refusal is not None
    if len(whole.requests) < len(reference.requests):
        assert whole.refusal is not None
        assert [why for message, _, why in STRICTER if message in whole.refusal], whole.refusal


@pytest.mark.parametrize(("message", "data", "why"), STRICTER)
def test_where_we_are_stricter(message: str, data: bytes, why: str) -> None:
    reference = by_h11(data)
    assert (len(reference.requests), reference.refusal) == (1, None)
    (outcome,) = run_all(data, [[]])
    assert outcome.requests == []
    assert message in (outcome.refusal or "")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), mutated(valid_requests())))
def test_garbage_raises_only_the_refusal(data: bytes) -> None:
    try:
        head = parse_request_head(data, 128)
    except RequestRefusedError:
        return
    assert data.endswith(HEAD_END)
    assert head.method


@st.composite
def response_heads(draw: st.DrawFn) -> bytes:
    lines = [
        draw(st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 404 Not Found", b"HTTP/1.0 200 OK", b"HTTP/1.1 503 "])),
        *draw(st.lists(FIELDS, max_size=3)),
        *draw(st.sampled_from([[], [b"Content-Length: 5"], [b"Transfer-Encoding: chunked"], [b"Connection: close"]])),
    ]
    return b"".join(line + b"\r\n" for line in lines) + b"\r\n"


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), mutated(response_heads())))
def test_response_heads_against_h11(data: bytes) -> None:
    try:
        head = parse_response_head(data, 128, head_only=False)
    except BadResponseError:
        return
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    event = parser.next_event()
    assert isinstance(event, (h11.Response, h11.InformationalResponse))
    assert event.status_code == head.status
    assert [(bytes(name), bytes(value)) for name, value in event.headers] == head.headers


def h11_body(data: bytes) -> tuple[str, bytes]:
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    parser.next_event()
    content = b""
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Data):
                content += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return "whole", content
            else:
                return "incomplete", content
    except h11.RemoteProtocolError:
        return "broken", content


def our_body(data: bytes, cuts: Sequence[int]) -> tuple[str, bytes]:
    dechunker = ResponseDechunker()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    content = b""
    try:
        for start, end in pairwise(edges):
            content += dechunker.feed(data[start:end])
    except IncompleteBodyError:
        with pytest.raises(IncompleteBodyError):
            dechunker.feed(b"0\r\n\r\n")
        return "broken", b""
    return ("whole" if dechunker.done else "incomplete"), content


FRAMING_TRAILER: Final = re.compile(rb"(?i)\n(?:transfer-encoding|content-length)[ \t]*:")


@st.composite
def chunked_bodies(draw: st.DrawFn) -> bytes:
    parts = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4))
    trailers = draw(st.sampled_from([b"", b"X: y\r\n"]))
    surplus = draw(st.sampled_from([b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", b"x"]))
    extension = draw(st.sampled_from([b"", b";a=b"]))
    return (
        b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
        + b"0\r\n" + trailers + b"\r\n" + surplus
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(mutated(chunked_bodies()), st.lists(st.integers(0, 100), max_size=8))
def test_response_chunks_against_h11(data: bytes, cuts: list[int]) -> None:
    ours = our_body(data, [])
    assert our_body(data, cuts) == ours
    assert our_body(data, range(len(data))) == ours
    theirs = h11_body(data)
    # RFC 9110, section 6.5.1: framing fields mean nothing in trailers, which we drop; h11 calls them an error.
    if ours[0] == "whole" and not FRAMING_TRAILER.search(data):
        assert theirs == ours
    if theirs[0] == "broken":
        assert ours[0] != "whole"
