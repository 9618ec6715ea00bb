"""How doctor judges facts: severity, cause, remedy."""

from __future__ import annotations

import pytest

from lloom_sidecar.admin.doctor import (
    CHECKS,
    WELL_KNOWN_BOOTSTRAP,
    Dialogue,
    Finding,
    RecordFacts,
    ValidatorFacts,
    count_severities,
    finding,
    in_order,
    judge_clock,
    judge_conditions,
    judge_descriptors,
    judge_dialogue,
    judge_disk,
    judge_features,
    judge_gossip,
    judge_ledger,
    judge_open_settings,
    judge_p2pd,
    judge_public_network,
    judge_reachability,
    judge_records,
    judge_stale,
    judge_validators,
)
from lloom_sidecar.admin.health import CONDITION_KINDS

OURS = {"mdns", "holePunch", "staticRelays", "psk", "streamsPerProtocolPeer"}
GOOD = ValidatorFacts("aaaaaaaa", "/ip4/192.0.2.1/tcp/4001", rtt_ms=2.5, is_member=True)


def severities(found: list[Finding]) -> list[str]:
    return [one["severity"] for one in found]


def dead(code: str, error: str) -> ValidatorFacts:
    return ValidatorFacts("bbbbbbbb", "/ip4/192.0.2.2/tcp/4001", code=code, error=error)


# --- form


def test_the_report_has_the_order_of_the_table() -> None:
    names = [kind.name for kind in CHECKS]
    assert len(names) == len(set(names))
    shuffled = [finding(name, "ok", "") for name in reversed(names)]
    assert [one["check"] for one in in_order(shuffled)] == names
    with pytest.raises(KeyError):
        finding("weather", "ok", "")


def test_severities_are_counted() -> None:
    found = [finding("disk", "ok", ""), finding("disk", "error", ""), finding("clock", "skipped", "")]
    assert count_severities(found) == {"error": 1, "warning": 0, "info": 0, "ok": 1, "skipped": 1}


# --- p2pd


def test_p2pd_that_answers() -> None:
    kwargs = {"is_up": True, "is_attached": False, "last_error": "", "version": "lloom-p2pd 1"}
    assert judge_p2pd(restarts=0, **kwargs)["severity"] == "ok"  # type: ignore[arg-type]
    again = judge_p2pd(restarts=2, **kwargs)  # type: ignore[arg-type]
    assert (again["severity"], "restarted 2 times" in again["text"]) == ("info", True)


@pytest.mark.parametrize(("is_attached", "hint"), [(True, "--p2pd-control"), (False, "p2pd.log")])
def test_p2pd_that_does_not(is_attached: bool, hint: str) -> None:
    found = judge_p2pd(is_up=False, is_attached=is_attached, restarts=3, last_error="it was killed", version=None)
    assert found["severity"] == "error"
    assert "it was killed" in found["text"]
    assert hint in found["remedy"]


def test_what_a_stock_p2pd_lacks_is_listed() -> None:
    assert judge_features(OURS, is_attached=False)["severity"] == "ok"
    stock = judge_features({"relay", "dht"}, is_attached=False)
    assert stock["severity"] == "info"
    for words in ("mDNS", "hole punching", "NAT", "raised limits"):
        assert words in stock["text"]
    assert "mDNS" not in judge_features({"mdns"}, is_attached=False)["text"]
    assert judge_features((), is_attached=True)["severity"] == "info"


@pytest.mark.parametrize(("is_replaced", "severity"), [(None, "skipped"), (True, "warning"), (False, "ok")])
def test_a_replaced_binary(is_replaced: bool | None, severity: str) -> None:
    assert judge_stale(is_replaced=is_replaced)["severity"] == severity


# --- listening


@pytest.mark.parametrize(
    ("dialogue", "expected"),
    [
        (Dialogue(""), ["info", "skipped"]),
        (Dialogue("127.0.0.1:1", error="nobody listens"), ["warning", "skipped"]),
        (Dialogue("127.0.0.1:1", accepted=frozenset({"/noise"})), ["ok", "ok"]),
        (Dialogue("127.0.0.1:1", accepted=frozenset({"/noise", "/plaintext/2.0.0"})), ["ok", "error"]),
        (Dialogue("127.0.0.1:1"), ["ok", "error"]),
    ],
)
def test_the_listeners_answers(dialogue: Dialogue, expected: list[str]) -> None:
    found = judge_dialogue(dialogue)
    assert [one["check"] for one in found] == ["listening", "plaintext"]
    assert severities(found) == expected


