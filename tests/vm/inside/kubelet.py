"""Runs in the guest: kubelet's side of the device-plugin API in /var/lib/kubelet, asked through a socket.

A line of JSON in, one out: {"do": "state"}, {"do": "until", "resource": R, "has": [..], "lacks": [..], "limit_s": N},
{"do": "admit", "name": N, "wants": {R: COUNT}}, {"do": "delete", "name": N}; "others" of admit: what containers
alongside "main" want, by name. Times are seconds of CLOCK_MONOTONIC, as in udev's own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, "/share")

from tests.doubles.kubelet import AdmissionError, FakeKubelet

SOCKET = "/run/vm-kubelet.sock"
NAMESPACE = "vm"


class TimedKubelet(FakeKubelet):
    """Remembers when each list came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lists: list[dict[str, Any]] = []

    def _checked_list(self, resource: str, message: Any) -> Any:
        ids = [device.ID for device in message.devices if device.health == "Healthy"]
        shown = [device.ID for device in message.devices]
        self.lists.append({"at_s": time.monotonic(), "resource": resource, "ids": ids, "shown": shown})
        return super()._checked_list(resource, message)

    def state(self) -> dict[str, Any]:
        return {
            "registrations": self.registrations,
            "devices": {name: [_shown(one) for one in self.devices(name)] for name in self.endpoints},
            "lists": self.lists,
            "violations": [str(one) for one in self.violations],
        }

    async def until_devices(
        self, resource: str, has: list[str], lacks: list[str], shown: list[str], gone: list[str], limit_s: float
    ) -> dict[str, Any]:
        """The first list that holds now: its time, or an error. has, lacks: what is healthy, what is not; shown, gone:
        the same of what is there in whatever health."""

        def fits(healthy: set[str], every: set[str]) -> bool:
            wanted = healthy.issuperset(has) and every.issuperset(shown)
            return wanted and not healthy.intersection(lacks) and not every.intersection(gone)

        def holds() -> bool:
            every = self.devices(resource)
            healthy = {one.ID for one in every if one.health == "Healthy"}
            return resource in self.endpoints and fits(healthy, {one.ID for one in every})

        try:
            await asyncio.wait_for(self.until(holds), limit_s)
        except TimeoutError:
            return {"error": f"{resource} did not get there in {limit_s:g} s", **self.state()}
        lists = [one for one in self.lists if one["resource"] == resource]
        return next(one for one in reversed(lists) if fits({*one["ids"]}, {*one["shown"]}))

    async def admit(self, name: str, wants: dict[str, int], others: dict[str, dict[str, int]]) -> dict[str, Any]:
        """A pod whose container "main" gets what it wants, and others what they want."""
        try:
            pod = await self.admit_pod(NAMESPACE, name, {"main": wants, **others})
        except AdmissionError as error:
            return {"error": str(error)}
        envs = {key: value for one in pod.responses["main"].values() for key, value in one.envs.items()}
        return {"uid": pod.uid, "devices": pod.devices["main"], "envs": envs}


def _shown(device: Any) -> dict[str, Any]:
    nodes = [node.ID for node in device.topology.nodes]
    return {"id": device.ID, "health": device.health, "nodes": nodes}


async def answer(kubelet: TimedKubelet, request: dict[str, Any]) -> dict[str, Any]:
    match request.pop("do"):
        case "state":
            return kubelet.state()
        case "until":
            return await kubelet.until_devices(**request)
        case "admit":
            return await kubelet.admit(request["name"], request["wants"], request.get("others", {}))
        case "delete":
            await kubelet.delete_pod(NAMESPACE, request["name"])
            return {}
        case other:
            return {"error": f"cannot do {other!r}"}


async def main() -> None:
    async with TimedKubelet(Path("/var/lib/kubelet")) as kubelet:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            said = await answer(kubelet, json.loads(await reader.readline()))
            writer.write(json.dumps(said).encode() + b"\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_unix_server(serve, SOCKET) as server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
