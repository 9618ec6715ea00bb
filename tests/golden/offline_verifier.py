"""A second implementation of the verification of receipts, from PROTOCOL.md alone: nothing of lloom_sidecar is used.

It stands for what an auditor would write: protobuf read by hand, SHA-256 of the standard library, Ed25519 of whatever
library is at hand (here PyNaCl's, and only its verification). ``python offline_verifier.py FILE`` prints what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

Fields = dict[int, list[Any]]

DOMAINS = {
    "request": ("lloom-request-1", b"/lloom/envelope/request/1"),
    "receipt": ("lloom-receipt-1", b"/lloom/envelope/receipt/1"),
    "checkpoint": ("lloom-checkpoint-1", b"/lloom/envelope/checkpoint/1"),
    "ack": ("lloom-ack-1", b"/lloom/envelope/ack/1"),
}
"""PROTOCOL.md, section 5."""


class WrongError(Exception):
    """One thing does not hold."""


# ---------------------------------------------------------------- protobuf and varints (sections 1 and 5)
def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise WrongError("a varint that does not end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


def write_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def lp(data: bytes) -> bytes:
    return write_varint(len(data)) + data


def fields_of(message: bytes) -> Fields:
    """Field number -> its values, in order; numbers for varints, bytes for what has a length."""
    found: Fields = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: Any
        if kind == 0:
            value, at = read_varint(message, at)
        elif kind == 2:
            length, at = read_varint(message, at)
            value, at = message[at : at + length], at + length
            if at > len(message):
                raise WrongError("a field that is longer than its message")
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise WrongError("a field of an unknown kind")
        found.setdefault(number, []).append(value)
    return found


def number(fields: Fields, which: int) -> int:
    return int(fields.get(which, [0])[-1])


def text(fields: Fields, which: int) -> bytes:
    return bytes(fields.get(which, [b""])[-1])


# ---------------------------------------------------------------- envelopes (sections 4 and 5)
def open_envelope(kind: str, raw: bytes) -> tuple[bytes, Fields]:
    """(peer id of the signer, the claims)."""
    domain, payload_type = DOMAINS[kind]
    fields = fields_of(raw)
    public_key_message, payload, signature = text(fields, 1), text(fields, 3), text(fields, 5)
    if public_key_message[:4] != bytes.fromhex("08011220") or len(public_key_message) != 36:
        raise WrongError("not an Ed25519 key")
    if text(fields, 2) != payload_type:
        raise WrongError("another kind of envelope")
    if len(signature) != 64:
        raise WrongError("no signature")
    exact = b"\x0a" + lp(public_key_message) + b"\x12" + lp(payload_type)
    exact += (b"\x1a" + lp(payload) if payload else b"") + b"\x2a\x40" + signature
    if exact != raw:
        raise WrongError("not the one form of an envelope")
    try:
        VerifyKey(public_key_message[4:]).verify(lp(domain.encode()) + lp(payload_type) + lp(payload), signature)
    except BadSignatureError:
        raise WrongError("forged") from None
    return b"\x00\x24" + public_key_message, fields_of(payload)


# ---------------------------------------------------------------- the rules (section 12)
def price_of(message: bytes) -> tuple[int, int, bytes]:
    fields = fields_of(message)
    return number(fields, 1), number(fields, 2), text(fields, 3)


def cost_of(price: tuple[int, int, bytes], usage: Fields) -> int:
    micro = price[0] * number(usage, 1) + price[1] * number(usage, 2)
    return (micro + 999_999) // 1_000_000


def faults_of(document: dict[str, str], *, body: bytes | None = None, answer: bytes | None = None) -> list[str]:
    """Names of what does not hold; empty = all that can be checked does."""
    if document.get("format") != "lloom-receipt-1":
        return ["format"]
    raw = {name: bytes.fromhex(document.get(name, "")) for name in ("request", "receipt", "checkpoint", "ack", "salt")}
    kind = "receipt" if raw["receipt"] else "checkpoint"
    faults = []
    opened = {}
    for name in ("request", kind):
        try:
            opened[name] = open_envelope(name, raw[name])
        except WrongError:
            faults.append(name)
    if faults:
        return faults
    client, request = opened["request"]
    executor, claims = opened[kind]
    if text(claims, 1) != client:
        faults.append("client")
    if text(claims, 2) != executor or text(request, 2) != executor:
        faults.append("executor")
    if text(claims, 3) != hashlib.sha256(raw["request"]).digest():
        faults.append("request_digest")
    if text(claims, 6) != text(request, 8):
        faults.append("model")
    price, ceiling = price_of(text(claims, 9)), price_of(text(request, 10))
    is_free = price[0] == 0 and price[1] == 0
    if price[0] > ceiling[0] or price[1] > ceiling[1] or (price[2] != ceiling[2] and not is_free):
        faults.append("price")
    due = cost_of(price, fields_of(text(claims, 7)))
    if number(request, 13):
        due = min(due, number(request, 12))
    if number(claims, 10) != due:
        faults.append("cost")
    if number(claims, 14) not in ((1, 2) if kind == "receipt" else (3,)):
        faults.append("outcome")
    if raw["ack"]:
        try:
            signer, ack = open_envelope("ack", raw["ack"])
        except WrongError:
            faults.append("ack")
        else:
            if kind != "receipt" or signer != client or text(ack, 1) != hashlib.sha256(raw["receipt"]).digest():
                faults.append("ack")
    if raw["salt"] and body is not None and text(request, 9) != hashlib.sha256(raw["salt"] + body).digest():
        faults.append("body")
    if raw["salt"] and answer is not None:
        digest = hashlib.sha256(raw["salt"] + answer).digest()
        if text(claims, 4) != digest or number(claims, 5) != len(answer):
            faults.append("answer")
    return faults


def main() -> int:
    """Exit status 1 when something is wrong."""
    with open(sys.argv[1], encoding="utf-8") as file:
        document = json.load(file)
    worst = 0
    for one in document if isinstance(document, list) else [document]:
        faults = faults_of(one)
        print("; ".join(faults) or "holds")
        worst = max(worst, int(bool(faults)))
    return worst


if __name__ == "__main__":
    sys.exit(main())
