"""What a capture contains, and where: a tar archive, compressed with zstd.

manifest.json        first: format, version, time, host, how many members follow
tree/sys tree/proc   what was read of the machine; device nodes are empty files of their names in tree/dev
devices.json         the numbers of these device nodes
inventory.json       the machine as scanned at that moment, with what NVML says
pages/               the pages of the status socket: pages/v1/status.json, pages/metrics.txt
state/ledger.db      a copy of the ledger
config/              the configuration, without secrets
kubelet/             kubelet's checkpoints, state and configuration; what of that is elsewhere is in the tree
log.txt versions.json
"""

from __future__ import annotations

import msgspec

FORMAT = 1
"""Raised when an older build would misread a capture; new members alone do not raise it."""
MANIFEST, TREE, DEVICES, SCANNED, STATE, LOG, CONFIG = (
    *("manifest.json", "tree", "devices.json", "inventory.json", "state", "log.txt", "config/config.yaml"),
)
PAGES = ("/v1/status", "/v1/inventory", "/v1/grants", "/v1/devices", "/v1/health")
TEXTS = ("/metrics",)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture says of itself. Fields that a newer build adds are ignored."""

    format: int
    nodeagent: str
    """Version of the build that made it."""
    at_s: float
    """When the node looked like this, in seconds since the epoch."""
    time: str
    """The same in RFC 3339."""
    host: str
    timezone: str
    """The node's time zone as in the variable TZ, or "" if it is unknown."""
    anonymized: bool
    members: int
    """How many members follow."""
    kubelet_dir: str = ""
    """Where kubelet's folder was on the node; "" if an older build made it."""
    missing: dict[str, str] = {}
    """Why something is not part of it, by name."""


def page_member(page: str) -> str:
    """Return the member with a page of the status socket."""
    return f"pages{page}.{'txt' if page in TEXTS else 'json'}"
