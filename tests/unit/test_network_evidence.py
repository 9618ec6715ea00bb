"""Evidence on the topic counts for those who configured its validator, and for nobody else."""

from __future__ import annotations

from collections import Counter

import pytest
from test_protocol_evidence import EVIDENCE, KEY, NOW_MS, OTHER, OTHER_KEY, VALIDATOR

from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.evidence import EvidenceBoard
from lloom_sidecar.p2p.daemon import TopicMessage
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.evidence import SignedEvidence, seal_evidence
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.network_key import NetworkKey


class Board:
    def __init__(self, *, now_ms: int = NOW_MS) -> None:
        self.dropped: Counter[str] = Counter()
        self.offences: list[tuple[PeerId, str]] = []
        self.heard: list[SignedEvidence] = []
        self.validators = {VALIDATOR.peer}
        self.board = EvidenceBoard(
            validators=self.validators,
            keys=lambda: (KEY,),
            now_ms=lambda: now_ms,
            on_evidence=self.heard.append,
            on_dropped=lambda reason: self.dropped.update([reason]),
            on_offence=lambda peer, reason: self.offences.append((peer, reason)),
        )

    def take(self, sequence: int = 1, *, key: NetworkKey | None = KEY, sender: Signer = VALIDATOR) -> bool:
        raw = seal_evidence(
            signer=VALIDATOR, key=key, sequence=sequence, issued_at_ms=NOW_MS, ttl_s=900, evidence=EVIDENCE
        )
        return self.take_raw(raw, sender=sender)

    def take_raw(self, raw: bytes, *, sender: Signer = VALIDATOR) -> bool:
        return self.board.take(TopicMessage(sender.peer, raw, 1, (TOPIC_NETWORK,)))


def test_each_repetition_of_a_configured_validator_counts() -> None:
    board = Board()
    assert board.take(1)
    assert board.take(2)
    assert [one.evidence for one in board.heard] == [EVIDENCE, EVIDENCE]
    assert board.dropped == {}


def test_a_copy_is_no_offence_and_an_older_one_is_dropped() -> None:
    board = Board()
    assert board.take(5)
    assert not board.take(5)
    assert board.dropped == {}
    assert not board.take(4)
    assert board.dropped == {"sequence": 1}
    assert board.offences == []
    assert len(board.heard) == 1


def test_nobody_else_is_listened_to() -> None:
    board = Board()
    board.validators.clear()
    assert not board.take(1)
    assert not board.take_raw(b"whatever", sender=OTHER)
    assert board.dropped == {"validator": 2}
    board.validators.add(VALIDATOR.peer)
    assert not board.take(2, key=None)
    assert not board.take(2, key=OTHER_KEY)
    assert board.dropped == {"validator": 2, "network": 2}
    assert (board.heard, board.offences) == ([], [])


@pytest.mark.parametrize(("raw", "reason"), [(b"x", "envelope"), (bytes(17_000), "size")])
def test_what_no_validator_publishes_is_an_offence(raw: bytes, reason: str) -> None:
    board = Board()
    assert not board.take_raw(raw)
    assert board.offences == [(VALIDATOR.peer, reason)]


def test_a_forged_one_is_an_offence_of_its_sender() -> None:
    board = Board()
    board.validators.add(OTHER.peer)
    assert not board.take(1, sender=OTHER)
    assert board.offences == [(OTHER.peer, "publisher")]


def test_the_clock() -> None:
    board = Board(now_ms=NOW_MS + 1_000_000)
    assert not board.take(1)
    assert board.dropped == {"clock": 1}
    assert board.offences == []
