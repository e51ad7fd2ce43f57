"""Gathers what a capture consists of. Everything is only read; what cannot be read is named and left out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from nodeagent.cli.node.capture import redact
from nodeagent.cli.node.capture.archive import Members
from nodeagent.cli.node.capture.tree import record
from nodeagent.cli.shared import ask
from nodeagent.cli.shared.capture_format import (
    CONFIG,
    DEVICES,
    FORMAT,
    LOG,
    PAGES,
    SCANNED,
    STATE,
    TEXTS,
    TREE,
    Manifest,
    page_member,
)
from nodeagent.cli.shared.moments import rfc3339
from nodeagent.cli.shared.source import scan_machine
from nodeagent.config.schema import Config
from nodeagent.core.model.inventory_json import to_document
from nodeagent.errors import NodeagentError, cause_of
from nodeagent.host.sysfs.recording import RecordingSysFs
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.latches import FILE as LATCHES
from nodeagent.managers.kubelet import configuration_files
from nodeagent.state.store import BUSY_TIMEOUT_MS, LOCK
from nodeagent.state.store import FILE as LEDGER
from nodeagent.version import VERSION

CHECKPOINT = "device-plugins/kubelet_internal_checkpoint"
KUBELET_FILES = (CHECKPOINT, "cpu_manager_state", "memory_manager_state", "dra_manager_state")
KUBELET_CONFIG = "config.yaml"
LOG_LINES, LOG_S = 2000, 2.0
"""How many lines of the log, and how long to wait for them."""
LARGEST_FILE_BYTES = 32 << 20


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What is captured, and where it is."""

    root: str
    socket: str
    state_dir: Path
    kubelet_dir: Path
    config: Config
    config_file: Path | None


