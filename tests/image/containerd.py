"""A containerd of its own, for as long as a test runs, from NODEAGENT_E2E_BIN; nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc

DEADLINE_S = 120.0
BINARIES = ("containerd", "containerd-shim-runc-v2", "ctr", "runc", "unshare")
_ENDS = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What it starts ends with it, even where the test is killed."""


def search_path() -> str:
    return f"{os.environ.get('NODEAGENT_E2E_BIN', '')}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def lacking() -> str:
    """Why there can be no containerd here; "" where there can."""
    if not os.environ.get("NODEAGENT_E2E_BIN"):
        return "NODEAGENT_E2E_BIN is not set: it names the folder with containerd, its shim, ctr and runc"
    absent = [name for name in BINARIES if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"missing in NODEAGENT_E2E_BIN and PATH: {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "containerd needs root"


class Containerd:
    """A running containerd. Snapshots are plain copies: an overlay cannot lie on every file system."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._runs = 0

    def ctr(self, *words: str) -> str:
        """What ctr prints in the namespace that kubelet's runtime service uses."""
        command = ("ctr", "--address", str(self._address), "--namespace", "k8s.io", *words)
        env = {**os.environ, "PATH": search_path()}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def load(self, archive: Path) -> None:
        """Load an image from an archive."""
        self.ctr("images", "import", "--local", "--snapshotter", "native", str(archive))

    def run(self, reference: str, options: tuple[str, ...], *words: str) -> str:
        """What a program in a new container of the image prints; without words, the image's own command."""
        self._runs += 1
        name = f"image-test-{self._runs}"
        return self.ctr("run", "--rm", "--snapshotter", "native", *options, reference, name, *words)

    def image_status(self, name: str) -> bytes:
        """The answer that kubelet gets when it asks for an image by the name in a pod (runtime.v1 of CRI); empty if
        there is none."""
        request = _field(1, _field(1, name.encode()))  # ImageStatusRequest.image = ImageSpec(image=name)
        with grpc.insecure_channel(f"unix://{self._address}") as channel:
            answer: bytes = channel.unary_unary("/runtime.v1.ImageService/ImageStatus")(request, timeout=DEADLINE_S)
        return answer


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, shorter than 128."""
    return bytes([number << 3 | 2, len(content)]) + content


@contextlib.contextmanager
def containerd(folder: Path) -> Iterator[Containerd]:
    """Start one; the caller's block begins when it serves."""
    address, ready = folder / "containerd.sock", folder / "ready.sock"
    (folder / "containerd.toml").write_text(_config(folder, address))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, (folder / "log").open("w") as log:
        notified.bind(str(ready))
        notified.settimeout(DEADLINE_S)
        env = {**os.environ, "PATH": search_path(), "NOTIFY_SOCKET": str(ready)}
        command = (*_ENDS, "containerd", "--config", str(folder / "containerd.toml"))
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            while b"READY=1" not in notified.recv(4096):
                pass
            yield Containerd(address)
        finally:
            process.kill()
            process.wait(DEADLINE_S)


def _config(folder: Path, address: Path) -> str:
    return f"""
version = 3
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs"]
[grpc]
  address = "{address}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{folder}/cni"]
  conf_dir = "{folder}/cni"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
"""
