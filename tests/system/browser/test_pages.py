"""The status page and the chat page in a real Chromium, on a real network."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.harness import Network, Node
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=0) as network:
        client = network.add("client", "--page", "127.0.0.1:0")
        network.clients.append(client)
        network.wait_known(client)
        yield network


@pytest.fixture
def client(network: Network) -> Node:
    return network.client


def status_url(client: Node) -> str:
    found = client.status()["page"]
    assert isinstance(found, str)
    return found


def no_barriers(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def ask(client: Node, prompt: str) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}]}
    httpx.post(f"{client.api}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def chat(page: Page, client: Node, prompt: str) -> None:
    page.goto(f"{client.api}/chat")
    page.wait_for_selector("#model option", state="attached")
    page.fill("#question", prompt)
    page.press("#question", "Enter")


# ---------------------------------------------------------------- the status page
def test_it_shows_the_network(page: Page, network: Network, client: Node) -> None:
    page.goto(status_url(client))
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator("#models")).to_contain_text("scripted")
    for node in network.nodes:
        if node is not client:
            expect(page.locator(f'#peers tr[data-peer="{node.peer}"]')).to_contain_text("direct")
    expect(page.locator("#facts")).to_contain_text(client.peer)
    expect(page.locator("#map .validator")).to_have_count(1)
    expect(page.locator("#map .executor")).to_have_count(2)
    no_barriers(page)


def test_a_running_request_is_seen_while_it_runs(page: Page, client: Node) -> None:
    page.goto(status_url(client))
    expect(page.locator("#live")).to_have_text("live")
    asking = threading.Thread(target=ask, args=(client, "chunks=20 delay_ms=200"))
    asking.start()
    try:
        expect(page.locator("#requests tr.live")).to_contain_text("running")
    finally:
        asking.join()
    expect(page.locator("#requests tr.live")).to_have_count(0)
    expect(page.locator("#requests tr").first).to_contain_text("ok")
    expect(page.locator("#events")).to_contain_text("response received")


def test_a_killed_executor_is_seen_without_loading_again(page: Page, network: Network, client: Node) -> None:
    dead = network.add("executor")
    network.wait_known(client, [*network.executors, dead])
    page.goto(status_url(client))
    row = page.locator(f'#peers tr[data-peer="{dead.peer}"]')
    expect(row).to_contain_text("direct")
    dead.kill()
    expect(row).to_contain_text("not connected")
    expect(page.locator("#events")).to_contain_text("connection closed")
    expect(row.locator(".pill.good")).to_have_count(0)


def test_it_is_usable_on_a_phone_in_the_dark(browser: Browser, client: Node) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    for url in (status_url(client), f"{client.api}/chat"):
        page.goto(url)
        page.wait_for_selector("#models th" if "/chat" not in url else "#model option", state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        no_barriers(page)
    context.close()


def test_the_keyboard_reaches_everything(page: Page, client: Node) -> None:
    page.goto(status_url(client))
    page.wait_for_selector("#models th")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
    assert {"chat", "Models", "Peers", "Requests", "Events, newest first"} <= reached


def test_the_pages_lead_to_each_other(page: Page, client: Node) -> None:
    page.goto(status_url(client))
    page.click("#chat")
    expect(page).to_have_title("Lloom chat")
    page.click("#status")
    expect(page).to_have_title(re.compile("Lloom node"))
    expect(page.locator("#live")).to_have_text("live")


def test_what_peers_say_is_text(page: Page, network: Network, client: Node) -> None:
    hostile = '<img/src=x/onerror="document.title=1">'
    node = network.add("executor", start=False)
    network.backends[-1].set_models([hostile])
    node.start()
    try:
        page.goto(status_url(client))
        expect(page.locator("#models")).to_contain_text(hostile)
        expect(page.locator("#models tr")).to_have_count(2)
        assert page.locator("#models img").count() == 0
        assert page.title() != "1"
    finally:
        node.stop()


def test_a_broken_node_says_what_to_do(page: Page, network: Network) -> None:
    alone = network.add("client", "--page", "127.0.0.1:0", bootstrap=False)
    page.goto(status_url(alone))
    expect(page.locator("#conditions")).to_contain_text("What to do")
    no_barriers(page)
    alone.kill()
    expect(page.locator("#live")).to_contain_text("does not answer")


# ---------------------------------------------------------------- the chat page
def test_an_answer_is_streamed_and_verified(page: Page, client: Node) -> None:
    chat(page, client, "chunks=5")
    expect(page.locator("#talk li.assistant .facts")).to_contain_text("receipt verified")
    expect(page.locator("#talk li.assistant")).to_contain_text("w0 w1 w2 w3 w4")
    no_barriers(page)


def test_stop_stops_the_backend(page: Page, network: Network, client: Node) -> None:
    chat(page, client, "chunks=500 delay_ms=100")
    expect(page.locator("#talk li.assistant")).to_contain_text("w2")
    page.click("#stop")
    expect(page.locator("#talk .failed")).to_contain_text("not the whole answer")
    wait_until(lambda: client.status()["requests"]["in_flight"] == 0, "the request to end")
    assert client.status()["requests"]["cancelled"] >= 1
    wait_until(
        lambda: any(
            one["outcome"] == "gone" and one["script"].get("chunks") == 500
            for backend in network.backends
            for one in backend.requests()
        ),
        "the backend to see that nobody listens",
    )


def test_a_cut_answer_does_not_look_finished(page: Page, network: Network, client: Node) -> None:
    chat(page, client, "chunks=500 delay_ms=100")
    expect(page.locator("#talk li.assistant")).to_contain_text("w2")
    busy = [node for node in network.executors if node.status()["requests"]["in_flight"]]
    assert len(busy) == 1
    busy[0].kill()
    expect(page.locator("#talk .failed")).to_contain_text("Cut: this is not the whole answer")
    assert page.locator("#talk .facts").count() == 0
    busy[0].start()
    network.wait_known(client)
