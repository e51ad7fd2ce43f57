"""Writes a container image with nothing but a static busybox, for `ctr images import`: ociimage.py BUSYBOX NAME OUT."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path


def packed(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def image(busybox: bytes, name: str) -> bytes:
    """Its default process waits indefinitely: it serves as a pod's sandbox too."""
    layer = packed({"bin/busybox": busybox}, 0o755)
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "infinity"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    whole = {"manifest.json": manifest, "config.json": config}
    return packed({"layer.tar": layer, **{key: json.dumps(value).encode() for key, value in whole.items()}})


if __name__ == "__main__":
    Path(sys.argv[3]).write_bytes(image(Path(sys.argv[1]).read_bytes(), sys.argv[2]))
