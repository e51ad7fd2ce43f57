"""Where the API server is and how it knows us, as values; what others renew on disk is read each time it is used.

Kubelet replaces a service account's token about every hour; client certificates and authorities are renewed too.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.errors import ConfigError
from nodeagent.kube.apiserver.exec_plugin import Plugin

Pem = Path | bytes
"""Read at each use, or the text itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to reach one API server. Secrets are not in its repr."""

    source: str
    """What it was read from."""
    host: str
    port: int
    path: str = ""
    """Before every request's path, without a slash at its end."""
    tls: bool = True
    server_name: str = ""
    """What the server's certificate must be for; "": the host."""
    insecure: bool = False
    """The server's certificate is not checked."""
    ca: Pem | None = None
    """None: the system's."""
    certificate: tuple[Pem, Pem] | None = field(default=None, repr=False)
    """Client certificate and key."""
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    plugin: Plugin | None = None

    @property
    def authority(self) -> str:
        """host:port, as messages and the Host header show it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def bearer(access: Access) -> str:
    """The token as it is at this moment, "" where there is none; ConfigError where its file cannot be read."""
    if access.token_file is None:
        return access.token
    try:
        text = access.token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read token {access.token_file}: {_why(error)}") from None
    if not text or not text.isprintable() or " " in text:
        raise ConfigError(f"cannot read token {access.token_file}: {'it is empty' if not text else 'not one word'}")
    return text


def tls_context(access: Access, certificate: tuple[Pem, Pem] | None = None) -> ssl.SSLContext | None:
    """For one connection, from the files as they are now; None without TLS. ConfigError with the file and the cause."""
    if not access.tls:
        return None
    context = _trusting(access.ca)
    _verify_as_go_does(context)
    if access.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _identify(context, certificate or access.certificate)
    return context


def _trusting(ca: Pem | None) -> ssl.SSLContext:
    try:
        if isinstance(ca, Path):
            return ssl.create_default_context(cafile=ca)
        return ssl.create_default_context(cadata=ca.decode("ascii") if ca is not None else None)
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(f"cannot read certificate authority {_named(ca)}: {_why(error)}") from None


def _verify_as_go_does(context: ssl.SSLContext) -> None:
    """Accept the certificates of a server that kubelet and the other programs of a cluster, all in Go, accept.

    Python 3.13 and later refuse by default what does not follow RFC 5280 to the letter, among it authorities without
    keyUsage or key identifiers, which many clusters have. For Go every certificate that is given as an authority is
    one to trust, an intermediate one too, and a server's name is never in its subject's common name.
    Source: crypto/x509 of Go 1.26 (Certificate.Verify, VerifyHostname); ssl.create_default_context.
    """
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.hostname_checks_common_name = False


def _identify(context: ssl.SSLContext, certificate: tuple[Pem, Pem] | None) -> None:
    if certificate is None:
        return
    try:
        with _as_file(certificate[0]) as cert, _as_file(certificate[1]) as key:
            context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        names = f"{_named(certificate[0])} with key {_named(certificate[1])}"
        raise ConfigError(f"cannot read client certificate {names}: {_why(error)}") from None


def _no_password() -> str:
    raise ValueError("the key has a password")


@contextlib.contextmanager
def _as_file(pem: Pem) -> Iterator[str]:
    """OpenSSL takes a key from a file alone: this one is in memory."""
    if isinstance(pem, Path):
        yield str(pem)
        return
    with os.fdopen(os.memfd_create("nodeagent-pem", os.MFD_CLOEXEC), "wb") as file:
        file.write(pem)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _named(pem: Pem | None) -> str:
    return str(pem) if isinstance(pem, Path) else "of the system" if pem is None else "given as data"


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate in PEM form").replace("_", " ").lower()
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
