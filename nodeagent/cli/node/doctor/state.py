"""The state folder: its rights, its disk, and the ledger in it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from urllib.parse import quote

from nodeagent.cli.node.doctor.model import Check, Finding, failure, ok, skipped, unknown, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.errors import StateError
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.state.layout import NEWEST
from nodeagent.state.store import FILE, LOCK

LEAST_FREE_BYTES, LEAST_FREE_FILES = 64 << 20, 64
SLOW_SYNC_S, FAILING_SYNC_S = 0.02, 0.5
"""kubelet waits for a decision until it is on disk; the agent promises 50 ms for 99 of 100 (docs/slo.md)."""
VOLATILE = ("tmpfs", "ramfs")
NETWORKED = ("nfs", "nfs4", "cifs", "ceph", "fuse.sshfs", "9p")
BUSY_MS = 2000


def _folder(node: Node) -> Finding:
    path = node.state_dir
    try:
        found = path.stat()
    except FileNotFoundError:
        return skipped(f"there is no {path} yet; the agent makes it")
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return failure(f"{path} is not a folder", "remove it, or set stateDir", f"ls -ld {path}")
    if mode & 0o022:
        return failure(f"{path} has mode {mode:04o}: others can change the ledger", "close it", f"chmod 0700 {path}")
    if mode & 0o055:
        return warning(f"{path} has mode {mode:04o}: others can read the ledger", "close it", f"chmod 0700 {path}")
    return ok(f"{path} has mode {mode:04o}")


def _space(node: Node) -> Finding:
    space = node.probes.space(node.state_dir)
    fix = "free some, or set stateDir to another disk"
    if space.kind in VOLATILE:
        return failure(f"{space.path} is on {space.kind}: the ledger is lost at a reboot", "set stateDir to a disk")
    if space.free_bytes < LEAST_FREE_BYTES:
        return failure(f"{space.path} has {space.free_bytes >> 20} MiB free", fix, f"df -h {space.path}")
    if space.total_files and space.free_files < LEAST_FREE_FILES:
        return failure(f"{space.path} has {space.free_files} inodes free", fix, f"df -i {space.path}")
    if space.kind in NETWORKED:
        return warning(f"{space.path} is on {space.kind}: locks and fsync depend on the network", "use a local disk")
    return ok(f"{space.free_bytes >> 20} MiB free in {space.path} ({space.kind or 'unknown file system'})")


def _sync(node: Node) -> Finding:
    if not node.state_dir.is_dir():
        return skipped(f"there is no {node.state_dir} yet")
    took_s = node.probes.sync_s(node.state_dir)
    seen = f"4 KiB are on disk after {took_s * 1e3:.1f} ms"
    fix = "put stateDir on a faster disk: a pod starts when its grant is on disk"
    if took_s > FAILING_SYNC_S:
        return failure(seen, fix)
    return warning(seen, fix) if took_s > SLOW_SYNC_S else ok(seen)


def _ledger(node: Node) -> Finding:
    if not node.has_ledger:
        return skipped(f"there is no {node.state_dir / FILE} yet")
    try:
        layout, verdict = _verdict(node)
        if verdict != "ok":
            return _damaged(f"{node.state_dir / FILE} is damaged: {verdict}")
        if layout > NEWEST:
            return failure(
                f"{node.state_dir / FILE} has layout {layout}, this version knows 1 to {NEWEST}",
                "start the version that wrote it",
                "nodeagent ledger export -o grants.json",
            )
        return ok(f"grants: {len(node.ledger())}, all of them whole and readable")
    except StateError as error:
        return _damaged(str(error))


def _verdict(node: Node) -> tuple[int, str]:
    path = node.state_dir / FILE
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
            layout = int(db.execute("PRAGMA user_version").fetchone()[0])
            return layout, str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        if not os.access(path, os.R_OK):
            raise PermissionError(0, "no permission", str(path)) from None
        raise StateError(f"cannot read {path}: {error}") from None


def _damaged(seen: str) -> Finding:
    return failure(
        seen,
        "leave the file as it is: the agent moves it aside when it starts and rebuilds the ledger",
        "systemctl restart nodeagent",
    )


def _whole(node: Node) -> Finding:
    if (ledger := node.status.get("ledger")) and isinstance(ledger, dict):
        loss = str(ledger.get("loss") or "")
    else:
        try:
            lines = (node.state_dir / LOCK).read_text(errors="replace").strip().split("\n")
        except FileNotFoundError:
            return skipped("no agent has run here")
        loss = lines[1].strip() if len(lines) > 1 else ""
    if loss:
        return failure(
            f"the ledger may lack decisions: {loss}",
            "let the agent rebuild it; it grants nothing until then",
            "nodeagent status",
        )
    return ok("every decision that was made is in it")


def _reboots(node: Node) -> Finding:
    if not node.has_ledger:
        return skipped("there is no ledger yet")
    boot = node.kernel_text(BOOT_ID)
    if boot is None:
        return unknown("the boot id of this machine cannot be read")
    grants = node.ledger()
    older = [one for one in grants if one.boot_id and one.boot_id != boot]
    if older and node.agent_error and node.live:
        return warning(
            f"{len(older)} of {len(grants)} grants are of an earlier boot, and no agent runs to check them",
            "start the agent: it asks kubelet which pods are still there",
            "systemctl start nodeagent",
        )
    return ok(f"grants: {len(grants)}, of an earlier boot: {len(older)}")


CHECKS = (
    Check("state.folder", "operations.md#with-systemd", _folder, live=True),
    Check("state.space", "doctor.md#state", _space, live=True),
    Check("state.fsync", "doctor.md#state", _sync, live=True),
    Check("state.ledger", "operations.md#a-ledger-that-was-lost", _ledger),
    Check("state.whole", "operations.md#a-ledger-that-was-lost", _whole),
    Check("state.reboots", "operations.md#when-a-grant-is-released", _reboots),
)
