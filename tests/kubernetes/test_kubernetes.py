"""The chart on a real cluster: by hand with `make test-kubernetes` (root; ten minutes the first time, then two)."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine.engine import running_engine  # tests/system/engine
from kubernetes_cluster import PAUSE_IMAGE, Cluster, ClusterError, running_cluster

from tests.harness.kube_tools import find_kube_tool

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "lloom-sidecar:0.1.0"
NAMESPACE = "lloom"
START_S = 180.0
BUILD_S = 1200.0
MODEL = "smollm2:135m"
VALUES = {
    "image": {"pullPolicy": "Never"},
    "validators": {"replicas": 2},
    "executors": [{"name": "small", "replicas": 2, "env": {"LLOOM_MODEL": "builtin"}, "graceSeconds": 30}],
    "gateway": {"enabled": True, "open": True, "replicas": 1},
}
ASK = f"""
import json, urllib.request as u
body = {{"model": "{MODEL}", "stream": True, "max_tokens": 8, "messages": [{{"role": "user", "content": "Hello"}}]}}
request = u.Request("URL/v1/chat/completions", json.dumps(body).encode(), {{"content-type": "application/json"}})
with u.urlopen(request, timeout=60) as answer:
    lines = [line.decode().strip() for line in answer if line.strip()]
    print(json.dumps({{"executor": answer.headers["x-lloom-executor"], "last": lines[-1], "count": len(lines)}}))
