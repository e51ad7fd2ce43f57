"""Latched causes of bad health, in a file that outlives the agent.

A cause counts until a reboot, until the driver is bound again, or until an admin clears it: each is kept with the
boot id and with what identifies the binding of the driver. A GPU that was reset without that is cleared by the admin:
nothing proves a reset (docs/decisions/0017).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.health import DeviceState, Evidence, Observed, Remedy, outlasting
from nodeagent.errors import HostError
from nodeagent.host.sysfs.record_file import RecordFile, UnreadableError
from nodeagent.telemetry.once import Once

_Causes = dict[tuple[str, str], "_Cause"]
"""By device and source."""
FILE = "health.json"
"""In the state folder."""
LOCK_S, LOCK_POLL_S = 1.0, 0.01
"""How long another agent is waited for: a change takes milliseconds."""


class _Cause(msgspec.Struct, frozen=True):
    device: str
    source: str
    state: DeviceState
    reason: str
    boot_id: str
    binding: str
    remedy: Remedy = Remedy.NONE


class _Document(msgspec.Struct, frozen=True):
    causes: tuple[_Cause, ...] = ()
    version: int = 1


class LatchMemory:
    """The latched causes, in their file. Everything blocks.

    Two agents may have the file at once, as during a rolling upgrade: each change reads it, changes it and replaces it
    under a lock, and nothing else of it is remembered but what could not be written.
    """

    def __init__(self, path: Path, boot_id: str, binding: Callable[[str], str]) -> None:
        """binding: returns what identifies the binding of a device's driver; "" if the device has none."""
        self._path = path
        self._file = RecordFile(path, _Document)
        self._boot_id = boot_id
        self._binding = binding
        self._unwritten: _Causes = {}
        self.readable = True
        """Whether the file could be read when it was last looked at."""
        self.damaged = False
        """Whether it was there and made no sense: what had latched is not known."""
        self._unreadable, self._unwritable = Once("health-unreadable"), Once("health-not-written")

    def standing(self, devices: Iterable[str]) -> tuple[list[Evidence], list[str]]:
        """Return the causes that still hold of some devices, and the devices whose causes have ended."""
        there = frozenset(devices)
        if self._unwritten:
            self._change(dict)
        known = self._read()
        ended = {one.device for one in known.values() if one.device in there and not self._holds(one)}
        if ended:
            self._change(lambda causes: _without(causes, ended))
        holding = [
            Evidence(
                device=one.device,
                source=one.source,
                state=one.state,
                reason=one.reason,
                latched=True,
                remedy=one.remedy,
            )
            for one in known.values()
            if one.device in there - ended
        ]
        return holding, sorted(ended)

    def keep(self, causes: Iterable[Evidence]) -> None:
        """Remember further causes. One that is less bad does not replace a worse one, nor lessen what ends it."""
        new = {(one.device, one.source): self._cause(one) for one in causes}
        known = self._read()
        if any(_standing(one, known.get(key)) != known.get(key) for key, one in new.items()):
            self._change(lambda there: {**there, **{key: _standing(one, there.get(key)) for key, one in new.items()}})

    def clear(self, device: str) -> None:
        """Forget the causes of a device."""
        self._change(lambda causes: _without(causes, {device}))

    def _cause(self, one: Evidence) -> _Cause:
        boot_id, binding = self._boot_id, self._binding(one.device)
        return _Cause(one.device, one.source, one.state, one.reason, boot_id, binding, one.remedy)

    def _holds(self, cause: _Cause) -> bool:
        return cause.boot_id == self._boot_id and cause.binding == self._binding(cause.device)

    def _change(self, change: Callable[[_Causes], _Causes]) -> None:
        with self._locked():
            after = change(self._read())
            document = _Document(causes=tuple(one for _, one in sorted(after.items())))
            try:
                self._file.save(document)
                self._unwritten = {}
                self._unwritable.clear()
            except HostError as error:
                self._unwritten = after
                self._unwritable.report(str(error))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of all agents of the node.

        Go on without it if the folder cannot be used, which writing reports, or if an agent that hangs has it."""
        handle = None
        with contextlib.suppress(OSError):
            handle = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _lock(handle)
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _read(self) -> _Causes:
        self.readable, self.damaged = True, False
        if self._unwritten:
            return dict(self._unwritten)
        try:
            document = self._file.load()
        except UnreadableError as error:
            left = "errors that GPUs reported before the agent started are not known"
            self.readable, self.damaged = False, error.damaged
            self._unreadable.report(str(error), left=left)
            return {}
        return {(one.device, one.source): one for one in document.causes} if document is not None else {}


def _lock(handle: int) -> None:
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_POLL_S)
        else:
            return


def _standing(new: _Cause, known: _Cause | None) -> _Cause:
    """Return what stands of a cause and the one that is known."""
    if known is None or (known.boot_id, known.binding) != (new.boot_id, new.binding):
        return new
    stands = outlasting(_observed(known), _observed(new))
    return replace(new, state=stands.state, reason=stands.reason, remedy=stands.remedy)


def _observed(cause: _Cause) -> Observed:
    return Observed(cause.state, cause.reason, True, cause.remedy)


def _without(causes: _Causes, devices: Set[str]) -> _Causes:
    return {key: one for key, one in causes.items() if one.device not in devices}
