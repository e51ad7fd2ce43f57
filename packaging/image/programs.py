"""Programs of the machine that a build runs, each with a deadline."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from image.errors import ImageError

DEADLINE_S = 900.0
_LAST_WORDS = 2000


def need(*names: str) -> None:
    """Raise ImageError if one of the programs is not in PATH."""
    if missing := [name for name in names if shutil.which(name) is None]:
        raise ImageError(f"{', '.join(missing)} not found: the image is made of Debian packages, with apt and dpkg")


def run(words: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Return what a program prints. Raise ImageError with its last words if it fails or is late."""
    command = [str(word) for word in words]
    shown = " ".join(command)[:200]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{shown} did not end within {DEADLINE_S:g} s") from error
    if done.returncode:
        raise ImageError(f"{shown} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-_LAST_WORDS:]}")
    return done.stdout
