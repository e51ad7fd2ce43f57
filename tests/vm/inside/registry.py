"""Runs in the guest: has CRI-O, which imports no archive, pull the one image from a registry on loopback.

    registry.py BUSYBOX    returns when the image is there

crio/registries.conf has the image's name lead here. Source: the OCI distribution specification.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path

import grpc
import ociimage

sys.path.insert(0, "/share/inside")

from pods import IMAGE, Runtime

PORT = 5000
COMMAND = ("/bin/busybox", "sh", "-c", "trap 'exit 0' TERM; sleep infinity & wait")
"""Ends on SIGTERM also as the first process of a namespace: CRI-O gives a sandbox ten seconds before it kills it."""
MANIFEST, CONFIG, LAYER = (
    f"application/vnd.oci.image.{form}" for form in ("manifest.v1+json", "config.v1+json", "layer.v1.tar")
)


def served(busybox: bytes) -> dict[str, tuple[str, bytes]]:
    """Return media type and content by path."""
    layer = ociimage.layer(busybox)
    config = json.dumps(ociimage.config(layer, COMMAND)).encode()
    parts = [
        {"mediaType": form, "digest": ociimage.digest_of(content), "size": len(content)}
        for form, content in ((CONFIG, config), (LAYER, layer))
    ]
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": parts[0], "layers": parts[1:]}).encode()
    found = {"/v2/": ("application/json", b"{}")}
    for name in ("vm", ociimage.digest_of(manifest)):
        found[f"/v2/busybox/manifests/{name}"] = (MANIFEST, manifest)
    for form, content in ((CONFIG, config), (LAYER, layer)):
        found[f"/v2/busybox/blobs/{ociimage.digest_of(content)}"] = (form, content)
    return found


def registry(files: dict[str, tuple[str, bytes]]) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            form, content = files.get(self.path, ("text/plain", b""))
            self.send_response(200 if self.path in files else 404)
            self.send_header("Content-Type", form)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)


def main(busybox: str) -> int:
    server = registry(served(Path(busybox).read_bytes()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Runtime() as runtime:
        try:
            runtime.call("PullImage", "ImageService", image={"image": IMAGE})
        except grpc.RpcError as error:
            print(error.details(), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
