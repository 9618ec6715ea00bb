"""Evidence on the network topic: checked, and believed of configured validators alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import TopicMessage
from lloom_sidecar.protocol.evidence import SignedEvidence, check_evidence_clock, open_evidence
from lloom_sidecar.protocol.network_key import NetworkKey

from .intake import OFFENCES


class EvidenceBoard:
    """Checks evidence and hands on what counts. Synchronous."""

    def __init__(
        self,
        *,
        validators: Collection[PeerId],
        keys: Callable[[], Sequence[NetworkKey]],
        now_ms: Callable[[], int],
        on_evidence: Callable[[SignedEvidence], None],
        on_dropped: Callable[[str], None],
        on_offence: Callable[[PeerId, str], None],
    ) -> None:
        """Arguments as for ``StatusBoard``; ``on_evidence``: a configured validator's, each time that it says it."""
        self._validators = validators
        self._keys = keys
        self._now_ms = now_ms
        self._on_evidence = on_evidence
        self._on_dropped = on_dropped
        self._on_offence = on_offence
        self._sequences: dict[PeerId, int] = {}
        """The last one of each validator that counts."""

    def take(self, message: TopicMessage) -> bool:
        """Check one message of the topic; True when it counted."""
        if message.sender not in self._validators:
            # Receipts cost a signature check each: nobody but a configured validator has that done here.
            self._on_dropped("validator")
            return False
        try:
            return self._take(message)
        except AnnouncementError as exc:
            self._on_dropped(exc.reason)
            if exc.reason in OFFENCES:
                self._on_offence(message.sender, exc.reason)
            return False

    def _take(self, message: TopicMessage) -> bool:
        found = open_evidence(message.data, keys=self._keys(), expected_signer=message.sender)
        if not found.is_member:
            self._on_dropped("network")
            return False
        known = self._sequences.get(found.peer, 0)
        if found.sequence <= known:
            if found.sequence < known:
                raise AnnouncementError("sequence", "evidence that is older than what is known")
            return False
        check_evidence_clock(found, self._now_ms())
        self._sequences[found.peer] = found.sequence
        self._on_evidence(found)
        return True
