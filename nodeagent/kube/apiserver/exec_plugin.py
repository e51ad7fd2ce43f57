"""Kubeconfig credential plugins (client.authentication.k8s.io): run, parsed strictly, cached.

An answer is used until shortly before it expires, or until the API server rejects it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.errors import PeerError, cause_of

VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
EARLY_S = 10.0
"""How long before its expiry a credential is renewed."""
_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """The command to run."""

    version: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    cluster: Mapping[str, Any] | None = None
    """Cluster information passed to the plugin (provideClusterInfo), or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """The agent's identity until it expires."""

    token: str = field(default="", repr=False)
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    """Certificate and key in PEM form."""
    expires_unix_s: float = float("inf")

    @property
    def stale(self) -> bool:
        """Return whether the credential has expired or is about to."""
        return time.time() >= self.expires_unix_s - EARLY_S


class _Status(msgspec.Struct, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: datetime | None = None


class _Answer(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    status: _Status


class Runner:
    """Runs a plugin when its last answer is no longer usable; one run at a time."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._turn = asyncio.Lock()
        self._known: Credential | None = None

    async def credential(self) -> Credential:
        """Return the cached credential, or a new one. Raise PeerError with the program and the cause.

        The caller sets a deadline.
        """
        async with self._turn:
            if self._known is None or self._known.stale:
                self._known = await run(self._plugin)
            return self._known

    def forget(self) -> None:
        """Drop the cached credential because the API server rejected it; the next call runs the plugin again."""
        self._known = None


async def run(plugin: Plugin) -> Credential:
    """Run the plugin once and return its credential. Raise PeerError with the program and the cause."""
    spec = {"interactive": False} | ({"cluster": dict(plugin.cluster)} if plugin.cluster is not None else {})
    info = {"apiVersion": plugin.version, "kind": "ExecCredential", "spec": spec}
    environment = {**os.environ, **dict(plugin.environment), "KUBERNETES_EXEC_INFO": json.dumps(info)}
    code, out, err = await _output(plugin.command, environment)
    if code != 0:
        said = " ".join(err.decode(errors="replace").split())[-500:]
        raise PeerError(f"cannot run {plugin.command[0]}: it ended with status {code}{f': {said}' if said else ''}")
    try:
        return _read(plugin, out)
    except ValueError as error:
        raise PeerError(f"cannot read the answer of {plugin.command[0]}: {error}") from None


async def _output(command: tuple[str, ...], environment: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Return exit status, standard output and standard error. If cancelled, kill the program."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
    except (OSError, ValueError) as error:
        raise PeerError(f"cannot run {command[0]}: {_cause(command[0], environment, error)}") from None
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return process.returncode or 0, out, err


def _cause(program: str, environment: Mapping[str, str], error: Exception) -> str:
    """Return why a program does not start, with the file or the folder that stands in the way.

    If a folder of PATH may not be searched, the error is "Permission denied", even if no other folder has the program
    (execvp(3))."""
    if not isinstance(error, PermissionError) or "/" in program:
        return cause_of(error)
    closed = []
    for path in (Path(folder) / program for folder in os.get_exec_path(environment)):
        try:
            path.stat()
        except PermissionError as denied:
            closed.append(f"cannot search {path.parent} of PATH: {cause_of(denied)}")
        except OSError:
            continue
        else:
            return f"{path}: {cause_of(error)}"
    return "; ".join([os.strerror(errno.ENOENT), *closed])


def _read(plugin: Plugin, out: bytes) -> Credential:
    if len(out) > _ANSWER_BYTES:
        raise ValueError(f"it has {len(out)} bytes, the limit is {_ANSWER_BYTES}")
    answer = msgspec.json.decode(out, type=_Answer)
    if (answer.kind, answer.api_version) != ("ExecCredential", plugin.version):
        raise ValueError(f"it is a {answer.api_version} {answer.kind}, expected a {plugin.version} ExecCredential")
    status = answer.status
    pair = (status.client_certificate_data.encode(), status.client_key_data.encode())
    if bool(pair[0]) != bool(pair[1]) or not (status.token or pair[0]):
        raise ValueError("it has neither a token nor a certificate with its key")
    ends = status.expiration_timestamp
    return Credential(
        token=status.token,
        certificate=pair if pair[0] else None,
        expires_unix_s=ends.timestamp() if ends is not None else float("inf"),
    )
