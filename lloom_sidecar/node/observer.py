"""Where what happens becomes metrics, events and health conditions: one class that every room reports to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lloom_sidecar.admin.events import (
    BootstrapComplete,
    ConnectionClosed,
    ConnectionEstablished,
    EventBus,
    ExecutorDiscovered,
    ExecutorLost,
    NetworkError,
    RequestReceived,
    ResponseReceived,
    ValidatorDiscovered,
)
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.client.settled import Settled
from lloom_sidecar.errors import LloomError, PeerTimeoutError, PeerUnreachableError
from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.link.exchange import Call, Receipt
from lloom_sidecar.network.upkeep import Round
from lloom_sidecar.peers.peerbook import Change
from lloom_sidecar.peers.trust import TrustBook
from lloom_sidecar.protocol.evidence import Evidence

MAX_RECENT_RECEIPTS: Final = 256
NUMBERS_WEIGHT: Final = 0.25
"""Of one receipt whose numbers cannot be: one may be a slip of a tokenizer, four in a row rule it out."""
MAX_CAUSES: Final = 256
MAX_DOUBTFUL: Final = 256
CAUSE_S: Final = 30.0
"""How long what a stream told counts as the cause of its connection's end."""

_CONNECTION_CODES: Final = frozenset({PeerUnreachableError.code, PeerTimeoutError.code, "draining"})
"""What a failed attempt says of the connection under it."""
_REFUSALS: Final = {
    "not_member": "It belongs to another network: it is not used, nor dialled for ten minutes.",
    "version": "It speaks another major version: it was told so and is not used.",
    "bad_proof": "It claims to be of this network and does not hold its key.",
}

log = structlog.get_logger("lloom.node")


@dataclass(frozen=True, slots=True)
class ClientReceipt:
    """A verified answer, for whoever asks by the request's id."""

    peer: PeerId
    call: Call
    receipt: Receipt


@dataclass(slots=True)
class Counts:
    """Requests since the node started, of one role."""

    in_flight: int = 0
    served: int = 0
    failed: int = 0
    cancelled: int = 0

    def end(self, code: str) -> None:
        """One ended with ``code``."""
        self.in_flight -= 1
        if code == "ok":
            self.served += 1
        elif code == "cancelled":
            self.cancelled += 1
        else:
            self.failed += 1


