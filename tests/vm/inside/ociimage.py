"""A container image with nothing but a static busybox. As a program it writes one for `ctr images import`:

ociimage.py BUSYBOX NAME OUT
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAIT = ("/bin/busybox", "sleep", "infinity")
"""The default process waits indefinitely: the image serves as a pod's sandbox too."""


def packed(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def layer(busybox: bytes) -> bytes:
    return packed({"bin/busybox": busybox}, 0o755)


def config(layer: bytes, command: Sequence[str] = WAIT) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
    }


def image(busybox: bytes, name: str) -> bytes:
    only = layer(busybox)
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    whole = {"manifest.json": manifest, "config.json": config(only)}
    return packed({"layer.tar": only, **{key: json.dumps(value).encode() for key, value in whole.items()}})


if __name__ == "__main__":
    Path(sys.argv[3]).write_bytes(image(Path(sys.argv[1]).read_bytes(), sys.argv[2]))
