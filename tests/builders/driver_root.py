"""An installation of NVIDIA's driver in a folder: libraries that are ELF files, their links, programs and firmware."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

VERSION = "580.95.05"
COMPUTE = {
    "libcuda": "libcuda.so.1",
    "libcudadebugger": "libcudadebugger.so.1",
    "libnvidia-ml": "libnvidia-ml.so.1",
    "libnvidia-nvvm": "libnvidia-nvvm.so.4",
    "libnvidia-ptxjitcompiler": "libnvidia-ptxjitcompiler.so.1",
    "libnvidia-gpucomp": f"libnvidia-gpucomp.so.{VERSION}",
}
"""SONAME by the beginning of the file's name."""
GRAPHICS = {
    "libGLX_nvidia": "libGLX_nvidia.so.0",
    "libEGL_nvidia": "libEGL_nvidia.so.0",
    "libnvidia-glcore": f"libnvidia-glcore.so.{VERSION}",
}
VIDEO = {"libnvcuvid": "libnvcuvid.so.1", "libnvidia-encode": "libnvidia-encode.so.1"}
PROGRAMS = ("nvidia-smi", "nvidia-cuda-mps-server")


def elf(soname: str, *, bits: int = 64) -> bytes:
    """The bytes of a shared library that says its SONAME, as a linker writes them: one segment and its dynamic part."""
    if bits == 32:
        return struct.pack("<4sBB10xHH", b"\x7fELF", 1, 1, 3, 3).ljust(64, b"\0")
    strings, base = b"\0" + soname.encode() + b"\0", 0x1000
    segments, dynamic = 64, 64 + 2 * 56
    table = dynamic + 3 * 16
    size = table + len(strings)
    entries = [(5, base + table), (14, 1)] if soname else [(5, base + table)]
    entries += [(0, 0)] * (3 - len(entries))
    header = struct.pack("<4sBB10xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 3, 62, 1, 0, segments, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, base, base, size, size, 4096)
    dyn = struct.pack("<IIQQQQQQ", 2, 4, dynamic, base + dynamic, base + dynamic, 48, 48, 8)
    return header + load + dyn + b"".join(struct.pack("<qQ", *one) for one in entries) + strings


class DriverRoot:
    """root: the file system's root. folder: where its libraries are."""

    def __init__(self, root: Path, folder: str = "usr/lib/x86_64-linux-gnu") -> None:
        self.root, self.folder = root, folder

    def install(self, version: str = VERSION, *, without: Sequence[str] = ()) -> None:
        """What the driver's installer leaves: everything, except the libraries that begin like one of `without`."""
        for stem, soname in (COMPUTE | GRAPHICS | VIDEO).items():
            if stem not in without:
                self.library(stem, soname.replace(VERSION, version), version)
        for name in PROGRAMS:
            self.write(f"usr/bin/{name}", b"\x7fELF")
        for name in ("gsp_ga10x.bin", "gsp_tu10x.bin"):
            self.write(f"lib/firmware/nvidia/{version}/{name}", b"firmware")
        self.write("usr/share/vulkan/icd.d/nvidia_icd.json", b"{}")

    def library(self, stem: str, soname: str, version: str = VERSION, *, bits: int = 64) -> str:
        """One library with its links, as ldconfig makes them. Return its path below the root."""
        path = f"{self.folder}/{stem}.so.{version}"
        self.write(path, elf(soname, bits=bits))
        if soname and soname != f"{stem}.so.{version}":
            self.link(f"{self.folder}/{soname}", f"{stem}.so.{version}")
        return path

    def write(self, path: str, data: bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def link(self, path: str, target: str) -> None:
        at = self.root / path
        at.parent.mkdir(parents=True, exist_ok=True)
        if at.is_symlink():
            at.unlink()
        os.symlink(target, at)

    def cache(self, *paths: str) -> None:
        """The loader's cache as glibc 2.32 and later write it: a header, entries, then the strings that they name."""
        strings = b"".join(f"{Path(path).name}\0{path}\0".encode() for path in paths)
        start = 48 + 24 * len(paths)
        entries, at = b"", start
        for path in paths:
            key, value = at, at + len(Path(path).name) + 1
            entries += struct.pack("<iIIIQ", 0x0303, key, value, 0, 0)
            at = value + len(path) + 1
        head = struct.pack("<20sIIB3xI12x", b"glibc-ld.so.cache1.1", len(paths), len(strings), 2, 0)
        self.write("etc/ld.so.cache", head + entries + strings)