"""

pytestmark = [pytest.mark.root, pytest.mark.docker, pytest.mark.slow]


@pytest.fixture(scope="module")
def images() -> Iterator[Path]:
    """What the cluster runs, as a ``docker save`` archive."""
    with tempfile.TemporaryDirectory(prefix="lli-") as folder, running_engine() as engine:
        engine.run("compose", "build", "init", timeout_s=BUILD_S)
        engine.run("tag", "lloom-sidecar:local", IMAGE)
        pause = Path(folder) / "pause"
        pause.mkdir()
        source = ROOT / "tests" / "kubernetes" / "kubernetes_cluster" / "pause.c"
        subprocess.run(["gcc", "-static", "-Os", "-o", pause / "pause", source], check=True, timeout=60)
        packed = Path(folder) / "pause.tar"
        with tarfile.open(packed, "w") as tar:
            tar.add(pause / "pause", "pause")
        engine.run("import", "--change", 'ENTRYPOINT ["/pause"]', str(packed), PAUSE_IMAGE)
        archive = Path(folder) / "images.tar"
        engine.run("save", "-o", str(archive), IMAGE, PAUSE_IMAGE)
        yield archive


@pytest.fixture(scope="module")
def cluster(images: Path) -> Iterator[Cluster]:
    """A cluster with the chart installed, everything ready."""
    with running_cluster(images) as cluster:
        cluster.kubectl("create", "namespace", NAMESPACE)
        label = "pod-security.kubernetes.io/enforce=restricted"
        cluster.kubectl("label", "namespace", NAMESPACE, label)
        cluster.kubectl("apply", "-f", "-", given=json.dumps(volumes(cluster.folder, 2)))
        lloomctl = [
            sys.executable,
            "-m",
            "lloom_sidecar.cli.lloomctl",
            "network",
            "kubernetes",
            "--namespace",
            NAMESPACE,
        ]
        secrets = subprocess.run(lloomctl, capture_output=True, text=True, check=True, timeout=60).stdout
        cluster.kubectl("apply", "-f", "-", given=secrets)
        cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", given=render())
        try:
            for kind in ("statefulset/lloom-validator", "deployment/lloom-executor-small", "deployment/lloom-gateway"):
                cluster.kubectl(
                    "-n", NAMESPACE, "rollout", "status", kind, f"--timeout={START_S:.0f}s", timeout_s=START_S + 10
                )
        except ClusterError as exc:
            pytest.fail(f"{exc}\n{explain(cluster)}", pytrace=False)
        yield cluster


def explain(cluster: Cluster) -> str:
    """What the pods and their containers say."""
    told = [cluster.kubectl("-n", NAMESPACE, "get", "pods,events")]
    for pod in cluster.get("-n", NAMESPACE, "pods")["items"]:
        name = pod["metadata"]["name"]
        told.append(cluster.kubectl("-n", NAMESPACE, "logs", name, "--all-containers", "--tail=15"))
    return "\n".join(told)[-12_000:]


def render() -> str:
    """The chart as the cluster gets it."""
    return subprocess.run(
        [find_kube_tool("helm"), "template", "lloom", ROOT / "deploy/helm/lloom", "-n", NAMESPACE, "-f", "-"],
        input=json.dumps(VALUES),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def volumes(folder: Path, count: int) -> dict[str, Any]:
    """A volume for each validator: the cluster has no storage class."""
    items = []
    for number in range(count):
        path = folder / "volumes" / str(number)
        path.mkdir(parents=True)
        path.chmod(0o777)
        items.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"validator-{number}"},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "hostPath": {"path": str(path)},
                    "claimRef": {"namespace": NAMESPACE, "name": f"lloom-home-lloom-validator-{number}"},
                },
            }
        )
    return {"apiVersion": "v1", "kind": "List", "items": items}


def ask(cluster: Cluster, *pod: str, url: str = "http://127.0.0.1:4880") -> dict[str, Any]:
    """Ask for a streamed answer from inside a pod."""
    told = cluster.kubectl("-n", NAMESPACE, "exec", *pod, "--", "python3", "-c", ASK.replace("URL", url))
    found: dict[str, Any] = json.loads(told)
    return found


def test_a_streamed_answer_through_the_gateways_service(cluster: Cluster) -> None:
    def answered() -> dict[str, Any]:
        return ask(cluster, "lloom-validator-0", "-c", "lloom", url="http://lloom-gateway:4880")

    try:
        answer = cluster.wait(answered, "an answer", 60)
    except ClusterError as exc:
        pytest.fail(f"{exc}\n{explain(cluster)}", pytrace=False)
    assert answer["last"] == "data: [DONE]"
    assert answer["count"] > 1


def app(name: str, kind: str, command: list[str]) -> str:
    """Somebody's workload with the client component, through kustomize."""
    container = {
        "name": "app",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": command,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    spec: dict[str, Any] = {"template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}}
    if kind == "Job":
        spec["template"]["spec"]["restartPolicy"] = "Never"
        spec["backoffLimit"] = 0
    else:
        spec["selector"] = {"matchLabels": {"app": name}}
    version = "batch/v1" if kind == "Job" else "apps/v1"
    document = {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": {"lloom-sidecar": "client"}},
        "spec": spec,
    }
    with tempfile.TemporaryDirectory(dir=ROOT / "deploy" / "kustomize" / "examples") as folder:
        (Path(folder) / "app.yaml").write_text(json.dumps(document))
        kustomization = {"resources": ["app.yaml"], "components": ["../../client-sidecar"]}
        (Path(folder) / "kustomization.yaml").write_text(json.dumps(kustomization))
        return subprocess.run(
            [find_kube_tool("kubectl"), "kustomize", folder], capture_output=True, text=True, check=True, timeout=60
        ).stdout


def restarts(cluster: Cluster) -> dict[str, int]:
    """Of each container of the application's pod."""
    [pod] = cluster.get("-n", NAMESPACE, "pods", "-l", "app=app")["items"]
    status = pod["status"]
    return {
        one["name"]: one["restartCount"] for one in (*status["initContainerStatuses"], *status["containerStatuses"])
    }


def was_restarted(cluster: Cluster, container: str) -> bool:
    return restarts(cluster)[container] == 1


