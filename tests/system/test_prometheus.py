"""A real Prometheus scrapes a real network: every panel of the dashboard has data, every alert is evaluated."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.harness import Network
from tests.harness.network import free_port
from tests.harness.waiting import wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "lloom.rules.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "lloom.json").read_text())
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
SEED = {
    "lloom_connected_peers",
    "lloom_messages_sent_total",
    "lloom_messages_received_total",
    "lloom_discovery_latency_seconds_count",
    "lloom_request_duration_seconds_count",
}
"""The five metrics that the project began with."""


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"this test needs {name}: apt-get install prometheus")
    return path


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=query, trust_env=False, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found

    def is_up(self, nodes: int) -> bool:
        try:
            # While it loads its storage it answers everything with 503.
            is_ready = httpx.get(f"{self.url}/-/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
        return is_ready and len(self.query("lloom_build_info")) == nodes


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes a validator, two executors and a client each second, after they have had something to do."""
    folder = tmp_path_factory.mktemp("prometheus")
    with Network(validators=1, executors=0, clients=0) as network:
        ports = [free_port() for _ in range(3)]
        for role, port in zip(("executor", "executor", "client"), ports, strict=True):
            node = network.add(role, "--probe", f"127.0.0.1:{port}")
            (network.executors if role == "executor" else network.clients).append(node)
        network.wait_known(network.client)
        jobs = {"job_name": "lloom", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [jobs],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            wait_until(
                lambda: found.is_up(len(ports)),
                "Prometheus to have scraped every node",
                timeout_s=30,
                explain=lambda: (folder / "log").read_text()[-2000:],
            )
            for prompt in ("chunks=5", "status=500", "chunks=2", "chunks=3"):
                network.client.chat(prompt)
            yield found
        finally:
            running.terminate()
            running.wait(20)


def test_the_rules_are_sound() -> None:
    for arguments in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.with_suffix(".test.yaml"))]):
        done = subprocess.run(
            [program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tested = RULES.with_suffix(".test.yaml").read_text()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert tested.count(rule["alert"]) >= 2, f"{rule['alert']} is not tested both ways"
            assert rule["annotations"]["remedy"]


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_every_panel_has_data(prometheus: Prometheus, title: str, expression: str) -> None:
    asked = expression.replace("$__rate_interval", "30s").replace("$instance", ".*").replace("$job", "lloom")
    assert "$" not in asked, title
    wait_until(lambda: bool(prometheus.query(asked)), f"data for {title}", timeout_s=20)


def test_every_metric_that_is_used_exists(prometheus: Prometheus) -> None:
    targets = prometheus.get("targets")["activeTargets"]
    text = "".join(httpx.get(target["scrapeUrl"], trust_env=False).text for target in targets)
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    used = set(re.findall(r"\b(?:lloom|process)_\w+", RULES.read_text() + " ".join(one for _, one in EXPRESSIONS)))
    used -= {"lloom_total"}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in used} <= families
    names = set(prometheus.get("label/__name__/values"))
    assert names >= SEED


def test_every_alert_is_evaluated(prometheus: Prometheus) -> None:
    def rules() -> list[Any]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: bool(rules()) and all(one["health"] == "ok" for one in rules()), "the rules", timeout_s=20)
    firing = [one["name"] for one in rules() if one["state"] == "firing"]
    assert firing == []


def test_labels_are_bounded(prometheus: Prometheus) -> None:
    names = set(prometheus.get("labels"))
    assert not names & {"peer", "session", "request_id", "model", "addr"}, (
        "a label for each peer or request grows for ever"
    )
