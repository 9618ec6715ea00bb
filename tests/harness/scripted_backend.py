"""An OpenAI-compatible server whose answers are known, with the faults that a test asks for. Standard library only.

The last user message is the script: ``chunks=50 delay_ms=10`` and so on; what is not given has a default.

    chunks=N     pieces of text, each " w<i>"              (5)
    delay_ms=N   pause before each piece                    (0)
    first_ms=N   pause before the first                     (0)
    status=N     answer with this status and an error body
    cut=N        close the connection after N pieces, unless the request brings the beginning of its answer along
    cut2=N       the same for such a one, if something comes before
    garbage=N    send something that is no JSON after N pieces
    error=N      send an error event after N pieces
    silent=1     accept the request and never answer
    tag=N        pieces are " <N>.<i>": the answer of one request cannot be taken for another's
    lie=N        the usage says N tokens more than there were
    seed=N       pieces of any length and characters, the same for the same N; then max_tokens and stop are obeyed

A request whose last message is the assistant's and that asks to continue it, or whose prompt ends with the beginning of
the answer, is answered with what follows.

With a second argument every request is written to that file when it begins and when it ends, one JSON line each, which
outlives a ``kill -9``.

``POST /_script`` with a JSON object of directives adds them to every request's own: a backend that is bad by itself.
``GET /_requests`` tells what came and how each request ended, with times: ``complete``, ``gone`` (the requester left),
``cut``. ``POST /_models`` with a JSON list changes the models; ``POST /_status`` with a number makes /v1/models fail.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOG: list[dict[str, Any]] = []
STATE: dict[str, Any] = {"models": ["scripted"], "status": 200, "script": {}}
LOCK = threading.Lock()
JOURNAL: list[int] = []
"""The file's descriptor, when there is one."""


def note(entry: dict[str, Any]) -> None:
    """Write what is known of a request to the journal: one write, so that a line is there or is not."""
    for file in JOURNAL:
        shown = {key: entry[key] for key in ("script", "began_at", "ended_at", "outcome", "sent")}
        os.write(file, json.dumps({"pid": os.getpid(), "number": entry["number"], **shown}).encode() + b"\n")


ALPHABET = [
    *"abcdefgh ,.",
    "\n",
    "\n\n",
    '"',
    "\\",
    "é",
    "漢",
    "🙂",
    "data: ",
    "[DONE]",
    '"finish_reason":"stop"',
    "<stop>",
]
"""What the pieces of ``seed=N`` consist of: whatever somebody might confuse with the end of something."""


def word(script: dict[str, int], index: int) -> str:
    """One piece of a streamed answer."""
    if "seed" in script:
        rng = random.Random(script["seed"] * 1_000_003 + index)
        return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 6)))
    return f" {script['tag']}.{index}" if "tag" in script else f" w{index}"


def script_of(body: dict[str, Any]) -> dict[str, int]:
    """The directives in a request."""
    if "messages" in body:
        text = next((m["content"] for m in reversed(body["messages"]) if m.get("role") == "user"), "")
    else:
        text = body.get("prompt") or body.get("input") or ""
    text = text if isinstance(text, str) else json.dumps(text)
    found = (part.partition("=") for part in text.split())
    return {key: int(value) for key, mark, value in found if mark and value.lstrip("-").isdigit()}


def beginning_of(body: dict[str, Any], whole: str) -> str:
    """The beginning of the answer that a request brings along, "" when none. ``whole``: the answer."""
    messages = body.get("messages")
    if messages is not None:
        is_begun = messages and messages[-1].get("role") == "assistant" and body.get("continue_final_message") is True
        return str(messages[-1]["content"]) if is_begun and body.get("add_generation_prompt") is False else ""
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        return ""
    return next((whole[:n] for n in range(min(len(whole), len(prompt)), 0, -1) if prompt.endswith(whole[:n])), "")