def test_an_application_with_its_own_sidecar(cluster: Cluster) -> None:
    """Killing its p2pd, then its sidecar, does not restart the application; it is answered again soon."""
    cluster.kubectl("-n", NAMESPACE, "apply", "-f", "-", given=app("app", "Deployment", ["sleep", "infinity"]))
    cluster.kubectl("-n", NAMESPACE, "rollout", "status", "deployment/app", f"--timeout={START_S:.0f}s", timeout_s=200)
    assert cluster.wait(lambda: ask(cluster, "deployment/app", "-c", "app"), "an answer", 60)["last"] == "data: [DONE]"
    for container in ("lloom-p2pd", "lloom"):
        code = "import os, signal; os.kill(1, signal.SIGTERM)"
        cluster.kubectl("-n", NAMESPACE, "exec", "deployment/app", "-c", container, "--", "python3", "-c", code)
        # An answer alone proves nothing: the old one may have given it before it ended.
        cluster.wait(partial(was_restarted, cluster, container), f"{container} to be started again", 60)
        cluster.wait(lambda: ask(cluster, "deployment/app", "-c", "app"), f"an answer after {container} ended", 60)
    assert restarts(cluster) == {"app": 0, "lloom-home": 0, "lloom-p2pd": 1, "lloom": 1}


def test_a_job_with_the_sidecar_completes(cluster: Cluster) -> None:
    code = ASK.replace("URL", "http://127.0.0.1:4880").replace("with u", "import time; time.sleep(5)\nwith u", 1)
    cluster.kubectl("-n", NAMESPACE, "apply", "-f", "-", given=app("job", "Job", ["python3", "-c", code]))
    cluster.kubectl("-n", NAMESPACE, "wait", "--for=condition=complete", "job/job", "--timeout=120s", timeout_s=130)
    assert '"last": "data: [DONE]"' in cluster.kubectl("-n", NAMESPACE, "logs", "job/job", "-c", "app")


def test_a_validators_pod_that_is_deleted_keeps_its_peer_id(cluster: Cluster) -> None:
    def peer() -> str:
        return cluster.kubectl(
            "-n", NAMESPACE, "exec", "lloom-validator-1", "-c", "lloom", "--", "lloomctl", "id"
        ).strip()

    before = peer()
    secret = cluster.get("-n", NAMESPACE, "secret", "lloom-network")
    assert before in base64.b64decode(secret["data"]["bootstrap"]).decode()
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", "lloom-validator-1", timeout_s=120)
    cluster.kubectl(
        "-n", NAMESPACE, "rollout", "status", "statefulset/lloom-validator", "--timeout=120s", timeout_s=130
    )
    assert peer() == before


def test_without_validators_application_pods_stay_ready(cluster: Cluster) -> None:
    cluster.kubectl("-n", NAMESPACE, "scale", "statefulset/lloom-validator", "--replicas=0")
    cluster.wait(
        lambda: not cluster.get("-n", NAMESPACE, "pods", "-l", "app.kubernetes.io/component=validator")["items"],
        "the validators to go",
        90,
    )
    assert ask(cluster, "deployment/app", "-c", "app")["last"] == "data: [DONE]"
    [pod] = cluster.get("-n", NAMESPACE, "pods", "-l", "app=app")["items"]
    conditions = {one["type"]: one["status"] for one in pod["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    cluster.kubectl("-n", NAMESPACE, "scale", "statefulset/lloom-validator", "--replicas=2")
    cluster.kubectl(
        "-n", NAMESPACE, "rollout", "status", "statefulset/lloom-validator", "--timeout=120s", timeout_s=130
    )


def test_the_disruption_budget_refuses_a_second_eviction(cluster: Cluster) -> None:
    def evict(number: int) -> str:
        name = f"lloom-validator-{number}"
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction"
        return cluster.kubectl("create", "--raw", path, "-f", "-", given=json.dumps(body))

    evict(0)
    with pytest.raises(ClusterError, match="disruption budget"):
        evict(1)


def test_a_rolling_update_of_the_executors_loses_no_answer(cluster: Cluster) -> None:
    cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/lloom-executor-small")
    answers = 0
    done = False
    while not done:
        assert ask(cluster, "deployment/app", "-c", "app")["last"] == "data: [DONE]"
        answers += 1
        status = cluster.get("-n", NAMESPACE, "deployment", "lloom-executor-small")["status"]
        done = status.get("updatedReplicas") == 2 and status.get("replicas") == 2 and status.get("readyReplicas") == 2
    print(f"{answers} answers during the update")
    assert answers > 1
