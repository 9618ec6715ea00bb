"""An application: asks over a plain socket, and notes exactly which ends it got to see."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable

import h11
import trio

from .record import Ask, Record

READ_BYTES = 65_536
RESUMED = b": lloom resumed at "
"""The comment in a stream that another executor goes on with. Source: docs/operate.md."""


class App:
    """One client of the OpenAI API. A connection for each request, as after every failure.

    Args:
        connect: opens a connection to the API.
        resume: sends ``x-lloom-resume: on``.
    """

    def __init__(self, connect: Callable[[], Awaitable[trio.SocketStream]], *, resume: bool = False) -> None:
        self._connect = connect
        self._resume = resume
        self.ended = trio.Event()

    async def ask(self, ask: Ask, timeout_s: float) -> Record:
        """Ask and read to the end, whatever that is. A record without ``ended_at`` was not over after ``timeout_s``."""
        record = Record(ask, time.time())
        await self._run(ask, record, timeout_s)
        return record

    async def ask_told(
        self, ask: Ask, timeout_s: float = 600.0, *, task_status: trio.TaskStatus[Record] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The same as a task: ``started`` with the record when the first text is there, ``ended`` is set at the end."""
        record = Record(ask, time.time())
        self.ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, ask, record, timeout_s)
            while record.first_at is None and record.ended_at is None:
                await trio.sleep(0.01)
            task_status.started(record)
        self.ended.set()

    async def _run(self, ask: Ask, record: Record, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            try:
                async with await self._connect() as stream:
                    await self._talk(stream, ask, record)
            except (OSError, trio.BrokenResourceError) as exc:
                record.error = record.error or f"connection_{type(exc).__name__}"
            record.ended_at = time.time()

    async def _talk(self, stream: trio.SocketStream, ask: Ask, record: Record) -> None:
        messages = [{"role": "user", "content": ask.prompt}]
        body = json.dumps({"model": "scripted", "stream": ask.streams, "messages": messages}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
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
            if event.startswith(RESUMED):
                self._record.was_resumed = True
                self._record.executor = event.split()[-1].decode()
            if event.startswith(b":"):
                continue
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
