"""The chart and the kustomize component: rendered by the real programs, held against Kubernetes' own schemas."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from lloom_sidecar import __version__
from tests.harness.kube_tools import find_kube_tool

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "lloom"
KUBERNETES = "1.34"
EXECUTOR = {"name": "small", "replicas": 2, "env": {"LLOOM_MODEL": "builtin"}}
OLLAMA = {
    "name": "ollama",
    "env": {"LLOOM_BACKEND": "http://127.0.0.1:11434/v1"},
    "backend": {"image": "ollama/ollama:latest", "ports": [{"containerPort": 11434}]},
}
ALL: dict[str, Any] = {
    "executors": [EXECUTOR, OLLAMA],
    "gateway": {"enabled": True, "apiKeySecret": "keys"},
    "networkPolicy": {"enabled": True},
    "validators": {"antiAffinity": "required", "storage": {"storageClassName": "fast"}},
    "imagePullSecrets": [{"name": "registry"}],
}


def helm(*args: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """``values`` go in as a file on standard input: JSON is YAML."""
    return subprocess.run(
        [find_kube_tool("helm"), *args, "--values", "-"],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def render(values: dict[str, Any] | None = None, chart: Path = CHART) -> list[dict[str, Any]]:
    done = helm("template", "lloom", str(chart), "--namespace", "ns", values=values)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for one in documents:
        if one["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "everything"])
def test_every_document_fits_the_schema(values: dict[str, Any]) -> None:
    documents = render(values)
    assert documents
    for one in documents:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    assert helm("lint", "--strict", str(CHART), values=values).returncode == 0


@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "everything"])
def test_pods_meet_the_restricted_standard(values: dict[str, Any]) -> None:
    """Source: Kubernetes' Pod Security Standards, restricted."""
    for name, pod in pods(render(values)):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, (name, container["name"])
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
        kinds = {key for volume in pod["volumes"] for key in volume if key != "name"}
        assert kinds <= {"emptyDir", "secret"}


def test_p2pd_starts_before_the_node_and_both_share_the_socket_alone() -> None:
    for name, pod in pods(render(ALL)):
        names = [one["name"] for one in containers(pod)]
        assert names[:2] == ["lloom-home", "lloom-p2pd"], name
        p2pd, node = (next(one for one in containers(pod) if one["name"] == which) for which in ("lloom-p2pd", "lloom"))
        assert p2pd["restartPolicy"] == "Always"
        # p2pd talks to strangers: it sees the sockets and its identity, not the network key or the ledger.
        assert p2pd["volumeMounts"] == [{"name": "lloom-run", "mountPath": "/run/lloom"}]
        assert p2pd["volumeMounts"][0] in node["volumeMounts"]
        settings = {one["name"]: one["value"] for one in node["env"]}
        assert (
            settings["LLOOM_P2PD_CONTROL"] == {one["name"]: one["value"] for one in p2pd["env"]}["LLOOM_P2PD_CONTROL"]
        )
        assert not any("preStop" in one.get("lifecycle", {}) for one in containers(pod))


def test_the_backend_outlives_the_drain() -> None:
    pod = dict(pods(render(ALL)))["lloom-executor-ollama"]
    backend = pod["initContainers"][-1]
    assert (backend["name"], backend["restartPolicy"]) == ("backend", "Always")
    assert [one["name"] for one in pod["containers"]] == ["lloom"]
    settings = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(settings["LLOOM_GRACE_S"])


def test_a_gateway_without_a_key_must_be_wanted() -> None:
    done = helm("template", "lloom", str(CHART), values={"gateway": {"enabled": True}})
    assert done.returncode != 0
    assert "gateway.apiKeySecret" in done.stderr
    pod = dict(pods(render({"gateway": {"enabled": True, "open": True}})))["lloom-gateway"]
    settings = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    assert settings["LLOOM_API_OPEN"] == "true"
    assert "lloom-gateway.ns.svc" in settings["LLOOM_ALLOWED_HOSTS"]


@pytest.mark.parametrize(
    "values",
    [
        {"nonsense": 1},
        {"validators": {"replicas": "two"}},
        {"executors": [{"replicas": 1}]},
        {"executors": [{"name": "Not_A_Name"}]},
        {"executors": [{"name": "a", "env": {"lower": "case"}}]},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    done = helm("template", "lloom", str(CHART), values=values)
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


def test_the_alerts_are_those_of_the_rule_file() -> None:
    rules = {"monitoring": {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}}
    kinds = {one["kind"]: one for one in render(rules)}
    assert kinds["PodMonitor"]["spec"]["podMetricsEndpoints"] == [{"port": "metrics", "interval": "30s"}]
    assert kinds["PrometheusRule"]["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "lloom.rules.yaml").read_text())


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def kustomize(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [find_kube_tool("kubectl"), "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_the_component_adds_what_the_named_templates_do(tmp_path: Path) -> None:
    """Two ways to the same pod: a chart that includes ours, and kustomize on somebody's Deployment."""
    documents = kustomize(DEPLOY / "kustomize" / "examples" / "app")
    for one in documents:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    [(_, added)] = pods(documents)

    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "lloom").symlink_to(CHART)
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: app\nversion: 1.0.0\n")
    (tmp_path / "templates" / "app.yaml").write_text(
        """
apiVersion: apps/v1
kind: Deployment
metadata: {name: app}
spec:
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}}
    spec:
      initContainers: {{- include "lloom.client.initContainers" .Subcharts.lloom | nindent 8 }}
      containers: [{name: app, image: app}]
      volumes: {{- include "lloom.client.volumes" .Subcharts.lloom | nindent 8 }}
"""
    )
    values = {"lloom": {"validators": {"replicas": 0}}}
    rendered = dict(pods(render(values, tmp_path)))["app"]
    # An application's pod has its own security context: the component says on each container what the chart says once.
    per_pod = {
        "runAsGroup": 10001,
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in rendered["initContainers"]:
        container["securityContext"] |= per_pod
    assert added["initContainers"] == rendered["initContainers"]
    assert added["volumes"] == rendered["volumes"]
