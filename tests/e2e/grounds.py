"""Whether there can be a whole node on this machine, and what the kernel has only once: put back after each run, or
where one was killed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.running import CHECKOUT

BINARIES = (
    "etcd",
    "kube-apiserver",
    "kube-scheduler",
    "kube-controller-manager",
    "kubelet",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
)
TOOLS = ("openssl", "unshare", "mount", "runc")
PREFIX = "na-e2e-"
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
SYSCTLS += ("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes")
"""What a kubelet sets when it starts."""


# ---------------------------------------------------------------- may it run


def missing() -> str:
    """Why there can be no node here; "" where there can."""
    return lacking() or next((f"{place} runs a kubelet already" for place in _kubelets()), "")


def lacking() -> str:
    """What this machine lacks for Kubernetes; "" where it has all."""
    if not (folder := os.environ.get("NODEAGENT_E2E_BIN", "")):
        return "NODEAGENT_E2E_BIN is not set: it names the folder with the binaries of Kubernetes"
    if not (CHECKOUT / "deploy").exists():
        return "the manifests that the node is given lie in the checkout"
    absent = [name for name in BINARIES if not os.access(Path(folder) / name, os.X_OK)]
    absent += [name for name in TOOLS if shutil.which(name, path=path()) is None]
    if absent:
        return f"missing in NODEAGENT_E2E_BIN={folder} and PATH: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "a node needs root"
    if Path(tempfile.gettempdir()).resolve().parts[1] in ("dev", "run", "var"):
        return f"TMPDIR={tempfile.gettempdir()}: the node has a /dev, /run and /var of its own, expected another folder"
    if busybox() is None:
        return "no static busybox for the image of the pods (package busybox-static)"
    return ""


def minor_version() -> int:
    """Of these binaries of Kubernetes 1; 0 where there are none."""
    if lacking():
        return 0
    command = [f"{os.environ['NODEAGENT_E2E_BIN']}/kube-apiserver", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.match(r"Kubernetes v1\.(\d+)\.", said)
    assert found is not None, said
    return int(found[1])


def busybox() -> Path | None:
    found = shutil.which("busybox")
    if found is None:
        return None
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False)
    return Path(found).resolve() if listed.returncode or "statically" in listed.stdout else None


def path() -> str:
    return f"{os.environ.get('NODEAGENT_E2E_BIN', '')}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _kubelets() -> Iterator[str]:
    for name in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().strip() == "kubelet":
                yield f"process {name.parent.name}"


# ---------------------------------------------------------------- what the kernel has only once


class Shared:
    """The lock of all runs on this machine, and what has to be put back after each."""

    def __init__(self) -> None:
        self._kept = Path(tempfile.gettempdir()) / f"{PREFIX}sysctls.json"
        self._lock = (Path(tempfile.gettempdir()) / f"{PREFIX}lock").open("w")
        self._taken = False

    def take(self, folder: Path) -> str:
        """Clean up behind runs that were killed, and remember how it is; why that cannot be, or "". folder: this run's,
        which stays."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another run of these tests is under way on this machine"
        self._taken = True
        self._put_back()
        for left in folder.parent.glob(f"{PREFIX}run-*"):
            if left != folder:
                shutil.rmtree(left, ignore_errors=True)
        values = {name: _sysctl(name).read_text() for name in SYSCTLS if _sysctl(name).exists()}
        self._kept.write_text(json.dumps(values))
        return ""

    def close(self) -> None:
        if self._taken:
            self._put_back()
        self._lock.close()

    def _put_back(self) -> None:
        for folder, _, _ in [one for root in _kubepods() for one in os.walk(root, topdown=False)]:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if self._kept.exists():
            for name, value in json.loads(self._kept.read_text()).items():
                with contextlib.suppress(OSError):
                    _sysctl(name).write_text(value)
            self._kept.unlink()


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _kubepods() -> Iterator[Path]:
    cgroups = Path("/sys/fs/cgroup")
    yield from (path for pattern in ("kubepods", "*/kubepods") for path in cgroups.glob(pattern))
