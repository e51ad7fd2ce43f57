"""Reading a file that may be bind-mounted on its own, as a pod's hostPath of a single file is.

Such a mount always shows the same inode. Most editors, `sed -i` and kubelet itself write a new file and rename it: the
mount then still shows the old file, which no longer has a name.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

_STALE = "it was replaced on the host after it was mounted here; restart the agent's pod"
_LOOKS, _BETWEEN_S = 5, 0.01
"""A rename in progress briefly looks the same: the opened file has been unlinked, while the path still resolves to
it."""


def read(path: Path) -> bytes:
    """Return the file's content. Raise OSError with errno.ESTALE if the file has been replaced on the host."""
    looks = 0
    while looks < _LOOKS:
        with path.open("rb") as file:
            content, seen = file.read(), os.fstat(file.fileno())
            if seen.st_nlink:
                return content
            # While it is open, no other file can have its inode number.
            is_stale = os.path.samestat(seen, path.stat())
        if is_stale:
            looks += 1
            time.sleep(_BETWEEN_S)
    raise OSError(errno.ESTALE, _STALE, str(path))
