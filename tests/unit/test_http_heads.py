"""Heads and the chunked coding, without IO: what is taken, and what is refused with which status."""

from __future__ import annotations

import pytest

from lloom_sidecar.http.chunked import MAX_CHUNK_LINE_BYTES, RequestDechunker, ResponseDechunker
from lloom_sidecar.http.errors import BadResponseError, IncompleteBodyError, RequestRefusedError
from lloom_sidecar.http.heads import (
    CHUNKED,
    UNTIL_CLOSE,
    RequestHead,
    early_fault,
    encode_fields,
    parse_request_head,
    parse_response_head,
)


def parse(text: str) -> RequestHead:
    return parse_request_head(text.replace("\n", "\r\n").encode("latin-1") + b"\r\n", 128)


def test_a_usual_head() -> None:
    head = parse("POST /v1/chat%20x?a=%20&b HTTP/1.1\nHost: localhost:4880\nX-A:  1 \nx-a: 2\nContent-Length: 12\n")
    assert (head.method, head.path, head.raw_path, head.query) == ("POST", "/v1/chat x", b"/v1/chat%20x", b"a=%20&b")
    assert (head.host, head.content_length, head.keep_alive, head.is_http11) == ("localhost:4880", 12, True, True)
    assert head.headers[1:3] == [(b"x-a", b"1"), (b"x-a", b"2")]
    assert head.by_name[b"x-a"] == b"1, 2"


def test_an_absolute_target_decides_the_host() -> None:
    head = parse("GET http://real.example:1?q HTTP/1.1\nHost: localhost\n")
    assert (head.host, head.path, head.query) == ("real.example:1", "/", b"q")


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        ("1.1", None, True),
        ("1.1", "close", False),
        ("1.1", "Foo, Close", False),
        ("1.1", "closed", True),
        ("1.0", None, False),
        ("1.0", "Keep-Alive", True),
        ("1.0", "keep-alive, close", False),
    ],
)
def test_keep_alive(version: str, connection: str | None, keep_alive: bool) -> None:
    line = "" if connection is None else f"Connection: {connection}\n"
    assert parse(f"GET / HTTP/{version}\nHost: a\n{line}").keep_alive is keep_alive


def test_unusual_and_valid() -> None:
    assert parse("OPTIONS * HTTP/1.1\nHost: a\n").path == "*"
    assert parse("FROBNICATE / HTTP/1.1\nHost: [::1]:80\n").method == "FROBNICATE"
    assert parse("GET / HTTP/1.0\n").host == ""
    assert parse("GET / HTTP/1.1\nHost:\n").host == ""
    assert parse("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: Chunked\nExpect: 100-Continue\n").expects_continue
    assert parse("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n").content_length == CHUNKED
    assert not parse("GET / HTTP/1.1\nHost: a\nExpect: 100-continue\n").expects_continue
    assert parse("GET / HTTP/1.1\nHost: a\nX: \xe4\t\xff\n").by_name[b"x"] == b"\xe4\t\xff"


