"""Who may use a listener: Host, Origin, Sec-Fetch-Site, Content-Type."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lloom_sidecar.http.guard import OriginGuard, is_loopback_name


@dataclass
class FakeRequest:
    method: str = "GET"
    host: str = "127.0.0.1:4880"
    scheme: str = "http"
    has_body: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    def header(self, name: str) -> str | None:
        return self.headers.get(name)


def code_of(guard: OriginGuard, request: FakeRequest) -> str | None:
    refusal = guard.check(request)
    return None if refusal is None else refusal.code


@pytest.mark.parametrize("name", ["localhost", "LocalHost", "127.0.0.1", "127.255.0.9", "[::1]"])
def test_loopback_names(name: str) -> None:
    assert is_loopback_name(name)


@pytest.mark.parametrize("name", ["", "localhost.evil.example", "128.0.0.1", "127.1", "::1", "[::2]", "0x7f.0.0.1"])
def test_other_names_are_not_loopback(name: str) -> None:
    assert not is_loopback_name(name)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:4880", "[::1]:4880", "[::1]", "LOCALHOST:80"])
def test_loopback_hosts_pass(host: str) -> None:
    assert code_of(OriginGuard(), FakeRequest(host=host)) is None


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:4880", "192.168.1.2", "a@localhost", "localhost:x", "a" * 301]
)
def test_other_hosts_are_refused(host: str) -> None:
    refusal = OriginGuard().check(FakeRequest(host=host))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (403, "host_not_allowed")


def test_allowed_hosts() -> None:
    guard = OriginGuard(["Node.example", "other.example:4880"])
    assert code_of(guard, FakeRequest(host="node.example:1234")) is None
    assert code_of(guard, FakeRequest(host="other.example:4880")) is None
    assert code_of(guard, FakeRequest(host="other.example:4881")) == "host_not_allowed"


def test_host_check_can_be_off() -> None:
    assert code_of(OriginGuard(check_host=False), FakeRequest(host="anything")) is None


def test_own_origin_passes_and_any_other_is_refused() -> None:
    guard = OriginGuard()
    assert code_of(guard, FakeRequest(headers={"origin": "http://127.0.0.1:4880"})) is None
    for origin in ("null", "https://127.0.0.1:4880", "http://127.0.0.1", "http://evil.example", ""):
        assert code_of(guard, FakeRequest(headers={"origin": origin})) == "origin_not_allowed"


def test_without_a_host_no_origin_is_its_own() -> None:
    guard = OriginGuard(check_host=False)
    assert code_of(guard, FakeRequest(host="", headers={"origin": "http://"})) == "origin_not_allowed"


def test_allowed_origin_passes_with_what_its_browser_adds() -> None:
    guard = OriginGuard(allowed_origins=["https://Chat.example/"])
    headers = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
    assert code_of(guard, FakeRequest(headers=headers)) is None


@pytest.mark.parametrize(
    ("site", "code"),
    [
        ("same-origin", None),
        ("none", None),
        ("cross-site", "cross_site"),
        ("same-site", "cross_site"),
        ("?", "cross_site"),
    ],
)
def test_fetch_metadata(site: str, code: str | None) -> None:
    assert code_of(OriginGuard(), FakeRequest(headers={"sec-fetch-site": site})) == code


@pytest.mark.parametrize(
    ("content_type", "code"),
    [
        ("application/json", None),
        ("Application/JSON; charset=utf-8", None),
        ("text/plain", "content_type"),
        ("application/json+x", "content_type"),
        (None, "content_type"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_body_must_be_json(method: str, content_type: str | None, code: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert code_of(OriginGuard(), FakeRequest(method, has_body=True, headers=headers)) == code


def test_json_is_not_asked_for_without_a_body_or_when_off() -> None:
    assert code_of(OriginGuard(), FakeRequest("POST")) is None
    assert code_of(OriginGuard(require_json=False), FakeRequest("POST", has_body=True)) is None
