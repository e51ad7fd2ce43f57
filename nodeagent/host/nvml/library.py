"""Where NVIDIA's management library is found.

The loader comes first (LD_LIBRARY_PATH, its cache, its own folders). What it does not find is searched below the roots
under which a container sees the driver: `/run/nvidia/driver`, where NVIDIA's GPU operator mounts the root of its driver
container, and `/host`, the host's root or only its library folders. Both are mounted there because a library folder of
the host at its own path would hide the container's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from nodeagent.host.nvml.values import Failure

LIBRARY = "libnvidia-ml.so.1"
ROOTS = ("run/nvidia/driver", "host")
_MACHINE = os.uname().machine
FOLDERS = tuple(
    f"{prefix}{folder}"
    for folder in (f"lib/{_MACHINE}-linux-gnu", "lib64", "lib")  # Debian's; Red Hat's and SUSE's; others'
    for prefix in ("usr/", "")
)


def has_library(root: Path) -> bool:
    """Return whether a root has the library itself, in one of ROOTS."""
    return any(candidates(root))


def load(root: Path = Path("/"), *, by_loader: bool = True) -> Failure | None:
    """Load the library, so that loading it by its name alone gives this one from now on: the loader compares the name
    with the SONAME of what is loaded. Return why there is none, or None if it is loaded. by_loader: whether the loader
    is asked first; it knows the library of this machine, which another root does not describe.

    A file that is found but does not load (of another architecture, or half written) is reported only if no other
    loads; it may be repaired, so it does not count as absent."""
    errors = []
    for path in (*([LIBRARY] if by_loader else []), *map(str, candidates(root))):
        try:
            ctypes.CDLL(path)
            return None
        except OSError as error:
            errors.append(f"cannot load {error}")  # the loader's message begins with the file's path
    found = errors[1:] if by_loader else errors
    return Failure(absent=not found, reason="; ".join(found) or f"there is no library {LIBRARY}")


def candidates(root: Path) -> Iterator[Path]:
    """Yield the files with the library's name below ROOTS, in the order in which they are tried."""
    paths = (root / top / folder / LIBRARY for top in ROOTS for folder in FOLDERS)
    return (path for path in paths if path.exists())
