"""``/lloom/hello/1.0.0`` as two state machines: who is at the other end, of which network, and what can it do. Sans-IO.

::

    opener                                   answerer
    HELLO(nonce, versions, network ids) ->
                                          <- REPLY(nonce, versions, network id, proof)
    PROVE(proof, node)                  ->
                                          <- WELCOME(node)     or before it, by either: REFUSE(code, message)
    CATALOGUE_QUERY                     ->
                                          <- CATALOGUE_ENTRY* CATALOGUE_END                     as often as wanted

Bytes go in by ``receive``, which gives back the bytes to send at once and the events. ``HelloDone`` comes only when the
far side's proof was verified, or when there is no shared network and both sides are open. Neither side shows its
``NodeInfo`` before that: an answerer that shares no network and is not open refuses, so that a REPLY without a network
tells the opener that the answerer is open.

A proof is an HMAC over both peer ids, both nonces and the role of who proves. So it cannot be reflected (another role),
relayed by hand (the ids are those of the secured connection, as p2pd reports them) or replayed (fresh nonces).
Source: PROTOCOL.md, Hello.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import LocalProtocolError, RemoteProtocolError
from lloom_sidecar.ids import PeerId, check_model_id

from .framing import MAX_FRAME_BYTES, FrameCutter, frame
from .names import HELLO_PROOF_LABEL, VERSION_MAJOR, VERSION_MINOR
from .network_key import NetworkKey
from .pb import lloom_pb2 as pb
from .varint import encode_varint

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
NETWORK_ID_BYTES: Final = 32
MAX_NETWORKS: Final = 4
"""Networks that an opener may name in one HELLO."""
MAX_ROLES: Final = 8
MAX_FEATURES: Final = 16
MAX_FEATURE_CHARACTERS: Final = 32
MAX_SOFTWARE_CHARACTERS: Final = 64
MAX_NODE_ANNOUNCEMENT_BYTES: Final = 16 * 1024 - 1
"""A full announcement is under 16 KiB."""
MAX_REFUSAL_CHARACTERS: Final = 1000
MAX_CATALOGUE_ENTRIES: Final = 10_000
MAX_CATALOGUE_BYTES: Final = 32 * 1024 * 1024
"""Of all CATALOGUE_ENTRY frames of one answer, each without its length prefix."""

_ROLE_OPENER: Final = b"\x01"
_ROLE_ANSWERER: Final = b"\x02"
_CODE: Final = re.compile(r"[a-z_]{1,40}")
_FEATURE: Final = re.compile(r"[a-z0-9_]{1,32}")
_KNOWN_ROLES: Final = frozenset({pb.ROLE_CLIENT, pb.ROLE_EXECUTOR, pb.ROLE_VALIDATOR})


class HelloState(Enum):
    """Where a hello stands. The same names serve both sides."""

    NEW = "new"
    GREETED = "greeted"
    """Opener: HELLO was sent. Answerer: REPLY was sent."""
    PROVED = "proved"
    """Opener: PROVE was sent."""
    IDLE = "idle"
    """Done; a catalogue may be asked for."""
    CATALOGUE = "catalogue"
    """A catalogue was asked for and has not ended."""
    CLOSED = "closed"
    """Refused by one side. What still comes is dropped."""
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class HelloDone:
    """The far side is known."""

    is_member: bool
    """True when it proved to hold a key of one of our networks; False only when both sides are open."""
    network_id: bytes
    """The shared network's public id; empty when there is none."""
    node: pb.NodeInfo
    """Its limits were checked and roles that we do not know were left out; its announcement was not opened."""


@dataclass(frozen=True, slots=True)
class HelloRefused:
    """One side refused; close the stream once the bytes that came with this event are sent."""

    code: str
    """version, not_member, bad_proof, busy, or a later version's code."""
    message: str
    """A sentence; the far side's own words when ``is_ours`` is False."""
    is_ours: bool