class Gathered(msgspec.Struct):
    """What was found so far."""

    at_s: float
    members: Members = msgspec.field(default_factory=Members)
    missing: dict[str, str] = msgspec.field(default_factory=dict)
    kubelet_dir: str = ""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Gather a part. If it cannot be read, the capture is made without it and says why."""
        try:
            yield
        except (NodeagentError, OSError, sqlite3.Error) as error:
            self.missing[name] = cause_of(error)

    def manifest(self, *, host: str, anonymized: bool) -> Manifest:
        """Return what the capture says of itself."""
        return Manifest(
            format=FORMAT,
            nodeagent=VERSION,
            at_s=self.at_s,
            time=rfc3339(self.at_s),
            host=host,
            timezone=time_zone(),
            anonymized=anonymized,
            members=len(self.members),
            kubelet_dir=self.kubelet_dir,
            missing=dict(self.missing),
        )


def gather(node: Node, step: Callable[[str], None]) -> Gathered:
    """Gather everything. step: called with the name of each part before it is read.

    The ledger and the pages come first, next to each other: they change, the machine hardly does.
    """
    found = Gathered(time.time(), kubelet_dir=str(node.kubelet_dir.absolute()))
    for name, part in (
        ("the agent's pages", _pages),
        ("the ledger", _state),
        ("the machine", _machine),
        ("kubelet's files", _kubelet),
        ("the configuration", _config),
        ("the log", _log),
    ):
        step(name)
        part(node, found)
    found.members.files["versions.json"] = _document(_versions())
    return found


def _pages(node: Node, found: Gathered) -> None:
    for page in (*PAGES, *TEXTS):
        with found.part(page):
            text = ask.text(node.socket, page)
            found.members.files[page_member(page)] = text.encode()
    # Of an agent that does not answer once is enough.
    reasons = {found.missing.get(page) for page in (*PAGES, *TEXTS)}
    if len(reasons) == 1 and (why := reasons.pop()):
        for page in (*PAGES, *TEXTS):
            del found.missing[page]
        found.missing["pages"] = why


def _state(node: Node, found: Gathered) -> None:
    with found.part("ledger"):
        found.members.files[f"{STATE}/{LEDGER}"] = ledger_copy(node.state_dir / LEDGER)
    with found.part("mark"), contextlib.suppress(FileNotFoundError):
        found.members.files[f"{STATE}/{LOCK}"] = _content(node.state_dir / LOCK)
    with found.part("latches"), contextlib.suppress(FileNotFoundError):
        found.members.files[f"{STATE}/{LATCHES}"] = _content(node.state_dir / LATCHES)


def ledger_copy(path: Path) -> bytes:
    """Return a copy of a ledger that may be in use, as it is at one moment. Raise sqlite3.Error or OSError."""
    with tempfile.TemporaryDirectory(prefix="nodeagent-") as folder:
        copy = Path(folder) / LEDGER
        with (
            contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as target,
        ):
            source.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            source.backup(target)
            # One file without journals, and without what was deleted.
            target.execute("PRAGMA journal_mode = DELETE")
            target.execute("VACUUM")
        return copy.read_bytes()


def _machine(node: Node, found: Gathered) -> None:
    sysfs, files = RecordingSysFs(node.root), found.members.files
    with found.part("inventory"):
        inventory = scan_machine(sysfs, live=node.root == "/")
        files[SCANNED] = _document(to_document(inventory))
    found.missing |= record(sysfs, node.config)
    for path, content in sysfs.tree():
        files[f"{TREE}/{path}"] = _redacted(path, content)
    found.members.folders |= {f"{TREE}/{path}" for path in sysfs.folders if path}
    found.members.links |= {f"{TREE}/{path}": target for path, target in sysfs.links.items()}
    files[DEVICES] = _document({path: one._asdict() for path, one in sorted(sysfs.nodes.items())})


def _redacted(path: str, content: bytes) -> bytes:
    """Return a file without secrets: command lines may have some."""
    if not path.endswith("cmdline"):
        return content
    return redact.text(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _kubelet(node: Node, found: Gathered) -> None:
    for name in KUBELET_FILES:
        with found.part(f"kubelet/{name}"):
            found.members.files[f"kubelet/{name}"] = _content(node.kubelet_dir / name)
    with found.part(f"kubelet/{KUBELET_CONFIG}"):
        content = _content(node.kubelet_dir / KUBELET_CONFIG)
        found.members.files[f"kubelet/{KUBELET_CONFIG}"] = redact.configuration(content)
    for path in configuration_files(SysFs(node.root), node.kubelet_dir, node.config.kubelet_config):
        with found.part(f"kubelet's {path}"):
            _kubelet_elsewhere(node, found, path)


def _kubelet_elsewhere(node: Node, found: Gathered, path: str) -> None:
    """Add a file or folder of kubelet's configuration that is not in kubelet's folder."""
    root = node.root.rstrip("/")
    place = f"{TREE}/{path.removeprefix(root).strip('/')}"
    if path == str(node.kubelet_dir / KUBELET_CONFIG) or not path.startswith(f"{root}/"):
        return
    if Path(path).is_dir():
        found.members.folders.add(place)
    else:
        found.members.files[place] = redact.configuration(_content(Path(path)))


def _config(node: Node, found: Gathered) -> None:
    if node.config_file is not None:
        with found.part("config"):
            found.members.files[CONFIG] = redact.configuration(_content(node.config_file))


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE_BYTES + 1)
    if len(content) > LARGEST_FILE_BYTES:
        raise OSError(0, f"{path} is larger than {LARGEST_FILE_BYTES >> 20} MiB")
    return content


def _log(node: Node, found: Gathered) -> None:
    """Add the last lines of the unit's log. In a pod kubelet has them."""
    if node.root != "/":
        return
    program = shutil.which("journalctl")
    if program is None:
        found.missing["log"] = "there is no journalctl: `kubectl logs` has the log of a pod"
        return
    words = [program, "--unit=nodeagent", f"--lines={LOG_LINES}", "--no-pager", "--output=short-iso-precise", "--quiet"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=LOG_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        found.missing["log"] = f"cannot run journalctl: {cause_of(error)}"
        return
    found.members.files[LOG] = redact.text(done.stdout.decode("utf-8", "replace")).encode()


def _versions() -> dict[str, str]:
    return {
        "nodeagent": VERSION,
        "python": sys.version.split()[0],
        "sqlite": sqlite3.sqlite_version,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "system": _system(),
    }


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def time_zone() -> str:
    """Return the time zone of this process as TZ would say it, or "" if it is unknown. A zone file ends with that text
    (RFC 8536, 3.3)."""
    if named := os.environ.get("TZ"):
        return named
    with contextlib.suppress(OSError):
        return Path("/etc/localtime").read_bytes().rstrip(b"\n").rpartition(b"\n")[2].decode("ascii", "ignore")
    return ""


def _document(value: Any) -> bytes:
    return json.dumps(msgspec.to_builtins(value), indent=1).encode() + b"\n"
