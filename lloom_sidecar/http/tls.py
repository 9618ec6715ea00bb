"""A server's certificate and key from files, exchanged under a running server when the files change."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Final

from lloom_sidecar.http.errors import CertificateError

READABLE_BY_OTHERS: Final = 0o007
"""Group is let in: Kubernetes mounts a secret for a pod's fsGroup as 0440."""


class ServerCertificate:
    """A certificate with its chain, its key, and the context that serves them.

    ``context`` stays one object: what ``reload_if_changed`` loads into it holds for connections made from then on.
    """

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        """Read both. Raises CertificateError, a sentence, when they cannot be used."""
        self._cert_file = cert_file
        self._key_file = key_file
        self._seen = self._stamp()
        self.ends_at_s = _checked(cert_file, key_file)
        """When the certificate ends, in seconds since 1970."""
        self.context = _context()
        self.context.load_cert_chain(cert_file, key_file, _no_password)

    def reload_if_changed(self) -> bool:
        """Load the files if they are not those that were read last; whether they were.

        Raises CertificateError, once for each change, when the new ones cannot be used: the old ones stay in use.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        # In contexts of their own first: half a pair must never reach the one that serves.
        self.ends_at_s = _checked(self._cert_file, self._key_file)
        self.context.load_cert_chain(self._cert_file, self._key_file, _no_password)
        return True

    def _stamp(self) -> tuple[object, ...]:
        # Follows links: cert-manager's renewals in Kubernetes exchange the link of a folder above the files.
        found: list[object] = []
        for path in (self._cert_file, self._key_file):
            try:
                status = os.stat(path)
            except OSError as exc:
                found.append(exc.errno)
            else:
                found += [status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode]
        return tuple(found)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    # Without it OpenSSL would ask on the terminal, and wait.
    return ""


def _checked(cert_file: Path, key_file: Path) -> float:
    """When the certificate ends; CertificateError when the pair cannot be used."""
    for path, what in ((cert_file, "certificate"), (key_file, "key")):
        try:
            path.open("rb").close()
        except OSError as exc:
            raise CertificateError(f"the {what} {path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
    if os.stat(key_file).st_mode & READABLE_BY_OTHERS:
        raise CertificateError(
            f"the key {key_file} is open to every user of this machine: `chmod o= {key_file}` (in Kubernetes: "
            "defaultMode 0440)"
        )
    server = _context()
    try:
        server.load_cert_chain(cert_file, key_file, _no_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(
                f"the key {key_file} is not the key of the certificate {cert_file}: give the pair, with the server's "
                "own certificate before those of its authorities"
            ) from exc
        raise CertificateError(
            f"{cert_file} and {key_file} are no certificate and unencrypted key in PEM form ({exc.reason or exc})"
        ) from exc
    return _end_of(server, cert_file)


def _end_of(server: ssl.SSLContext, cert_file: Path) -> float:
    """A handshake in memory with a client that trusts just this certificate: it tells what real clients would object to
    besides their lack of trust, and the dates, which the ssl module does not tell about a file.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert_file)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs, ours):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as exc:
            raise CertificateError(
                f"the certificate {cert_file} would be refused by every client: {exc.verify_message}"
            ) from exc
        except ssl.SSLError as exc:
            raise CertificateError(f"the certificate {cert_file} cannot be used: {exc.reason or exc}") from exc
    found = ours.getpeercert()
    assert found is not None
    return float(ssl.cert_time_to_seconds(str(found["notAfter"])))
