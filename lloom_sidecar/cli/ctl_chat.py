"""``lloomctl chat``: a conversation through the node's own OpenAI API, as every application has it."""

from __future__ import annotations

import json
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    import httpx

TIMEOUT_S: Final = 600.0
"""As OpenAI's own clients; an executor that thinks says so by keep-alive comments."""
CONNECT_TIMEOUT_S: Final = 3.0
MAX_QUESTION_CHARACTERS: Final = 8 << 20
"""Of stdin; the API has a limit of its own."""
HELP: Final = "/model [ID] shows or changes the model, /clear begins anew, /help, Ctrl-C stops an answer, Ctrl-D ends."


class CutError(LloomError):
    """The answer is not whole; what came of it has been printed."""

    code = "answer_cut"


@dataclass(slots=True)
class Answer:
    """What came back of one question."""

    text: str = ""
    is_whole: bool = False
    """``[DONE]`` came, which the node sends once the executor's receipt was verified."""
    executor: str = ""
    attempts: int = 1
    tokens: int | None = None


@dataclass(slots=True)
class Talk:
    """A conversation; nothing of it is kept anywhere else."""

    client: httpx.Client
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, answer: Answer) -> Iterator[str]:
        """The answer's pieces as they come; ``answer`` is filled on the way.

        The question stays in the conversation only with a whole answer. Raises LloomError: refused, or cut (CutError).
        """
        import httpx

        asked = [*self.messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": asked, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise LloomError(_error_of(response))
                answer.executor = response.headers.get("x-lloom-executor", "")
                answer.attempts = int(response.headers.get("x-lloom-attempts", "1"))
                yield from _pieces(response, answer)
        except httpx.TransportError as exc:
            if answer.text or isinstance(exc, httpx.RemoteProtocolError):
                raise CutError("the answer was cut: the connection ended before it did") from exc
            raise LloomError(f"the API at {self.client.base_url} does not answer: {exc}") from exc
        if not answer.is_whole:
            raise CutError("the answer was cut: its end was never confirmed")
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]


def _pieces(response: httpx.Response, answer: Answer) -> Iterator[str]:
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            answer.is_whole = True
            continue
        chunk: dict[str, Any] = json.loads(data)
        if "error" in chunk:
            raise CutError(f"the answer was cut: {chunk['error'].get('message')} ({chunk['error'].get('code')})")
        if chunk.get("usage"):
            answer.tokens = chunk["usage"].get("completion_tokens")
        for choice in chunk.get("choices", ()):
            piece = choice.get("delta", {}).get("content")
            if piece:
                answer.text += piece
                yield piece


def _error_of(response: httpx.Response) -> str:
    with suppress(ValueError, KeyError, TypeError):
        error = response.json()["error"]
        return f"{error['message']} ({error['code']})"
    return f"the API answered with HTTP {response.status_code}"


def _open(target: Target, key_file: str | None, ca_file: str | None) -> httpx.Client:
    import httpx

    with target.client() as node:
        address = node.status()["api"]["address"]
    if address is None:
        raise LloomError("this node has no API: only one with --role client has; name it with --home or --node")
    headers = {}
    if key_file is not None:
        try:
            lines = [line.strip() for line in Path(key_file).read_text().splitlines()]
        except OSError as exc:
            raise LloomError(f"--api-key-file {key_file} cannot be read: {exc.strerror}") from exc
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise LloomError(f"--api-key-file {key_file} holds no key")
        headers["authorization"] = f"Bearer {keys[0]}"
    timeout = httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    verify: ssl.SSLContext | bool = True
    if ca_file is not None:
        try:
            verify = ssl.create_default_context(cafile=ca_file)
        except OSError as exc:  # SSLError is one
            raise LloomError(f"--ca-file {ca_file} holds no certificates in PEM form: {exc.strerror or exc}") from exc
    return httpx.Client(base_url=address, headers=headers, timeout=timeout, trust_env=False, verify=verify)


def _models(client: httpx.Client) -> list[str]:
    import httpx

    try:
        response = client.get("/v1/models")
    except httpx.TransportError as exc:
        raise LloomError(f"the API at {client.base_url} does not answer: {exc}") from exc
    if response.status_code != 200:
        raise LloomError(_error_of(response))
    return [one["id"] for one in response.json()["data"]]


