"""The files that secure the metrics endpoint: a token, a certificate. Each is read again when it changes.

A file that has become unusable leaves the last good content in force, as a bad configuration does.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from nodeagent.errors import HostError

LARGEST_TOKEN_BYTES = 8 << 10
_TOKEN = re.compile(rb"[\x21-\x7e]+")
T = TypeVar("T")
_Identity = tuple[int, ...]


class Reloaded(Generic[T]):
    """What some files contain together, read again when one of them is replaced, written or made readable."""

    def __init__(self, files: Mapping[str, Path], load: Callable[[], T]) -> None:
        """files: by the key of the configuration that names them. load: reads them; raises HostError, OSError or
        ssl.SSLError."""
        self.value: T | None = None
        """The last good content, or None if there never was one."""
        self.fault = ""
        """Why the newest content is not in force, or ""."""
        self._files = files
        self._load = load
        self._seen: tuple[_Identity | None, ...] | None = None

    def refresh(self) -> None:
        """Read the files if any has changed since the last call. Blocks, for as long as small local files take."""
        # Before reading: a change while they are read is seen the next time.
        now = tuple(map(_identity, self._files.values()))
        if now == self._seen:
            return
        self._seen = now
        try:
            self.value, self.fault = self._load(), ""
        except (HostError, OSError) as error:
            self.fault = str(error) if isinstance(error, HostError) else self._cannot(error)

    def _cannot(self, error: OSError) -> str:
        names = ", ".join(f"{key} {path}" for key, path in self._files.items())
        return f"cannot use {names}: {error.strerror or error}"


class Token(NamedTuple):
    """A token that clients must present."""

    secret: bytes
    warning: str
    """What is unsafe about its file, or ""."""


def token_of(key: str, path: Path) -> Reloaded[Token]:
    """Return the token in a file, to be refreshed. key: of the configuration, for messages."""
    return Reloaded({key: path}, lambda: _read_token(key, path))


def context_of(
    cert: tuple[str, Path], key: tuple[str, Path], clients: tuple[str, Path] | None
) -> Reloaded[ssl.SSLContext]:
    """Return the TLS context of a server, to be refreshed.

    cert, key, clients: pairs of the configuration's key and the path of the certificate, its private key, and the
    authorities of clients (None: clients need no certificate).
    """
    files = dict([cert, key, clients] if clients is not None else [cert, key])
    return Reloaded(files, lambda: _context(cert, key, clients))


def _context(cert: tuple[str, Path], key: tuple[str, Path], clients: tuple[str, Path] | None) -> ssl.SSLContext:
    _check_readable(cert, key, *([clients] if clients is not None else ()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Without a password, OpenSSL would ask for one on the terminal.
    context.load_cert_chain(cert[1], key[1], password=lambda: "")
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients[1])
    return context


def _check_readable(*files: tuple[str, Path]) -> None:
    """Raise HostError with the key and the path of the first file that cannot be read: OpenSSL names neither."""
    for key, path in files:
        _read(key, path, 1)


def _read_token(key: str, path: Path) -> Token:
    content, mode = _read(key, path, LARGEST_TOKEN_BYTES + 1)
    if len(content) > LARGEST_TOKEN_BYTES:
        raise HostError(f"cannot use {key} {path}: it has more than {LARGEST_TOKEN_BYTES} bytes")
    secret = content.strip()
    if not secret:
        raise HostError(f"cannot use {key} {path}: it is empty")
    if not _TOKEN.fullmatch(secret):
        raise HostError(f"cannot use {key} {path}: expected one word of printable ASCII characters")
    mode = stat.S_IMODE(mode)
    warning = f"{key} {path} can be read by every user of the host (mode {mode:04o})" if mode & 0o004 else ""
    return Token(secret, warning)


def _read(key: str, path: Path, most: int) -> tuple[bytes, int]:
    """Return at most so many bytes of a file, and its mode. Never waits, as opening a named pipe would."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot read {key} {path}: {error.strerror}") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise HostError(f"cannot read {key} {path}: it is no regular file")
        return os.read(handle, most), mode
    except OSError as error:
        raise HostError(f"cannot read {key} {path}: {error.strerror}") from None
    finally:
        os.close(handle)


def _identity(path: Path) -> _Identity | None:
    """Return what changes when the file that a path leads to is replaced, written, or given another mode."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
