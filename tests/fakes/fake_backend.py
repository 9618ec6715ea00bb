"""A backend without HTTP: answers are scripts. Same surface as ``executor.backend.Backend``, which it extends."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from lloom_sidecar.executor.backend import Backend, BackendAnswer, BackendState
from lloom_sidecar.executor.body import BackendCall
from lloom_sidecar.http.errors import BodyTooLargeError
from lloom_sidecar.protocol.offers import ModelOffer

Line = bytes | float | Exception | trio.Event
"""Of a script: bytes to give, seconds to wait, an exception to raise, an event to wait for."""


def sse(*documents: Any, done: bool = True) -> list[bytes]:
    """Each document as an event, and ``[DONE]``."""
    events = [b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n" for document in documents]
    return [*events, b"data: [DONE]\n\n"] if done else events


def chunk(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """One chat chunk."""
    delta = {"content": text} if text else {}
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


USAGE = {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
HELLO = [chunk("Hel"), chunk("lo"), chunk("", "stop"), USAGE]


class FakeAnswer:
    """The body of one answer."""

    def __init__(self, script: Sequence[Line]) -> None:
        self._script = list(script)

    async def receive_some(self) -> bytes:
        """The next bytes of the script; ``b""`` at its end."""
        await trio.lowlevel.checkpoint()
        while self._script:
            line = self._script.pop(0)
            match line:
                case bytes():
                    return line
                case float():
                    await trio.sleep(line)
                case trio.Event():
                    await line.wait()
                case Exception():
                    raise line
        return b""

    async def read(self, max_bytes: int) -> bytes:
        """All of it."""
        data = b""
        while piece := await self.receive_some():
            data += piece
            if len(data) > max_bytes:
                raise BodyTooLargeError("too large")
        return data


class FakeBackend(Backend):
    """Serves the model ``m``; ``script`` is the next answers' body, ``failure`` is raised instead of one."""

    def __init__(self, script: Sequence[Line] = ()) -> None:
        super().__init__("http://nowhere", on_change=lambda state: None)
        self.script: Sequence[Line] = script or sse(*HELLO)
        self.failure: Exception | None = None
        self.calls: list[BackendCall] = []
        self.traceparents: list[str] = []
        self.outcomes: list[str] = []
        """How each call ended: ``left`` or ``cancelled`` or the name of an exception."""
        self.answers: list[FakeAnswer] = []
        self.state = BackendState(True, "", (ModelOffer("m", context_length=100),), 2)
        self._offers = {"m": self.state.offers[0]}

    @property
    def left_over(self) -> int:
        """Lines of the last answer's script that nobody asked for."""
        return len(self.answers[-1]._script)

    @asynccontextmanager
    async def call(self, call: BackendCall, *, traceparent: str = "") -> AsyncGenerator[BackendAnswer]:
        self.calls.append(call)
        self.traceparents.append(traceparent)
        if self.failure is not None:
            raise self.failure
        try:
            self.answers.append(FakeAnswer(self.script))
            yield self.answers[-1]
        except trio.Cancelled:
            self.outcomes.append("cancelled")
            raise
        except Exception as exc:
            self.outcomes.append(type(exc).__name__)
            raise
        self.outcomes.append("left")