@click.command(
    "chat",
    epilog=example("lloomctl chat", "lloomctl chat smollm2:135m -q 'Name a colour.'", "lloomctl chat < question"),
)
@click.argument("model", required=False)
@click.option("--question", "-q", help="Ask this and end. Without it, what comes on stdin when that is no terminal.")
@click.option(
    "--api-key-file", envvar="LLOOM_API_KEY_FILE", metavar="FILE", help="File whose first line is the API's key."
)
@click.option("--ca-file", metavar="FILE", help="Certificates to trust, for an API that has TLS of its own.")
@json_option
@pass_target
def chat(
    target: Target,
    model: str | None,
    question: str | None,
    api_key_file: str | None,
    ca_file: str | None,
    as_json: bool,
) -> None:
    """Ask a model of the network, for a first taste.

    On a terminal it is a conversation: /help lists what it knows. The answer goes to stdout, everything else to stderr.
    An answer that was cut says so, and the exit status is 1. Nothing is kept on disk.
    """
    with _open(target, api_key_file, ca_file) as client:
        offered = _models(client)
        if model is None and not offered:
            raise LloomError("no executor offers a model yet: `lloomctl executor list` shows who is known")
        talk = Talk(client, model or offered[0])
        if question is None and not sys.stdin.isatty():
            question = sys.stdin.read(MAX_QUESTION_CHARACTERS).strip()
            if not question:
                raise click.UsageError("there is no question on stdin")
        if question is not None:
            _once(talk, question, as_json=as_json)
        elif as_json:
            raise click.UsageError("--json takes one question: give it with -q or on stdin")
        else:
            _converse(talk, offered)


def _once(talk: Talk, question: str, *, as_json: bool) -> None:
    answer = Answer()
    if not as_json:
        _print_answer(talk, question, answer)
        return
    failure: LloomError | None = None
    try:
        for _ in talk.ask(question, answer):
            pass
    except CutError as exc:
        failure = exc
    output.print_json(
        {
            "model": talk.model,
            "answer": answer.text,
            "complete": answer.is_whole and failure is None,
            "error": None if failure is None else failure.message,
            "executor": answer.executor,
            "attempts": answer.attempts,
            "completion_tokens": answer.tokens,
        }
    )
    if failure is not None:
        raise SystemExit(1)


def _print_answer(talk: Talk, question: str, answer: Answer) -> None:
    try:
        for piece in talk.ask(question, answer):
            # A model's text must not move the cursor either; line ends are its own.
            click.echo("\n".join(output.printable(part) for part in piece.split("\n")), nl=False)
    finally:
        if answer.text:
            click.echo("")
    parts = [f"receipt verified, executor {output.short_id(answer.executor)}"]
    if answer.tokens is not None:
        parts.append(output.count(answer.tokens, "token"))
    if answer.attempts > 1:
        parts.append(f"{answer.attempts} asked")
    output.say(output.style(f"({', '.join(parts)})", "cyan", err=True))


def _converse(talk: Talk, offered: list[str]) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  # arrows and history in the prompt; the history is this session's only

    # A shell that started this in the background had it ignore Ctrl-C; who types here means it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output.say(f"{talk.model}. {HELP}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            output.say("")
            return
        except KeyboardInterrupt:
            output.say("")
            continue
        if line.startswith("/"):
            _obey(talk, offered, line)
        elif line:
            answer = Answer()
            try:
                _print_answer(talk, line, answer)
            except KeyboardInterrupt:
                output.say("stopped: this is not the whole answer")
            except LloomError as exc:
                output.fail(output.printable(exc.message))


def _obey(talk: Talk, offered: list[str], line: str) -> None:
    word, _, rest = line.partition(" ")
    if word == "/clear":
        talk.messages = []
    elif word == "/model" and rest.strip():
        talk.model = rest.strip()
        output.say(talk.model if talk.model in offered else f"{talk.model} (nobody offered it when this began)")
    elif word == "/model":
        output.say(f"{talk.model}; offered: {', '.join(map(output.printable, offered)) or 'none'}")
    else:
        output.say(HELP)
