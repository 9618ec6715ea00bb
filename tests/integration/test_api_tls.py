"""The API by TLS on a real node: an ordinary client, a renewal under way, refused starts."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.harness import Network
from tests.harness.waiting import wait_until

AUTHORITY = trustme.CA()


def write(folder: Path, name: str) -> None:
    leaf = AUTHORITY.issue_cert("127.0.0.1", common_name=name)
    (folder / "tls.key").touch(mode=0o600)
    (folder / "tls.key").write_bytes(leaf.private_key_pem.bytes())
    (folder / "tls.crt").write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    write(folder, "first")
    with Network(validators=1, executors=1, clients=0) as network:
        flags = ["--api-tls-cert-file", str(folder / "tls.crt"), "--api-tls-key-file", str(folder / "tls.key")]
        network.clients.append(network.add("client", *flags))
        network.wait_known(network.client)
        yield network, folder


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


def shown_name(url: str) -> str:
    with httpx.Client(verify=trusting()) as client, client.stream("GET", url + "/v1/models") as answer:
        found = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
    return str(dict(part[0] for part in found["subject"])["commonName"])


def test_an_answer_streams_by_https_only(served: tuple[Network, Path]) -> None:
    url = served[0].client.status()["api"]["address"]
    assert url is not None
    assert url.startswith("https://")
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "chunks=5"}]}
    with httpx.Client(verify=trusting(), timeout=30) as client:
        body["model"] = client.get(url + "/v1/models").json()["data"][0]["id"]
        with client.stream("POST", url + "/v1/chat/completions", json=body) as answer:
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    authority = served[1] / "authority.crt"
    AUTHORITY.cert_pem.write_to_path(str(authority))
    done = served[0].client.ctl("chat", "-q", "chunks=3", "--ca-file", str(authority))
    assert done.returncode == 0, done.stderr
    assert "receipt verified" in done.stderr
    assert served[0].client.ctl("chat", "-q", "chunks=3").returncode == 1
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https:", "http:") + "/v1/models")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url + "/v1/models")


def test_a_renewed_certificate_is_used_without_a_restart(served: tuple[Network, Path]) -> None:
    network, folder = served
    url = str(network.client.status()["api"]["address"])
    pid = network.client.process.pid if network.client.process else None
    write(folder, "second")
    wait_until(lambda: shown_name(url) == "second", "the renewed certificate")
    (folder / "tls.crt").write_text("broken")
    wait_until(lambda: "certificate" in network.client.conditions(), "the fault to be told")
    assert shown_name(url) == "second"
    write(folder, "third")
    wait_until(lambda: shown_name(url) == "third", "the repaired certificate")
    # A certificate of trustme lives for long, so nothing is left to be said.
    wait_until(lambda: "certificate" not in network.client.conditions(), "the condition to end")
    assert network.client.process is not None
    assert network.client.process.pid == pid


def test_a_node_whose_pair_does_not_fit_does_not_start(served: tuple[Network, Path], tmp_path: Path) -> None:
    network, folder = served
    (tmp_path / "tls.key").touch(mode=0o600)
    (tmp_path / "tls.key").write_bytes(AUTHORITY.issue_cert("127.0.0.1").private_key_pem.bytes())
    flags = ["--api-tls-cert-file", str(folder / "tls.crt"), "--api-tls-key-file", str(tmp_path / "tls.key")]
    node = network.add("client", *flags, start=False).start(wait=False)
    assert node.process is not None
    assert node.process.wait(30) != 0
    assert "is not the key of the certificate" in node.log_tail()
    assert "Traceback" not in node.log_tail()
