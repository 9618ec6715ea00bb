"""The control protocol's generated messages, re-exported: the only module that imports ``p2pclient``.

Only p2pclient's generated code is used. Its clients have no deadlines, leak sockets on errors, and its listener dies of
one empty connection, so connector, calls and listener are Lloom's own.
Source: https://github.com/libp2p/go-libp2p-daemon/tree/master/specs (CONTROL, DHT, PUBSUB, CM).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, EncodeError
from p2pclient.pb import p2pd_pb2 as pb

from lloom_sidecar.p2p.errors import DaemonProtocolError

Request = pb.Request
Response = pb.Response
ConnectRequest = pb.ConnectRequest
DisconnectRequest = pb.DisconnectRequest
StreamOpenRequest = pb.StreamOpenRequest
StreamHandlerRequest = pb.StreamHandlerRequest
StreamInfo = pb.StreamInfo
IdentifyResponse = pb.IdentifyResponse
PeerInfo = pb.PeerInfo
ErrorResponse = pb.ErrorResponse
DHTRequest = pb.DHTRequest
DHTResponse = pb.DHTResponse
ConnManagerRequest = pb.ConnManagerRequest
PSRequest = pb.PSRequest
PSResponse = pb.PSResponse
PSMessage = pb.PSMessage


class Message(Protocol):
    """What this room needs of a generated message."""

    def SerializeToString(self) -> bytes: ...  # noqa: N802, D102 (protobuf's name)

    def ParseFromString(self, serialized: bytes, /) -> int: ...  # noqa: N802, D102 (protobuf's name)

    def IsInitialized(self) -> bool: ...  # noqa: N802, D102 (protobuf's name)


M = TypeVar("M", bound=Message)


def parse(kind: type[M], body: bytes) -> M:
    """``body`` as a message of ``kind``.

    Raises: DaemonProtocolError when it is none (garbage, or a required field is missing).
    """
    message = kind()
    fault = f"p2pd sent {len(body)} bytes that are no {kind.__name__} message"
    try:
        message.ParseFromString(body)
    except DecodeError as exc:
        raise DaemonProtocolError(fault) from exc
    if not message.IsInitialized():
        raise DaemonProtocolError(fault)
    return message


def serialize(message: Message) -> bytes:
    """The bytes of ``message``. Raises: ValueError when it cannot be encoded (a required field is missing)."""
    try:
        return message.SerializeToString()
    except EncodeError as exc:
        raise ValueError(f"cannot encode a {type(message).__name__}: {exc}") from exc
