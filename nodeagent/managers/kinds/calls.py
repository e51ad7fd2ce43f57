"""Calls of the hooks of kinds, each in a thread with a deadline: whatever a hook does, the caller gets a value or a
HostError.

A hook that hangs is left behind in its thread, and no hook is called for its device before it has returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from nodeagent.aio.reads import Reads
from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.errors import HostError
from nodeagent.host.devices.hooks import Preparing

HOOK_S = 5.0
"""How long a hook may take. Kubelet waits 45 s for all devices of a pod's claims."""


class _Outcome(NamedTuple):
    """What a hook returned, or what it raised."""

    value: object = None
    error: BaseException | None = None


class HookCalls:
    """One caller at a time."""

    def __init__(self, deadline_s: float = HOOK_S) -> None:
        """deadline_s: how long a hook may take at least; a call ends after twice as long at most."""
        self._deadline_s = deadline_s
        self._reads: Reads[str, _Outcome] = Reads(deadline_s)

    async def prepare(self, kind: Preparing, device: Device, config: Any) -> ContainerEdits:
        """Return what the container of a device gets besides what the kind says of it. Raise HostError."""
        what = f"prepare {device.id}"
        said = await self._called(what, kind, device, functools.partial(kind.prepare, device, config))
        if said is None:
            return ContainerEdits()
        if not isinstance(said, ContainerEdits):
            raise HostError(
                f"cannot {what}: the kind {kind.name} returned {type(said).__name__}, expected ContainerEdits or None"
            )
        try:  # as it is recorded
            return msgspec.json.decode(msgspec.json.encode(said, enc_hook=dict), type=ContainerEdits)
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise HostError(
                f"cannot {what}: the kind {kind.name} returned ContainerEdits that are none: {error}"
            ) from None

    async def unprepare(self, kind: Preparing, device: Device, config: Any) -> None:
        """Undo what `prepare` did. Raise HostError."""
        what = f"unprepare {device.id}"
        await self._called(what, kind, device, functools.partial(kind.unprepare, device, config))

    async def _called(self, what: str, kind: Preparing, device: Device, work: Callable[[], object]) -> object:
        found, hanging = await self._reads.run({device.id: functools.partial(_caught, work)})
        if device.id in hanging:
            raise HostError(f"cannot {what}: the kind {kind.name} has not returned for {self._deadline_s:g} s")
        value, error = found[device.id]
        if error is not None:
            raise HostError(f"cannot {what}: the kind {kind.name} raised {type(error).__name__}: {error}")
        return value


def _caught(work: Callable[[], object]) -> _Outcome:
    try:
        return _Outcome(value=work())
    except BaseException as error:  # the thread of a hook that calls sys.exit must end like any other
        return _Outcome(error=error)
