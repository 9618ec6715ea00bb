"""What is fuzzed: a function each, which takes any bytes and raises only when the code is wrong.

Each one checks more than "no other exception": the same bytes in other pieces give the same, what was read comes back
as it was written, what is broken stays broken.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from lloom_sidecar.client.openai import TailHolder, read_body
from lloom_sidecar.client.part import Part, Progress
from lloom_sidecar.client.resume import body_after, is_exhausted, plan_of
from lloom_sidecar.config import load_config
from lloom_sidecar.errors import AnnouncementError, ConfigError, ProtocolError, ReceiptError, RequestError
from lloom_sidecar.executor.body import BodyPolicy, prepare_body
from lloom_sidecar.http.chunked import RequestDechunker, ResponseDechunker
from lloom_sidecar.http.errors import BadResponseError, IncompleteBodyError, RequestRefusedError, SseError
from lloom_sidecar.http.heads import HEAD_END, early_fault, encode_fields, parse_request_head, parse_response_head
from lloom_sidecar.http.sse import SseCutter, data_of, split_events
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.errors import DaemonProtocolError
from lloom_sidecar.p2p.framing import FrameReader, encode_frame
from lloom_sidecar.protocol import claims, names
from lloom_sidecar.protocol.announcement import open_announcement
from lloom_sidecar.protocol.compression import SizedDecoder
from lloom_sidecar.protocol.envelope import Signer, open_envelope, seal
from lloom_sidecar.protocol.exchange import RequesterStream, ResponderStream, State
from lloom_sidecar.protocol.framing import FrameCutter, frame
from lloom_sidecar.protocol.hello import HelloAnswerer, HelloOpener, HelloState
from lloom_sidecar.protocol.kad import read_providers
from lloom_sidecar.protocol.network_key import Invite, NetworkKey, format_key_file, parse_key_file
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import open_status

Target = Callable[[bytes], None]
T = TypeVar("T")

SIGNER: Final = Signer(bytes(range(32)))
OTHER: Final = Signer(bytes(32))
KEY: Final = NetworkKey(b"k" * 32)
NODE: Final = pb.NodeInfo(roles=[pb.ROLE_CLIENT], software="lloom/0.1.0")
CHALLENGE: Final = b"c" * 16
NOW_MS: Final = 1_800_000_000_000

TARGETS: Final[dict[str, Target]] = {}


def target(function: Target) -> Target:
    """Register one under its name."""
    TARGETS[function.__name__] = function
    return function


def pieces(data: bytes) -> Iterator[bytes]:
    """The same bytes, cut at places that depend on them alone."""
    rng = random.Random(data[:8])
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
    for start, end in itertools.pairwise([0, *places, len(data)]):
        yield data[start:end]


def _refuses(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except ProtocolError:
        return True
    return False


# ---------------------------------------------------------------- the wire: frames and machines
@target
def frames(data: bytes) -> None:
    """The cutter of frames; limits as the wire has them and small."""
    for limit in (64, 65_536):

        def cut(parts: Iterator[bytes], limit: int = limit) -> tuple[list[bytes], str]:
            cutter, found = FrameCutter(limit), []
            try:
                for part in parts:
                    found += cutter.feed(part)
            except ProtocolError as exc:
                return [], exc.code
            return found, "partial" if cutter.has_partial else ""

        whole = cut(iter([data]))
        assert cut(pieces(data)) == whole
        assert all(len(message) <= limit for message in whole[0])


@target
def control_frames(data: bytes) -> None:
    """The framing of p2pd's control protocol."""

    def read(parts: Iterator[bytes]) -> tuple[list[bytes], bool]:
        reader, found = FrameReader(max_bytes=256), []
        try:
            for part in parts:
                reader.feed(part)
                while (body := reader.next_frame()) is not None:
                    found.append(body)
        except DaemonProtocolError:
            return found, True
        return found, False

    whole = read(iter([data]))
    assert read(pieces(data)) == whole
    for body in whole[0]:
        reader = FrameReader()
        reader.feed(encode_frame(body))
        assert reader.next_frame() == body