class Observer:
    """Implements what the rooms want to report to. Every method is quick; none raises."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        events: EventBus,
        models_of: Callable[[PeerId], tuple[str, ...]],
        roles_of: Callable[[PeerId], frozenset[str]],
        keep_receipt: Callable[[Settled | ServedReceipt], None],
        trust: TrustBook | None = None,
    ) -> None:
        self._trust = trust or TrustBook()
        self._metrics = metrics
        self._events = events
        self._models_of = models_of
        self._roles_of = roles_of
        self._keep_receipt = keep_receipt
        self.client = Counts()
        self.executor = Counts()
        self.tokens_received = 0
        """Completion tokens of the answers that applications got."""
        self.receipts: OrderedDict[str, ClientReceipt] = OrderedDict()
        """The newest verified answers by request id (hex)."""
        self.doubtful: OrderedDict[PeerId, float] = OrderedDict()
        """Executors whose numbers did not fit, and when that was seen last (trio's clock)."""
        self.rtt_s: dict[PeerId, float] = {}
        self._causes: OrderedDict[PeerId, tuple[float, str]] = OrderedDict()

    # ------------------------------------------------------------ connections
    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        """A peer has a connection now."""
        self._events.publish(ConnectionEstablished(str(peer), "relayed" if addr.is_relayed else "direct"))

    def disconnected(self, peer: PeerId) -> str:
        """A peer's last connection ended; returns the cause."""
        self.rtt_s.pop(peer, None)
        told_at, cause = self._causes.pop(peer, (float("-inf"), ""))
        if trio.current_time() - told_at > CAUSE_S:
            cause = "unknown"
        self._events.publish(ConnectionClosed(str(peer), cause))
        return cause

    def will_close(self, peer: PeerId, cause: str) -> None:
        """Something says why the connection to ``peer`` is about to end, should it end soon."""
        self._causes[peer] = (trio.current_time(), cause)
        self._causes.move_to_end(peer)
        if len(self._causes) > MAX_CAUSES:
            self._causes.popitem(last=False)

    # ------------------------------------------------------------ announcements
    def announcement_dropped(self, reason: str) -> None:
        """An announcement was not believed."""
        self._metrics.announcement_dropped(reason)

    def executor_changed(self, peer: PeerId, change: Change, found_by: str) -> None:
        """An announcement was believed."""
        if change is Change.NEW:
            log.info("executor_discovered", peer=str(peer), source=found_by)
            self._events.publish(ExecutorDiscovered(str(peer), self._models_of(peer), found_by))
        elif change is Change.REMOVED:
            self.executor_lost(peer, "removal")

    def executor_lost(self, peer: PeerId, reason: str) -> None:
        """An executor is not used any more."""
        log.info("executor_lost", peer=str(peer), reason=reason)
        self._events.publish(ExecutorLost(str(peer), reason))

    # ------------------------------------------------------------ validators
    def validator_joined(self, peer: PeerId, entries: int) -> None:
        """A validator was joined."""
        is_validator = "validator" in self._roles_of(peer)
        log.info("validator_joined" if is_validator else "bootstrap_peer_joined", peer=str(peer), entries=entries)
        if is_validator:
            self._events.publish(ValidatorDiscovered(str(peer), "bootstrap"))

    def validator_seen(self, peer: PeerId) -> None:
        """A member says that it is a validator; this node is not configured to trust it as one."""
        log.info("validator_seen", peer=str(peer))
        self._events.publish(ValidatorDiscovered(str(peer), "hello"))

    def validator_failed(self, peer: PeerId, error: LloomError, attempt: int) -> None:
        """A validator could not be joined."""
        log.warning("validator_not_joined", peer=str(peer), code=error.code, reason=str(error), attempt=attempt)
        if attempt == 1:
            self._events.publish(NetworkError(error.code, str(error), str(peer)))

    def bootstrap_complete(self, validators: int, seconds: float) -> None:
        """The first validator was joined."""
        log.info("bootstrap_complete", validators=validators, seconds=round(seconds, 3))
        self._metrics.discovery_finished(seconds)
        self._events.publish(BootstrapComplete(validators, validators, round(seconds, 3)))

    def round_ended(self, found: Round) -> None:
        """A further round of bootstrap ended; a node that has nobody to dial does not tell of it."""
        tried = found.validators_tried + found.known_tried
        if tried:
            joined = found.validators_joined + found.known_joined
            self._events.publish(BootstrapComplete(joined, tried, round(found.seconds, 3)))

    def few_peers(self, peers: int, wanted: int, tried: str) -> None:
        """There are too few peers, whatever was tried."""
        log.warning("few_peers", peers=peers, wanted=wanted, tried=tried)
        self._events.publish(NetworkError("few_peers", f"{peers} of {wanted} wanted peers: {tried}."))

    def hello_refused(self, peer: PeerId, code: str) -> None:
        """A hello failed, whichever side refused."""
        log.info("hello_refused", peer=str(peer), code=code)
        self._metrics.refused(code)
        self.will_close(peer, code)

    def peer_refused(self, peer: PeerId, code: str) -> None:
        """A peer turned out to be of another network or major version; told once in ten minutes."""
        self._events.publish(NetworkError(f"hello_{code}", _REFUSALS.get(code, "Hello was refused."), str(peer)))

    def peer_banned(self, peer: PeerId, reason: str) -> None:
        """A peer is kept away for its messages."""
        log.warning("peer_banned", peer=str(peer), reason=reason)
        text = f"Its gossip is not listened to for ten minutes, and it is kept away ({reason})."
        self._events.publish(NetworkError("peer_banned", text, str(peer)))

    # ------------------------------------------------------------ requests of applications
    def http_started(self) -> None:
        """A call of an application came in."""
        self.client.in_flight += 1
        self._metrics.request_started("client")

    def http_ended(
        self,
        request_id: str,
        model: str,
        peer: PeerId | None,
        code: str,
        seconds: float,
        first_s: float | None,
        attempts: int,
    ) -> None:
        """It ended."""
        self.client.end(code)
        self._metrics.request_finished("client", code, seconds)
        if first_s is not None:
            self._metrics.first_token("client", first_s)
        log.info(
            "request_ended",
            request_id=request_id,
            model=model,
            peer=None if peer is None else str(peer),
            code=code,
            seconds=round(seconds, 4),
        )
        self._events.publish(
            ResponseReceived(
                request_id, model, "client", None if peer is None else str(peer), code, round(seconds, 4), attempts
            )
        )

    def http_received(self, request_id: str, model: str) -> None:
        """Its body was read."""
        self._metrics.message_sent("request")
        self._events.publish(RequestReceived(request_id, model, "client"))

    def attempt_failed(self, peer: PeerId, model: str, error: LloomError, stage: str) -> None:
        """An executor failed at it."""
        log.info("attempt_failed", peer=str(peer), model=model, stage=stage, code=error.code)
        self._metrics.attempt_failed(error.code)
        if error.code in _CONNECTION_CODES:
            self.will_close(peer, error.code)

    def exchange_settled(self, settled: Settled) -> None:
        """A REQUEST that went out is over."""
        self._keep_receipt(settled)
        if settled.receipt is None:
            return
        if settled.receipt.doubts:
            self.numbers_doubtful(settled.peer, settled.call.model, settled.receipt.doubts)
        if settled.is_owed:
            self.tokens_received += settled.receipt.claims.usage.completion_tokens
            kept = ClientReceipt(settled.peer, settled.call, settled.receipt)
            self.receipts[settled.call.request_id.hex()] = kept
            if len(self.receipts) > MAX_RECENT_RECEIPTS:
                self.receipts.popitem(last=False)

    def numbers_doubtful(self, peer: PeerId, model: str, doubts: tuple[str, ...]) -> None:
        """An executor signed numbers that cannot be."""
        log.warning("numbers_doubtful", peer=str(peer), model=model, doubts=list(doubts))
        self._metrics.receipt_doubtful()
        self._trust.doubt(peer, "numbers in its receipts", NUMBERS_WEIGHT, trio.current_time())
        self.doubtful[peer] = trio.current_time()
        self.doubtful.move_to_end(peer)
        if len(self.doubtful) > MAX_DOUBTFUL:
            self.doubtful.popitem(last=False)
        text = f"It signed for {' and '.join(doubts)} of {model}: more than there can be."
        self._events.publish(NetworkError("numbers_doubtful", text, str(peer)))

    def executor_doubted(self, peer: PeerId, model: str, validator: PeerId) -> None:
        """Evidence against an executor that nobody spoke against before."""
        log.warning("executor_doubted", peer=str(peer), model=model, validator=str(validator))
        text = f"Validator {validator.short()} has evidence that it answers {model} unlike most others."
        self._events.publish(NetworkError("executor_doubted", text, str(peer)))

    def executor_found_wanting(self, evidence: Evidence) -> None:
        """This validator's audit found one."""
        log.warning("audit_finding", peer=str(evidence.subject), model=evidence.model, rounds=len(evidence.rounds))

    # ------------------------------------------------------------ requests of peers
    def request_received(self, peer: PeerId, request_id: bytes, model: str) -> None:
        """A peer's request passed the checks."""
        self.executor.in_flight += 1
        self._metrics.message_received("request")
        self._metrics.request_started("executor")
        self._events.publish(RequestReceived(request_id.hex(), model, "executor", str(peer)))

    def request_ended(
        self,
        peer: PeerId,
        request_id: bytes,
        model: str,
        code: str,
        seconds: float,
        first_s: float | None,
        tokens: int,
    ) -> None:
        """It ended."""
        self.executor.end(code)
        self._metrics.request_finished("executor", code, seconds)
        if first_s is not None:
            self._metrics.first_token("executor", first_s)
        log.info("served", peer=str(peer), model=model, code=code, seconds=round(seconds, 4), tokens=tokens)
        self._events.publish(ResponseReceived(request_id.hex(), model, "executor", str(peer), code, round(seconds, 4)))

    def slot_given(self, waited_s: float) -> None:
        """A peer's request got its slot."""
        self._metrics.slot_given(waited_s)

    def refused(self, code: str) -> None:
        """A peer's request was refused."""
        self._metrics.refused(code)

    def receipt_made(self, served: ServedReceipt) -> None:
        """A receipt was signed or countersigned."""
        self._keep_receipt(served)
