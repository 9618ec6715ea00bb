"""Members of the network that do not keep to the wire's rules: requesters, and executors."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import trio

from lloom_sidecar.identity import load_network_keys
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.errors import StreamClosedError
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.claims import salted_digest, seal_ack, seal_receipt, seal_request
from lloom_sidecar.protocol.compression import Encoder, compress, decompress
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.exchange import BodyReceived, Event, OpenReceived, RequestReceived, ResponderStream, State
from lloom_sidecar.protocol.framing import frame
from lloom_sidecar.protocol.hello import HelloDone
from lloom_sidecar.protocol.names import KIND_CHECKPOINT, PROTOCOL_HELLO, PROTOCOL_REQUEST
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.varint import encode_varint
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer, Wire, now_ms, open_request_stream

BODY = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "chunks=2"}]}).encode()
CHANGE_S = 15.0
"""How long a counter may take to change; an idle machine needs milliseconds."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=1) as network:
        yield network


@pytest.fixture(scope="module")
def hand() -> Iterator[HandPeer]:
    with HandPeer() as hand:
        yield hand


@pytest.fixture(scope="module")
def stranger() -> Iterator[HandPeer]:
    """Another one, that says hello to nobody."""
    with HandPeer() as hand:
        yield hand


@pytest.fixture
def key(network: Network) -> NetworkKey:
    return load_network_keys(network.key_file).current


@pytest.fixture
async def daemon(network: Network, hand: HandPeer, key: NetworkKey) -> AsyncIterator[Daemon]:
    """The requester by hand: connected to both executors and a member for them."""
    async with hand.daemon(*network.executors) as daemon:
        for executor in network.executors:
            assert isinstance(await hand.say_hello(daemon, executor, [key]), HelloDone)
        yield daemon


@dataclass(frozen=True)
class Draft:
    """A request before it is signed; a test changes what it wants wrong."""

    claims: dict[str, Any] = field(default_factory=dict)
    body: bytes = BODY
    sent_body: bytes | None = None
    """Another body than the signed one."""
    request: dict[str, Any] = field(default_factory=dict)
    """Fields of the REQUEST frame."""
    envelope: Callable[[bytes], bytes] = bytes
    """What is done to the envelope behind the signature."""

    def frames(self, accept: pb.Accept, to: Node, signer: Signer, exchange: int = 1) -> list[pb.Frame]:
        salt = b"s" * 16
        claims = {
            "request_id": os.urandom(16),
            "executor": PeerId.parse(to.peer).raw,
            "issued_at_ms": accept.now_ms,
            "challenge": accept.challenge,
            "exchange": exchange,
            "deadline_ms": 30_000,
            "operation": pb.OPERATION_CHAT,
            "model": "scripted",
            "body_digest": salted_digest(salt, self.body),
            **{name: value(accept) if callable(value) else value for name, value in self.claims.items()},
        }
        envelope = self.envelope(seal_request(pb.RequestClaims(**claims), signer))
        body = self.body if self.sent_body is None else self.sent_body
        request = {"envelope": envelope, "salt": salt, "body_length": len(body), **self.request}
        return [pb.Frame(request=pb.Request(**request)), *([pb.Frame(body=body)] if body else [])]


async def read_answer(wire: Wire[pb.Frame]) -> tuple[bytes, pb.Frame]:
    """DATA, and the frame that ended the answer."""
    data = b""
    while True:
        message = await wire.receive()
        assert message is not None, "the stream ended before END or ERROR"
        kind = message.WhichOneof("kind")
        if kind == "data":
            data += message.data
        elif kind != "head":
            return data, message