def shown_of(text: str, stops: list[str]) -> tuple[str, bool]:
    """What a server shows of ``text``: up to a stop string, or up to what may be the beginning of one."""
    ends = [text.find(stop) for stop in stops if stop in text]
    if ends:
        return text[: min(ends)], True
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], False


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""

    def do_GET(self) -> None:
        """Models and the log."""
        if self.path == "/v1/models":
            if STATE["status"] != 200:
                self._json(STATE["status"], {"error": {"message": "scripted"}})
            else:
                data = [{"id": m, "object": "model", "max_model_len": 4096} for m in STATE["models"]]
                self._json(200, {"object": "list", "data": data})
        elif self.path == "/_requests":
            with LOCK:
                self._json(200, LOG)
        else:
            self._json(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        """A call, or a change of the script's state."""
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(raw)
        if self.path == "/_models":
            STATE["models"] = body
            self._json(200, {})
            return
        if self.path == "/_script":
            STATE["script"] = body
            self._json(200, {})
            return
        if self.path == "/_status":
            STATE["status"] = body
            self._json(200, {})
            return
        entry: dict[str, Any] = {"path": self.path, "body": body, "began_at": time.time()}
        entry |= {"ended_at": None, "outcome": None, "sent": 0, "traceparent": self.headers.get("traceparent")}
        entry["script"] = script_of(body) | STATE["script"]
        with LOCK:
            entry["number"] = len(LOG)
            LOG.append(entry)
        note(entry)
        try:
            entry["outcome"] = self._answer(body, entry["script"], entry)
        except (BrokenPipeError, ConnectionResetError):
            entry["outcome"] = "gone"
        finally:
            entry["ended_at"] = time.time()
            note(entry)
        if entry["outcome"] != "complete":
            self.close_connection = True

    def _answer(self, body: dict[str, Any], script: dict[str, int], entry: dict[str, Any]) -> str:
        if "status" in script:
            error = {"message": "scripted refusal", "type": "x", "code": script["status"]}
            self._json(script["status"], {"error": error})
            return "complete"
        if script.get("silent"):
            self._pause(3600)
            return "gone" if self._is_gone() else "complete"
        if self.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            self._json(200, {"object": "list", "model": body["model"], "data": data, "usage": usage})
            return "complete"
        return self._stream(body, script, entry)

    def _stream(self, body: dict[str, Any], script: dict[str, int], entry: dict[str, Any]) -> str:
        is_chat = self.path == "/v1/chat/completions"
        chunks = script.get("chunks", 5)
        top = {"id": "c-1", "created": 1, "model": body["model"], "system_fingerprint": "fp"}
        top["object"] = "chat.completion.chunk" if is_chat else "text_completion"
        if not body.get("stream"):
            text = "".join(word(script, i) for i in range(chunks))
            message = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            self._json(200, {**top, "choices": [{"index": 0, **message, "finish_reason": "stop"}]})
            return "complete"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if self._pause(script.get("first_ms", 0) / 1000):
            return "gone"
        begun = ""
        if "messages" not in body or body.get("continue_final_message"):
            begun = beginning_of(body, "".join(word(script, i) for i in range(chunks)))
        stop = body.get("stop") or [] if "seed" in script else []
        stops = [stop] if isinstance(stop, str) else stop
        limit = body.get("max_tokens") if "seed" in script else None
        skip = len(begun)
        text = sent = ""
        count, finish, has_stopped = 0, "stop", False
        for i in range(chunks):
            piece = word(script, i)
            if skip >= len(piece) and begun:
                skip -= len(piece)
                continue
            if i == script.get("cut2" if begun else "cut") and (count or not begun):
                return "cut"
            if script.get("garbage") == i:
                self._chunk(b"data: {this is not json\n\n")
            if script.get("error") == i:
                self._chunk(b'data: {"error":{"message":"scripted failure","code":500}}\n\n')
            if self._pause(script.get("delay_ms", 0) / 1000):
                return "gone"
            if count == limit:
                finish = "length"
                break
            count += 1
            piece, skip = piece[skip:], 0
            if stops:
                text += piece
                shown, has_stopped = shown_of(text, stops)
                piece, sent = shown[len(sent) :], shown
            if piece or not stops:
                self._event({**top, "choices": [self._choice(is_chat, piece)]})
            entry["sent"] = i + 1
            if has_stopped:
                break
        if len(text) > len(sent) and not has_stopped:
            self._event({**top, "choices": [self._choice(is_chat, text[len(sent) :])]})
        last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        self._event({**top, "choices": [{"index": 0, **last, "finish_reason": finish}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            counted = count + script.get("lie", 0)
            usage = {"prompt_tokens": 3, "completion_tokens": counted, "total_tokens": 3 + counted}
            self._event({**top, "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        return "complete"

    def _choice(self, is_chat: bool, text: str) -> dict[str, Any]:
        piece: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
        return {"index": 0, **piece, "finish_reason": None}

    def _pause(self, seconds: float) -> bool:
        """Wait; True when the requester left meanwhile."""
        if seconds <= 0:
            return self._is_gone()
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable) and self._is_gone()

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """Many at once, and quiet about those who leave."""

    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent."""


def main() -> None:
    """Serve on the port in argv (0 = any) until standard input ends; prints the port."""
    if len(sys.argv) > 2:
        JOURNAL.append(os.open(sys.argv[2], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
