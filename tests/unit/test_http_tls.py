"""Certificates from files: what is refused, and how a renewal comes into use."""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path

import pytest
import trustme

from lloom_sidecar.http.errors import CertificateError
from lloom_sidecar.http.tls import ServerCertificate

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Files:
    """A certificate and its key on disk."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"

    def write(self, name: str = "localhost", *, ends: datetime.datetime = NOW + DAY) -> trustme.LeafCert:
        leaf = self.authority.issue_cert(name, not_before=NOW - 30 * DAY, not_after=ends)
        self.write_key(leaf)
        self.cert.write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))
        return leaf

    def write_key(self, leaf: trustme.LeafCert) -> None:
        self.key.write_bytes(leaf.private_key_pem.bytes())
        self.key.chmod(0o600)

    def load(self) -> ServerCertificate:
        return ServerCertificate(self.cert, self.key)

    def served_name(self, served: ServerCertificate) -> str:
        """The name in the certificate that a new connection is shown."""
        client = ssl.create_default_context()
        self.authority.configure_trust(client)
        client.check_hostname = False
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ours = client.wrap_bio(to_client, to_server)
        theirs = served.context.wrap_bio(to_server, to_client, server_side=True)
        for side in (ours, theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        found = ours.getpeercert()
        assert found is not None
        return str(found["subjectAltName"][0][1])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_pair_is_served_and_its_end_known(files: Files) -> None:
    files.write()
    served = files.load()
    assert files.served_name(served) == "localhost"
    assert abs(served.ends_at_s - (NOW + DAY).timestamp()) < 2
    assert served.reload_if_changed() is False


def test_what_cannot_be_served_is_said(files: Files) -> None:
    with pytest.raises(CertificateError, match=r"the certificate .*tls\.crt cannot be read: no such file"):
        files.load()
    files.write()
    files.key.unlink()
    with pytest.raises(CertificateError, match=r"the key .*tls\.key cannot be read: no such file"):
        files.load()
    files.write_key(files.authority.issue_cert("localhost"))
    with pytest.raises(CertificateError, match="is not the key of the certificate"):
        files.load()
    files.write()
    files.key.chmod(0o644)
    with pytest.raises(CertificateError, match=r"open to every user of this machine: `chmod o= "):
        files.load()
    files.key.chmod(0o440)
    files.load()
    files.cert.write_text("no certificate")
    with pytest.raises(CertificateError, match="are no certificate and unencrypted key in PEM form"):
        files.load()
    files.write(ends=NOW - DAY)
    with pytest.raises(CertificateError, match="would be refused by every client: certificate has expired"):
        files.load()


def test_an_encrypted_key_is_refused_and_nobody_asked_for_its_password(files: Files) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    leaf = files.write()
    key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
    sealed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    files.key.write_bytes(sealed)
    with pytest.raises(CertificateError, match="unencrypted key in PEM form"):
        files.load()


def test_a_renewal_is_taken_into_use(files: Files) -> None:
    files.write("before.example")
    served = files.load()
    context = served.context
    files.write("after.example", ends=NOW + 9 * DAY)
    assert served.reload_if_changed() is True
    assert served.reload_if_changed() is False
    assert served.context is context
    assert files.served_name(served) == "after.example"
    assert abs(served.ends_at_s - (NOW + 9 * DAY).timestamp()) < 2


def test_a_faulty_renewal_leaves_the_old_pair_in_use(files: Files) -> None:
    files.write("before.example")
    served = files.load()
    ends_at_s = served.ends_at_s
    files.write_key(files.authority.issue_cert("other.example"))
    with pytest.raises(CertificateError, match="is not the key"):
        served.reload_if_changed()
    assert served.reload_if_changed() is False  # said once
    assert files.served_name(served) == "before.example"
    files.key.unlink()
    with pytest.raises(CertificateError, match="cannot be read"):
        served.reload_if_changed()
    assert served.ends_at_s == ends_at_s
    files.write("after.example")
    assert served.reload_if_changed() is True
    assert files.served_name(served) == "after.example"


def test_the_exchange_of_a_link_above_the_files_is_seen(files: Files, tmp_path: Path) -> None:
    # As Kubernetes exchanges the contents of a mounted secret.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.cert, files.key = tmp_path / name / "tls.crt", tmp_path / name / "tls.key"
        files.write(f"{name}.example")
    data = tmp_path / "data"
    data.symlink_to(tmp_path / "one")
    served = ServerCertificate(data / "tls.crt", data / "tls.key")
    (tmp_path / "new").symlink_to(tmp_path / "two")
    os.rename(tmp_path / "new", data)
    assert served.reload_if_changed() is True
    assert files.served_name(served) == "two.example"
