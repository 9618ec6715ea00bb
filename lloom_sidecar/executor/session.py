"""One inbound stream of ``/lloom/request/1.0.0``: one task reads frames, and so notices at once when the requester
closes, which cancels the work; another works on the exchange that is under way."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from lloom_sidecar.errors import DaemonError, LloomError, PeerBusyError, RemoteProtocolError
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import check_ack, price_message
from lloom_sidecar.protocol.exchange import (
    CHALLENGE_BYTES,
    AckReceived,
    BodyReceived,
    Event,
    OpenReceived,
    PingReceived,
    RequestReceived,
    ResponderStream,
    State,
)
from lloom_sidecar.protocol.names import VERSION_MAJOR

from .answering import Answering, Job
from .intake import take_request
from .observer import ServedReceipt

if TYPE_CHECKING:
    from .serve import Executor

OPEN_TIMEOUT_S: Final = 10.0
"""From the stream's arrival to its OPEN."""
BODY_TIME_S: Final = 10.0
"""For a body to come, whatever its length, and beside what its length needs at ``MIN_BODY_RATE``."""
MIN_BODY_RATE: Final = 64 * 1024
"""Bytes a second: half of what a home line of 1 Mbit/s sends."""
IDLE_STREAM_S: Final = 600.0
"""A stream without an exchange is closed by the requester first; this is for one that forgot."""
GOAWAY_LINGER_S: Final = 5.0


