"""A root file system that has of the host only Python, and of NVIDIA only what a CDI file names: run as a child, it
enters a mount namespace of its own, builds that root, changes into it and starts a program.

python -m benchmarks.gpu.contained FOLDER CDI_FILE PROGRAM ARGUMENT…: FOLDER is empty, and is the root in that namespace
alone; PROGRAM is a Python file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
"""sched.h, sys/mount.h."""
_LIBRARY = re.compile(r"(?:=>\s*)?(/\S+)\s+\(0x")


class Bind(NamedTuple):
    """A file or folder of the host, and where the container has it."""

    host: str
    inside: str


def binds(spec: Any) -> tuple[list[Bind], list[str]]:
    """Return what the edits of a CDI file's devices mount, nodes of devices included, and their variables."""
    edits = [one["containerEdits"] for one in spec["devices"]] + [spec.get("containerEdits") or {}]
    nodes = [Bind(one.get("hostPath") or one["path"], one["path"]) for it in edits for one in it.get("deviceNodes", ())]
    mounts = [Bind(one["hostPath"], one["containerPath"]) for it in edits for one in it.get("mounts", ())]
    return [*nodes, *mounts], [line for it in edits for line in it.get("env", ())]


def of_python() -> Iterator[Bind]:
    """Yield what this interpreter needs: its program, its library, and the shared libraries of both."""
    program = Path(sys.executable).resolve()
    standard = Path(sysconfig.get_path("stdlib"))
    native = sorted(standard.glob("lib-dynload/*.so"))
    yield from (Bind(str(one), str(one)) for one in (program, standard))
    yield from (Bind(one, one) for one in sorted(set(libraries([program, *native]))))


def libraries(files: Iterable[Path]) -> Iterator[str]:
    """Yield the shared libraries that some files are linked with, and the loader."""
    words = ["ldd", *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if (found := _LIBRARY.search(line)) and Path(found[1]).exists():
            yield found[1]


def build(root: Path, every: Iterable[Bind]) -> None:
    """Bind everything below a root."""
    for one in every:
        to = root / one.inside.lstrip("/")
        if Path(one.host).is_dir():
            to.mkdir(parents=True, exist_ok=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.touch()
        mount(one.host, str(to), MS_BIND | MS_REC)
    for name in ("proc", "tmp"):
        (root / name).mkdir(exist_ok=True)


def mount(source: str, target: str, flags: int, kind: str = "") -> None:
    """Mount, as mount(2). Raise OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), None)
    if libc.mount(*words):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def main(words: list[str]) -> None:
    """Build the root in a namespace of this process, change into it, and become the program."""
    root = Path(words[0])
    every, env = binds(json.loads(Path(words[1]).read_text()))
    program = Path(words[2]).resolve()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "a mount namespace")
    mount("none", "/", MS_REC | MS_PRIVATE)
    mount("tmpfs", str(root), 0, "tmpfs")
    build(root, [*of_python(), Bind(str(program), "/program.py"), *every])
    mount("proc", str(root / "proc"), 0, "proc")
    python = str(Path(sys.executable).resolve())
    os.chroot(root)
    os.chdir("/")
    variables = dict(line.split("=", 1) for line in env)
    os.execve(python, [python, "-S", "-B", "/program.py", *words[3:]], {**variables, "PYTHONHOME": sys.base_prefix})


if __name__ == "__main__":
    main(sys.argv[1:])
