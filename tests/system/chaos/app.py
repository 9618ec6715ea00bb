"""An application: asks over a plain socket, and notes exactly which ends it got to see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import h11
import trio

from .record import Ask, Record

READ_BYTES = 65_536


class App:
    """One client of the OpenAI API. A connection for each request, as after every failure.

    Args:
        host, port: of the API.
        resume: sends ``x-lloom-resume: on``.
        faults: what is broken at the moment.
    """

    def __init__(
        self, host: str, port: int, *, resume: bool = False, faults: Callable[[], frozenset[str]] = frozenset
    ) -> None:
        self._host = host
        self._port = port
        self._resume = resume
        self._faults = faults

    async def ask(self, ask: Ask, timeout_s: float) -> Record:
        """Ask and read to the end, whatever that is. A record without ``ended_at`` was not over after ``timeout_s``."""
        record = Record(ask, time.time(), faults_at_begin=self._faults())
        record.faults |= record.faults_at_begin
        with trio.move_on_after(timeout_s):
            try:
                async with await trio.open_tcp_stream(self._host, self._port) as stream:
                    await self._talk(stream, ask, record)
            except (OSError, trio.BrokenResourceError) as exc:
                record.error = record.error or f"connection_{type(exc).__name__}"
            record.ended_at = time.time()
        record.faults |= self._faults()
        return record

    async def _talk(self, stream: trio.SocketStream, ask: Ask, record: Record) -> None:
        messages = [{"role": "user", "content": ask.prompt}]
        body = json.dumps({"model": "scripted", "stream": ask.streams, "messages": messages}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n" + ("x-lloom-resume: on\r\n" if self._resume else "") + "\r\n"
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
        parser.send(h11.EndOfMessage())
        await stream.send_all(head.encode() + body)
        reader = _Reader(ask, record)
        while not reader.is_over:
            try:
                data = await stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                data = b""  # a reset: no more comes, and it is not an end
            record.faults |= self._faults()
            if not data:
                reader.finish()
                return
            parser.receive_data(data)
            while not reader.is_over:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    break
                reader.take(event)


class _Reader:
    """The parsed answer, as a record."""

    def __init__(self, ask: Ask, record: Record) -> None:
        self._ask = ask
        self._record = record
        self._text = b""
        self._last_at = record.began_at
        self.is_over = False

    def take(self, event: object) -> None:
        """One event of h11."""
        record = self._record
        if isinstance(event, h11.Response):
            headers = {bytes(name): bytes(value).decode() for name, value in event.headers}
            record.status = event.status_code
            record.request_id = headers.get(b"x-request-id", "")
            record.executor = headers.get(b"x-lloom-executor", "")
            record.attempts = int(headers.get(b"x-lloom-attempts", "0"))
        elif isinstance(event, h11.Data):
            self._text += bytes(event.data)
            if record.status == 200 and self._ask.streams:
                self._take_events()
        elif isinstance(event, h11.EndOfMessage):
            record.has_end = True
            self.finish()

    def finish(self) -> None:
        """Nothing comes any more."""
        self.is_over = True
        if self._text and not (self._record.status == 200 and self._ask.streams):
            self._take_document(json.loads(self._text))

    def _take_events(self) -> None:
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                self._record.has_done = True
                continue
            try:
                self._take_document(json.loads(data))
            except ValueError:
                self._record.unread = data.decode(errors="replace")
            if self._ask.leave_after is not None and len(self._record.pieces) >= self._ask.leave_after:
                self._record.left = True
                self.is_over = True
                return

    def _take_document(self, document: dict[str, object]) -> None:
        record = self._record
        if "error" in document:
            error = document["error"]
            assert isinstance(error, dict)
            record.error = str(error["lloom"]["code"]) if "lloom" in error else str(error.get("code"))
            return
        now = time.time()
        if record.first_at is None:
            record.first_at = now
        else:
            record.longest_gap_s = max(record.longest_gap_s, now - self._last_at)
        self._last_at = now
        choices = document["choices"]
        assert isinstance(choices, list)
        for choice in choices:
            piece = choice.get("delta", choice.get("message", {}))
            if piece.get("content"):
                record.pieces.append(piece["content"])
            if choice.get("finish_reason"):
                record.has_finish = True
