"""Files of the agent, replaced as a whole: readers see the old content or the new one, even after a power cut. Files
that can be written again from something else may forgo the latter and cost no sync of a disk.

The draft is in the same folder as the file. Its name starts with a dot and ends in `.tmp`, so container runtimes ignore
it; `drafts` finds those that a killed agent left behind. Missing folders are created. Everything blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
import time
from pathlib import Path

from nodeagent.errors import HostError

DRAFT_END = ".tmp"
DAMAGED = ".damaged-"
"""In the names of files that were set aside, between the name that one had and when that was."""
READABLE = 0o644
_TRIES = 3
"""Another process may delete the folder, or a draft in it, between two steps."""


def replace(path: Path, content: bytes, *, mode: int = READABLE, durable: bool = True) -> bool:
    """Give a file this content and mode. Return False, without writing, if it has them already.
    Raise HostError with the cause. durable: whether it has to survive a power cut."""
    try:
        if _has(path, content, mode):
            return False
        _replace_patiently(path, content, mode, durable)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror or error}") from None
    return True


def remove(path: Path, *, durable: bool = True) -> bool:
    """Remove a file. Return whether it existed. Raise HostError with the cause if it cannot be removed. durable:
    whether it has to stay away after a power cut."""
    try:
        path.unlink()
        if durable:
            _settle(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror or error}") from None
    return True


def set_aside(path: Path, *, durable: bool = True) -> Path | None:
    """Rename a damaged file, so that nothing replaces it. Return its new name, or None if there is no file. Raise
    HostError with the cause. durable: whether it has to keep that name after a power cut."""
    target = _free_name(path)
    try:
        path.rename(target)
        if durable:
            _settle(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"cannot set aside {path}: {error.strerror or error}") from None
    return target


def _free_name(path: Path) -> Path:
    """Return a name for a damaged file to be set aside under, which nothing has."""
    name = f"{path.name}{DAMAGED}{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    names = [name, *(f"{name}-{number}" for number in range(1, 1000))]
    return next(one for one in map(path.with_name, names) if not os.path.lexists(one))


def remove_folder(folder: Path) -> bool:
    """Remove a folder and its files; it has no subfolders, and may be back after a power cut.

    Return whether there was anything to remove. Raise HostError with the cause. It retries more often than `replace`,
    which may put a file there at the same moment.
    """
    removed = []
    for left in reversed(range(2 * _TRIES)):
        removed += [remove(entry, durable=False) for entry in entries(folder)]
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
    """Return the entries of a folder in order of name; empty if it does not exist. Raise
    HostError if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostError(f"cannot list {folder}: {error.strerror or error}") from None


def version(path: Path) -> tuple[int, int, int] | None:
    """Return what differs after each change of a file's content, mode or owner: its device, inode and time of change in
    ns. None if there is no file or it cannot be seen."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def drafts(folder: Path, name: str) -> list[Path]:
    """Return drafts, half-written or abandoned, of files whose name matches a regular expression."""
    pattern = re.compile(rf"\.(?:{name})\.[^.]+{re.escape(DRAFT_END)}")
    return [entry for entry in entries(folder) if pattern.fullmatch(entry.name)]


def _has(path: Path, content: bytes, mode: int) -> bool:
    """Return whether the path is a plain file with this content and mode. Never blocks, whatever is there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except NotADirectoryError:
        raise
    except OSError:
        return False  # nothing there, or something to be replaced
    try:
        found = os.fstat(handle)
        alike = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == mode and found.st_size == len(content)
        return alike and os.read(handle, len(content) + 1) == content
    finally:
        os.close(handle)


def _replace_patiently(path: Path, content: bytes, mode: int, durable: bool) -> None:
    for left in reversed(range(_TRIES)):
        try:
            _make(path.parent)
            return _replace(path, content, mode, durable)
        except FileNotFoundError:
            if not left:
                raise
    return None


def _make(folder: Path) -> None:
    """Create a folder that everyone may read, whatever the umask; leave an existing one as it is."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)


def _replace(path: Path, content: bytes, mode: int, durable: bool) -> None:
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=DRAFT_END, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, mode)
            if durable:
                os.fsync(handle)
        Path(draft).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(draft).unlink()
        raise
    if durable:
        _settle(path.parent)


def _settle(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut; do nothing if the folder is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
