"""Reading a file that may be mounted here by itself, as a pod's hostPath of one file is.

Such a mount always shows the same inode. Most editors, `sed -i` and kubelet itself write a new file and rename it: what
is mounted is then the old file, which no folder contains.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

_STALE = "it was replaced on the host after it was mounted here; restart the agent's pod"
_LOOKS, _BETWEEN_S = 5, 0.01
"""A rename in progress looks the same for a moment: the old file has lost its name, which still leads to it."""


def read(path: Path) -> bytes:
    """The file's content; OSError with errno.ESTALE where another file has taken its place on the host."""
    looks = 0
    while looks < _LOOKS:
        with path.open("rb") as file:
            content, seen = file.read(), os.fstat(file.fileno())
            if seen.st_nlink:
                return content
            # While it is open no other file has its number.
            is_stale = os.path.samestat(seen, path.stat())
        if is_stale:
            looks += 1
            time.sleep(_BETWEEN_S)
    raise OSError(errno.ESTALE, _STALE, str(path))