async def until(condition: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(CHANGE_S):
        while not await trio.to_thread.run_sync(condition):
            await trio.sleep(0.02)
        return
    raise AssertionError(f"waited {CHANGE_S:g} s for {what}")


class Watch:
    """What one executor counted and its backend saw since the test began."""

    def __init__(self, network: Network, executor: Node) -> None:
        self._executor = executor
        self._backend = network.backend_of(executor.peer)
        self._network = network
        self._refused: dict[str, float] = {}
        self._requests: int | None = len(self._backend.requests())

    def expects(self, code: str) -> None:
        self._refused[code] = self._executor.metric("lloom_refused_total", code=code)

    def allows_work(self) -> None:
        """The backend may have been asked meanwhile."""
        self._requests = None

    async def check(self, *, honest: bool = True) -> None:
        """Every expected code was counted once, the backend saw nothing, nothing is left, the next one is served."""
        for code, before in self._refused.items():
            await until(
                lambda code=code, before=before: (  # type: ignore[misc]
                    self._executor.metric("lloom_refused_total", code=code) == before + 1
                ),
                f"{code} to be counted",
            )
        assert self._requests in (None, len(self._backend.requests()))
        await until(
            lambda: self._executor.metric("lloom_requests_in_flight", role="executor") == 0,
            "the executor to have no request in flight",
        )
        if honest:
            pin = {"x-lloom-pin-executor": self._executor.peer}
            body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]}
            client = self._network.client
            answer = await trio.to_thread.run_sync(lambda: client.post("/v1/chat/completions", body, headers=pin))
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-lloom-executor"] == self._executor.peer


# ---------------------------------------------------------------- by hand, and right
async def test_a_request_made_by_hand_is_served_when_it_keeps_the_rules(
    network: Network, daemon: Daemon, hand: HandPeer
) -> None:
    """The others differ from this one in one thing each: without it their refusals would prove nothing."""
    executor = network.executors[0]
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        for exchange in (1, 2):
            await wire.send(*Draft().frames(accept, executor, hand.signer, exchange))
            data, last = await read_answer(wire)
            assert json.loads(data)["choices"][0]["message"]["content"] == " w0 w1"
            assert last.WhichOneof("kind") == "end"
            envelope = seal_ack(last.end.receipt, hand.signer)
            await wire.send(pb.Frame(ack=pb.Ack(exchange=exchange, envelope=envelope)))
        await wire.send(pb.Frame(ping=pb.Ping(payload=7)))
        assert (await wire.receive_kind("pong")).pong.payload == 7


LONG = json.dumps({**json.loads(BODY), "pad": "The same again and again. " * 4000}).encode()
BOMB = compress(bytes(1 << 30))
"""32 KiB that would be a GiB."""


@pytest.mark.parametrize(("encoding", "pack"), [(pb.ENCODING_ZSTD, compress), (pb.ENCODING_GZIP, gzip.compress)])
async def test_a_compressed_body_is_served(
    network: Network, daemon: Daemon, hand: HandPeer, encoding: pb.Encoding, pack: Callable[[bytes], bytes]
) -> None:
    executor = network.executors[0]
    sent = pack(LONG)
    assert len(sent) < len(LONG) / 50
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        request = {"encoding": encoding, "body_size": len(LONG)}
        draft = Draft(body=LONG, sent_body=sent, request=request)
        await wire.send(*draft.frames(accept, executor, hand.signer))
        data, last = await read_answer(wire)
        assert json.loads(data)["choices"][0]["message"]["content"] == " w0 w1"
        assert last.WhichOneof("kind") == "end"


# ---------------------------------------------------------------- refused with ERROR
def flip_last(envelope: bytes) -> bytes:
    return envelope[:-1] + bytes([envelope[-1] ^ 1])


def unsigned(envelope: bytes) -> bytes:
    """The envelope without its last field, the signature."""
    return envelope[:-66]


def body_of(**changes: Any) -> bytes:
    return json.dumps({**json.loads(BODY), **changes}).encode()


REMOTE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]

