"""A kubelet in the /proc of a captured machine: its files as proc(5) describes them, and a configuration's files."""

from __future__ import annotations

import shutil
from pathlib import Path

HEAD = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
"""What every file of kubelet's configuration begins with."""


def process(root: Path, pid: int, *words: str, name: str = "kubelet", cwd: str | None = "/", parent: int = 1) -> Path:
    """A process below a root. words: its command line from argv[0] on. cwd None: it may not be read."""
    folder = root / "proc" / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    (folder / "status").write_text(f"Name:\t{name}\nUmask:\t0022\nPid:\t{pid}\nPPid:\t{parent}\n")
    if cwd is not None:
        (folder / "cwd").unlink(missing_ok=True)
        (folder / "cwd").symlink_to(cwd)
    return folder


def kubelet(root: Path, kubelet_dir: Path, *flags: str, pid: int = 812) -> Path:
    """The kubelet whose folder is `kubelet_dir`, for an agent that sees a machine below `root`."""
    link = root / "var/lib/kubelet"
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(kubelet_dir)
    return process(root, pid, "/usr/bin/kubelet", *flags)


def ends(process: Path) -> None:
    """A process is gone."""
    shutil.rmtree(process)


def put(path: Path, text: str) -> Path:
    """A file of kubelet's configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + text)
    return path
