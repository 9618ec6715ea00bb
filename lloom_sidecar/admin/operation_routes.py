"""The admin API's operations: peers, validators, DHT, gossip, the market, doctor.

| request | answer |
|---|---|
| POST /v1/peers/ping, /v1/peers/disconnect ``{"peer"}`` | ``operations.PingInfo``, ``DisconnectInfo`` |
| GET /v1/bootstrap | ``operations.BootstrapInfo`` |
| POST /v1/bootstrap/add ``{"addr"}``, /v1/bootstrap/rm ``{"which"}`` | ``operations.BootstrapChange`` |
| POST /v1/dht/findprovs ``{"key", "count"?, "timeout_s"?, "at"?}`` | ``operations.ProvidersInfo`` |
| POST /v1/dht/provide, /v1/dht/closest ``{"key", "timeout_s"?}`` | ``operations.ProvidedInfo``, ``ClosestInfo`` |
| POST /v1/dht/findpeer ``{"peer", "timeout_s"?}`` | ``operations.DhtPeer`` |
| POST /v1/dht/get ``{"key", "timeout_s"?}`` | ``operations.RecordInfo`` |
| POST /v1/dht/put ``{"key", "value": BASE64, "timeout_s"?}``, or no key for the own /pk | ``operations.RecordInfo`` |
| GET /v1/gossip/topics, /v1/gossip/peers?topic=T | ``{"topics": [operations.TopicInfo]}``, ``TopicInfo`` |
| POST /v1/models/query ``{"peer"}`` | ``operations.QueriedModels`` |
| POST /v1/models/quote ``{"peer", "model"}`` | ``operations.QuoteInfo`` |
| POST /v1/executor/price ``{"model", "price": "15/60 EUR"}`` | ``operations.PriceChange`` |
| POST /v1/executor/drain?wait_s=S | ``operations.ExecutorState`` when nothing works here any more, or after S seconds |
| GET /v1/requests | ``{"requests": [explaining.RequestInfo]}`` |
| POST /v1/explain ``{"what": MODEL or REQUEST ID, "policy"?}`` | ``explaining.Explanation`` |
| POST /v1/doctor | ``{"findings": [doctor.Finding]}`` |

A KEY is a service key such as /lloom/executor/1.0.0, or a CID; a record's key is /pk/PEER or /ipns/NAME.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lloom_sidecar.errors import RequestError

from .operations import (
    DEFAULT_DHT_TIMEOUT_S,
    DEFAULT_PROVIDERS,
    MAX_DHT_TIMEOUT_S,
    MAX_PROVIDERS,
    MAX_RECORD_BYTES,
    Operations,
)

MAX_BODY_BYTES: Final = 64 * 1024
MAX_DRAIN_WAIT_S: Final = 3600.0
DRAIN_POLL_S: Final = 0.1
"""A preStop hook waits for seconds: this much later does not matter to it."""

Action = Callable[["Fields"], Awaitable[Any]]


class Fields:
    """The checked fields of a request's JSON body. Each method raises RequestError, a sentence."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def text(self, name: str, what: str) -> str:
        """A text that must be there; ``what`` explains it."""
        value = self._body.get(name)
        if not isinstance(value, str) or not value:
            raise RequestError(f'the body lacks "{name}": {what}')
        return value

    def optional_text(self, name: str, what: str) -> str | None:
        """A text that may be missing."""
        return None if self._body.get(name) is None else self.text(name, what)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number that may be missing."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise RequestError(f'"{name}" is not a number from {least:g} to {most:g}')
        return value

    def timeout_s(self) -> float:
        """How long a DHT request may take."""
        return self.number("timeout_s", DEFAULT_DHT_TIMEOUT_S, 1, MAX_DHT_TIMEOUT_S)

    def record(self) -> bytes:
        """The value of a DHT record."""
        try:
            value = base64.b64decode(self.text("value", "the record, base64"), validate=True)
        except binascii.Error as exc:
            raise RequestError('"value" is not base64') from exc
        if len(value) > MAX_RECORD_BYTES:
            raise RequestError(f"a record has at most {MAX_RECORD_BYTES} bytes, this one {len(value)}")
        return value


_PEER: Final = "a peer id such as 12D3KooW..."
_MODEL: Final = "a model's id"
_KEY: Final = "a service key such as /lloom/executor/1.0.0, or a CID"
_RECORD_KEY: Final = "/pk/PEER or /ipns/NAME"