H = b"GET / HTTP/1.1\r\nHost: a\r\n"
REFUSED = [
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, H + b"Host: a\r\n\r\n"),
    (400, H + b"host: b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (400, H + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, H + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
    (400, H + b"Content-Length: 1, 2\r\n\r\n"),
    (400, H + b"Content-Length: 1, 1\r\n\r\n"),
    (400, H + b"Content-Length: +5\r\n\r\n"),
    (400, H + b"Content-Length: -5\r\n\r\n"),
    (400, H + b"Content-Length: 0x5\r\n\r\n"),
    (400, H + b"Content-Length: 5 5\r\n\r\n"),
    (400, H + b"Content-Length: 1_0\r\n\r\n"),
    (400, H + b"Content-Length:\r\n\r\n"),
    (400, H + b"Content-Length: 9999999999999999999\r\n\r\n"),
    (400, H + b"X: a\r\n b\r\n\r\n"),
    (400, H + b" X: a\r\n\r\n"),
    (400, H + b"X: a\nY: b\r\n\r\n"),
    (400, H + b"X: a\rb\r\n\r\n"),
    (400, H + b"X : a\r\n\r\n"),
    (400, H + b"X\r\n\r\n"),
    (400, H + b": a\r\n\r\n"),
    (400, H + b"X: a\0b\r\n\r\n"),
    (400, H + b"X: a\x1bb\r\n\r\n"),
    (400, H + b"X: a\x7fb\r\n\r\n"),
    (400, H + b"X\xe4: a\r\n\r\n"),
    (400, b"\r\n" + H + b"\r\n"),
    (400, b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
    (400, b"GET / http/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1\r\nHost: a\r\n\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /#f HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /% HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /\xe4 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET http://:1/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (417, H + b"Expect: something\r\n\r\n"),
    (431, H + b"X: a\r\n" * 128 + b"\r\n"),
    (501, H + b"Transfer-Encoding: gzip, chunked\r\n\r\n"),
    (501, H + b"Transfer-Encoding: identity\r\n\r\n"),
    (501, H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\n"),
    (505, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    (505, b"GET / HTTP/0.9\r\nHost: a\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "head"), REFUSED)
def test_refused_heads(status: int, head: bytes) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        parse_request_head(head, 128)
    assert caught.value.http_status == status


def test_a_long_run_of_blanks_is_refused_in_linear_time() -> None:
    for junk in (b" " * 60_000, b"\t" * 60_000, b"a" * 60_000):
        with pytest.raises(RequestRefusedError):
            parse_request_head(H + b"X:" + junk + b"\0\r\n\r\n", 128)


def test_nonsense_is_noticed_before_the_head_is_complete() -> None:
    assert early_fault(b"\x16\x03\x01", 0, 100) is not None
    assert early_fault(b"GET / HTTP/1.1\nHost", 0, 100) is not None
    assert early_fault(b"GET / HTTP/1.1\r\nHost", 0, 100) is None
    assert early_fault(b"GET / HTTP/1.1\r\nHost", 15, 100) is None
    assert early_fault(b"GET / HTTP/1.1\r\nHo\n", 17, 100) is not None
    fault = early_fault(b"G" * 101, 0, 100)
    assert fault is not None
    assert fault.http_status == 431


def test_nothing_breaks_out_of_a_header() -> None:
    assert encode_fields([(b"a", b"b"), (b"c", b"")]) == b"a: b\r\nc: \r\n"
    for field in [(b"a", b"b\r\nc: d"), (b"a\n", b"b"), (b"a", b"\r"), (b"a", b"\0")]:
        with pytest.raises(ValueError):
            encode_fields([field])


@pytest.mark.parametrize(
    ("head", "length", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 5, True),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED, True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", UNTIL_CLOSE, False),
        (b"HTTP/1.0 200 OK\r\n\r\n", UNTIL_CLOSE, False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\n", 1, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n", 0, True),
    ],
)
def test_response_heads(head: bytes, length: int, keep_alive: bool) -> None:
    parsed = parse_response_head(head, 128, head_only=False)
    assert (parsed.content_length, parsed.keep_alive) == (length, keep_alive)
    assert parse_response_head(head, 128, head_only=True).content_length == 0


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 204 X\r\n" + b"a: b\r\n" * 129 + b"\r\n",
    ],
)
def test_refused_response_heads(head: bytes) -> None:
    with pytest.raises(BadResponseError):
        parse_response_head(head, 128, head_only=False)


def dechunk(data: bytes, step: int) -> tuple[bytes, bytes]:
    dechunker = RequestDechunker(1000, 200)
    for i in range(0, len(data), step):
        dechunker.feed(data[i : i + step])
    assert dechunker.done
    return dechunker.body, dechunker.rest


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_request_chunks(step: int) -> None:
    data = b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: dropped\r\n\r\n"
    assert dechunk(data, step) == (b"abc0123456789", b"")


def test_what_follows_the_chunks_is_kept() -> None:
    assert dechunk(b"0\r\n\r\nGET /", 1000) == (b"", b"GET /")


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"x\r\n"),
        (400, b"-1\r\n"),
        (400, b"+1\r\n"),
        (400, b"0x1\r\n"),
        (400, b"1 \r\n"),
        (400, b"1\n"),
        (400, b"1;a\rb\r\n"),
        (400, b"\r\n"),
        (400, b"0" * 17 + b"\r\n"),
        (400, b"1;" + b"x" * MAX_CHUNK_LINE_BYTES),
        (400, b"1\r\nab"),
        (400, b"1\r\na\n"),
        (400, b"1\r\na\rb"),
        (400, b"0\r\nnonsense\r\n\r\n"),
        (400, b"0\r\na: b\r\n c\r\n\r\n"),
        (431, b"0\r\na: " + b"b" * 200),
        (413, b"3e9\r\n"),
        (413, b"3e8\r\n" + b"a" * 1000 + b"\r\n1\r\n"),
        (413, b"ffffffffffffffff\r\n"),
        (400, (b"1;" + b"x" * 200 + b"\r\na\r\n") * 100),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_refused_chunks(status: int, data: bytes, step: int) -> None:
    dechunker = RequestDechunker(1000, 200)

    def feed() -> None:
        for i in range(0, len(data), step):
            dechunker.feed(data[i : i + step])

    with pytest.raises(RequestRefusedError) as caught:
        feed()
    assert caught.value.http_status == status


def test_response_chunks_and_surplus() -> None:
    dechunker = ResponseDechunker()
    assert dechunker.feed(b"3\r\nabc\r\n2\r\nde\r\n") == b"abcde"
    assert dechunker.feed(b"0\r\n") == b""
    assert not dechunker.done
    assert dechunker.feed(b"\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil") == b""
    assert dechunker.done
    assert dechunker.has_surplus
    assert dechunker.feed(b"more") == b""


@pytest.mark.parametrize("data", [b"x\r\n", b"1\r\nab\r\n", b"1\na\r\n", b"-1\r\n", b"fffffffffffffffff\r\n"])
def test_broken_response_chunks_stay_broken(data: bytes) -> None:
    dechunker = ResponseDechunker()
    with pytest.raises(IncompleteBodyError):
        dechunker.feed(data)
    with pytest.raises(IncompleteBodyError):
        dechunker.feed(b"0\r\n\r\n")


def test_framing_without_content_is_bounded() -> None:
    dechunker = ResponseDechunker()
    assert dechunker.feed(b"1;" + b"x" * (ResponseDechunker.MAX_SILENT_BYTES - 2)) == b""
    for _ in range(2):
        with pytest.raises(IncompleteBodyError):
            dechunker.feed(b"x")