def _machine(make: Callable[[], RequesterStream | ResponderStream | HelloOpener | HelloAnswerer], data: bytes) -> None:
    def run(parts: Iterator[bytes]) -> tuple[bool, object]:
        machine, is_broken = make(), False
        try:
            for part in parts:
                machine.receive(part)
        except ProtocolError:
            is_broken = True
            assert machine.state in (State.BROKEN, HelloState.BROKEN)
            assert _refuses(machine.receive, b"")
        return is_broken, machine.state

    # A fault breaks the stream from the piece on that holds it, so in one piece it may hide what came before.
    whole = run(iter([data]))
    assert whole[0] or run(pieces(data)) == whole


def a_requester() -> RequesterStream:
    """One that waits for an answer."""
    stream = RequesterStream()
    stream.open()
    stream.receive(frame(pb.Frame(accept=pb.Accept(challenge=CHALLENGE)).SerializeToString()))
    stream.request(b"envelope", b"s" * 16, b"")
    return stream


def a_responder() -> ResponderStream:
    """One that waits for a request."""
    stream = ResponderStream()
    stream.receive(RequesterStream().open())
    stream.accept(now_ms=0, challenge=CHALLENGE, max_streams=1)
    return stream


def an_opener() -> HelloOpener:
    """One that said HELLO."""
    side = HelloOpener(me=SIGNER.peer, peer=OTHER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"n" * 32)
    side.start()
    return side


def an_answerer() -> HelloAnswerer:
    """One that waits for HELLO."""
    return HelloAnswerer(me=OTHER.peer, peer=SIGNER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"m" * 32)


def a_catalogue_reader() -> HelloOpener:
    """One that said hello to a member and asked for its catalogue."""
    opener, answerer = an_opener(), an_answerer()
    fresh = HelloOpener(me=SIGNER.peer, peer=OTHER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"n" * 32)
    data = fresh.start()
    while data:
        out, _ = answerer.receive(data)
        data, _ = opener.receive(out)
    opener.catalogue_query()
    return opener


@target
def answer_frames(data: bytes) -> None:
    """Bytes of an executor, to a client that asked."""
    _machine(a_requester, data)


@target
def request_frames(data: bytes) -> None:
    """Bytes of a client, to an executor."""
    _machine(a_responder, data)


@target
def hello_frames(data: bytes) -> None:
    """Bytes of a stranger, on either side of hello."""
    _machine(an_opener, data)
    _machine(an_answerer, data)


@target
def catalogue(data: bytes) -> None:
    """A catalogue as it is read."""
    _machine(a_catalogue_reader, data)


# ---------------------------------------------------------------- the wire: statements
@target
def envelopes(data: bytes) -> None:
    """Signed envelopes of any kind. What opens has one form only."""
    for kind in names.ALL_KINDS:
        with contextlib.suppress(ProtocolError):
            opened = open_envelope(data, kind)
            # Only its signer can have made it, so it opens again, and with one bit less it does not.
            assert open_envelope(data, kind, expected_signer=opened.signer).payload == opened.payload
            assert _refuses(open_envelope, data[:-1], kind)


@target
def announcements(data: bytes) -> None:
    """Announcements: as they come, and with a signature that holds."""
    with contextlib.suppress(AnnouncementError):
        open_announcement(data, keys=(KEY,), expected_signer=None)
    with contextlib.suppress(AnnouncementError):
        raw = seal(names.KIND_ANNOUNCEMENT, data, SIGNER)
        found = open_announcement(raw, keys=(KEY,), expected_signer=SIGNER.peer)
        assert found.peer == SIGNER.peer
        assert 0 < found.ttl_s <= 900


@target
def statuses(data: bytes) -> None:
    """A validator's status."""
    with contextlib.suppress(AnnouncementError):
        found = open_status(seal(names.KIND_STATUS, data, SIGNER), keys=(KEY,), expected_signer=SIGNER.peer)
        assert found.peer == SIGNER.peer


