"""Files of the agent's own, replaced whole: a reader sees the old content or the new one, also after a power cut.

The draft lies in the same folder as the file, under a name that starts with a dot and ends in `.tmp`, which container
runtimes pass over; `drafts` finds what a killed agent left. Folders that are gone are made again. Everything blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from pathlib import Path

from nodeagent.errors import HostError

DRAFT_END = ".tmp"
READABLE = 0o644
_TRIES = 3
"""The folder, or a draft in it, may be deleted by others between two steps."""


def replace(path: Path, content: bytes, *, mode: int = READABLE) -> bool:
    """Give a file this content and mode; False, and nothing is written, where it has them. HostError with the cause."""
    try:
        if _has(path, content, mode):
            return False
        _replace_patiently(path, content, mode)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror or error}") from None
    return True


def remove(path: Path) -> bool:
    """Whether there was a file to remove; HostError with the cause where there is one that cannot be."""
    try:
        path.unlink()
        _settle(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror or error}") from None
    return True


def remove_folder(folder: Path) -> bool:
    """Whether there was a folder to remove, with the files in it; it has no folders below. Who puts a file there at the
    same moment gives up sooner than this."""
    removed = []
    for left in reversed(range(2 * _TRIES)):
        removed += [remove(entry) for entry in entries(folder)]
        try:
            folder.rmdir()
        except (FileNotFoundError, NotADirectoryError):
            return any(removed)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise HostError(f"cannot remove {folder}: {error.strerror or error}") from None
        else:
            return True
    raise AssertionError("the last try returns or raises")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order of name; nothing where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostError(f"cannot list {folder}: {error.strerror or error}") from None


def drafts(folder: Path, name: str) -> list[Path]:
    """Drafts of files whose name matches a regular expression, half-written or given up."""
    pattern = re.compile(rf"\.(?:{name})\.[^.]+{re.escape(DRAFT_END)}")
    return [entry for entry in entries(folder) if pattern.fullmatch(entry.name)]


def _has(path: Path, content: bytes, mode: int) -> bool:
    """Whether a plain file with this content and mode lies there. Never waits, whatever lies there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except NotADirectoryError:
        raise
    except OSError:
        return False  # nothing, or what is to be replaced
    try:
        found = os.fstat(handle)
        alike = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == mode and found.st_size == len(content)
        return alike and os.read(handle, len(content) + 1) == content
    finally:
        os.close(handle)


def _replace_patiently(path: Path, content: bytes, mode: int) -> None:
    for left in reversed(range(_TRIES)):
        try:
            _make(path.parent)
            return _replace(path, content, mode)
        except FileNotFoundError:
            if not left:
                raise
    return None


def _make(folder: Path) -> None:
    """A folder that everybody may look into, whatever the umask; one that is there stays as it is."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)


def _replace(path: Path, content: bytes, mode: int) -> None:
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=DRAFT_END, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
        Path(draft).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(draft).unlink()
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Make what was renamed or removed in a folder outlive a power cut; nothing to do where the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
