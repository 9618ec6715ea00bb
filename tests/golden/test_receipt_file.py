"""Exported receipts, verified twice: by this project and by an implementation written from PROTOCOL.md alone."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_vectors as golden
import pytest
from offline_verifier import faults_of

from lloom_sidecar.protocol import names
from lloom_sidecar.protocol.claims import seal_ack, seal_checkpoint, seal_receipt, seal_request
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.receipt_file import (
    MAX_FILE_BYTES,
    ExportedReceipt,
    Verdict,
    parse_receipts,
    verify_receipt,
)

STRANGER = Signer(bytes([7]) * 32)
RECEIPT = ExportedReceipt(request=golden.REQUEST, receipt=golden.RECEIPT, ack=golden.ACK, salt=golden.SALT)
CHECKPOINT = ExportedReceipt(request=golden.REQUEST, checkpoint=golden.CHECKPOINT, salt=golden.SALT)


def file_of(*receipts: ExportedReceipt) -> str:
    documents = [one.as_dict() for one in receipts]
    return json.dumps(documents[0] if len(documents) == 1 else documents)


def faults(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if check.holds is False]


def both(exported: ExportedReceipt, **texts: bytes) -> list[str]:
    """What is wrong by this project's verdict, which the other implementation has to share."""
    ours = faults(verify_receipt(exported, **texts))
    theirs = faults_of(exported.as_dict(), **texts)
    assert bool(ours) == bool(theirs), (ours, theirs)
    assert sorted(ours) == sorted(theirs)
    return ours


