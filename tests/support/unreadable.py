"""A file that is good and cannot be read for the moment."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock


@contextlib.contextmanager
def unreadable(name: str) -> Iterator[None]:
    """Every open of a file of this name fails with EIO."""
    opened = Path.open

    def fails(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *args, **kwargs)

    with mock.patch.object(Path, "open", fails):
        yield
