"""One node with everything that the agent meets through DRA: kubelet's two sides, the API server, the agent itself."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.builders.devices import DeviceTree
from tests.doubles.api_server import FakeApiServer
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet, Outcome
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import Running, running

DRIVER, NODE = "nodeagent.dev", "node-a"
QUICK = {
    "resyncSeconds": 0.1,
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
}
CPU, CHAR = "nodeagent.dev/cpu", "nodeagent.dev/serial"
CPUS = {"name": "cpu", "kind": "cpu", "serve": "both"}
SERIAL = {"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"], "serve": "both"}
SHARED = {"name": "null", "kind": "char", "paths": ["/dev/null"], "replicas": 4, "serve": "both"}
PAGES = {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "serve": "both"}
MEMORY = {"name": "memory", "kind": "memory", "serve": "dra"}


@dataclass
class DraNode:
    """What tests touch of a node."""

    folder: Path
    kubelet: FakeKubelet
    dra: FakeDraKubelet
    api: FakeApiServer
    agent: Running
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cdi(self) -> Path:
        return self.folder / "cdi"

    async def published(self, *kinds: str) -> None:
        """Return once the server has complete pools of these kinds."""
        await self.api.until(lambda: all(self.devices(kind) for kind in kinds))

    def devices(self, kind: str) -> dict[str, dict[str, Any]]:
        """The devices of a pool by name, of its newest generation; none while it is not complete."""
        slices = [one["spec"] for one in self.api.slices(node=NODE) if one["spec"]["pool"]["name"] == f"{NODE}/{kind}"]
        newest = max((one["pool"]["generation"] for one in slices), default=0)
        slices = [one for one in slices if one["pool"]["generation"] == newest]
        if len(slices) != (slices[0]["pool"]["resourceSliceCount"] if slices else -1):
            return {}
        return {device["name"]: device for one in slices for device in one.get("devices", ())}

    def claim(self, name: str, *results: Mapping[str, Any], **more: Any) -> ClaimId:
        """An allocated claim in the API server."""
        made = self.api.add_claim(name, results=[dict(one) for one in results], **more)
        return ClaimId("default", name, made["metadata"]["uid"])

    async def prepare(self, *claims: ClaimId) -> list[Outcome]:
        """What kubelet is answered, in the order asked."""
        answers = await self.dra.prepare(DRIVER, claims)
        return [answers[claim.uid] for claim in claims]

    async def unprepare(self, *claims: ClaimId) -> list[str]:
        answers = await self.dra.unprepare(DRIVER, claims)
        return [answers[claim.uid] for claim in claims]

    def spec(self, claim: ClaimId) -> Any:
        """The claim's CDI file."""
        (path,) = [one for one in self.cdi.glob("*.json") if claim.uid in one.name]
        return json.loads(path.read_text())

    def env(self, claim: ClaimId, device: int = 0) -> dict[str, str]:
        """The variables of one device of a claim."""
        lines = self.spec(claim)["devices"][device]["containerEdits"].get("env", [])
        return dict(line.split("=", 1) for line in lines)

    def metadata(self, claim: ClaimId) -> Any:
        return json.loads((self.folder / "run" / "claims" / claim.uid / "metadata.json").read_text())

    async def grants(self) -> list[dict[str, Any]]:
        """As soon as an agent answers: one that was started again registers before it does."""
        found: list[dict[str, Any]] = await self.agent.until("/v1/grants", lambda grants: isinstance(grants, list))
        return found


def result(kind: str, device: str, request: str = "r", **more: Any) -> dict[str, Any]:
    """What the scheduler writes into a claim's allocation."""
    return {"request": request, "driver": DRIVER, "pool": f"{NODE}/{kind}", "device": device, **more}


def consumed(kind: str, device: str, request: str = "r", share: str = "", **amounts: str) -> dict[str, Any]:
    """The same of a shared device; shareID must be a UID."""
    share = share or str(uuid.uuid4())
    return result(kind, device, request, shareID=share, consumedCapacity=amounts)


@contextlib.asynccontextmanager
async def dra_node(
    folder: Path,
    tree: DeviceTree,
    resources: Sequence[Mapping[str, Any]],
    dra: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    program: Path | None = None,
    module: str = "nodeagent",
) -> AsyncIterator[DraNode]:
    """A node whose agent is registered with both sides of kubelet. program: where it is installed, if that is not the
    checkout. module: what is run."""
    async with FakeApiServer() as api, FakeKubelet(folder / "kubelet") as kubelet:
        api.add_node(NODE)
        access = {"kubeconfig": str(api.kubeconfig(folder)), "nodeName": NODE, "cdiDir": str(folder / "cdi")}
        options = {"resources": list(resources), **QUICK, "dra": {**access, "spreadSeconds": 0, **(dra or {})}}
        options |= more or {}
        async with (
            FakeDraKubelet(folder / "kubelet") as side,
            running(folder, root=tree.root, program=program, module=module, **options) as agent,
        ):
            await side.wait_registered(DRIVER)
            for one in resources:
                if one.get("serve") != "dra":
                    await kubelet.wait_registered(f"nodeagent.dev/{one['name']}")
            yield DraNode(folder, kubelet, side, api, agent, options)
