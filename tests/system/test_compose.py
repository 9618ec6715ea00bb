"""docker-compose.yml on a real engine: it builds, gets healthy, answers on the published port, and goes without trace.

The engine's networks have no way out, so an answer also proves that the containers need no downloads.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import trio
from engine.engine import Engine, EngineError, running_engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # imports of the SDK's own dependencies
    import docker

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

NODES = ("validator", "executor-1", "executor-2", "client")
P2PDS = tuple(f"{node}-p2pd" for node in NODES)
PROJECT = "lloom"
LABEL = f"com.docker.compose.project={PROJECT}"
MODEL = "smollm2:135m"

BUILD_TIMEOUT_S = 900
"""From nothing, on two busy cores: Go's modules are fetched and compiled."""

FIRST_ANSWER_TIMEOUT_S = 60
"""From healthy to the first answer: the client has yet to meet the executor."""


@dataclass(frozen=True)
class Compose:
    """The project of docker-compose.yml, up."""

    engine: Engine
    sdk: docker.DockerClient
    api: str
    """Base URL of the published API."""

    def run(self, *arguments: str, timeout_s: float = 180) -> str:
        """Run ``docker compose``."""
        return self.engine.run("compose", *arguments, timeout_s=timeout_s)

    def peer_ids(self) -> dict[str, str]:
        """Ask each node's home who it is."""
        return {node: self.run("exec", "-T", node, "lloomctl", "id").strip() for node in NODES}

    def inspect(self) -> dict[str, dict[str, Any]]:
        """Return the engine's own description of each container."""
        containers = self.sdk.containers.list(all=True, filters={"label": LABEL})
        return {c.labels["com.docker.compose.service"]: c.attrs for c in containers}

    def leftovers(self) -> list[str]:
        """Return whatever of the project the engine still has."""
        containers = [f"container {c.name}" for c in self.sdk.containers.list(all=True, filters={"label": LABEL})]
        volumes = [f"volume {v.name}" for v in self.sdk.volumes.list()]
        networks = [f"network {n.name}" for n in self.sdk.networks.list() if n.name not in ("bridge", "host", "none")]
        return containers + volumes + networks


def free_api_port() -> int:
    """Return the default port, or another one when something on this machine has it."""
    for wanted in (4880, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port
    raise AssertionError("no free port on 127.0.0.1")


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    """The network of docker-compose.yml, built from the checkout and waited for."""
    with pytest.MonkeyPatch.context() as patch, running_engine() as engine:
        port = free_api_port()
        for name in [name for name in os.environ if name.startswith("LLOOM_")]:
            patch.delenv(name)
        patch.setenv("LLOOM_API_PORT", str(port))
        patch.setenv("LLOOM_PAGE_PORT", "0")
        sdk = docker.DockerClient(base_url=engine.host, timeout=60)
        project = Compose(engine, sdk, f"http://127.0.0.1:{port}")
        try:
            try:
                project.run("up", "--build", "--wait", "--wait-timeout", "180", timeout_s=BUILD_TIMEOUT_S)
            except EngineError as exc:
                logs = engine.run("compose", "logs", "--no-color", "--tail", "40", check=False)
                pytest.fail(f"docker compose up: {exc}\n{logs[-8000:]}", pytrace=False)
            yield project
        finally:
            engine.run("compose", "down", "-v", "--remove-orphans", check=False)
            sdk.close()


def test_every_node_is_healthy_and_the_one_shot_ended_well(compose: Compose) -> None:
    rows = [json.loads(line) for line in compose.run("ps", "--all", "--format", "json").splitlines()]
    states = {row["Service"]: (row["State"], row["Health"], row["ExitCode"]) for row in rows}
    assert states == {"init": ("exited", "", 0)} | dict.fromkeys((*NODES, *P2PDS), ("running", "healthy", 0))


async def ask(client: httpx.AsyncClient, url: str) -> tuple[httpx.Response, list[str]]:
    """Ask for a short streamed answer; return the response and its non-empty lines."""
    question = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": True,
        "max_tokens": 16,
    }
    async with client.stream("POST", f"{url}/v1/chat/completions", json=question) as response:
        return response, [line async for line in response.aiter_lines() if line]


