"""Who may see the status page: whoever sits at the machine, or holds a key; no other site's page."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.harness import Network, Node
from tests.harness.network import free_port


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=0, clients=0) as network:
        (network.root / "keys").write_text("a-key\n")
        (network.root / "keys").chmod(0o600)
        yield network


def get(url: str, path: str = "/snapshot.json", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(f"{url}{path}", headers=named, trust_env=False).status_code


def page_of(node: Node) -> str:
    found = node.status()["page"]
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("has_key", [False, True])
def test_on_loopback_it_is_for_this_machine_only(network: Network, has_key: bool) -> None:
    flags = ["--api-key-file", str(network.root / "keys")] if has_key else []
    page = page_of(network.add("client", "--page", "127.0.0.1:0", *flags))
    assert get(page) == 200
    # A name that a page's owner points at 127.0.0.1 (DNS rebinding): the API's key must not open this door.
    assert get(page, host="evil.example") == 403
    assert get(page, sec_fetch_site="cross-site") == 403
    assert get(page, origin="https://evil.example") == 403
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert get(page, "/", **link) == 200
    assert get(page, "/", **{**link, "sec_fetch_dest": "iframe"}) == 403


def test_where_others_reach_it_it_wants_the_key(network: Network) -> None:
    port = free_port()
    network.add("client", "--page", f"0.0.0.0:{port}", "--api-key-file", str(network.root / "keys"))
    page = f"http://127.0.0.1:{port}"
    assert get(page) == 401
    assert get(page, "/live") == 401
    assert get(page, authorization="Bearer a-key") == 200
    assert httpx.get(f"{page}/snapshot.json", auth=("me", "a-key"), trust_env=False).status_code == 200
    assert httpx.get(f"{page}/snapshot.json", auth=("me", "another"), trust_env=False).status_code == 401


def test_a_busy_port_is_told_in_a_sentence(network: Network) -> None:
    taken = page_of(network.add("client", "--page", "127.0.0.1:0")).rpartition(":")[2]
    node = network.add("client", "--page", f"127.0.0.1:{taken}", start=False)
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(30) == 1
    assert "--page" in node.log_tail()
