"""The one way by which announcements enter the peer book, from gossip, hello or a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.peerbook import Change, PeerBook
from lloom_sidecar.protocol.announcement import check_clock, open_announcement
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Announcement

MAX_FOUND_BY: Final = 20_000
OFFENCES: Final = frozenset({"size", "envelope", "publisher", "signature", "tag"})
"""Reasons for which no honest node hands an announcement on. ``schema`` is none: a later version may say more."""

log = structlog.get_logger("lloom.intake")


class IntakeObserver(Protocol):
    """What the node wants to know of announcements."""

    def announcement_dropped(self, reason: str) -> None:
        """One was not believed; ``reason`` is AnnouncementError's."""

    def executor_changed(self, peer: PeerId, change: Change, found_by: str) -> None:
        """One was believed and did ``change`` to the book."""


class Intake:
    """Checks and applies announcements; synchronous, so each is atomic."""

    def __init__(
        self,
        *,
        me: PeerId,
        book: PeerBook,
        keys: Callable[[], Sequence[NetworkKey]],
        observer: IntakeObserver,
        now_ms: Callable[[], int],
        on_offence: Callable[[PeerId, str], None] = lambda peer, reason: None,
    ) -> None:
        """``on_offence``: a peer published, or has in its catalogue, what cannot be honest."""
        self._me = me
        self._book = book
        self._keys = keys
        self._observer = observer
        self._now_ms = now_ms
        self._on_offence = on_offence
        self.found_by: dict[PeerId, str] = {}
        """How each executor was first found: gossip, hello, catalogue."""

    def take(
        self,
        raw: bytes,
        *,
        found_by: str,
        source: PeerId | None,
        direct: bool = False,
        expected_signer: PeerId | None = None,
        age_s: float = 0.0,
    ) -> Change | None:
        """Apply one signed announcement; whatever is wrong with it is counted and dropped, and None returned."""
        announcement = self._open(raw, expected_signer, source)
        if announcement is None or not self._has_right_clock(announcement):
            return None
        return self._apply(announcement, found_by=found_by, source=source, direct=direct, age_s=age_s)

    def take_entry(self, full: bytes, heartbeat: bytes, *, source: PeerId, age_s: float) -> None:
        """Apply an entry of ``source``'s catalogue: a full announcement and the newest heartbeat after it, or empty.

        The age is that of the newer of the two, and it is that one's clock which counts: the full announcement may be
        older than clocks are compared.
        """
        opened = self._open(full, None, source)
        beat = self._open(heartbeat, None, source) if heartbeat else None
        if beat is not None and not self._has_right_clock(beat):
            beat = None
        if opened is not None and (_speaks_for(beat, opened) or self._has_right_clock(opened)):
            self._apply(opened, found_by="catalogue", source=source, direct=False, age_s=age_s)
        if beat is not None:
            self._apply(beat, found_by="catalogue", source=source, direct=False, age_s=age_s)

    def _open(self, raw: bytes, expected_signer: PeerId | None, source: PeerId | None) -> Announcement | None:
        try:
            return open_announcement(raw, keys=self._keys(), expected_signer=expected_signer)
        except AnnouncementError as exc:
            offender = expected_signer or source
            if offender is not None and exc.reason in OFFENCES:
                self._on_offence(offender, exc.reason)
            self._dropped(exc)
            return None

    def _has_right_clock(self, announcement: Announcement) -> bool:
        try:
            check_clock(announcement, self._now_ms())
        except AnnouncementError as exc:
            self._dropped(exc)
            return False
        return True

    def _apply(
        self, announcement: Announcement, *, found_by: str, source: PeerId | None, direct: bool, age_s: float
    ) -> Change | None:
        peer = announcement.peer
        if peer == self._me:
            return None
        try:
            change = self._book.apply(announcement, now=trio.current_time(), age_s=age_s, direct=direct, source=source)
        except AnnouncementError as exc:
            self._dropped(exc)
            return None
        if change is Change.NEW and len(self.found_by) < MAX_FOUND_BY:
            self.found_by[peer] = found_by
        elif change is Change.REMOVED:
            self.found_by.pop(peer, None)
        self._observer.executor_changed(peer, change, found_by)
        return change

    def _dropped(self, exc: AnnouncementError) -> None:
        self._observer.announcement_dropped(exc.reason)
        log.debug("announcement_dropped", reason=exc.reason)


def _speaks_for(beat: Announcement | None, full: Announcement) -> bool:
    return beat is not None and (beat.peer, beat.full_digest) == (full.peer, full.digest)
