"""The admin API behind a token."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lloom_sidecar.admin.token import with_token


async def _hello(request: Any) -> PlainTextResponse:
    return PlainTextResponse("let in")


APP = Starlette(routes=[Route("/", _hello, methods=["GET", "POST"])])


async def status_for(*authorization: bytes) -> int:
    """What a request with these Authorization headers gets; it has a body that may not be read when refused."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("a refused request was read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", one) for one in authorization]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    await with_token(APP, ("one", "two"))(scope, receive, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize("header", [b"Bearer one", b"bearer two", b"Bearer  two "])
async def test_who_has_a_token_is_let_in(header: bytes) -> None:
    assert await status_for(header) == 200


@pytest.mark.parametrize(
    "header",
    [b"", b"Bearer", b"Bearer ", b"Bearer on", b"Bearer onee", b"Bearer one two", b"Basic one", b"one", b"\xff"],
)
async def test_all_others_are_refused_unread(header: bytes) -> None:
    assert await status_for(header) == 401
    assert await status_for() == 401


def test_nobody_is_let_in_by_an_empty_list() -> None:
    with pytest.raises(ValueError, match="needs a token"):
        with_token(APP, ())