def operation_routes(node: Operations) -> list[Route]:
    """The routes of this module."""

    async def findprovs(fields: Fields) -> Any:
        return await node.find_providers(
            fields.text("key", _KEY),
            count=int(fields.number("count", DEFAULT_PROVIDERS, 1, MAX_PROVIDERS)),
            timeout_s=fields.timeout_s(),
            at=fields.optional_text("at", _PEER),
        )

    async def put(fields: Fields) -> Any:
        key = fields.optional_text("key", _RECORD_KEY)
        value = b"" if key is None else fields.record()
        return await node.put_record(key, value, timeout_s=fields.timeout_s())

    async def price(fields: Fields) -> Any:
        return node.set_price(fields.text("model", _MODEL), fields.text("price", "such as 15/60 EUR, or free"))

    async def pause(fields: Fields) -> Any:
        return node.pause_executor()

    async def resume(fields: Fields) -> Any:
        return node.resume_executor()

    async def drain(request: Request) -> Response:
        # For a container's preStop: no body to write, and the answer comes when the backend may end.
        text = request.query_params.get("wait_s", "0")
        try:
            wait_s = float(text)
        except ValueError:
            wait_s = -1.0
        if not 0 <= wait_s <= MAX_DRAIN_WAIT_S:
            raise RequestError(f"wait_s is not a number of seconds from 0 to {MAX_DRAIN_WAIT_S:g}")
        state = node.pause_executor()
        with trio.move_on_after(wait_s):
            while state["paused"] and state["requests"]:
                await trio.sleep(DRAIN_POLL_S)
                state = node.executor_state()
        return JSONResponse(state)

    async def bootstrap(request: Request) -> Response:
        return JSONResponse(node.bootstrap())

    async def topics(request: Request) -> Response:
        return JSONResponse({"topics": await node.topics()})

    async def topic_peers(request: Request) -> Response:
        topic = request.query_params.get("topic")
        if not topic:
            raise RequestError("the query lacks topic=TOPIC")
        try:
            return JSONResponse(await node.topic_peers(topic))
        except ValueError as exc:
            raise RequestError(str(exc)) from exc

    async def requests(request: Request) -> Response:
        return JSONResponse({"requests": node.requests()})

    async def explain(fields: Fields) -> Any:
        what = fields.text("what", "a model's id, or a request's")
        return node.explain(what, fields.optional_text("policy", "such as fastest"))

    async def doctor(request: Request) -> Response:
        return JSONResponse({"findings": await node.examine()})

    actions: dict[str, Action] = {
        "/v1/peers/ping": lambda f: node.ping(f.text("peer", _PEER)),
        "/v1/peers/disconnect": lambda f: node.disconnect(f.text("peer", _PEER)),
        "/v1/bootstrap/add": lambda f: node.bootstrap_add(f.text("addr", "a multiaddr with /p2p/<peer id>")),
        "/v1/bootstrap/rm": lambda f: node.bootstrap_remove(f.text("which", "a validator's peer id or address")),
        "/v1/dht/findprovs": findprovs,
        "/v1/dht/provide": lambda f: node.provide(f.text("key", _KEY), timeout_s=f.timeout_s()),
        "/v1/dht/closest": lambda f: node.closest(f.text("key", f"{_KEY}, or {_PEER}"), timeout_s=f.timeout_s()),
        "/v1/dht/findpeer": lambda f: node.find_peer(f.text("peer", _PEER), timeout_s=f.timeout_s()),
        "/v1/dht/get": lambda f: node.get_record(f.text("key", _RECORD_KEY), timeout_s=f.timeout_s()),
        "/v1/dht/put": put,
        "/v1/explain": explain,
        "/v1/models/query": lambda f: node.query_models(f.text("peer", _PEER)),
        "/v1/models/quote": lambda f: node.ask_quote(f.text("peer", _PEER), f.text("model", _MODEL)),
        "/v1/executor/price": price,
        "/v1/executor/pause": pause,
        "/v1/executor/resume": resume,
    }
    return [
        *(Route(path, _endpoint(action), methods=["POST"]) for path, action in actions.items()),
        Route("/v1/executor/drain", drain, methods=["POST"]),
        Route("/v1/bootstrap", bootstrap),
        Route("/v1/gossip/topics", topics),
        Route("/v1/gossip/peers", topic_peers),
        Route("/v1/requests", requests),
        Route("/v1/doctor", doctor, methods=["POST"]),
    ]


def _endpoint(action: Action) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        fields = Fields(await read_object(request))
        try:
            return JSONResponse(await action(fields))
        except ValueError as exc:
            raise RequestError(str(exc)) from exc

    return endpoint


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body. Raises RequestError."""
    body = b""
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RequestError(f"the body is over {MAX_BODY_BYTES} bytes", http_status=413)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RequestError("the body is not JSON") from exc
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object")
    return value
