"""Who belongs to this node's network, whom it trusts as validator, and who is kept away."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

import trio

from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.config import Config
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.standing import Standing
from lloom_sidecar.protocol.network_key import NetworkKey, NetworkKeys

from .observer import Observer
from .receipts import now_ms

DROP_AGAIN_S: Final = 0.5
"""Between two closings of a banned peer's connections that its messages cause."""
LASTING_REFUSALS: Final = frozenset({"not_member", "version", "bad_proof"})
"""What asking again soon will not change."""


class Membership:
    """Answers from the keys, the settings, the peer book and the standing; synchronous.

    ``validators`` is shared with the peer book and the board of statuses, which see what is added and removed.
    """

    def __init__(
        self,
        config: Config,
        *,
        key_file: NetworkKeys | None,
        book: PeerBook,
        validators: Collection[PeerId],
        in_use: Callable[[PeerId], bool],
        look_now: Callable[[], None],
        metrics: Metrics,
        observer: Observer,
    ) -> None:
        """``in_use``: a request is under way with the peer; ``look_now``: somebody is to be disconnected now."""
        self.key_file = key_file
        self.standing = Standing()
        self._config = config
        self._book = book
        self._validators = validators
        self._in_use = in_use
        self._look_now = look_now
        self._metrics = metrics
        self._observer = observer
        self._next_drop_at = 0.0

    # ------------------------------------------------------------ who belongs to us
    def keys(self) -> tuple[NetworkKey, ...]:
        """The network keys that count now, newest first."""
        return () if self.key_file is None else self.key_file.valid(now_ms())

    def current_key(self) -> NetworkKey | None:
        """The newest of them."""
        return None if self.key_file is None else self.key_file.current

    def may_ask(self, peer: PeerId) -> bool:
        """Whether this node serves ``peer``: a member by hello, an allowed one, or anybody when open."""
        now = trio.current_time()
        if self.standing.ban_of(peer, now) is not None:
            return False
        return self._config.open or self._book.is_member(peer, now) or peer in self._config.allow_peers

    def counts_as_member(self, peer: PeerId) -> bool:
        """Whether ``peer`` is a member by hello or an allowed one: known by more than an address."""
        return self._book.is_member(peer, trio.current_time()) or peer in self._config.allow_peers

    def member_roles(self, peer: PeerId) -> frozenset[str] | None:
        """The roles of a member or an allowed peer, None for anybody else."""
        known = self._book.known(peer, trio.current_time())
        if known is None or not (known.is_member or peer in self._config.allow_peers):
            return None
        return known.roles

    # ------------------------------------------------------------ who is kept away
    def ban_of(self, peer: PeerId) -> str | None:
        """Why ``peer`` is banned now, None = it is not."""
        return self.standing.ban_of(peer, trio.current_time())

    def keeps_away(self, peer: PeerId) -> str | None:
        """Why ``peer`` must not be dialled now, None = nothing speaks against it."""
        now = trio.current_time()
        return self.standing.ban_of(peer, now) if self.is_needed(peer) else self.standing.keeps_away(peer, now)

    def is_needed(self, peer: PeerId) -> bool:
        """Somebody wants it though it may be of another network."""
        return peer in self._validators or peer in self._config.allow_peers or self._in_use(peer)

    def is_banned_author(self, peer: PeerId) -> bool:
        """Whether a message's author is banned, which is then disconnected should it be a neighbour again."""
        now = trio.current_time()
        if self.standing.ban_of(peer, now) is None:
            return False
        if now >= self._next_drop_at:
            # It may be a neighbour again since the last look at the connections.
            self._next_drop_at = now + DROP_AGAIN_S
            self._look_now()
        return True

    def on_offence(self, peer: PeerId, reason: str) -> None:
        """``peer`` published what no honest node publishes; too often, and it is banned."""
        if not self.standing.offend(peer, reason, trio.current_time()):
            return
        self._metrics.peer_banned(reason)
        self._observer.peer_banned(peer, reason)
        self._look_now()

    def on_refused(self, peer: PeerId, code: str) -> None:
        """A hello with ``peer`` failed, whichever side refused."""
        self._observer.hello_refused(peer, code)
        plain = code.removeprefix("hello_")
        if plain in LASTING_REFUSALS and self.standing.refuse(peer, plain, trio.current_time()):
            self._observer.peer_refused(peer, plain)

    def other_versions(self) -> int:
        """Peers that lately refused hello, or were refused, because of their major version."""
        return len(self.standing.refused("version", trio.current_time()))