@target
def statements(data: bytes) -> None:
    """The signed claims of an exchange, with signatures that hold."""
    with contextlib.suppress(ProtocolError, DecodeError):
        request = pb.RequestClaims.FromString(data)
        # What only the right client can know: without it nothing else would ever be looked at.
        request.executor, request.challenge, request.exchange = OTHER.peer.raw, CHALLENGE, 1
        request.issued_at_ms = NOW_MS + request.issued_at_ms % 120_000 - 60_000
        for payload in (request.SerializeToString(), data):
            checked = claims.check_request(
                seal(names.KIND_REQUEST, payload, SIGNER),
                sender=SIGNER.peer,
                executor=OTHER.peer,
                challenge=CHALLENGE,
                exchange=1,
                now_ms=NOW_MS,
            )
            assert checked.client == SIGNER.peer
            assert checked.claims.model
    with contextlib.suppress(ReceiptError, DecodeError):
        receipt = pb.ReceiptClaims.FromString(data)
        receipt.client, receipt.executor, receipt.model = OTHER.peer.raw, SIGNER.peer.raw, "m"
        receipt.request_digest, receipt.answer_digest, receipt.answer_bytes = b"d" * 32, b"a" * 32, 1
        ceiling = pb.Price(prompt_per_million=1000, completion_per_million=1000, currency="EUR")
        for payload in (receipt.SerializeToString(), data):
            found = claims.check_receipt(
                seal(names.KIND_RECEIPT, payload, SIGNER),
                client=OTHER.peer,
                executor=SIGNER.peer,
                request_digest=b"d" * 32,
                request=pb.RequestClaims(model="m", max_price=ceiling, max_cost=50, max_cost_set=True),
                answer_digest=b"a" * 32,
                answer_bytes=1,
            )
            assert found.cost <= 50
    with contextlib.suppress(ProtocolError, DecodeError):
        quote = pb.QuoteClaims.FromString(data)
        quote.client, quote.executor, quote.model = OTHER.peer.raw, SIGNER.peer.raw, "m"
        for payload in (quote.SerializeToString(), data):
            sealed = seal(names.KIND_QUOTE, payload, SIGNER)
            claims.check_quote(sealed, client=OTHER.peer, executor=SIGNER.peer, model="m")
    with contextlib.suppress(ProtocolError):
        claims.check_ack(seal(names.KIND_ACK, data, SIGNER), client=SIGNER.peer, receipt=b"r")


@target
def providers(data: bytes) -> None:
    """A peer's answer on the DHT's protocol."""
    with contextlib.suppress(ProtocolError):
        read_providers(data)


@target
def addresses(data: bytes) -> None:
    """Multiaddrs and peer ids, binary and as text."""
    with contextlib.suppress(ValueError):
        address = Multiaddr.from_bytes(data)
        assert Multiaddr.parse(str(address)).raw == data
    with contextlib.suppress(ValueError):
        assert PeerId.parse(str(PeerId(data))).raw == data
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        address = Multiaddr.parse(text)
        assert Multiaddr.from_bytes(address.raw) == address
        assert (address.peer_id, address.ip, address.unix_path, address.is_relayed) is not None
    with contextlib.suppress(ValueError):
        peer = PeerId.parse(text)
        assert PeerId(peer.raw) == peer


@target
def key_files(data: bytes) -> None:
    """Invites and key files."""
    with contextlib.suppress(ConfigError):
        keys = parse_key_file(data)
        rotated = None if keys.previous is None else (keys.previous, keys.previous_until_ms)
        again = parse_key_file(format_key_file(keys.current, rotated))
        assert (again.current, again.previous) == (keys.current, keys.previous)
    with contextlib.suppress(ConfigError):
        invite = Invite.decode(data.decode("utf-8", "replace"))
        assert Invite.decode(invite.encode()) == invite


@target
def compressed(data: bytes) -> None:
    """A compressed body whose size was stated, here by the first byte: never more than that comes out."""
    size, data = (data[0] if data else 0) + 1, data[1:]

    def read(encoding: int, parts: Iterator[bytes]) -> bytes | None:
        decoder, found = SizedDecoder(encoding, size), b""
        try:
            for part in parts:
                found += decoder.feed(part)
            decoder.finish()
        except ProtocolError:
            assert len(found) <= size
            return None
        assert len(found) == size
        return found

    for encoding in (pb.ENCODING_ZSTD, pb.ENCODING_GZIP):
        assert read(encoding, iter([data])) == read(encoding, pieces(data))


# ---------------------------------------------------------------- HTTP
@target
def http_heads(data: bytes) -> None:
    """Heads of requests and responses."""
    with contextlib.suppress(RequestRefusedError):
        head = parse_request_head(data, 64)
        assert data.endswith(HEAD_END)
        assert early_fault(data, 0, len(data)) is None
        assert encode_fields(head.headers).count(b"\r\n") == len(head.headers)
        assert "\0" not in head.path
        assert head.content_length >= -1
    with contextlib.suppress(BadResponseError):
        answer = parse_response_head(data, 64, head_only=False)
        assert 100 <= answer.status <= 999
        assert answer.content_length >= -2