@pytest.mark.parametrize(
    ("addrs", "is_validator", "severity"),
    [
        ([], False, "warning"),
        (["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1"], True, "info"),
        (["/ip4/192.168.1.2/tcp/1"], False, "info"),
        (["/ip4/192.168.1.2/tcp/1", "/ip4/127.0.0.1/tcp/1"], True, "warning"),
        (["/ip4/8.8.8.8/tcp/1"], True, "ok"),
        (["/ip6/2606:4700::1/tcp/1"], True, "ok"),
        (["/ip6/fe80::1%eth0/tcp/1"], False, "info"),
        (["/dns4/node.example.org/tcp/1"], True, "ok"),
        (["/ip4/10.0.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1/p2p/X/p2p-circuit"], False, "ok"),
        (["/ip4/no-ip/tcp/1"], False, "ok"),
        (["/x"], False, "ok"),
    ],
)
def test_reachability(addrs: list[str], is_validator: bool, severity: str) -> None:
    assert judge_reachability(addrs, is_validator=is_validator)["severity"] == severity


# --- validators


def test_validators_that_answer() -> None:
    found = judge_validators([GOOD], is_validator=False, is_open=False)
    assert severities(found) == ["ok"]
    assert found[0]["text"] == "1 of 1 answer: aaaaaaaa in 2.5 ms"


def test_no_validator_at_all() -> None:
    assert severities(judge_validators([], is_validator=True, is_open=False)) == ["ok"]
    assert severities(judge_validators([], is_validator=False, is_open=False)) == ["info"]


@pytest.mark.parametrize(
    ("code", "error", "cause", "remedy"),
    [
        ("hello_not_member", "refused hello", "belongs to another network", "network show"),
        ("hello_bad_proof", "refused hello", "its network key differs", "network show"),
        ("hello_version", "refused hello", "another major version", "Upgrade"),
        ("peer_unreachable", "dial: peer id mismatch: expected X", "another node answers", "Correct the peer id"),
        ("peer_unreachable", "lookup v: no such host", "name is not known", "name server"),
        ("peer_unreachable", "dial tcp: connect: connection refused", "nothing listens", "correct the port"),
        ("peer_unreachable", "context deadline exceeded: i/o timeout", "does not answer in time", "firewall"),
        ("peer_unreachable", "protocols not supported: [/lloom/hello]", "no lloom-sidecar", "Lloom node's"),
        ("kept_away", "it is banned (forged)", "keeps it away", "events"),
        ("peer_unreachable", "something else", "something else (peer_unreachable)", "address and port"),
    ],
)
def test_a_validator_that_does_not_is_explained(code: str, error: str, cause: str, remedy: str) -> None:
    (found,) = judge_validators([dead(code, error)], is_validator=False, is_open=False)
    assert found["severity"] == "error"
    assert cause in found["text"]
    assert remedy in found["remedy"]
    # with another one that answers it is no error
    assert severities(judge_validators([GOOD, dead(code, error)], is_validator=False, is_open=False)) == (
        ["ok", "warning"]
    )


def test_a_validator_of_another_network() -> None:
    stranger = ValidatorFacts("cccccccc", "/x", rtt_ms=1.0)
    assert severities(judge_validators([stranger], is_validator=False, is_open=False)) == ["error"]
    assert severities(judge_validators([stranger], is_validator=False, is_open=True)) == ["ok"]


@pytest.mark.parametrize(
    ("skews_ms", "severity"),
    [
        ([], "skipped"),
        ([0], "ok"),
        ([4_999, -4_000], "ok"),
        ([120_000], "warning"),
        ([-120_000], "warning"),
        ([120_000, 0, 10], "ok"),
        ([20 * 60_000], "error"),
    ],
)
def test_the_clock(skews_ms: list[int], severity: str) -> None:
    facts = [ValidatorFacts("a", "/x", rtt_ms=1.0, clock_ahead_ms=skew) for skew in skews_ms]
    found = judge_clock([*facts, dead("peer_timeout", "")])
    assert found["severity"] == severity
    if severity == "warning":
        assert "120.0 s" in found["text"]
        assert ("ahead of" in found["text"]) == (skews_ms[0] > 0)


