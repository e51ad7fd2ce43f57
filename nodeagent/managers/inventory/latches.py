"""Latched causes of bad health, in a file that outlives the agent.

A cause counts until the machine or the device's driver starts anew, or until an admin clears it: each is kept with the
boot id and with what identifies the binding of the driver. A GPU that was reset without that is cleared by the admin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from nodeagent.core.model.health import DeviceState, Evidence
from nodeagent.errors import HostError, cause_of
from nodeagent.host.sysfs import atomic_file
from nodeagent.telemetry.once import Once

FILE = "health.json"
"""In the state folder."""


class _Cause(msgspec.Struct, frozen=True):
    device: str
    source: str
    state: DeviceState
    reason: str
    boot_id: str
    binding: str


class _Document(msgspec.Struct, frozen=True):
    causes: tuple[_Cause, ...] = ()
    version: int = 1


class LatchMemory:
    """The causes that hold at this moment, and their file. Everything blocks."""

    def __init__(self, path: Path, boot_id: str, binding: Callable[[str], str]) -> None:
        """binding: returns what identifies the binding of a device's driver; "" if the device has none."""
        self._path = path
        self._boot_id = boot_id
        self._binding = binding
        self._causes: dict[tuple[str, str], _Cause] | None = None
        self._unreadable, self._unwritable = Once("health-unreadable"), Once("health-not-written")

    def standing(self, devices: Iterable[str]) -> tuple[list[Evidence], list[str]]:
        """Return the causes that still hold of some devices, and the devices whose causes have ended."""
        known = self._known()
        there = frozenset(devices)
        ended = {one.device for one in known.values() if one.device in there and not self._holds(one)}
        for key in [key for key in known if key[0] in ended]:
            del known[key]
        if ended:
            self._write()
        holding = [
            Evidence(device=one.device, source=one.source, state=one.state, reason=one.reason, latched=True)
            for one in known.values()
            if one.device in there
        ]
        return holding, sorted(ended)

    def keep(self, causes: Iterable[Evidence], cleared: Iterable[str] = ()) -> None:
        """Remember further causes, and forget those of cleared devices."""
        known = self._known()
        before = dict(known)
        for key in [key for key in known if key[0] in frozenset(cleared)]:
            del known[key]
        for one in causes:
            old = known.get((one.device, one.source))
            if old is None or old.reason != one.reason:
                binding = self._binding(one.device)
                known[one.device, one.source] = _Cause(
                    one.device, one.source, one.state, one.reason, self._boot_id, binding
                )
        if known != before:
            self._write()

    def _holds(self, cause: _Cause) -> bool:
        return cause.boot_id == self._boot_id and cause.binding == self._binding(cause.device)

    def _known(self) -> dict[tuple[str, str], _Cause]:
        if self._causes is None:
            self._causes = {(one.device, one.source): one for one in self._read().causes}
        return self._causes

    def _read(self) -> _Document:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Document)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "errors that GPUs reported before the agent started are not known"
            self._unreadable.report(f"cannot read {self._path}: {cause_of(error)}", left=left)
        return _Document()

    def _write(self) -> None:
        causes = tuple(one for _, one in sorted(self._known().items()))
        try:
            atomic_file.replace(self._path, msgspec.json.encode(_Document(causes=causes)), mode=0o600)
            self._unwritable.clear()
        except HostError as error:
            self._unwritable.report(str(error))