@target
def request_bodies(data: bytes) -> None:
    """The chunked coding of requests."""

    def read(parts: Iterator[bytes]) -> tuple[object, ...]:
        dechunker = RequestDechunker(1000, 200)
        rest = b""
        try:
            for part in parts:
                if dechunker.done:
                    rest += part
                else:
                    dechunker.feed(part)
        except RequestRefusedError as exc:
            return (exc.http_status,)
        return dechunker.done, dechunker.body, dechunker.rest + rest

    whole = read(iter([data]))
    assert read(pieces(data)) == whole


@target
def response_bodies(data: bytes) -> None:
    """The chunked coding of responses."""

    def read(parts: Iterator[bytes]) -> tuple[object, ...]:
        dechunker, content = ResponseDechunker(), b""
        try:
            for part in parts:
                content += dechunker.feed(part)
        except IncompleteBodyError:
            return ("broken",)
        return dechunker.done, content

    assert read(pieces(data)) == read(iter([data]))


@target
def sse(data: bytes) -> None:
    """Events of a stream, and what is held back of them."""

    def cut(parts: Iterator[bytes]) -> tuple[list[bytes], bytes]:
        cutter, found = SseCutter(4096), []
        try:
            for part in parts:
                found += cutter.feed(part)
        except SseError:
            return [], b"error"
        return found, bytes(cutter.rest())

    whole = cut(iter([data]))
    assert cut(pieces(data)) == whole
    if whole[1] != b"error":
        assert b"".join(whole[0]) + whole[1] == data
        assert split_events(b"".join(whole[0])) == whole[0]
        for event in whole[0]:
            data_of(event)
    once, cut_up = TailHolder(), TailHolder()
    ready = once.feed(data)
    assert b"".join(cut_up.feed(part) for part in pieces(data)) == ready
    assert ready + once.release() == data == ready + cut_up.release()


@target
def bodies(data: bytes) -> None:
    """An application's body, as the client node and as the executor read it."""
    with contextlib.suppress(ValueError):
        asked = read_body(data)
        assert asked.n >= 1
    for operation in (pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS, pb.OPERATION_EMBEDDINGS):
        with contextlib.suppress(RequestError):
            call = prepare_body(data, operation=operation, model="m", backend_model="n", policy=BodyPolicy())
            # Prepared once, it is a body of the backend's model that needs no further change but for usage.
            again = prepare_body(call.body, operation=operation, model="n", backend_model="n", policy=BodyPolicy())
            assert again.body == call.body


@target
def resumed(data: bytes) -> None:
    """A streamed answer that may go on elsewhere: its first part, and a second one behind it."""
    stops = ("<stop>", "ab")

    def read(parts: Iterator[bytes], before: Progress, operation: int) -> tuple[bytes, Progress] | None:
        part, shown = Part(operation, stops, before), b""
        try:
            for piece in parts:
                shown += part.feed(piece)
        except (SseError, ProtocolError):
            return None
        return shown, part.progress

    for operation in (pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS):
        whole = read(iter([data]), Progress(), operation)
        assert read(pieces(data), Progress(), operation) == whole
        if whole is not None:
            again = read(iter([data]), whole[1], operation)
            assert read(pieces(data), whole[1], operation) == again
            part = Part(operation, stops, whole[1])
            with contextlib.suppress(SseError, ProtocolError):
                part.feed(data)
                part.release()


@target
def continuations(data: bytes) -> None:
    """The body behind which an answer goes on: what the application asked, as the next executor gets it."""
    with contextlib.suppress(ValueError):
        read_body(data)
        for operation in (pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS):
            plan = plan_of(operation, data)
            # Whoever has answered has accepted the body.
            with contextlib.suppress(RequestError):
                prepare_body(data, operation=operation, model="m", backend_model="m", policy=BodyPolicy())
                progress = Progress(text="some words", tokens=2)
                if not plan.obstacle and not is_exhausted(plan, progress):
                    read_body(body_after(plan, progress))


# ---------------------------------------------------------------- files
@target
def configs(data: bytes) -> None:
    """A config file."""
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "config.toml"
        file.write_bytes(data)
        with contextlib.suppress(ConfigError):
            load_config({"roles": ["client"], "open": True}, env={"LLOOM_HOME": home}, config_file=file)