@dataclass(frozen=True, slots=True)
class CatalogueAsked:
    """Answerer: send ``catalogue_entry`` as often as needed, then ``catalogue_end``."""

    model: str
    """Empty = every model."""
    since: int
    """The ``cursor`` of an earlier answer; 0 = from the start."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """Opener: one executor. Both envelopes are unchecked."""

    announcement: bytes
    heartbeat: bytes
    """Empty when there was none since."""
    age_ms: int
    """How long before now the validator received the newer of the two."""


@dataclass(frozen=True, slots=True)
class CatalogueEnd:
    """Opener: the catalogue is complete, unless ``truncated``."""

    cursor: int
    truncated: bool


Event = HelloDone | HelloRefused | CatalogueAsked | CatalogueEntry | CatalogueEnd


def membership_proof(
    key: NetworkKey, *, by_opener: bool, opener: PeerId, answerer: PeerId, nonce_opener: bytes, nonce_answerer: bytes
) -> bytes:
    """HMAC-SHA256 under K_hello of the fields in PROTOCOL.md's order, each behind its length as a varint."""
    fields = (
        HELLO_PROOF_LABEL,
        _ROLE_OPENER if by_opener else _ROLE_ANSWERER,
        opener.raw,
        answerer.raw,
        nonce_opener,
        nonce_answerer,
    )
    message = b"".join(encode_varint(len(field)) + field for field in fields)
    return hmac.digest(key.k_hello, message, "sha256")