class Session:
    """One inbound stream."""

    def __init__(self, executor: Executor, stream: P2PStream) -> None:
        self._executor = executor
        self._stream = stream
        self._peer = stream.peer
        self._machine = ResponderStream(max_body_bytes=executor.limits.max_body_bytes)
        self._challenge = os.urandom(CHALLENGE_BYTES)
        self._job: Job | None = None
        self._ready = trio.Event()
        self._unacked: dict[int, ServedReceipt] = {}
        self._is_sending = False
        self._control = bytearray()
        self._scope: trio.CancelScope | None = None
        self._body_due_at = 0.0
        self._has_gone_away = False
        self._answering = Answering(executor, self._peer, machine=self._machine, send=self._send, keep=self._keep)

    async def run(self) -> None:
        """Read and work until the stream ends; cancelled = its work at the backend is stopped."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            try:
                nursery.start_soon(self._work)
                await self._read()
            finally:
                nursery.cancel_scope.cancel()
                if self._job is not None:
                    self._drop_job(self._job)

    def go_away(self, reason: str) -> None:
        """Say GOAWAY; what is under way goes on, an idle stream ends when the requester closes it."""
        if self._machine.state in (State.NEW, State.CLOSED, State.BROKEN, State.OPENING):
            self._stream.close()
            return
        self._has_gone_away = True
        data = self._machine.go_away(reason)
        if self._is_sending:
            self._control += data
        else:
            self._stream.send_nowait(data)
        if self._job is None and self._scope is not None:
            # p2pd has no half-close: the requester closes, and we read to its end, for a while.
            self._scope.deadline = trio.current_time() + GOAWAY_LINGER_S

    def cut(self) -> None:
        """End the stream if it was told GOAWAY, with what is under way on it."""
        if self._has_gone_away:
            self._cancel()

    # ------------------------------------------------------------------ reading
    async def _read(self) -> None:
        with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
            while True:
                data = await self._stream.receive_some()
                if not data:
                    return
                try:
                    events = self._machine.receive(data)
                    for event in events:
                        await self._on_event(event)
                except RemoteProtocolError as exc:
                    self._executor.count_refused(self._peer, exc)
                    return
                except DaemonError:
                    return  # the stream closed while we answered on it
                if self._machine.state is State.CLOSED:
                    # Refused before it was open: the requester reads ERROR and closes; closing first may lose it.
                    opening.deadline = trio.current_time() + OPEN_TIMEOUT_S
                    while await self._stream.receive_some():
                        pass
                    return
                opening.deadline = self._due_at()
        if opening.cancelled_caught and self._machine.state in (State.BODY, State.DISCARDING):
            late = RemoteProtocolError("the body of a request did not come in time", code="body_timeout")
            self._executor.count_refused(self._peer, late)

    def _due_at(self) -> float:
        """When the next frame is due at the latest, on trio's clock."""
        match self._machine.state:
            case State.NEW | State.OPENING:
                return trio.current_time() + OPEN_TIMEOUT_S
            case State.BODY | State.DISCARDING:
                return self._body_due_at
            case State.ANSWERING:
                return float("inf")  # the requester waits; the work has its own deadline
            case _:
                return trio.current_time() + IDLE_STREAM_S

    async def _on_event(self, event: Event) -> None:
        match event:
            case BodyReceived(data=data, is_last=is_last):
                if self._job is not None:
                    await self._on_body(self._job, data, is_last)
            case RequestReceived():
                await self._on_request(event)
            case PingReceived(payload=payload):
                await self._send(self._machine.pong(payload))
            case AckReceived(exchange=exchange, envelope=envelope):
                self._on_ack(exchange, envelope)
            case OpenReceived():
                await self._on_open(event)
            case _:
                pass

    async def _on_open(self, event: OpenReceived) -> None:
        executor = self._executor
        refusal: LloomError | None = None
        if event.version_major != VERSION_MAJOR:
            refusal = RemoteProtocolError(
                f"this node speaks version {VERSION_MAJOR} of the protocol, not {event.version_major}", code="version"
            )
        elif executor.is_draining:
            refusal = PeerBusyError("this executor takes no more work", code="draining", retry_after_s=5.0)
        elif not executor.may_ask(self._peer):
            refusal = RemoteProtocolError(
                "say hello first: this node serves members of its network", code="hello_required"
            )
        if refusal is not None:
            self._executor.count_refused(self._peer, refusal)
            await self._send(self._machine.error(refusal))
            return
        await self._send(
            self._machine.accept(
                now_ms=executor.now_ms(),
                challenge=self._challenge,
                max_streams=executor.max_streams(),
            )
        )

    async def _on_request(self, event: RequestReceived) -> None:
        """Everything that can be refused is refused here, from the REQUEST frame, before a BODY frame is read."""
        executor = self._executor
        self._body_due_at = trio.current_time() + BODY_TIME_S + event.body_length / MIN_BODY_RATE
        try:
            taken = take_request(executor, self._stream, self._challenge, event, is_leaving=self._has_gone_away)
        except LloomError as exc:
            executor.count_refused(self._peer, exc)
            await self._send(self._machine.error(exc))
            return
        self._job = Job(
            request=taken.request,
            envelope=event.envelope,
            salt=event.salt,
            ticket=taken.ticket,
            accepted_at=trio.current_time(),
            accepted_at_ms=executor.now_ms(),
            deadline_at=taken.deadline_at,
            decoder=taken.decoder,
            price=price_message(taken.price),
        )
        claims = taken.request.claims
        executor.observer.request_received(self._peer, claims.request_id, claims.model)

    async def _on_body(self, job: Job, data: bytes, is_last: bool) -> None:
        executor = self._executor
        try:
            if job.decoder is not None:
                data = job.decoder.feed(data)
                if is_last:
                    job.decoder.finish()
            executor.buffered_bytes += len(data)
            job.held_bytes += len(data)
            if executor.buffered_bytes > executor.limits.buffered_bodies_bytes:
                # There was room for it when its REQUEST came; others that were taken before it came have filled it.
                raise PeerBusyError("this executor holds too many bodies", code="busy", retry_after_s=1.0)
        except LloomError as exc:  # nothing more of it is decompressed or kept
            self._answering.note_end(job, exc.code)
            self._drop_job(job)
            executor.count_refused(self._peer, exc)
            await self._send(self._machine.error(exc))
            return
        job.body.append(data)
        if is_last:
            self._ready.set()

    def _keep(self, served: ServedReceipt) -> None:
        self._unacked = {**dict(list(self._unacked.items())[-7:]), served.exchange: served}

    def _on_ack(self, exchange: int, envelope: bytes) -> None:
        served = self._unacked.pop(exchange, None)
        if served is None:
            return
        assert served.receipt is not None  # kept with END
        check_ack(envelope, client=self._peer, receipt=served.receipt)
        self._executor.unacked.acked(self._peer)
        self._executor.observer.receipt_made(replace(served, ack=envelope))

    # ------------------------------------------------------------------ working
    async def _work(self) -> None:
        while True:
            await self._ready.wait()
            self._ready = trio.Event()
            job = self._job
            assert job is not None  # set before _ready
            try:
                await self._answering.run(job)
            except DaemonError:
                self._cancel()  # the requester's side of the stream is gone
            finally:
                self._drop_job(job)
            if self._has_gone_away:
                self._deadline_after_goaway()

    # ------------------------------------------------------------------ sending
    async def _send(self, data: bytes) -> None:
        """Send whole frames; the reader's PONG and the worker's DATA never mix inside a frame."""
        if self._is_sending:
            self._control += data
            return
        self._is_sending = True
        try:
            await self._stream.send_all(data)
            while self._control:
                data = bytes(self._control)
                self._control.clear()
                await self._stream.send_all(data)
        finally:
            self._is_sending = False

    def _drop_job(self, job: Job) -> None:
        """Give back what the job held. Idempotent; the next one may have come already, behind this one's END."""
        if self._job is job:
            self._job = None
        self._executor.buffered_bytes -= job.held_bytes
        job.held_bytes = 0
        if job.ticket is not None:
            self._executor.leave(job.ticket)
        self._answering.note_end(job, "cancelled")  # where the stream ended before its body was complete

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _deadline_after_goaway(self) -> None:
        if self._scope is not None:
            self._scope.deadline = trio.current_time() + GOAWAY_LINGER_S
