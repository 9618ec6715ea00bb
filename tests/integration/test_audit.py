"""A validator's audit between real nodes: one executor serves something else under a model's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trio

from lloom_sidecar.identity import init_home, load_network_keys
from lloom_sidecar.protocol.claims import seal_receipt
from lloom_sidecar.protocol.evidence import CanaryAnswer, CanaryRound, Evidence, seal_evidence
from lloom_sidecar.protocol.hello import HelloDone
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer, now_ms
from tests.harness.waiting import wait_until

FOUND_S = 60.0
"""Three questions a second apart, and gossip; a busy machine needs some of that."""


@dataclass(frozen=True)
class Audited:
    network: Network
    auditor: Node
    believer: Node
    """A client that has the auditor configured."""
    avoider: Node
    """The same, with --avoid-doubted."""
    stranger: Node
    """A client that knows only the other validator."""

    @property
    def liar(self) -> str:
        return self.network.executors[0].peer

    @property
    def honest(self) -> list[str]:
        return [node.peer for node in self.network.executors[1:]]


@pytest.fixture(scope="module")
def audited() -> Iterator[Audited]:
    with Network(validators=1, executors=4, clients=1) as network:
        network.backends[0].set_script(tag=7)
        auditor = network.add("validator", "--audit", "--audit-interval", "1")
        network.validators.append(auditor)
        believer, avoider = network.add("client"), network.add("client", "--avoid-doubted")
        for client in (believer, avoider):
            network.wait_known(client)
        audited = Audited(network, auditor, believer, avoider, network.client)
        for client in (believer, avoider):
            wait_until(
                lambda client=client: client.executors()[audited.liar]["trust"] < 1,  # type: ignore[misc]
                "the liar to be doubted",
                timeout_s=FOUND_S,
                explain=network.logs,
            )
        yield audited


def test_the_liar_is_doubted_and_nobody_else(audited: Audited) -> None:
    for node in (audited.auditor, audited.believer, audited.avoider):
        executors = node.executors()
        assert executors[audited.liar]["trust"] == pytest.approx(0.5, abs=0.1)  # no digest is announced here
        assert "audit of scripted" in executors[audited.liar]["doubts"][0]
        assert {executors[peer]["trust"] for peer in audited.honest} == {1.0}
        wait_until(
            lambda node=node: "executor_doubted" in node.conditions(),  # type: ignore[misc]
            "the health condition",
            timeout_s=15,
        )
    shown = audited.believer.ctl("executor", "show", audited.liar)
    assert shown.returncode == 0
    assert "audit of scripted by" in shown.stdout


def test_who_did_not_configure_that_validator_does_not_listen_to_it(audited: Audited) -> None:
    dropped = wait_until(
        lambda: audited.stranger.metric("lloom_statuses_dropped_total", reason="validator"),
        "evidence to be dropped",
        timeout_s=90,
    )
    assert dropped >= 1
    assert audited.stranger.executors()[audited.liar]["trust"] == 1.0


def test_the_executors_were_asked_what_anybody_asks(audited: Audited) -> None:
    for backend in audited.network.backends:
        body = backend.requests()[0]["body"]
        assert body["temperature"] == 0
        assert set(body) <= {"model", "messages", "temperature", "seed", "max_tokens", "stream", "stream_options"}


def test_a_client_that_avoids_it_sends_it_nothing(audited: Audited) -> None:
    used = set()
    for _ in range(24):
        answer = audited.avoider.chat("chunks=1")
        assert answer.status_code == 200, answer.text
        used.add(answer.headers["x-lloom-executor"])
    assert audited.liar not in used
    assert used <= set(audited.honest)
    pinned = audited.avoider.post(
        "/v1/chat/completions",
        {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]},
        headers={"x-lloom-pin-executor": audited.liar},
    )
    assert pinned.status_code == 503
    assert "doubted" in pinned.json()["error"]["message"]


@pytest.fixture
def hand() -> Iterator[HandPeer]:
    with HandPeer() as peer:
        yield peer


async def test_evidence_of_a_member_that_is_no_validator_counts_nowhere(audited: Audited, hand: HandPeer) -> None:
    """Everything in it is signed by those who are named; only its author is nobody's validator."""
    network = audited.network
    key = load_network_keys(network.key_file).current
    rounds = []
    for number in range(2):
        answers = []
        for index, node in enumerate(network.executors[1:4]):
            signer = init_home(node.home)[0]
            claims = pb.ReceiptClaims(
                client=hand.peer.raw, executor=signer.peer.raw, model="scripted", ended_at_ms=now_ms() + number
            )
            receipt = seal_receipt(claims, signer)
            answers.append(CanaryAnswer(signer.peer, receipt, os.urandom(32), index != 0))
        rounds.append(CanaryRound(os.urandom(32), tuple(answers)))
    victim = answers[0].executor
    evidence = Evidence(victim, "scripted", b"", tuple(rounds))

    def dropped() -> float:
        return audited.believer.metric("lloom_statuses_dropped_total", reason="validator")

    before = await trio.to_thread.run_sync(dropped)
    async with hand.daemon(audited.believer) as daemon:
        assert isinstance(await hand.say_hello(daemon, audited.believer, [key]), HelloDone)
        async with daemon.subscribe(TOPIC_NETWORK):
            with trio.fail_after(60):
                while await trio.to_thread.run_sync(dropped) == before:
                    sealed = seal_evidence(
                        signer=hand.signer,
                        key=key,
                        sequence=now_ms(),
                        issued_at_ms=now_ms(),
                        ttl_s=900,
                        evidence=evidence,
                    )
                    await daemon.publish(TOPIC_NETWORK, sealed)
                    await trio.sleep(2.5)
    executors = await trio.to_thread.run_sync(audited.believer.executors)
    assert executors[str(victim)]["trust"] == 1.0