def test_the_second_implementation_uses_nothing_of_the_first() -> None:
    tree = ast.parse(Path(__file__).with_name("offline_verifier.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "hashlib", "json", "sys", "typing", "nacl.exceptions", "nacl.signing"}


@pytest.mark.parametrize("exported", [RECEIPT, CHECKPOINT])
def test_what_is_signed_holds_in_both(exported: ExportedReceipt) -> None:
    assert both(exported) == []
    assert both(exported, body=golden.BODY, answer=golden.ANSWER) == []
    verdict = verify_receipt(exported, body=golden.BODY, answer=golden.ANSWER)
    assert verdict.holds
    assert {check.name for check in verdict.checks if check.holds is None} == (set() if exported.ack else {"ack"})
    assert verdict.claims is not None
    assert verdict.claims.cost == 1
    assert verdict.request is not None
    assert verdict.request.model == "smollm2:135m"


@pytest.mark.parametrize("name", ["request", "receipt", "checkpoint", "ack"])
def test_any_byte_that_is_changed_is_refused_by_both(name: str) -> None:
    exported = CHECKPOINT if name == "checkpoint" else RECEIPT
    raw = getattr(exported, name)
    for position in range(len(raw)):
        changed = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        assert both(_replaced(exported, **{name: changed})), f"byte {position} of {name}"
    for cut in (raw[:-1], raw + b"\x00", raw[1:]):
        assert both(_replaced(exported, **{name: cut}))


def test_any_byte_of_salt_body_and_answer_that_is_changed_is_refused_by_both() -> None:
    for position in range(16):
        salt = golden.SALT[:position] + bytes([golden.SALT[position] ^ 0x80]) + golden.SALT[position + 1 :]
        assert both(_replaced(RECEIPT, salt=salt), body=golden.BODY, answer=golden.ANSWER) == ["body", "answer"]
    for name, text in (("body", golden.BODY), ("answer", golden.ANSWER)):
        for position in range(len(text)):
            changed = text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :]
            assert both(RECEIPT, **{name: changed}) == [name]
    assert both(RECEIPT, answer=golden.ANSWER + b" ") == ["answer"]


def _replaced(exported: ExportedReceipt, **fields: bytes) -> ExportedReceipt:
    known = {name: getattr(exported, name) for name in ("request", "receipt", "checkpoint", "ack", "salt")}
    return ExportedReceipt(**{**known, **fields})


def resigned(signer: Signer = golden.EXECUTOR, **changes: Any) -> ExportedReceipt:
    claims = golden.receipt_claims(pb.OUTCOME_COMPLETE)
    for name, value in changes.items():
        if isinstance(value, pb.Price | pb.Usage):
            getattr(claims, name).CopyFrom(value)
        else:
            setattr(claims, name, value)
    envelope = seal_receipt(claims, signer)
    return ExportedReceipt(
        request=golden.REQUEST, receipt=envelope, ack=seal_ack(envelope, golden.CLIENT), salt=golden.SALT
    )


DEAR = pb.Price(prompt_per_million=151, completion_per_million=600, currency="EUR")
FOREIGN = pb.Price(prompt_per_million=150, completion_per_million=600, currency="USD")
FREE = pb.Price(currency="USD")


@pytest.mark.parametrize(
    ("wrong", "exported"),
    [
        (["client"], resigned(client=STRANGER.peer.raw)),
        (["executor"], resigned(executor=STRANGER.peer.raw)),
        (["executor"], resigned(signer=STRANGER)),
        (["executor"], resigned(signer=STRANGER, executor=STRANGER.peer.raw)),
        (["request_digest"], resigned(request_digest=bytes(32))),
        (["answer"], resigned(answer_digest=bytes(32))),
        (["answer"], resigned(answer_bytes=71)),
        (["model"], resigned(model="other")),
        (["price"], resigned(price=DEAR)),
        (["price"], resigned(price=FOREIGN)),
        ([], resigned(price=FREE, cost=0)),
        (["cost"], resigned(cost=2)),
        (["cost"], resigned(usage=pb.Usage(prompt_tokens=12, completion_tokens=2000))),
        (["cost"], resigned(usage=pb.Usage(completion_tokens=10**9), cost=600_000)),
        ([], resigned(usage=pb.Usage(completion_tokens=10**9), cost=100)),
        (["outcome"], resigned(outcome=pb.OUTCOME_PARTIAL)),
        ([], resigned(outcome=pb.OUTCOME_STOPPED)),
        ([], resigned(accepted_at_ms=0, first_at_ms=0, ended_at_ms=0)),
    ],
)
def test_a_false_statement_with_a_true_signature_is_refused_by_both(
    wrong: list[str], exported: ExportedReceipt
) -> None:
    assert both(exported, body=golden.BODY, answer=golden.ANSWER) == wrong


def test_a_statement_about_another_request_is_refused_by_both() -> None:
    claims = golden.request_claims()
    claims.exchange = 2
    other = seal_request(claims, golden.CLIENT)
    assert both(_replaced(RECEIPT, request=other)) == ["request_digest"]
    stolen = seal_request(golden.request_claims(), STRANGER)
    assert both(_replaced(RECEIPT, request=stolen)) == ["client", "request_digest", "ack"]
    assert both(_replaced(RECEIPT, request=golden.RECEIPT)) == ["request"]


def test_acks_of_others_and_for_others_are_refused_by_both() -> None:
    for ack in (
        seal_ack(golden.RECEIPT, STRANGER),
        seal_ack(golden.CHECKPOINT, golden.CLIENT),
        seal(names.KIND_ACK, b"", golden.CLIENT),
    ):
        assert both(_replaced(RECEIPT, ack=ack)) == ["ack"]
    assert both(_replaced(CHECKPOINT, ack=seal_ack(golden.CHECKPOINT, golden.CLIENT))) == ["ack"]


def test_a_checkpoint_is_no_receipt_and_the_other_way_round() -> None:
    assert both(ExportedReceipt(request=golden.REQUEST, receipt=golden.CHECKPOINT)) == ["receipt"]
    assert both(ExportedReceipt(request=golden.REQUEST, checkpoint=golden.RECEIPT)) == ["checkpoint"]
    whole = seal_checkpoint(golden.receipt_claims(pb.OUTCOME_COMPLETE), golden.EXECUTOR)
    assert both(ExportedReceipt(request=golden.REQUEST, checkpoint=whole)) == ["outcome"]


def test_signed_bytes_that_are_no_claims() -> None:
    garbage = seal(names.KIND_RECEIPT, b"\xff\xff\xff", golden.EXECUTOR)
    verdict = verify_receipt(ExportedReceipt(request=golden.REQUEST, receipt=garbage))
    assert (faults(verdict), verdict.claims) == (["claims"], None)


def test_what_cannot_be_looked_at_is_no_fault() -> None:
    bare = ExportedReceipt(request=golden.REQUEST, receipt=golden.RECEIPT)
    verdict = verify_receipt(bare, body=b"anything", answer=b"anything")
    assert verdict.holds
    assert {c.name: c.text for c in verdict.checks if c.holds is None}.keys() == {"ack", "body", "answer"}


# ---------------------------------------------------------------- the file
def test_a_file_holds_one_or_several() -> None:
    assert parse_receipts(file_of(RECEIPT).encode()) == [RECEIPT]
    assert parse_receipts(file_of(RECEIPT, CHECKPOINT).encode()) == [RECEIPT, CHECKPOINT]
    assert set(json.loads(file_of(CHECKPOINT))) == {"format", "request", "checkpoint", "salt"}


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "holds no receipt"),
        (b"[1]", '"format" is not'),
        (b'{"format": "lloom-receipt-2"}', '"format" is not'),
        (b'{"format": "lloom-receipt-1"}', 'lacks "request"'),
        (b'{"format": "lloom-receipt-1", "request": 5}', '"request" is not hex'),
        (b'{"format": "lloom-receipt-1", "request": "zz"}', '"request" is not hex'),
        (b'{"format": "lloom-receipt-1", "request": "00"}', 'either "receipt" or "checkpoint"'),
        (b'{"format": "lloom-receipt-1", "request": "00", "receipt": "0", "checkpoint": "00"}', '"receipt" is not hex'),
        (b'{"format": "lloom-receipt-1", "request": "00", "receipt": "00", "checkpoint": "00"}', "either"),
        (b" " * (MAX_FILE_BYTES + 1), "more than"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(data: bytes, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        parse_receipts(data)


def test_the_second_implementation_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "receipts.json"
    program = Path(__file__).with_name("offline_verifier.py")
    forged = _replaced(RECEIPT, ack=seal_ack(golden.RECEIPT, STRANGER))
    for receipts, words, code in (([RECEIPT, CHECKPOINT], "holds\nholds\n", 0), ([RECEIPT, forged], "holds\nack\n", 1)):
        path.write_text(file_of(*receipts))
        done = subprocess.run(
            [sys.executable, "-I", str(program), str(path)], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == (words, code), done.stderr


def test_the_golden_receipt_is_for_the_golden_request() -> None:
    assert golden.receipt_claims(pb.OUTCOME_COMPLETE).request_digest == hashlib.sha256(golden.REQUEST).digest()
