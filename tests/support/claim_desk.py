"""Desk and Vitals: who prepares claims and who knows the health of devices, for tests of the wire adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from nodeagent.aio.revision import Revision
from nodeagent.core.model.claim import ClaimRef, DeviceHealth, Prepared, PreparedDevice

POOL = "node-1-cpu"


def ref(number: int | str, *, uid: str = "") -> ClaimRef:
    return ClaimRef(namespace="default", name=f"claim-{number}", uid=uid or f"uid-{number}")


def device(uid: str, name: str = "cpu-0", *, share_id: str = "") -> PreparedDevice:
    return PreparedDevice(
        requests=("cpus",), pool=POOL, device=name, cdi_ids=(f"nodeagent.dev/claim={uid}",), share_id=share_id
    )


class Desk:
    """Prepares what is asked, or does as it is told to."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.calls: list[tuple[str, list[str]]] = []
        self.ops: list[str] = []
        self.fault: BaseException | None = None
        self.results: dict[str, Any] = {}
        """Instead of the usual one, by UID."""
        self.left_out: set[str] = set()
        self.share_id = ""
        self.busy = asyncio.Event()
        """Set while a call waits for `free`."""
        self.free = asyncio.Event()
        self.free.set()
        self.done = asyncio.Event()
        """Set when a call has ended."""

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]:
        await self._turn("prepare", claims, op)
        self.held |= {one.uid for one in claims}
        usual = {one.uid: Prepared(devices=(device(one.uid, share_id=self.share_id),)) for one in claims}
        return self._answer(usual)

    async def unprepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, str]:
        await self._turn("unprepare", claims, op)
        self.held -= {one.uid for one in claims}
        return self._answer({one.uid: "" for one in claims})

    async def _turn(self, verb: str, claims: Sequence[ClaimRef], op: str) -> None:
        self.calls.append((verb, [one.uid for one in claims]))
        self.ops.append(op)
        self.busy.set()
        await self.free.wait()
        self.done.set()
        if self.fault is not None:
            raise self.fault

    def _answer(self, usual: dict[str, Any]) -> dict[str, Any]:
        return {uid: one for uid, one in {**usual, **self.results}.items() if uid not in self.left_out}


class Vitals:
    """A list of health that can be changed, or made to hang or fail."""

    def __init__(self, *states: tuple[str, str]) -> None:
        """(device, state) each."""
        self.revision = Revision()
        self.fault: Exception | None = None
        self.hangs = False
        self._states: dict[str, tuple[str, str]] = {}
        for name, state in states:
            self._states[name] = (state, "")

    def put(self, name: str, state: str, message: str = "") -> None:
        """Change one device."""
        self._states[name] = (state, message)
        self.revision.bump()

    def drop(self, name: str) -> None:
        """The device is gone."""
        del self._states[name]
        self.revision.bump()

    def states(self) -> tuple[DeviceHealth, ...]:
        if self.fault is not None:
            raise self.fault
        return tuple(
            DeviceHealth(pool=POOL, device=name, state=state, since_unix_s=1.0, message=message)
            for name, (state, message) in sorted(self._states.items())
        )

    async def changed(self, seen: int) -> int:
        if self.hangs:
            await asyncio.Event().wait()
        return await self.revision.changed(seen)
