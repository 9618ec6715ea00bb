"""The LLM server behind an executor, an OpenAI-compatible URL: what it serves, whether it is up, one call to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import msgspec
import structlog
import trio

from lloom_sidecar.errors import BackendError, BackendRejectedError, BackendTimeoutError, BackendUnavailableError
from lloom_sidecar.http.client import HttpClient
from lloom_sidecar.http.errors import BodyTooLargeError, HttpClientError, HttpTimeoutError
from lloom_sidecar.ids import check_model_id
from lloom_sidecar.protocol.offers import RESUME, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .ability import can_resume
from .body import PATHS, BackendCall

PROBE_INTERVAL_S: Final = 1.0
"""A model that the backend lists no more must be known to the network within 2 s. A probe takes about a millisecond."""
PROBE_TIMEOUT_S: Final = 5.0
PROBE_FAILURES_TO_DOWN: Final = 2
"""A refused connection is down at once; a slow answer may be load, so two in a row."""
MAX_PROBE_BYTES: Final = 4 * 1024 * 1024
MAX_ERROR_BYTES: Final = 32 * 1024
MAX_MODELS: Final = 64
TRY_OUT_S: Final = 60.0
"""For the two short answers that show whether a model can resume; a busy machine may take long."""
MAX_TRY_OUTS: Final = 3
"""Times that a model is tried out whose backend failed at it; then again when the backend comes up anew."""
MAX_TRY_OUT_BYTES: Final = 256 * 1024
DEFAULT_SLOTS: Final = 8
"""Assumed parallelism of a backend that does not say."""

log = structlog.get_logger("lloom.backend")


class BackendAnswer(Protocol):
    """The body of a successful answer."""

    async def receive_some(self) -> bytes:
        """Some bytes, ``b""`` at the verified end."""

    async def read(self, max_bytes: int) -> bytes:
        """The whole body, if it is not longer than ``max_bytes``."""


@dataclass(frozen=True, slots=True)
class BackendState:
    """What the last probe found."""

    is_up: bool = False
    reason: str = "not probed yet"
    """Why it is down, a sentence."""
    offers: tuple[ModelOffer, ...] = ()
    slots: int = DEFAULT_SLOTS


class Backend:
    """One backend. ``run`` keeps ``state`` true; ``on_change`` is called after each change of it."""

    def __init__(
        self,
        url: str,
        *,
        on_change: Callable[[BackendState], None],
        slots: int | None = None,
        only_alias: str | None = None,
        api_key: str | None = None,
        features: frozenset[str] = frozenset(),
        digests: Mapping[str, bytes] | None = None,
    ) -> None:
        """``url``: ``http(s)://host[:port][/prefix]`` or ``unix:/path``, with or without ``/v1`` at its end.
        ``only_alias``: the id that the network sees, for a backend that serves one model. ``slots``: overrides what the
        backend says. ``digests``: SHA-256 of the weights of each model, by the id that the network sees; under "" those
        of the only one.
        """
        self.url = url
        self.state = BackendState()
        self._client = HttpClient(url.rstrip("/").removesuffix("/v1"))
        self._on_change = on_change
        self._slots = slots
        self._only_alias = only_alias
        self._headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream, application/json")]
        if api_key:
            self._headers.append((b"authorization", b"Bearer " + api_key.encode()))
        self._features = features
        self._digests = dict(digests or {})
        self._abilities: dict[str, frozenset[str]] = {}
        """What each model was seen to be able to, since the backend came up."""
        self._try_outs: dict[str, int] = {}
        self._probed = trio.Event()
        self._offers: dict[str, ModelOffer] = {}
        self._real_ids: dict[str, str] = {}
        self._probe_now = trio.Event()
        self._failures = 0
        self._lacks_properties = False

    @property
    def is_up(self) -> bool:
        """True while the last probe succeeded and no call since found it gone."""
        return self.state.is_up

    def offer(self, model: str) -> ModelOffer | None:
        """What it offers under the network's id ``model``."""
        return self._offers.get(model)

    def backend_model(self, model: str) -> str:
        """The backend's own id of a model."""
        return self._real_ids.get(model, model)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Probe until cancelled. ``started`` after the first probe, whatever it found."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._client.run)
            await self.probe()
            task_status.started()
            nursery.start_soon(self._try_out_models)
            while True:
                with trio.move_on_after(PROBE_INTERVAL_S):
                    await self._probe_now.wait()
                self._probe_now = trio.Event()
                await self.probe()

    def suspect(self) -> None:
        """Probe soon: somebody knows that the backend changed."""
        self._probe_now.set()

    def set_digest(self, model: str, digest: bytes) -> None:
        """The SHA-256 of a model's weights became known; ``state`` has it after the next probe, which comes at once."""
        self._digests[model] = digest
        self.suspect()

    async def _try_out_models(self) -> None:
        """Find out which models go on with a given beginning. Only those whose weights are known are worth it, which
        also means that a server of many models is not made to load them all."""
        while True:
            probed = self._probed = trio.Event()
            for offer in self.state.offers if self.state.is_up else ():
                if offer.digest and offer.id not in self._abilities:
                    await self._try_out(offer.id)
            await probed.wait()

    async def _try_out(self, model: str) -> None:
        can: bool | None = False
        try:
            with trio.fail_after(TRY_OUT_S):
                can = await can_resume(self._ask, self.backend_model(model))
        except BackendRejectedError as exc:
            can = None if exc.retryable else False  # it is busy, or still loading; or it refuses the form
        except (BackendError, trio.TooSlowError):
            can = None
        if can is None:
            self._try_outs[model] = tries = self._try_outs.get(model, 0) + 1
            if tries < MAX_TRY_OUTS:
                return
        log.info("model_tried_out", model=model, resume=bool(can))
        self._abilities[model] = frozenset({RESUME}) if can else frozenset()
        if can:
            self.suspect()

    async def _ask(self, body: bytes) -> bytes:
        call = BackendCall(PATHS[pb.OPERATION_CHAT], body, wants_stream=True, is_streamed=True, strips_usage=False)
        async with self.call(call) as answer:
            try:
                return await answer.read(MAX_TRY_OUT_BYTES)
            except BodyTooLargeError:
                return b""

    async def probe(self) -> None:
        """Ask the backend what it serves, and update ``state``."""
        try:
            with trio.fail_after(PROBE_TIMEOUT_S):
                listing = await self._get_json("/v1/models")
                properties = await self._properties()
            state = self._read_state(listing, properties)
            self._failures = 0
        except (HttpTimeoutError, trio.TooSlowError):
            self._failures += 1
            if self._failures < PROBE_FAILURES_TO_DOWN and self.state.is_up:
                return
            state = replace(
                self.state,
                is_up=False,
                reason=f"the backend at {self.url} does not answer within {PROBE_TIMEOUT_S:.0f} s",
            )
        except HttpClientError as exc:
            state = replace(self.state, is_up=False, reason=f"the backend at {self.url} cannot be reached: {exc}")
        except BackendUnavailableError as exc:
            state = replace(self.state, is_up=False, reason=str(exc))
        self._set(state)

    @asynccontextmanager
    async def call(self, call: BackendCall, *, traceparent: str = "") -> AsyncGenerator[BackendAnswer]:
        """Send a request; the answer's body inside the context. Leaving it early closes the connection (and the work).
        ``traceparent``: a header of that name, unless it is empty.

        Raises:
            BackendRejectedError: another status than 200, with the backend's own error document.
            BackendUnavailableError: not reachable, or its answer is incomplete (also out of the body's methods).
            BackendTimeoutError: no bytes for too long.
        """
        headers = [*self._headers, (b"traceparent", traceparent.encode())] if traceparent else self._headers
        try:
            async with self._client.request("POST", call.path, headers, call.body) as response:
                if response.status != 200:
                    if response.status == 404:
                        self.suspect()  # so do servers answer for a model that they do not have any more
                    try:
                        body = await response.read(MAX_ERROR_BYTES)
                    except BodyTooLargeError:
                        body = b""  # some echo the whole input; the status says enough
                    raise BackendRejectedError(
                        f"the backend answered {response.status}",
                        status=response.status,
                        body=body if _is_json(body) else b"",
                    )
                yield response
        except HttpTimeoutError as exc:
            raise BackendTimeoutError(f"the backend went silent: {exc}") from exc
        except HttpClientError as exc:
            self.suspect()
            raise BackendUnavailableError(f"the backend failed: {exc}") from exc

    async def _get_json(self, path: str) -> Any:
        async with self._client.request("GET", path, self._headers, b"") as response:
            body = await response.read(MAX_PROBE_BYTES)
            if response.status != 200:
                raise BackendUnavailableError(f"the backend at {self.url} answers {path} with status {response.status}")
        try:
            return msgspec.json.decode(body)
        except (ValueError, RecursionError) as exc:
            raise BackendUnavailableError(
                f"the backend at {self.url} answers {path} with something that is not JSON"
            ) from exc

    async def _properties(self) -> dict[str, Any]:
        """llama.cpp's ``/props``: real context and slots. Other servers do not have it, and are asked once, not each
        second, since they may log every such request."""
        if self._lacks_properties and self.state.is_up:
            return {}
        try:
            found = await self._get_json("/props")
        except HttpTimeoutError:
            raise
        except (BackendUnavailableError, HttpClientError) as exc:
            self._lacks_properties = isinstance(exc, BackendUnavailableError)
            return {}
        self._lacks_properties = False
        return found if isinstance(found, dict) else {}

    def _read_state(self, listing: Any, properties: dict[str, Any]) -> BackendState:
        entries = listing.get("data") if isinstance(listing, dict) else None
        if not isinstance(entries, list):
            raise BackendUnavailableError(
                f"the backend at {self.url} lists no models: is it an OpenAI-compatible server?"
            )
        settings = properties.get("default_generation_settings")
        props_context = settings.get("n_ctx") if isinstance(settings, dict) else None
        slots = self._slots or properties.get("total_slots")
        if not isinstance(slots, int) or not 0 < slots <= 65536:
            slots = DEFAULT_SLOTS
        alias = self._only_alias if len(entries) == 1 else None
        if self._only_alias is not None and alias is None:
            log.warning("alias_not_used", code="several_models", models=len(entries))
        offers: dict[str, ModelOffer] = {}
        real_ids: dict[str, str] = {}
        for entry in entries[:MAX_MODELS]:
            real = entry.get("id") if isinstance(entry, dict) else None
            if not isinstance(real, str):
                continue
            try:
                name = check_model_id(alias or real)
            except ValueError as exc:
                log.warning("model_skipped", code="model_id", reason=str(exc))
                continue
            context = (
                props_context
                or entry.get("max_model_len")
                or entry.get("context_length")
                or entry.get("context_window")
            )
            offers[name] = ModelOffer(
                id=name,
                context_length=context if isinstance(context, int) and 0 < context < 2**31 else 0,
                features=self._features | self._abilities.get(name, frozenset()),
                slots=slots,
                digest=self._digests.get(name) or (self._digests.get("", b"") if len(entries) == 1 else b""),
            )
            real_ids[name] = real
        if not offers:
            raise BackendUnavailableError(f"the backend at {self.url} serves no model")
        self._offers, self._real_ids = offers, real_ids
        return BackendState(True, "", tuple(offers.values()), slots)

    def _set(self, state: BackendState) -> None:
        if not state.is_up:
            self._abilities.clear()  # what comes up again may be another server
            self._try_outs.clear()
        self._probed.set()
        if state != self.state:
            was_up, self.state = self.state.is_up, state
            if was_up != state.is_up:
                log.info("backend_up" if state.is_up else "backend_down", url=self.url, reason=state.reason)
            self._on_change(state)


def _is_json(body: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(body), dict)
    except (ValueError, RecursionError):
        return False
