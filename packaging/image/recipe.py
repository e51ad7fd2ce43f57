"""What is in the image and what it says of itself. `Containerfile` at the top of the checkout makes the same image with
a container engine; tests/rules/test_image_recipes.py compares the two."""

from __future__ import annotations

import sys
from pathlib import Path

from nodeagent.version import VERSION

CHECKOUT = Path(__file__).resolve().parents[2]
NAME = "nodeagent"
PYTHON = f"python3.{sys.version_info.minor}"
"""The interpreter of the image: the distribution's, with the minor version of the one that builds the compiled core."""
PACKAGES = ("libstdc++6", "libudev1", f"{PYTHON}-minimal", f"lib{PYTHON}-stdlib")
"""What the product needs of the distribution: protobuf is C++, pyudev loads libudev, the ledger needs the standard
library's sqlite3, and the API server its ssl."""
SYSTEM_PACKAGES = ("base-files", "libc-bin")
"""What every image of the distribution has, and this one lacks without a base image: os-release and the top folders;
ldconfig, which ctypes asks where a library is."""
NOT_NEEDED = frozenset(
    {"awk", "debconf", "dpkg", "install-info", "media-types", "netbase", "readline-common", "tzdata"}
)
"""Dependencies that are left out with all they depend on: scripts of packages, line editing, the agent's UTC times."""
DROPPED = (
    "usr/share/doc/*/[!c]*",
    "usr/share/doc/*/changelog*",
    *(
        "usr/share/man",
        "usr/share/info",
        "usr/share/locale",
        "usr/share/lintian",
        "usr/share/bug",
    ),
    *("usr/lib/*/gconv", "usr/lib/*/perl-base", "usr/share/i18n", "usr/share/bash-completion", "usr/share/gcc"),
    *("usr/share/applications", "usr/share/pixmaps", "usr/share/menu", "usr/share/base-files", "usr/share/binfmts"),
    *(f"usr/lib/python3*/{one}" for one in ("lib2to3", "pydoc_data", "turtledemo", "idlelib", "tkinter", "ensurepip")),
)
"""What is dropped of the packages, by pattern; the copyright files stay."""
LARGEST_PRODUCT_BYTES = 120 << 20
"""Unpacked: what an upgrade of the product may make each node fetch."""

PREFIX = "opt/nodeagent"
"""The product's virtual environment, as in the installation under systemd."""
SITE = f"{PREFIX}/lib/{PYTHON}/site-packages"
SBOM = f"{PREFIX}/share/sbom/nodeagent.cdx.json"

USER = "0:0"
"""What the agent writes belongs to root; a DaemonSet takes every capability from it (deploy/daemonset.yaml)."""
ENTRYPOINT = ("nodeagent",)
COMMAND = ("run", "--config", "/etc/nodeagent/config.yaml")
ENVIRONMENT = {
    "PATH": f"/{PREFIX}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
}
TITLE = NAME
DESCRIPTION = "One daemon per Kubernetes node that assigns CPUs, hugepages, GPUs, NICs and other devices to containers"
LICENSES = "Apache-2.0"


def labels(source: str) -> dict[str, str]:
    """Return the OCI labels. source: the address of the sources, or "" if it is not to be named."""
    known = {"title": TITLE, "description": DESCRIPTION, "version": VERSION, "licenses": LICENSES, "source": source}
    return {f"org.opencontainers.image.{key}": value for key, value in known.items() if value}