# --- DHT, gossip, public network


def test_records_that_others_hold() -> None:
    found = judge_records([RecordFacts(f"/k{i}", holders=2, asked=3) for i in range(6)])
    assert severities(found) == ["ok"]
    assert "/k0 at 2 of 3" in found[0]["text"]
    assert "and 2 more" in found[0]["text"]


def test_records_that_nobody_holds() -> None:
    found = judge_records([RecordFacts("/k", 0, 3), RecordFacts("/j", 1, 3)])
    assert severities(found) == ["ok", "warning"]
    assert "lloomctl dht provide /k" in found[1]["remedy"]
    assert severities(judge_records([RecordFacts("/k", 0, 0)])) == ["info"]
    assert severities(judge_records([])) == ["ok"]
    assert severities(judge_records([], error="empty table")) == ["skipped"]


@pytest.mark.parametrize(
    ("topics", "members", "severity"),
    [
        ({"a": 1, "b": 2}, 2, "ok"),
        ({"a": 1}, 2, "warning"),
        ({"a": 1, "b": 0}, 2, "warning"),
        ({"a": 0, "b": 0}, 0, "skipped"),
        ({}, 0, "skipped"),
    ],
)
def test_gossip(topics: dict[str, int], members: int, severity: str) -> None:
    assert judge_gossip(topics, wanted=("a", "b"), members=members)["severity"] == severity


def test_the_public_network() -> None:
    stranger = min(WELL_KNOWN_BOOTSTRAP)
    assert judge_public_network(["x"], has_flag=False)["severity"] == "ok"
    found = judge_public_network(["x", stranger], has_flag=False)
    assert (found["severity"], stranger[-8:] in found["text"]) == ("error", True)
    assert "-b" in judge_public_network([], has_flag=True)["text"]


# --- settings, machine


def test_open_settings() -> None:
    kwargs = {"is_open": False, "is_api_open": False, "api": "0.0.0.0:4880", "allows_media": False}
    assert severities(judge_open_settings(**kwargs)) == ["ok"]  # type: ignore[arg-type]
    kwargs |= {"is_open": True, "is_api_open": True, "allows_media": True}
    found = judge_open_settings(**kwargs)  # type: ignore[arg-type]
    assert severities(found) == ["warning"] * 3
    assert "0.0.0.0:4880" in found[1]["text"]


def test_the_ledger() -> None:
    assert judge_ledger("")["severity"] == "ok"
    assert judge_ledger("disk is full")["severity"] == "error"


@pytest.mark.parametrize(("free_mib", "severity"), [(10, "error"), (500, "warning"), (5000, "ok")])
def test_the_disk(free_mib: int, severity: str) -> None:
    assert judge_disk(free_mib << 20)["severity"] == severity


@pytest.mark.parametrize(
    ("used", "limit", "severity"),
    [
        (10, 65536, "ok"),
        (10, 1024, "info"),
        (10, 512, "warning"),
        (900, 1024, "warning"),
        (1000, 1024, "error"),
        (60_000, 65536, "warning"),
    ],
)
def test_open_files(used: int, limit: int, severity: str) -> None:
    assert judge_descriptors("p2pd", used, limit)["severity"] == severity


def test_health_conditions_that_no_check_covers_are_findings() -> None:
    assert severities(judge_conditions([])) == ["ok"]
    rows = [
        {"code": k.code, "title": k.title, "severity": str(k.severity), "text": "", "remedy": k.remedy}
        for k in CONDITION_KINDS
    ]
    found = judge_conditions(rows)
    text = " ".join(one["text"] for one in found)
    assert "backend_down: the backend does not answer" in text
    assert "p2pd_down" not in text
    assert {"error", "warning", "info"} == set(severities(found))
    assert all(one["remedy"] for one in found)
