"""Which endpoints of DRA plugins kubelet takes: validateEndpoint of pkg/kubelet/cm/dra/plugin, Kubernetes 1.38, and the
parser that it asks (Go's net/url)."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

UNIX_PATH_MAX = 108


def wrong_with_endpoint(endpoint: str) -> str:
    """Why it is refused, or ""."""
    if not endpoint.startswith("/"):
        return f"DRA plugin endpoint {endpoint!r} must be an absolute path"
    if len(os.fsencode(endpoint)) >= UNIX_PATH_MAX:
        return f"DRA plugin endpoint {endpoint!r} must not be longer than {UNIX_PATH_MAX} bytes"
    return "" if _resolved(endpoint) == endpoint else f"DRA plugin endpoint {endpoint!r} must be a plain path"


def _resolved(endpoint: str) -> str | None:
    """The path of unix:ENDPOINT; None where it is no URL, or has a host, a query or a fragment."""
    if any(letter < " " or letter == "\x7f" for letter in endpoint) or endpoint.startswith("//"):
        return None
    if "?" in endpoint or "#" in endpoint or re.search(r"%(?![0-9A-Fa-f]{2})", endpoint):
        return None
    return unquote(endpoint)
