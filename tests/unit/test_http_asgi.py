"""A Starlette application behind our server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lloom_sidecar.http.asgi import AsgiApp, asgi_handler
from lloom_sidecar.http.client import HttpClient, open_client
from lloom_sidecar.http.errors import HttpUsageError, IncompleteBodyError
from lloom_sidecar.http.listeners import open_tcp_listeners
from lloom_sidecar.http.server import serve

SOON_S = 5.0


class Application:
    """Routes of every kind."""

    def __init__(self) -> None:
        self.cancelled = trio.Event()
        self.app = Starlette(
            routes=[
                Route("/echo/{name}", self.echo, methods=["GET", "POST"]),
                Route("/stream", self.stream),
                Route("/forever", self.forever),
                Route("/broken", self.broken),
                Route("/empty", self.empty),
            ]
        )

    async def echo(self, request: Request) -> JSONResponse:
        assert request.client is not None
        return JSONResponse(
            {
                "name": request.path_params["name"],
                "query": request.query_params.get("q"),
                "body": (await request.body()).decode(),
                "url": str(request.url),
                "client": request.client.host,
            }
        )

    async def stream(self, request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for part in (b"one", b"two"):
                yield part

        return StreamingResponse(parts(), media_type="text/plain")

    async def forever(self, request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            try:
                yield b"begun"
                await trio.sleep_forever()
            finally:
                self.cancelled.set()

        return StreamingResponse(parts())

    async def broken(self, request: Request) -> Response:
        raise ZeroDivisionError

    async def empty(self, request: Request) -> Response:
        return Response(status_code=204)


@asynccontextmanager
async def running(app: AsgiApp) -> AsyncIterator[tuple[HttpClient, list[BaseException]]]:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    errors: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve(
                [listener],
                asgi_handler(app),
                on_error=lambda exc, request: errors.append(exc),
                task_status=task_status,
            )
        )
        async with open_client(f"http://127.0.0.1:{listener.port}") as client:
            with trio.fail_after(SOON_S):
                yield client, errors
        nursery.cancel_scope.cancel()


async def test_requests_and_answers() -> None:
    async with running(Application().app) as (client, errors):
        async with client.request("POST", "/echo/a%20b?q=1", (), b"hi") as response:
            assert response.status == 200
            body = await response.read(1000)
        assert b'"name":"a b","query":"1","body":"hi"' in body
        assert b'"client":"127.0.0.1"' in body
        assert f'"url":"{client.base}/echo/'.encode() in body
        async with client.request("GET", "/stream") as response:
            assert response.header("transfer-encoding") == "chunked"
            assert await response.read(1000) == b"onetwo"
        async with client.request("HEAD", "/echo/x") as response:
            assert int(response.header("content-length") or 0) > 10
            assert await response.read(0) == b""
        async with client.request("GET", "/empty") as response:
            assert response.status == 204
        async with client.request("GET", "/missing") as response:
            assert response.status == 404
            await response.read(1000)
        assert client.idle_connections == 1
        assert errors == []


async def test_a_broken_application() -> None:
    async with running(Application().app) as (client, errors):
        async with client.request("GET", "/broken") as response:
            assert response.status == 500
        assert [type(exc) for exc in errors] == [ZeroDivisionError]


async def test_a_hang_up_cancels_the_application() -> None:
    application = Application()
    async with running(application.app) as (client, errors):
        async with client.request("GET", "/forever") as response:
            assert await response.receive_some() == b"begun"
        await application.cancelled.wait()
        assert errors == []


def answers(*messages: dict[str, Any]) -> AsgiApp:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


START = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"4")]}


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (START,),
        (START, START),
        ({"type": "http.response.body"},),
        ({"type": "websocket.accept"},),
    ],
)
async def test_applications_that_break_the_rules(messages: tuple[dict[str, Any], ...]) -> None:
    async with running(answers(*messages)) as (client, errors):
        async with client.request("GET", "/") as response:
            assert response.status == 500
            await response.read(1000)
        assert [type(exc) for exc in errors] == [HttpUsageError]


async def test_a_declared_length_is_kept() -> None:
    parts = [{"type": "http.response.body", "body": part, "more_body": True} for part in (b"ab", b"cd")]
    end = {"type": "http.response.body"}
    async with running(answers(START, *parts, end)) as (client, errors):
        async with client.request("GET", "/") as response:
            assert response.header("content-length") == "4"
            assert await response.read(10) == b"abcd"
        assert errors == []
    async with running(answers(START, parts[0], end)) as (client, errors):
        async with client.request("GET", "/") as response:
            with pytest.raises(IncompleteBodyError):
                await response.read(10)
        assert [type(exc) for exc in errors] == [HttpUsageError]


async def test_receive_tells_the_end() -> None:
    kinds: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kinds.append((await receive())["type"])
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                kinds.append((await receive())["type"])

            nursery.start_soon(wait)
            await send(START)
            await send({"type": "http.response.body", "body": b"done"})

    async with running(app) as (client, errors), client.request("GET", "/") as response:
        assert await response.read(10) == b"done"
    assert kinds == ["http.request", "http.disconnect"]
    assert errors == []