REFUSED = {
    "no envelope": (Draft(envelope=lambda raw: b""), "bad_envelope"),
    "garbage as envelope": (Draft(envelope=lambda raw: b"\xff" * 40), "bad_envelope"),
    "unsigned": (Draft(envelope=unsigned), "bad_signature"),
    "forged": (Draft(envelope=flip_last), "bad_signature"),
    "signed by somebody else": (Draft(), "wrong_signer"),
    "expired": (Draft({"issued_at_ms": lambda accept: accept.now_ms - 100_000}), "expired"),
    "from the future": (Draft({"issued_at_ms": lambda accept: accept.now_ms + 100_000}), "expired"),
    "misaddressed": (Draft({"executor": Signer(b"x" * 32).peer.raw}), "misaddressed"),
    "for another stream": (Draft({"challenge": b"c" * 16}), "replayed"),
    "for another exchange": (Draft({"exchange": 2}), "replayed"),
    "no id": (Draft({"request_id": b""}), "bad_request"),
    "no deadline": (Draft({"deadline_ms": 0}), "bad_request"),
    "a header in traceparent": (Draft({"traceparent": "00-1\r\nx: y"}), "bad_request"),
    "model id with control characters": (Draft({"model": "a\nb"}), "bad_request"),
    "operation that is not served": (Draft({"operation": pb.OPERATION_RESPONSES}), "unsupported_operation"),
    "model that is not served": (Draft({"model": "another"}), "model_not_served"),
    "compressed, of no size": (Draft(request={"encoding": pb.ENCODING_ZSTD}), "bad_request"),
    "compressed, over the limit": (
        Draft(sent_body=BOMB, request={"encoding": pb.ENCODING_ZSTD, "body_size": 1 << 30}),
        "body_too_large",
    ),
    "a bomb": (Draft(sent_body=BOMB, request={"encoding": pb.ENCODING_ZSTD, "body_size": 1 << 20}), "bad_encoding"),
    "cut within its encoding": (
        Draft(sent_body=gzip.compress(BODY)[:-1], request={"encoding": pb.ENCODING_GZIP, "body_size": len(BODY)}),
        "bad_encoding",
    ),
    "no body": (Draft(body=b""), "invalid_json"),
    "another body than the signed one": (Draft(sent_body=BODY.replace(b"chunks=2", b"chunks=3")), "bad_digest"),
    "body of another model": (Draft(body=body_of(model="another")), "model_mismatch"),
    "body that is no JSON": (Draft(body=b"{"), "invalid_json"),
    "body that is no object": (Draft(body=b"[]"), "invalid_json"),
    "repeated key": (Draft(body=BODY[:-1] + b', "model": "scripted"}'), "repeated_key"),
    "repeated key, deep": (Draft(body=BODY[:-1] + b', "x": [{"a": 1, "a": 2}]}'), "repeated_key"),
    "remote media": (Draft(body=body_of(messages=[{"role": "user", "content": REMOTE}])), "remote_media"),
    "store": (Draft(body=body_of(store=True)), "not_allowed"),
    "background": (Draft(body=body_of(background=True)), "not_allowed"),
    "previous response": (Draft(body=body_of(previous_response_id="r")), "not_allowed"),
    "too many tokens": (Draft(body=body_of(max_tokens=10**9)), "limit"),
    "too many tokens, other name": (Draft(body=body_of(max_completion_tokens=10**9)), "limit"),
    "no limit of tokens": (Draft(body=body_of(max_tokens=-1)), "limit"),
    "too many choices": (Draft(body=body_of(n=10**6)), "limit"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_request_is_refused_with_its_code_and_the_stream_serves_on(
    network: Network, daemon: Daemon, hand: HandPeer, case: str
) -> None:
    draft, code = REFUSED[case]
    executor = network.executors[0]
    watch = Watch(network, executor)
    watch.expects(code)
    signer = Signer(os.urandom(32)) if code == "wrong_signer" else hand.signer
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        await wire.send(*draft.frames(accept, executor, signer))
        error = (await wire.receive_kind("error")).error
        assert error.code == code
        assert error.message
        assert "chunks" not in error.message
        await watch.check(honest=False)
        # Exchange 1 was used up by the refusal.
        await wire.send(*Draft().frames(accept, executor, hand.signer, exchange=2))
        _, last = await read_answer(wire)
        assert last.WhichOneof("kind") == "end"


# ---------------------------------------------------------------- the stream is reset
def request_frames(accept: pb.Accept, executor: Node, hand: HandPeer) -> list[bytes]:
    return [frame(f.SerializeToString()) for f in Draft().frames(accept, executor, hand.signer)]


def body_too_long(accept: pb.Accept, executor: Node, hand: HandPeer) -> bytes:
    draft = Draft(request={"body_length": len(BODY) - 1})
    return b"".join(frame(f.SerializeToString()) for f in draft.frames(accept, executor, hand.signer))


def body_over_the_limit(accept: pb.Accept, executor: Node, hand: HandPeer) -> bytes:
    draft = Draft(request={"body_length": accept.max_body_bytes + 1})
    return frame(draft.frames(accept, executor, hand.signer)[0].SerializeToString())


def two_requests(accept: pb.Accept, executor: Node, hand: HandPeer) -> bytes:
    slow = Draft(body=body_of(messages=[{"role": "user", "content": "silent=1"}]))
    first = b"".join(frame(f.SerializeToString()) for f in slow.frames(accept, executor, hand.signer))
    return first + b"".join(request_frames(accept, executor, hand))


def request_in_the_body(accept: pb.Accept, executor: Node, hand: HandPeer) -> bytes:
    head = request_frames(accept, executor, hand)[0]
    return head + head


RESETS: dict[str, tuple[Callable[[pb.Accept, Node, HandPeer], bytes], str]] = {
    "garbage": (lambda a, e, h: b"\x05hello", "bad_frame"),
    "empty frame": (lambda a, e, h: b"\x00", "unexpected_frame"),
    "oversized prefix": (lambda a, e, h: encode_varint(65_537), "oversize"),
    "prefix that is not minimal": (lambda a, e, h: b"\x80\x00", "bad_frame"),
    "a second OPEN": (
        lambda a, e, h: frame(pb.Frame(open=pb.Open(version_major=1)).SerializeToString()),
        "unexpected_frame",
    ),
    "DATA": (lambda a, e, h: frame(pb.Frame(data=b"x").SerializeToString()), "unexpected_frame"),
    "BODY without REQUEST": (lambda a, e, h: frame(pb.Frame(body=b"x").SerializeToString()), "unexpected_frame"),
    "ACK for nothing": (
        lambda a, e, h: frame(pb.Frame(ack=pb.Ack(exchange=1, envelope=b"x")).SerializeToString()),
        "unexpected_frame",
    ),
    "body longer than declared": (body_too_long, "bad_frame"),
    "body over the limit": (body_over_the_limit, "oversize"),
    "two REQUESTs at once": (two_requests, "unexpected_frame"),
    "REQUEST where its body is due": (request_in_the_body, "unexpected_frame"),
    "no salt": (
        lambda a, e, h: frame(Draft(request={"salt": b""}).frames(a, e, h.signer)[0].SerializeToString()),
        "bad_frame",
    ),
}


@pytest.mark.parametrize("case", RESETS)
async def test_whoever_breaks_the_framing_loses_the_stream(
    network: Network, daemon: Daemon, hand: HandPeer, case: str
) -> None:
    make, code = RESETS[case]
    executor = network.executors[0]
    watch = Watch(network, executor)
    watch.expects(code)
    if case == "two REQUESTs at once":
        watch.allows_work()  # the first of them is in order
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        await wire.send_raw(make(accept, executor, hand))
        await wire.expect_end()
    await watch.check()


async def test_garbage_instead_of_open(network: Network, daemon: Daemon) -> None:
    executor = network.executors[0]
    watch = Watch(network, executor)
    watch.expects("bad_frame")
    async with Wire(await daemon.open_stream(PeerId.parse(executor.peer), PROTOCOL_REQUEST), pb.Frame) as wire:
        await wire.send_raw(b"\x05hello")
        await wire.expect_end()
    await watch.check()


async def test_another_major_version_is_told_so(network: Network, daemon: Daemon) -> None:
    executor = network.executors[0]
    watch = Watch(network, executor)
    watch.expects("version")
    async with Wire(await daemon.open_stream(PeerId.parse(executor.peer), PROTOCOL_REQUEST), pb.Frame) as wire:
        await wire.send(pb.Frame(open=pb.Open(version_major=2)))
        assert (await wire.receive_kind("error")).error.code == "version"
    await watch.check()


@pytest.mark.parametrize("part", ["half of the REQUEST", "half of the body"])
async def test_a_truncated_request_leaves_nothing_behind(
    network: Network, daemon: Daemon, hand: HandPeer, part: str
) -> None:
    executor = network.executors[0]
    watch = Watch(network, executor)
    draft = Draft(request={"body_length": 2 * len(BODY)})
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        raw = b"".join(frame(f.SerializeToString()) for f in draft.frames(accept, executor, hand.signer))
        if part == "half of the REQUEST":
            await wire.send_raw(raw[:100])
        else:
            await wire.send_raw(raw)
            await wire.send(pb.Frame(ping=pb.Ping(payload=1)))
            await wire.receive_kind("pong")  # so all of it has arrived
    await watch.check()


async def test_an_ack_that_does_not_hold_loses_the_stream(network: Network, daemon: Daemon, hand: HandPeer) -> None:
    executor = network.executors[0]
    wire, accept = await open_request_stream(daemon, executor)
    async with wire:
        await wire.send(*Draft().frames(accept, executor, hand.signer))
        _, last = await read_answer(wire)
        watch = Watch(network, executor)
        watch.expects("bad_ack")
        envelope = seal_ack(last.end.receipt + b"x", hand.signer)
        await wire.send(pb.Frame(ack=pb.Ack(exchange=1, envelope=envelope)))
        await wire.expect_end()
    await watch.check()


async def test_a_peer_that_did_not_say_hello_is_asked_for_it(network: Network, stranger: HandPeer) -> None:
    executor = network.executors[0]
    watch = Watch(network, executor)
    watch.expects("hello_required")
    async with stranger.daemon(executor) as daemon:
        stream = await daemon.open_stream(PeerId.parse(executor.peer), PROTOCOL_REQUEST)
        async with Wire(stream, pb.Frame) as wire:
            await wire.send(pb.Frame(open=pb.Open(version_major=1)))
            assert (await wire.receive_kind("error")).error.code == "hello_required"
    await watch.check()


# ---------------------------------------------------------------- replays
async def test_a_served_request_is_served_nowhere_again(
    network: Network, daemon: Daemon, hand: HandPeer, key: NetworkKey
) -> None:
    executor, other = network.executors
    wire, accept = await open_request_stream(daemon, executor)
    frames = Draft().frames(accept, executor, hand.signer)
    async with wire:
        await wire.send(*frames)
        _, last = await read_answer(wire)
        assert last.WhichOneof("kind") == "end"
        watch = Watch(network, executor)
        watch.expects("replayed")
        await wire.send(*frames)
        assert (await wire.receive_kind("error")).error.code == "replayed"
        await watch.check()
    for target, code in ((executor, "replayed"), (other, "misaddressed")):
        watch = Watch(network, target)
        watch.expects(code)
        wire, _ = await open_request_stream(daemon, target)
        async with wire:
            await wire.send(*frames)
            assert (await wire.receive_kind("error")).error.code == code
        await watch.check()
    # A restart forgets what was served; the challenge makes that harmless.
    await trio.to_thread.run_sync(executor.kill)
    await trio.to_thread.run_sync(executor.start)
    async with hand.daemon(executor) as again:
        assert isinstance(await hand.say_hello(again, executor, [key]), HelloDone)
        watch = Watch(network, executor)
        watch.expects("replayed")
        wire, _ = await open_request_stream(again, executor)
        async with wire:
            await wire.send(*frames)
            assert (await wire.receive_kind("error")).error.code == "replayed"
        await trio.to_thread.run_sync(network.wait_known, network.client)
        await watch.check()


# ---------------------------------------------------------------- hostile executors
EVENTS = [
    b'data: {"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]
DOCUMENT = b'{"object":"chat.completion","choices":[{"index":0,"message":{"content":"hello"},"finish_reason":"stop"}]}'


class Play:
    """One answer by hand: ``await play.answer()`` is the honest one, step by step, with what a test changes."""

    def __init__(self, hand: HandPeer, stream: P2PStream, machine: ResponderStream, event: RequestReceived) -> None:
        self.hand = hand
        self.stream = stream
        self.machine = machine
        envelope = pb.Envelope.FromString(event.envelope)
        self.request = pb.RequestClaims.FromString(envelope.payload)
        self.request_digest = hashlib.sha256(event.envelope).digest()
        self.salt = event.salt
        self.encoding = event.encoding
        self.body = b""
        self.data = b""
        self.is_honest = False

    @property
    def wants_stream(self) -> bool:
        return json.loads(self.body).get("stream") is True

    async def send_data(self, *, content_type: str | None = None) -> None:
        self.data = b"".join(EVENTS) if self.wants_stream else DOCUMENT
        kind = content_type or ("text/event-stream" if self.wants_stream else "application/json")
        await self.stream.send_all(self.machine.head(kind) + self.machine.data(self.data))

    def receipt(self, **changes: Any) -> pb.ReceiptClaims:
        claims = {
            "client": self.stream.peer.raw,
            "executor": self.hand.peer.raw,
            "request_digest": self.request_digest,
            "answer_digest": salted_digest(self.salt, self.data),
            "answer_bytes": len(self.data),
            "model": self.request.model,
            "usage": pb.Usage(prompt_tokens=1, completion_tokens=1),
            "usage_source": pb.USAGE_SOURCE_CHUNKS,
            "accepted_at_ms": now_ms(),
            "first_at_ms": now_ms(),
            "ended_at_ms": now_ms(),
            "outcome": pb.OUTCOME_COMPLETE,
            **changes,
        }
        return pb.ReceiptClaims(**claims)

    async def end(self, envelope: bytes) -> None:
        await self.stream.send_all(self.machine.end(envelope))

    async def read_to_end(self) -> None:
        while await self.stream.receive_some():
            pass


Script = Callable[[Play], Awaitable[None]]


def forged(**changes: Any) -> Script:
    async def script(play: Play) -> None:
        await play.send_data()
        await play.end(seal_receipt(play.receipt(**changes), play.hand.signer))
        await play.read_to_end()

    return script


def enveloped(change: Callable[[Play, bytes], bytes]) -> Script:
    async def script(play: Play) -> None:
        await play.send_data()
        await play.end(change(play, seal_receipt(play.receipt(), play.hand.signer)))
        await play.read_to_end()

    return script


async def no_end(play: Play) -> None:
    await play.send_data()


async def no_answer(play: Play) -> None:
    pass


async def garbage_behind_data(play: Play) -> None:
    await play.send_data()
    await play.stream.send_all(b"\x05hello")
    await play.read_to_end()


async def only_end(play: Play) -> None:
    await play.end(seal_receipt(play.receipt(answer_bytes=5), play.hand.signer))
    await play.read_to_end()


async def header_in_head(play: Play) -> None:
    head = pb.Frame(head=pb.Head(content_type="text/html\r\nx-evil: 1"))
    await play.stream.send_all(frame(head.SerializeToString()))
    await play.read_to_end()


async def head_twice(play: Play) -> None:
    head = frame(pb.Frame(head=pb.Head(content_type="text/event-stream")).SerializeToString())
    await play.stream.send_all(head + head)
    await play.read_to_end()


async def cut_within_its_encoding(play: Play) -> None:
    """Everything comes out, and the frame's own end is missing."""
    play.data = b"".join(EVENTS)
    encoder = Encoder()
    head = play.machine.head("text/event-stream", encoding=pb.ENCODING_ZSTD)
    await play.stream.send_all(head + play.machine.data(encoder.encode(play.data)))
    await play.end(seal_receipt(play.receipt(), play.hand.signer))
    await play.read_to_end()


async def bomb(play: Play) -> None:
    """32 KiB that would be a GiB for the application."""
    head = play.machine.head("text/event-stream", encoding=pb.ENCODING_ZSTD)
    with suppress(StreamClosedError):
        await play.stream.send_all(head + play.machine.data(BOMB))
    await play.read_to_end()


async def checkpoint_for_end(play: Play) -> None:
    """A checkpoint is no END, whatever is in it."""
    await play.send_data()
    raw = seal_receipt(play.receipt(), play.hand.signer)
    await play.stream.send_all(frame(pb.Frame(checkpoint=pb.Checkpoint(envelope=raw)).SerializeToString()))


async def error_behind_data(play: Play) -> None:
    await play.send_data()
    error = pb.Error(code="made_up", message="no", http_status=200)
    await play.stream.send_all(frame(pb.Frame(error=error).SerializeToString()))
    await play.read_to_end()


async def more_data_behind_end(play: Play) -> None:
    """The receipt is for less than what was sent."""
    await play.send_data()
    first = play.receipt()
    await play.stream.send_all(play.machine.data(b"data: more\n\n"))
    await play.end(seal_receipt(first, play.hand.signer))
    await play.read_to_end()


HOSTILE: dict[str, Script] = {
    "client": forged(client=Signer(b"x" * 32).peer.raw),
    "executor": forged(executor=Signer(b"x" * 32).peer.raw),
    "request digest": forged(request_digest=b"r" * 32),
    "answer digest": forged(answer_digest=b"a" * 32),
    "answer bytes": forged(answer_bytes=1),
    "model": forged(model="another"),
    "price": forged(price=pb.Price(prompt_per_million=10**9, currency="EUR"), cost=1000),
    "cost": forged(cost=1),
    "partial": forged(outcome=pb.OUTCOME_PARTIAL),
    "no outcome": forged(outcome=pb.OUTCOME_UNSPECIFIED),
    "no receipt": enveloped(lambda play, raw: b""),
    "unsigned receipt": enveloped(lambda play, raw: unsigned(raw)),
    "forged signature": enveloped(lambda play, raw: flip_last(raw)),
    "signed by somebody else": enveloped(lambda play, raw: seal_receipt(play.receipt(), Signer(os.urandom(32)))),
    "signed as another kind": enveloped(
        lambda play, raw: seal(KIND_CHECKPOINT, play.receipt().SerializeToString(), play.hand.signer)
    ),
    "an ACK for a receipt": enveloped(lambda play, raw: seal_ack(raw, play.hand.signer)),
    "no END": no_end,
    "no answer": no_answer,
    "garbage behind DATA": garbage_behind_data,
    "END of nothing": only_end,
    "a header in HEAD": header_in_head,
    "HEAD twice": head_twice,
    "cut within its encoding": cut_within_its_encoding,
    "CHECKPOINT for END": checkpoint_for_end,
    "ERROR behind DATA": error_behind_data,
    "more DATA than the receipt says": more_data_behind_end,
}


@asynccontextmanager
async def executor_by_hand(
    network: Network, hand: HandPeer, key: NetworkKey, model: str, script: Script
) -> AsyncGenerator[list[str]]:
    """An executor of ``model`` that the client knows and that answers with ``script``. Gives what was asked."""
    asked: list[str] = []

    async def serve(stream: P2PStream) -> None:
        machine = ResponderStream()
        is_over = False
        while not is_over:
            play: Play | None = None
            while play is None or machine.state is not State.ANSWERING:
                data = await stream.receive_some()
                if not data:
                    return
                events: list[Event] = machine.receive(data)
                for event in events:
                    if isinstance(event, OpenReceived):
                        await stream.send_all(machine.accept(now_ms=now_ms(), challenge=os.urandom(16), max_streams=8))
                    elif isinstance(event, RequestReceived):
                        play = Play(hand, stream, machine, event)
                    elif isinstance(event, BodyReceived) and play is not None:
                        play.body += event.data
            asked.append(play.request.model)
            await script(play)
            is_over = not play.is_honest

    async def greet(stream: P2PStream) -> None:
        await hand.answer_hello(stream, [key])

    async with hand.serving({PROTOCOL_REQUEST: serve, PROTOCOL_HELLO: greet}), hand.daemon(network.client) as daemon:
        announcement = seal_announcement(
            signer=hand.signer,
            key=key,
            sequence=now_ms(),
            issued_at_ms=now_ms(),
            ttl_s=60,
            kind=Kind.INITIAL,
            addrs=hand.addrs,
            models=[ModelOffer(model)],
        )
        assert isinstance(await hand.say_hello(daemon, network.client, [key], announcement=announcement), HelloDone)

        def is_known() -> bool:
            found = network.client.executors().get(str(hand.peer))
            return found is not None and found["models"] == [model]

        await until(is_known, "the client to know the executor by hand")
        yield asked


def ask_streamed(client: Node, model: str) -> tuple[int, list[str], bool]:
    """Status, events, and whether the answer ended as HTTP wants it."""
    with client.stream("hi", model=model) as answer:
        events: list[str] = []
        try:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                elif line.startswith("{"):
                    events.append(line)
        except httpx.RemoteProtocolError:
            return answer.status_code, events, False
        return answer.status_code, events, True


async def honest(play: Play) -> None:
    await play.send_data()
    await play.end(seal_receipt(play.receipt(), play.hand.signer))
    play.is_honest = True


async def test_an_executor_made_by_hand_is_believed_when_it_keeps_the_rules(
    network: Network, hand: HandPeer, key: NetworkKey
) -> None:
    client = network.client
    async with executor_by_hand(network, hand, key, "by-hand", honest) as asked:
        status, events, is_whole = await trio.to_thread.run_sync(ask_streamed, client, "by-hand")
        assert (status, is_whole) == (200, True)
        assert [f"data: {event}\n\n".encode() for event in events] == EVENTS
        answer = await trio.to_thread.run_sync(lambda: client.chat("hi", model="by-hand"))
        assert (answer.status_code, answer.content) == (200, DOCUMENT)
        assert asked == ["by-hand", "by-hand"]


async def test_a_bomb_as_an_answer_is_cut_off_in_small_memory(
    network: Network, hand: HandPeer, key: NetworkKey
) -> None:
    client = network.client
    assert client.process is not None
    process = psutil.Process(client.process.pid)
    before = process.memory_info().rss
    async with executor_by_hand(network, hand, key, "bomb", bomb):
        status, events, is_whole = await trio.to_thread.run_sync(ask_streamed, client, "bomb")
        assert status >= 500 or not is_whole
        assert json.loads(events[-1])["error"]["code"] == "sse_event_too_large"
        answer = await trio.to_thread.run_sync(lambda: client.chat("hi", model="bomb"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "answer_too_large")
    assert process.memory_info().rss - before < 256 << 20
    assert (await trio.to_thread.run_sync(client.chat, "chunks=1")).status_code == 200


@pytest.mark.parametrize("features", [(), ("compression",)])
async def test_compressed_is_sent_only_to_who_takes_it(
    network: Network, hand: HandPeer, key: NetworkKey, features: tuple[str, ...]
) -> None:
    seen: list[tuple[int, bytes]] = []

    async def note(play: Play) -> None:
        seen.append((play.encoding, play.body))
        play.body = decompress(play.body, play.encoding, 1 << 20) if play.encoding else play.body
        await honest(play)

    client = network.client
    model = f"packed-{len(features)}"
    hand.features = features
    try:
        async with executor_by_hand(network, hand, key, model, note):
            answer = await trio.to_thread.run_sync(lambda: client.chat("again " * 2000, model=model))
            assert (answer.status_code, answer.content) == (200, DOCUMENT)
            # And the other way: what the hand asks of a real executor.
            executor = network.executors[0]
            async with hand.daemon(executor) as daemon:
                assert isinstance(await hand.say_hello(daemon, executor, [key]), HelloDone)
                wire, accept = await open_request_stream(daemon, executor)
                async with wire:
                    body = body_of(messages=[{"role": "user", "content": "chunks=500"}])
                    await wire.send(*Draft(body=body).frames(accept, executor, hand.signer))
                    head = (await wire.receive_kind("head")).head
                    data, last = await read_answer(wire)
                    assert last.WhichOneof("kind") == "end"
    finally:
        hand.features = ()
    ((encoding, body),) = seen
    expected = pb.ENCODING_ZSTD if features else pb.ENCODING_IDENTITY
    assert (encoding, head.encoding) == (expected, expected)
    assert (len(body) < 1000) is bool(features)
    document = decompress(data, head.encoding, 1 << 20) if head.encoding else data
    assert len(json.loads(document)["choices"][0]["message"]["content"]) > 1500


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_executors_answer_never_looks_finished(
    network: Network, hand: HandPeer, key: NetworkKey, case: str
) -> None:
    client = network.client
    model = f"hostile-{list(HOSTILE).index(case)}"
    async with executor_by_hand(network, hand, key, model, HOSTILE[case]) as asked:
        status, events, is_whole = await trio.to_thread.run_sync(ask_streamed, client, model)
        assert asked, "the client asked somebody else"
        text = "".join(events)
        assert "[DONE]" not in text
        assert '"finish_reason":"stop"' not in text
        error = json.loads(events[-1])["error"]
        assert [a["executor"] for a in error["lloom"]["attempts"]] == [str(hand.peer)] * len(asked)
        if status == 200:
            assert not is_whole
        else:
            assert status >= 500

        answer = await trio.to_thread.run_sync(lambda: client.chat("hi", model=model))
        assert answer.status_code >= 500, answer.text
        assert "x-evil" not in answer.headers
        assert "hello" not in answer.json().get("choices", "")
        assert answer.json()["error"]["lloom"]["attempts"]
    # And nobody else suffers.
    answer = await trio.to_thread.run_sync(client.chat, "chunks=1")
    assert answer.status_code == 200
