"""Where the API server is and how the agent authenticates, as values. Files that others renew are looked at on every
use.

Kubelet replaces a service account token about every hour; client certificates and CA certificates are renewed as well.
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
"""A file, read on every use, or the PEM text itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to reach one API server. Secrets are not in its repr."""

    source: str
    """Where these settings were read from."""
    host: str
    port: int
    path: str = ""
    """Prefix of every request's path, without a trailing slash."""
    tls: bool = True
    server_name: str = ""
    """Name that the server's certificate must be valid for, or "" for the host."""
    insecure: bool = False
    """Whether to skip verification of the server's certificate."""
    ca: Pem | None = None
    """CA certificates, or None for the system's."""
    certificate: tuple[Pem, Pem] | None = field(default=None, repr=False)
    """Client certificate and key."""
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    plugin: Plugin | None = None

    @property
    def authority(self) -> str:
        """Return host:port, as messages and the Host header show it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def bearer(access: Access) -> str:
    """Return the current bearer token, or "" if none is configured. Raise ConfigError if its file cannot be read."""
    if access.token_file is None:
        return access.token
    try:
        text = access.token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read token {access.token_file}: {_why(error)}") from None
    if not text or not text.isprintable() or " " in text:
        raise ConfigError(f"cannot read token {access.token_file}: {'it is empty' if not text else 'not one word'}")
    return text


class TlsContexts:
    """TLS contexts for one API server. One is re-created only when a file that it was made from has changed: loading a
    bundle of authorities takes about 20 ms."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._made: tuple[object, ssl.SSLContext | None] = (None, None)

    def sources(self, certificate: tuple[Pem, Pem] | None = None) -> object:
        """Return a value that changes with the files that a context is made from; None while one cannot be found."""
        certificate = certificate or self._access.certificate
        ca = (self._access.ca,) if self._access.ca is not None else _system_authorities()
        found = [_version(pem) for pem in (*ca, *(certificate or ()))]
        return None if None in found else (certificate, *found)

    def get(self, certificate: tuple[Pem, Pem] | None = None) -> ssl.SSLContext | None:
        """Return what `tls_context` returns."""
        sources = self.sources(certificate)
        made_from, made = self._made
        if sources is None or sources != made_from:
            made = tls_context(self._access, certificate)
            self._made = (sources, made)
        return made


def _system_authorities() -> tuple[Pem, ...]:
    places = ssl.get_default_verify_paths()
    return tuple(Path(one) for one in (places.cafile, places.capath) if one)


def _version(pem: Pem) -> object:
    """Return a value that changes with a file, or the text itself; None if there is no file."""
    if not isinstance(pem, Path):
        return pem
    try:
        found = pem.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def tls_context(access: Access, certificate: tuple[Pem, Pem] | None = None) -> ssl.SSLContext | None:
    """Return the TLS context for one connection, from the files as they are now, or None without TLS.

    `certificate` (certificate and key) replaces the one in `access`. Raise ConfigError with the file and the cause.
    """
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
    """Accept the server certificates that kubelet and other cluster components, all written in Go, accept.

    Python 3.13 and later reject certificates that do not strictly follow RFC 5280 by default, including CAs without
    keyUsage or key identifiers, which many clusters have. Go trusts every certificate given as an authority, including
    an intermediate one, and never takes a server's name from the subject's common name. Source: crypto/x509 of Go 1.26
    (Certificate.Verify, VerifyHostname); ssl.create_default_context.
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
    """Yield a path for a PEM: OpenSSL reads a key only from a file, so in-memory data goes into a memfd."""
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
