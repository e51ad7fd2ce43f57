"""A registry on loopback that serves one image, for runtimes that import no archives: registry.py ARCHIVE NAME:TAG

ARCHIVE is what ociimage.py has written. Pulls of the OCI distribution specification, and nothing else: another method,
name, tag or digest, or a client that does not accept OCI manifests, gets the specification's error.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST, PORT = "127.0.0.1", 80
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"
BLOB = "application/octet-stream"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def served(archive: Path, name: str, tag: str) -> Mapping[str, tuple[str, bytes]]:
    """Media type and content by path."""
    with tarfile.open(archive) as packed:
        config, layer = (packed.extractfile(one).read() for one in ("config.json", "layer.tar"))  # type: ignore[union-attr]
    described = [
        {"mediaType": kind, "digest": digest(one), "size": len(one)} for kind, one in ((CONFIG, config), (LAYER, layer))
    ]
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
    manifest = json.dumps(document).encode()
    manifests = {f"/v2/{name}/manifests/{one}": (MANIFEST, manifest) for one in (tag, digest(manifest))}
    blobs = {f"/v2/{name}/blobs/{digest(one)}": (BLOB, one) for one in (config, layer)}
    return {"/v2/": ("application/json", b"{}"), **manifests, **blobs}


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Mapping[str, tuple[str, bytes]] = {}

    def do_GET(self) -> None:
        self._answer(*self._found())

    def do_HEAD(self) -> None:
        self._answer(*self._found())

    def _found(self) -> tuple[int, str, bytes]:
        if self.path not in self.files:
            code = "MANIFEST_UNKNOWN" if "/manifests/" in self.path else "BLOB_UNKNOWN"
            return self._error(code, f"there is no {self.path}")
        kind, content = self.files[self.path]
        if kind == MANIFEST and MANIFEST not in ",".join(self.headers.get_all("Accept", [])):
            return self._error("MANIFEST_UNKNOWN", f"the client does not accept {MANIFEST}")
        return 200, kind, content

    def _error(self, code: str, message: str) -> tuple[int, str, bytes]:
        return 404, "application/json", json.dumps({"errors": [{"code": code, "message": message}]}).encode()

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status == 200 and self.path != "/v2/":
            self.send_header("Docker-Content-Digest", digest(content))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def main(archive: str, image: str) -> None:
    name, tag = image.split(":")
    Registry.files = served(Path(archive), name, tag)
    ThreadingHTTPServer((HOST, PORT), Registry).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