async def test_a_streamed_answer_comes_through_the_published_port(compose: Compose) -> None:
    # No key and no proxy: as curl on the host would ask.
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        with trio.fail_after(FIRST_ANSWER_TIMEOUT_S):
            response, lines = await ask(client, compose.api)
            while response.status_code == 503:  # the executor is not known yet
                await trio.sleep(min(float(response.headers.get("retry-after", 1)), 2))
                response, lines = await ask(client, compose.api)
    assert response.status_code == 200, lines
    assert response.headers["content-type"].startswith("text/event-stream")
    peers = compose.peer_ids()
    assert response.headers["x-lloom-executor"] in (peers["executor-1"], peers["executor-2"])
    assert all(line.startswith(("data: ", ":")) for line in lines), lines  # a colon starts a comment: keep-alive
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item) for item in data[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices)
    assert choices[-1]["finish_reason"] in ("stop", "length")


def test_containers_are_confined(compose: Compose) -> None:
    for service, container in compose.inspect().items():
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert not host["Privileged"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert container["Config"]["User"] == "10001:10001", service


def test_only_the_api_is_published_and_only_to_this_machine(compose: Compose) -> None:
    published = {
        (service, inside, binding["HostIp"])
        for service, container in compose.inspect().items()
        for inside, bindings in container["NetworkSettings"]["Ports"].items()
        for binding in bindings or ()
    }
    assert published == {("client", "4880/tcp", "127.0.0.1"), ("client", "4882/tcp", "127.0.0.1")}


async def test_the_pages_are_published_too(compose: Compose) -> None:
    where = compose.run("port", "client", "4882").strip()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        snapshot = (await client.get(f"http://{where}/snapshot.json")).json()
        assert {"executor", "validator"} <= {role for peer in snapshot["peers"] for role in peer["roles"]}
        assert (await client.get(f"{compose.api}/chat")).status_code == 200


def test_homes_are_private_and_p2pd_sees_none(compose: Compose) -> None:
    """The container that talks to strangers has the identity and the sockets of its node, no key of the network."""
    volumes = {
        service: {m["Name"].removeprefix(f"{PROJECT}_") for m in c["Mounts"] if m["Type"] == "volume"}
        for service, c in compose.inspect().items()
        if service != "init"
    }
    assert volumes == {node: {node, f"{node}-run"} for node in NODES} | {
        f"{node}-p2pd": {f"{node}-run"} for node in NODES
    }
    for node in NODES:
        modes = compose.run("exec", "-T", node, "stat", "-c", "%a %u", ".", "identity.key", "network.key")
        assert modes.splitlines() == ["700 10001", "600 10001", "600 10001"], node


def test_another_up_keeps_identities_and_network(compose: Compose) -> None:
    before = compose.peer_ids()
    assert len(set(before.values())) == len(NODES)
    compose.run("up", "--wait", "--wait-timeout", "120", "--force-recreate", timeout_s=180)
    assert compose.peer_ids() == before


async def test_each_process_that_is_killed_comes_back_and_answers_go_on(compose: Compose) -> None:
    """The engine starts a container again whose process died; the node finds its p2pd again, or p2pd its node."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        for service in (*P2PDS, *NODES):
            container = compose.sdk.containers.get(compose.inspect()[service]["Id"])
            os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
            with trio.fail_after(FIRST_ANSWER_TIMEOUT_S):
                while not await is_answered(client, compose.api):
                    await trio.sleep(0.25)
        with trio.fail_after(FIRST_ANSWER_TIMEOUT_S):
            while set(states(compose).values()) != {"healthy"}:
                await trio.sleep(0.5)


async def is_answered(client: httpx.AsyncClient, url: str) -> bool:
    """Ask once; the client's own container may be the one that is away."""
    try:
        response, lines = await ask(client, url)
    except httpx.TransportError:
        return False
    return response.status_code == 200 and lines[-1] == "data: [DONE]"


def states(compose: Compose) -> dict[str, str]:
    """The health of each container that stays."""
    shown = compose.inspect()
    return {service: shown[service]["State"].get("Health", {}).get("Status", "") for service in (*NODES, *P2PDS)}


def test_down_leaves_nothing(compose: Compose) -> None:
    assert compose.leftovers()
    compose.run("down", "-v")
    assert compose.leftovers() == []
