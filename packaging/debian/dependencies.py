"""What the package depends on: the Python whose ABI its modules are compiled for, and the libraries that they link."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = {
    "libc.so.6": "",
    "libm.so.6": "",
    "libpthread.so.0": "",
    "libdl.so.2": "",
    "librt.so.1": "",
    "ld-linux-x86-64.so.2": "",
    "ld-linux-aarch64.so.1": "",
    "libgcc_s.so.1": "libgcc-s1",
    "libstdc++.so.6": "libstdc++6",
    "libz.so.1": "zlib1g",
}
"""Debian packages of shared libraries; "" for those of libc6, whose version follows from the symbols."""
_LOADED = ("libudev1",)
"""Libraries that are loaded by name: pyudev's."""


def depends(modules: Iterable[Path]) -> str:
    """Return the field Depends for compiled modules. Raise SystemExit for a library of which no package is known."""
    modules = list(modules)
    major, minor = sys.version_info[:2]
    python = [f"python3 (>= {major}.{minor})", f"python3 (<< {major}.{minor + 1})"]
    needed = {name for one in modules for name in _needed(one)} - {path.name for path in modules}
    if unknown := sorted(needed - _PACKAGES.keys()):
        raise SystemExit(f"build: cannot tell which packages have {', '.join(unknown)}")
    linked = {_PACKAGES[name] for name in needed} - {""}
    return ", ".join([f"libc6 (>= {_glibc(modules)})", *sorted({*linked, *_LOADED}), *python])


def _needed(module: Path) -> list[str]:
    shown = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", shown)


def _glibc(modules: Iterable[Path]) -> str:
    """Return the newest version of glibc that a symbol needs."""
    found: set[bytes] = {one for module in modules for one in re.findall(rb"GLIBC_(2\.\d+)\b", module.read_bytes())}
    return max(found, key=lambda version: int(version[2:])).decode()
