"""An image's archive, read as a container runtime reads it, and a way to run a program in the tree of its layers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE_S = 120.0
_MOUNTED = ("dev", "proc", "sys")


class Bundle:
    """A layout whose layers are unpacked over each other."""

    def __init__(self, layout: Path, tree: Path) -> None:
        self.layout, self.tree = layout, tree
        (top,) = json.loads((layout / "index.json").read_text())["manifests"]
        self.manifest = json.loads(self.blob(top["digest"]))
        self.config = json.loads(self.blob(self.manifest["config"]["digest"]))
        tree.mkdir()
        for path in self.layers():
            with tarfile.open(path) as layer:
                layer.extractall(tree, filter="fully_trusted")

    def blob(self, digest: str) -> bytes:
        """The content of a blob, which is checked against its name."""
        content = self._path(digest).read_bytes()
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
        return content

    def layers(self) -> list[Path]:
        return [self._path(one["digest"]) for one in self.manifest["layers"]]

    def entries(self) -> Iterator[tarfile.TarInfo]:
        """All entries of all layers."""
        for path in self.layers():
            with tarfile.open(path) as layer:
                yield from layer

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the tree, with the image's environment and the machine's /dev, /proc and /sys; as a plain
        user in a user namespace."""
        mounts = " && ".join(f"mount --rbind /{one} {self.tree}/{one}" for one in _MOUNTED)
        root = () if os.geteuid() == 0 else ("--map-root-user",)
        outside = ("unshare", "--mount", *root, "sh", "-c", f'{mounts} && exec chroot {self.tree} "$@"', "sh")
        settings: list[str] = self.config["config"]["Env"]
        inside = ("/opt/nodeagent/bin/python", "-c", _START, json.dumps(settings), *words)
        return subprocess.run([*outside, *inside], capture_output=True, text=True, check=False, timeout=DEADLINE_S)

    def _path(self, digest: str) -> Path:
        return self.layout / "blobs" / digest.replace(":", "/")


_START = (
    "import json, os, sys; env = dict(one.split('=', 1) for one in json.loads(sys.argv[1])); "
    "os.execvpe(sys.argv[2], sys.argv[2:], env)"
)
"""There is no shell and no `env` in the image."""


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What a program has printed as JSON."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