class _Hello:
    """What both sides share: cutting, the broken state, the refusal."""

    def __init__(
        self,
        *,
        me: PeerId,
        peer: PeerId,
        keys: Sequence[NetworkKey],
        is_open: bool,
        node: pb.NodeInfo,
        nonce: bytes,
    ) -> None:
        if len(nonce) != NONCE_BYTES:
            raise LocalProtocolError(f"a hello's nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        if len(keys) > MAX_NETWORKS:
            raise LocalProtocolError(f"a hello names at most {MAX_NETWORKS} networks, not {len(keys)}")
        try:
            _checked_node(node)
        except RemoteProtocolError as exc:
            raise LocalProtocolError(f"our own node's description breaks the rules: {exc}") from exc
        self.state = HelloState.NEW
        self._me = me
        self._peer = peer
        self._keys = {key.network_id: key for key in keys}
        self._is_open = is_open
        self._node = node
        self._nonce = nonce
        self._cutter = FrameCutter(MAX_FRAME_BYTES)
        self._key: NetworkKey | None = None
        self._error: RemoteProtocolError | None = None
        self._entries_left = 0
        self._bytes_left = 0

    @property
    def catalogue_entries_left(self) -> int:
        """Entries that the catalogue under way may still have."""
        return self._entries_left

    @property
    def catalogue_bytes_left(self) -> int:
        """Bytes of entries that the catalogue under way may still have."""
        return self._bytes_left

    def receive(self, data: bytes) -> tuple[bytes, list[Event]]:
        """Take bytes that arrived; returns (bytes to send now, events in order). After a refusal bytes are dropped.

        Raises:
            RemoteProtocolError: the far side broke the rules (codes bad_frame, oversize, unexpected_frame); what this
                call would have returned is lost, the stream is to be reset. Again on every later call.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error.message, code=self._error.code)
        out = bytearray()
        events: list[Event] = []
        try:
            for message in () if self._is_closed else self._cutter.feed(data):
                if self._is_closed:
                    break
                self._take(message, out, events)
        except RemoteProtocolError as exc:
            self.state = HelloState.BROKEN
            self._error = exc
            raise
        return bytes(out), events

    def receive_eof(self) -> None:
        """The far side closed.

        Raises:
            RemoteProtocolError: code ``truncated``, when a hello or a catalogue was under way.
        """
        before = self.state
        if self._is_closed or (before is HelloState.IDLE and not self._cutter.has_partial):
            self.state = HelloState.CLOSED
            return
        self.state = HelloState.BROKEN
        self._error = RemoteProtocolError(
            f"the stream ended while the hello was {before.value}, before it was complete", code="truncated"
        )
        raise self._error

    @property
    def _is_closed(self) -> bool:
        return self.state is HelloState.CLOSED

    def _take(self, message: bytes, out: bytearray, events: list[Event]) -> None:
        try:
            parsed = pb.HelloFrame.FromString(message)
        except DecodeError as exc:
            raise RemoteProtocolError("bytes that are no hello frame", code="bad_frame") from exc
        kind = parsed.WhichOneof("kind")
        if kind == "refuse" and self.state in (HelloState.NEW, HelloState.GREETED, HelloState.PROVED):
            if _CODE.fullmatch(parsed.refuse.code) is None or len(parsed.refuse.message) > MAX_REFUSAL_CHARACTERS:
                raise RemoteProtocolError("a REFUSE over its limits", code="bad_frame")
            self.state = HelloState.CLOSED
            events.append(HelloRefused(parsed.refuse.code, parsed.refuse.message, is_ours=False))
            return
        self._frame(kind, parsed, len(message), out, events)

    def _frame(self, kind: str | None, message: pb.HelloFrame, size: int, out: bytearray, events: list[Event]) -> None:
        raise NotImplementedError

    def _expect(self, kind: str | None, wanted: str, state: HelloState) -> None:
        if kind != wanted or self.state is not state:
            raise RemoteProtocolError(
                f"a frame of kind {kind or 'unknown'} while the hello was {self.state.value}", code="unexpected_frame"
            )

    def _demand(self, action: str, *states: HelloState) -> None:
        if self.state not in states:
            raise LocalProtocolError(f"{action} while the hello was {self.state.value}")

    def _refuse(self, code: str, message: str, out: bytearray, events: list[Event]) -> None:
        self.state = HelloState.CLOSED
        out += _sent(pb.HelloFrame(refuse=pb.Refuse(code=code, message=message)))
        events.append(HelloRefused(code, message, is_ours=True))

    def _is_other_major(self, version: int, out: bytearray, events: list[Event]) -> bool:
        if version == VERSION_MAJOR:
            return False
        self._refuse(
            "version",
            f"this node speaks version {VERSION_MAJOR} of Lloom's protocol, the other one {version}: "
            "update the older of the two",
            out,
            events,
        )
        return True

    def _done(self, node: pb.NodeInfo, events: list[Event]) -> None:
        self.state = HelloState.IDLE
        network_id = b"" if self._key is None else self._key.network_id
        events.append(HelloDone(self._key is not None, network_id, _checked_node(node)))

    def _begin_catalogue(self) -> None:
        self.state = HelloState.CATALOGUE
        self._entries_left = MAX_CATALOGUE_ENTRIES
        self._bytes_left = MAX_CATALOGUE_BYTES


class HelloOpener(_Hello):
    """The side that opened the stream.

    Args (of the constructor):
        me: our id, as p2pd's IDENTIFY reports it.
        peer: the far side's id, as p2pd reports it for this stream (never as the far side states it).
        keys: of our networks, newest first, at most 4; may be empty.
        is_open: True when strangers are to be accepted, if they accept us.
        node: what the far side learns of us once it is accepted.
        nonce: 32 random bytes, never used again.

    Raises LocalProtocolError when an argument breaks the wire's rules.
    """

    def start(self) -> bytes:
        """The first bytes to send."""
        self._demand("start", HelloState.NEW)
        self.state = HelloState.GREETED
        return _sent(
            pb.HelloFrame(
                hello=pb.Hello(
                    version_major=VERSION_MAJOR,
                    version_minor=VERSION_MINOR,
                    nonce=self._nonce,
                    network_ids=list(self._keys),
                )
            )
        )

    def catalogue_query(self, model: str = "", since: int = 0) -> bytes:
        """Ask for the catalogue, once the hello is done and no other one is under way.

        Args:
            model: only executors of this one; empty = all.
            since: ``CatalogueEnd.cursor`` of an earlier answer of the same validator; 0 = all.
        """
        self._demand("catalogue_query", HelloState.IDLE)
        self._begin_catalogue()
        return _sent(pb.HelloFrame(catalogue_query=pb.CatalogueQuery(model=model, since=since)))

    def _frame(self, kind: str | None, message: pb.HelloFrame, size: int, out: bytearray, events: list[Event]) -> None:
        if kind == "reply":
            self._expect(kind, "reply", HelloState.GREETED)
            self._on_reply(message.reply, out, events)
        elif kind == "welcome":
            self._expect(kind, "welcome", HelloState.PROVED)
            self._done(message.welcome.node, events)
        elif kind == "catalogue_entry":
            self._expect(kind, "catalogue_entry", HelloState.CATALOGUE)
            self._entries_left -= 1
            self._bytes_left -= size
            if self._entries_left < 0 or self._bytes_left < 0:
                raise RemoteProtocolError(
                    f"a catalogue of over {MAX_CATALOGUE_ENTRIES} entries or {MAX_CATALOGUE_BYTES} bytes",
                    code="oversize",
                )
            entry = message.catalogue_entry
            events.append(CatalogueEntry(entry.announcement, entry.heartbeat, entry.age_ms))
        else:
            self._expect(kind, "catalogue_end", HelloState.CATALOGUE)
            self.state = HelloState.IDLE
            events.append(CatalogueEnd(message.catalogue_end.cursor, message.catalogue_end.truncated))

    def _on_reply(self, reply: pb.Reply, out: bytearray, events: list[Event]) -> None:
        if self._is_other_major(reply.version_major, out, events):
            return
        if len(reply.nonce) != NONCE_BYTES:
            raise RemoteProtocolError(f"a REPLY without a nonce of {NONCE_BYTES} bytes", code="bad_frame")
        proof = b""
        if reply.network_id:
            key = self._keys.get(reply.network_id)
            if key is None:
                raise RemoteProtocolError("a REPLY for a network that was not named", code="bad_frame")
            expected, proof = (
                membership_proof(
                    key,
                    by_opener=by_opener,
                    opener=self._me,
                    answerer=self._peer,
                    nonce_opener=self._nonce,
                    nonce_answerer=reply.nonce,
                )
                for by_opener in (False, True)
            )
            if not hmac.compare_digest(expected, reply.proof):
                self._refuse("bad_proof", "the other node did not prove that it holds the network's key", out, events)
                return
            self._key = key
        elif not self._is_open:
            self._refuse("not_member", _NOT_MEMBER, out, events)
            return
        self.state = HelloState.PROVED
        out += _sent(pb.HelloFrame(prove=pb.Prove(proof=proof, node=self._node)))


class HelloAnswerer(_Hello):
    """The side that a stream was opened to. Arguments as for ``HelloOpener``."""

    def __init__(
        self,
        *,
        me: PeerId,
        peer: PeerId,
        keys: Sequence[NetworkKey],
        is_open: bool,
        node: pb.NodeInfo,
        nonce: bytes,
    ) -> None:
        super().__init__(me=me, peer=peer, keys=keys, is_open=is_open, node=node, nonce=nonce)
        self._expected_proof = b""

    def refuse(self, code: str, message: str) -> bytes:
        """Refuse for a reason of our own (``busy``), at any point before the hello is done. Send it, then close."""
        self._demand("refuse", HelloState.NEW, HelloState.GREETED)
        self.state = HelloState.CLOSED
        return _sent(pb.HelloFrame(refuse=pb.Refuse(code=code, message=message[:MAX_REFUSAL_CHARACTERS])))

    def catalogue_entry(self, announcement: bytes, heartbeat: bytes = b"", age_ms: int = 0) -> bytes:
        """One executor, while ``CatalogueAsked`` is being answered.

        Args:
            announcement: its newest full announcement, as it signed it.
            heartbeat: its newest heartbeat after that, or empty.
            age_ms: time since the newer of the two was received, milliseconds.

        Raises LocalProtocolError over the limits: look at ``catalogue_entries_left`` and ``catalogue_bytes_left``
        first. An entry takes both envelopes' bytes and at most 32 more.
        """
        self._demand("catalogue_entry", HelloState.CATALOGUE)
        entry = pb.CatalogueEntry(announcement=announcement, heartbeat=heartbeat, age_ms=min(age_ms, 2**32 - 1))
        message = pb.HelloFrame(catalogue_entry=entry).SerializeToString()
        if not self._entries_left or len(message) > min(self._bytes_left, MAX_FRAME_BYTES):
            raise LocalProtocolError("a catalogue entry over the limits")
        self._entries_left -= 1
        self._bytes_left -= len(message)
        return frame(message)

    def catalogue_end(self, cursor: int, truncated: bool) -> bytes:
        """The catalogue is complete. ``truncated``: True when a limit cut it; ask again with this ``cursor``."""
        self._demand("catalogue_end", HelloState.CATALOGUE)
        self.state = HelloState.IDLE
        return _sent(pb.HelloFrame(catalogue_end=pb.CatalogueEnd(cursor=cursor, truncated=truncated)))

    def _frame(self, kind: str | None, message: pb.HelloFrame, size: int, out: bytearray, events: list[Event]) -> None:
        if kind == "hello":
            self._expect(kind, "hello", HelloState.NEW)
            self._on_hello(message.hello, out, events)
        elif kind == "prove":
            self._expect(kind, "prove", HelloState.GREETED)
            self._on_prove(message.prove, out, events)
        else:
            self._expect(kind, "catalogue_query", HelloState.IDLE)
            query = message.catalogue_query
            if query.model:
                try:
                    check_model_id(query.model)
                except ValueError as exc:
                    raise RemoteProtocolError(f"a catalogue query that is none: {exc}", code="bad_frame") from exc
            self._begin_catalogue()
            events.append(CatalogueAsked(query.model, query.since))

    def _on_hello(self, hello: pb.Hello, out: bytearray, events: list[Event]) -> None:
        if self._is_other_major(hello.version_major, out, events):
            return
        if (
            len(hello.nonce) != NONCE_BYTES
            or len(hello.network_ids) > MAX_NETWORKS
            or any(len(network_id) != NETWORK_ID_BYTES for network_id in hello.network_ids)
        ):
            raise RemoteProtocolError("a HELLO whose nonce or networks break the rules", code="bad_frame")
        self._key = next((self._keys[network] for network in hello.network_ids if network in self._keys), None)
        if self._key is None and not self._is_open:
            self._refuse("not_member", _NOT_MEMBER, out, events)
            return
        network_id = proof = b""
        if self._key is not None:
            network_id = self._key.network_id
            proof, self._expected_proof = (
                membership_proof(
                    self._key,
                    by_opener=by_opener,
                    opener=self._peer,
                    answerer=self._me,
                    nonce_opener=hello.nonce,
                    nonce_answerer=self._nonce,
                )
                for by_opener in (False, True)
            )
        self.state = HelloState.GREETED
        out += _sent(
            pb.HelloFrame(
                reply=pb.Reply(
                    version_major=VERSION_MAJOR,
                    version_minor=VERSION_MINOR,
                    nonce=self._nonce,
                    network_id=network_id,
                    proof=proof,
                )
            )
        )

    def _on_prove(self, prove: pb.Prove, out: bytearray, events: list[Event]) -> None:
        # Without a shared network the expected proof is empty, and so must be the one that came.
        if not hmac.compare_digest(self._expected_proof, prove.proof):
            self._refuse("bad_proof", "the other node did not prove that it holds the network's key", out, events)
            return
        self._done(prove.node, events)
        out += _sent(pb.HelloFrame(welcome=pb.Welcome(node=self._node)))


_NOT_MEMBER: Final = "these two nodes share no network (`lloomctl network join` makes a node a member)"


def _sent(message: pb.HelloFrame) -> bytes:
    return frame(message.SerializeToString())


def _checked_node(node: pb.NodeInfo) -> pb.NodeInfo:
    """``node`` within its limits, without the roles that this version does not know."""
    if (
        len(node.roles) > MAX_ROLES
        or len(node.features) > MAX_FEATURES
        or any(_FEATURE.fullmatch(feature) is None for feature in node.features)
        or len(node.announcement) > MAX_NODE_ANNOUNCEMENT_BYTES
        or len(node.software) > MAX_SOFTWARE_CHARACTERS
        or not node.software.isprintable()
        or node.now_ms < 0
    ):
        raise RemoteProtocolError("a node's description over its limits", code="bad_frame")
    return pb.NodeInfo(
        roles=[role for role in dict.fromkeys(node.roles) if role in _KNOWN_ROLES],
        features=list(dict.fromkeys(node.features)),
        max_streams=node.max_streams,
        announcement=node.announcement,
        software=node.software,
        now_ms=node.now_ms,
    )
