"""The pages' HTTP, without a browser: files and their headers, the key, the live stream and its bounds."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from test_admin_fake_node import FakeNode

from lloom_sidecar.admin.events import ConnectionEstablished
from lloom_sidecar.page.app import EVERY_S, KEEP_ALIVE_S, MAX_VIEWERS, WRITE_S, AsgiApp, chat_app, status_app
from lloom_sidecar.page.assets import SECURITY_HEADERS, is_navigation, load_assets


class Asked:
    """What an app answered."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_over = False

    def events(self, kind: str) -> list[Any]:
        """The data of each event of ``kind`` so far."""
        marked = f"event: {kind}\n".encode()
        parts = [part for part in self.body.split(b"\n\n") if part.startswith(marked)]
        return [json.loads(part.removeprefix(marked).removeprefix(b"data: ")) for part in parts]


async def ask(
    app: AsgiApp,
    path: str,
    *,
    method: str = "GET",
    authorization: str | None = None,
    asked: Asked | None = None,
    write: Callable[[], Any] | None = None,
    leave: trio.Event | None = None,
) -> Asked:
    """One request; ``leave``: the viewer goes away then; ``write``: awaited in every write."""
    asked = asked or Asked()
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]

    async def receive() -> dict[str, Any]:
        await (trio.Event() if leave is None else leave).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            asked.status = message["status"]
            asked.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        if write is not None:
            await write()
        asked.body += message["body"]

    await app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    asked.is_over = True
    return asked


async def test_every_answer_has_the_headers_that_keep_others_out() -> None:
    app = status_app(FakeNode())
    for path in ("/", "/status.js", "/page.css", "/snapshot.json", "/nothing", "/../app.py"):
        answer = await ask(app, path)
        assert answer.status == (200 if path not in ("/nothing", "/../app.py") else 404)
        assert SECURITY_HEADERS.items() <= answer.headers.items()
        assert int(answer.headers["content-length"]) == len(answer.body)


def test_nothing_comes_from_elsewhere() -> None:
    for name, (_, content) in load_assets().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, name
        assert "https://" not in text, name
        for unsafe in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "<script>",
            " onclick",
        ):
            assert unsafe not in text, f"{name}: {unsafe}"


async def test_it_changes_nothing() -> None:
    for method in ("POST", "PUT", "DELETE"):
        answer = await ask(status_app(FakeNode()), "/", method=method)
        assert answer.status == 405
        assert answer.headers["allow"] == "GET, HEAD"
        assert (await ask(chat_app(dict), "/chat", method=method)).status == 405


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer k2", 200),
        ("Basic " + base64.b64encode(b"any:k1").decode(), 200),
        ("Basic " + base64.b64encode(b"k1").decode(), 401),
        ("Basic %%%", 401),
        ("Digest k1", 401),
        ("", 401),
    ],
)
async def test_where_others_reach_it_it_needs_a_key(authorization: str | None, status: int) -> None:
    app = status_app(FakeNode(), keys=("k1", "k2"))
    for path in ("/", "/snapshot.json", "/status.js"):
        answer = await ask(app, path, authorization=authorization)
        assert answer.status == status
        assert ("www-authenticate" in answer.headers) == (status == 401)


async def test_the_chat_page_is_its_own_files_only() -> None:
    app = chat_app(lambda: {"page_port": 4882})
    assert (await ask(app, "/chat")).headers["content-type"].startswith("text/html")
    assert (await ask(app, "/chat/chat.js")).status == 200
    assert json.loads((await ask(app, "/chat/node.json")).body) == {"page_port": 4882}
    assert (await ask(app, "/chat/status.html")).status == 404
    assert (await ask(app, "/chat/../../secret")).status == 404


async def test_the_live_stream_tells_changes_and_events(autojump_clock: trio.testing.MockClock) -> None:
    node, leave, asked = FakeNode(), trio.Event(), Asked()
    node.events.publish(ConnectionEstablished("before"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(status_app(node), "/live", asked=asked, leave=leave))
        await trio.sleep(EVERY_S * 3.5)
        assert asked.headers["content-type"] == "text/event-stream"
        assert len(asked.events("snapshot")) == 1, "nothing has changed since"
        assert [one["peer"] for one in asked.events("activity")] == ["before"]
        node.events.publish(ConnectionEstablished("later"))
        node.health.set("p2pd_down", "it ended")
        await trio.sleep(EVERY_S)
        assert [one["peer"] for one in asked.events("activity")] == ["before", "later"]
        last = asked.events("snapshot")[-1]
        assert [one["code"] for one in last["status"]["conditions"]] == ["p2pd_down"]
        await trio.sleep(KEEP_ALIVE_S * 2)
        assert asked.body.endswith(b"\n\n:\n\n")
        leave.set()
        with trio.fail_after(1):
            while not asked.is_over:
                await trio.sleep(0.01)


async def test_a_viewer_who_takes_nothing_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    answer = await ask(status_app(FakeNode()), "/live", write=trio.sleep_forever)
    assert answer.is_over
    assert trio.current_time() - began == pytest.approx(WRITE_S)


async def test_viewers_are_bounded_and_their_places_come_back(autojump_clock: trio.testing.MockClock) -> None:
    app = status_app(FakeNode())
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_VIEWERS):
            nursery.start_soon(lambda: ask(app, "/live"))
        await trio.testing.wait_all_tasks_blocked()
        refused = await ask(app, "/live")
        assert refused.status == 503
        assert refused.headers["retry-after"] == "10"
        nursery.cancel_scope.cancel()
    leave = trio.Event()
    leave.set()
    assert (await ask(app, "/live", leave=leave)).status == 200


async def test_the_stream_ends_with_the_node(autojump_clock: trio.testing.MockClock) -> None:
    node, asked = FakeNode(), Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(status_app(node), "/live", asked=asked))
        await trio.sleep(EVERY_S)
        node.events.close()
        await trio.sleep(EVERY_S * 1.5)
        assert asked.is_over


def test_only_a_link_may_come_from_elsewhere() -> None:
    assert is_navigation("GET", "navigate", "document")
    for method, mode, destination in (
        ("POST", "navigate", "document"),
        ("GET", "navigate", "iframe"),
        ("GET", "cors", "empty"),
        ("GET", "no-cors", "script"),
        ("GET", None, None),
    ):
        assert not is_navigation(method, mode, destination)
