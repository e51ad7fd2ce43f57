"""An image as an archive of an OCI image layout (github.com/opencontainers/image-spec, image-layout.md 1.1)."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from image.layer import Layer
from image.recipe import COMMAND, ENTRYPOINT, ENVIRONMENT, NAME, USER, labels
from nodeagent.version import VERSION

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
REFERENCE = f"localhost/{NAME}:{VERSION}"
"""Of an image that was built here: a runtime that lacks it asks no registry in the world for a namesake."""


def configuration(layers: Sequence[Layer], *, architecture: str, epoch_s: int, source: str) -> dict[str, Any]:
    """Return the image's configuration. epoch_s: when it counts as made, in seconds since 1970."""
    created = datetime.fromtimestamp(epoch_s, UTC).isoformat().replace("+00:00", "Z")
    steps = ("Debian packages", f"nodeagent {VERSION}")
    return {
        "created": created,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "User": USER,
            "Env": [f"{key}={value}" for key, value in ENVIRONMENT.items()],
            "Entrypoint": list(ENTRYPOINT),
            "Cmd": list(COMMAND),
            "WorkingDir": "/",
            "Labels": labels(source),
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": step} for step in steps],
    }


def write_archive(path: Path, layers: Sequence[Layer], configuration: dict[str, Any], *, mtime_s: int) -> str:
    """Write the archive. Return the digest of its manifest, which identifies the image."""
    config = _encoded(configuration)
    descriptors = [_descriptor(LAYER, one.blob.digest, one.blob.size_bytes) for one in layers]
    manifest = _encoded(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _descriptor(CONFIG, _digest(config), len(config)),
            "layers": descriptors,
            "annotations": configuration["config"]["Labels"],
        }
    )
    blobs: dict[str, bytes | Path] = {_digest(config): config, _digest(manifest): manifest}
    blobs |= {layer.blob.digest: layer.blob.path for layer in layers}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, "oci-layout", _encoded({"imageLayoutVersion": "1.0.0"}), mtime_s)
        _add(archive, "index.json", _index(manifest, configuration["architecture"]), mtime_s)
        for digest, content in sorted(blobs.items()):
            _add(archive, f"blobs/{digest.replace(':', '/')}", content, mtime_s)
    return _digest(manifest)


def _index(manifest: bytes, architecture: str) -> bytes:
    """Return the index, with the names that containerd's and others' import give the image."""
    names = {"io.containerd.image.name": REFERENCE, "org.opencontainers.image.ref.name": REFERENCE}
    platform = {"architecture": architecture, "os": "linux"}
    entry = {**_descriptor(MANIFEST, _digest(manifest), len(manifest)), "platform": platform, "annotations": names}
    return _encoded({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]})


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _encoded(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes | Path, mtime_s: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.mtime = 0o644, mtime_s
    if isinstance(content, Path):
        entry.size = content.stat().st_size
        with content.open("rb") as stream:
            archive.addfile(entry, stream)
        return
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
