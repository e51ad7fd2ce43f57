"""Claims for virtual machines: bound when prepared and given back when unprepared, with a real ledger and real files,
on a double of the kernel."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.opaque.decode import API_VERSION
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import Functions, TimedPut
from nodeagent.managers.dra import prepare as claims_of
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.passthrough import manager
from nodeagent.managers.passthrough.manager import PassthroughManager
from nodeagent.resources.catalog import dra_of
from nodeagent.state.lock import FileLock
from tests.doubles.pci_drivers import PciKernel
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import DRIVER, NODE, result
from tests.support.unreadable import unreadable

GPU, AUDIO, OTHER = "0000:41:00.0", "0000:41:00.1", "0000:43:00.0"
OWN = {GPU: "nvidia", AUDIO: "snd_hda_intel", OTHER: "nvidia"}
RESOURCES = (
    {"name": "gpu", "kind": "gpu", "serve": "both", "match": {"parent": ""}},
    {"name": "sound", "kind": "pci", "serve": "both", "match": {"pci_class": "0403*"}},
)


@dataclass
class Node:
    """A node with two GPUs, one with an audio function in its IOMMU group, and its kernel."""

    room: Room
    kernel: PciKernel
    passthrough: PassthroughManager

    def claim(self, name: str, device: str, driver: str = "vfio-pci", kind: str = "gpu", **more: Any) -> ClaimRef:
        ref = self.room.claim(name, result(kind, device.replace(":", "-").replace(".", "-")))
        if driver:
            parameters = {"apiVersion": API_VERSION, "kind": "GpuConfig", "driver": driver, **more}
            config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
            self.room.objects["default", name]["status"]["allocation"]["devices"]["config"] = [config]
        return ref

    async def prepare(self, ref: ClaimRef) -> str:
        (answer,) = await self.room.prepare(ref)
        return answer.error

    def drivers(self) -> dict[str, str]:
        return {address: self.kernel.driver(address) for address in OWN}

    def edits(self, ref: ClaimRef) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.room.spec_file(ref).read_text())["devices"][0]["containerEdits"]
        return found

    def open(self) -> None:
        """Start what prepares claims, as after kill -9."""
        room = self.room
        put = _Direct(self.kernel.put)
        functions = Functions(SysFs(room.tree.root), put)

        async def rescan() -> None:
            room.rescan()

        self.passthrough = PassthroughManager(room.agent, functions, room.folder / "state", rescan)
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, passthrough=self.passthrough
        )


class _Direct(TimedPut):
    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from None


@contextlib.asynccontextmanager
async def node(folder: Path, *drivers: str) -> AsyncIterator[Node]:
    async with claim_room(folder, *RESOURCES) as room:
        facts = {GPU: ("030200", 7), AUDIO: ("040300", 7), OTHER: ("030200", 9)}
        for minor, (address, (pci_class, group)) in enumerate(facts.items()):
            made = room.tree.pci(address, pci_class=pci_class, vendor="10de", driver=OWN[address], group=group)
            room.tree.link(f"sys/kernel/iommu_groups/{group}/devices/{address}", made)
            if pci_class.startswith("03"):
                room.tree.node(f"/dev/nvidia{minor}")
                lines = f"Model: NVIDIA L40\nGPU UUID: GPU-{minor}\nDevice Minor: {minor}"
                room.tree.write(f"proc/driver/nvidia/gpus/{address}/information", lines)
        tables = {driver: frozenset(one for one in OWN if OWN[one] == driver) for driver in set(OWN.values())}
        allowed = list(drivers or ("vfio-pci",))
        content = {"resources": [dict(one) for one in RESOURCES], "dra": {"passthroughDrivers": allowed}}
        room.config = msgspec.convert(content, Config)
        room.dra = dra_of(room.config, all_kinds.builtin_kinds(), NODE)
        room.rescan()
        made_node = Node(room, PciKernel(room.tree.root, tables), None)  # type: ignore[arg-type]
        made_node.open()
        try:
            yield made_node
        finally:
            await made_node.passthrough.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the last process of a pod to end."""
    monkeypatch.setattr(claims_of, "ENDING_S", 0.0)


async def test_a_claim_gets_the_nodes_of_its_group_and_the_driver_back_afterwards(folder: Path) -> None:
    """With the audio function; nothing of NVIDIA's; the address is in the metadata, where KubeVirt looks."""
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        assert one.drivers() == {**OWN, GPU: "vfio-pci", AUDIO: "vfio-pci"}
        assert [it["path"] for it in one.edits(claim)["deviceNodes"]] == ["/dev/vfio/vfio", "/dev/vfio/7"]
        assert not [line for line in one.edits(claim)["env"] if line.startswith("NVIDIA")]
        stream = (one.room.readable / claim.uid / "request-r.json").read_text().splitlines()
        attributes = json.loads(stream[0])["requests"][0]["devices"][0]["attributes"]
        assert attributes["resource.kubernetes.io/pciBusID"] == {"string": GPU}
        assert await one.prepare(claim) == ""
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN
        assert one.room.agent.ledger.grants == {}
        assert not (folder / "state/passthrough.json").exists()


async def test_a_driver_that_the_node_does_not_allow_is_refused_and_nothing_is_bound(folder: Path) -> None:
    async with node(folder, "mlx5_vfio_pci") as one:
        error = await one.prepare(one.claim("c", GPU))
        assert "dra.passthroughDrivers of this node does not have it" in error
        assert one.drivers() == OWN
        assert one.room.agent.ledger.grants == {}


async def test_a_member_of_the_group_that_is_held_is_named(folder: Path) -> None:
    """And the other way round: while the group is a guest's, no claim gets the audio function."""
    async with node(folder) as one:
        sound = one.claim("s", AUDIO, "", "pci")
        assert await one.prepare(sound) == ""
        assert f"{AUDIO} is held" in await one.prepare(one.claim("c", GPU))
        assert one.drivers() == OWN
        assert await one.room.unprepare(sound) == [""]
        claim = one.claim("d", GPU)
        assert await one.prepare(claim) == ""
        assert "held by claim default/d" in await one.prepare(one.claim("t", AUDIO, "", "pci"))


async def test_a_guest_s_gpu_and_another_one_on_the_node_do_not_disturb_each_other(folder: Path) -> None:
    async with node(folder) as one:
        assert await one.prepare(one.claim("guest", GPU)) == ""
        plain = one.claim("plain", OTHER, "")
        assert await one.prepare(plain) == ""
        assert "/dev/nvidia2" in [it["path"] for it in one.edits(plain)["deviceNodes"]]
        assert one.drivers()[OTHER] == "nvidia"


async def test_a_record_that_cannot_be_read_for_the_moment_keeps_the_claim(folder: Path) -> None:
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        with unreadable("passthrough.json"):
            (error,) = await one.room.unprepare(claim)
        assert "cannot unprepare claim" in error and "Input/output error" in error
        assert one.drivers()[GPU] == "vfio-pci" and one.room.agent.ledger.grants
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN and one.room.agent.ledger.grants == {}


async def test_what_may_be_bound_for_another_claim_is_handed_to_nobody_while_the_record_cannot_be_read(
    folder: Path,
) -> None:
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        await one.room.agent.unprepare([claim.uid], "an admin", "op")
        plain, other = one.claim("plain", GPU, ""), one.claim("other", OTHER, "")
        with unreadable("passthrough.json"):  # either may be bound
            for ref in (plain, other):
                assert "Input/output error" in await one.prepare(ref)
        assert f"cannot hand over {GPU}: it is not given back to its driver yet" in await one.prepare(plain)
        assert await one.prepare(other) == ""


async def test_a_device_bound_for_another_claim_is_not_handed_over_either_while_another_agent_binds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "LOCK_S", 0.05)
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        await one.room.agent.unprepare([claim.uid], "an admin", "op")
        lock = FileLock(folder / "state" / manager.LOCK)
        assert lock.try_take()
        try:
            assert "another agent has" in await one.prepare(one.claim("plain", GPU, ""))
            assert await one.prepare(one.claim("other", OTHER, "")) == ""
        finally:
            lock.close()


async def test_where_binding_fails_the_claim_fails_and_everything_is_given_back_when_it_is_unprepared(
    folder: Path,
) -> None:
    async with node(folder) as one:
        (one.kernel.root / "sys/bus/pci/drivers/vfio-pci").rmdir()
        claim = one.claim("c", GPU)
        assert "there is no driver vfio-pci (modprobe vfio-pci)" in await one.prepare(claim)
        assert not one.room.spec_file(claim).exists()
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN


async def test_what_a_living_pod_uses_is_neither_released_nor_given_back(folder: Path, impatient: None) -> None:
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        one.room.alive.add("pod-uid")
        (answer,) = await one.room.unprepare(claim)
        assert "it is in use, it runs" in answer
        assert one.drivers()[GPU] == "vfio-pci"
        one.room.alive.clear()
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN


async def test_a_claim_is_not_released_before_its_device_is_given_back(folder: Path) -> None:
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""

        def broken(path: str) -> None:
            if path.endswith("/driver/unbind"):
                raise OSError(5, "Input/output error")

        one.kernel.before = broken
        (answer,) = await one.room.unprepare(claim)
        assert "Input/output error" in answer
        assert len(one.room.agent.ledger.grants) == 1
        one.kernel.before = lambda path: None
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN


async def test_what_a_claim_that_was_released_otherwise_left_behind_is_given_back(folder: Path) -> None:
    """An admin released it, or kubelet forgot it; until then no claim is handed the device."""
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        await one.room.agent.unprepare([claim.uid], "an admin released it", "op")
        other = one.claim("d", GPU, "")
        assert "is not given back to its driver yet" in await one.prepare(other)
        await one.passthrough.recover()
        assert one.drivers() == OWN
        assert await one.prepare(other) == ""
        assert [it["path"] for it in one.edits(other)["deviceNodes"]] == ["/dev/nvidia0"]


@pytest.mark.parametrize("after", range(1, 8))
async def test_killed_while_a_claim_is_prepared_the_next_agent_completes_it(folder: Path, after: int) -> None:
    """At each write to the kernel."""
    async with node(folder) as one:
        claim, left = one.claim("c", GPU), [after]

        def die(path: str) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise _Killed

        one.kernel.before = die
        with contextlib.suppress(_Killed):
            await one.prepare(claim)
        one.kernel.before = lambda path: None
        await one.passthrough.close()
        await one.room.restart()
        one.open()
        assert await one.prepare(claim) == ""
        assert one.drivers() == {**OWN, GPU: "vfio-pci", AUDIO: "vfio-pci"}
        assert await one.room.unprepare(claim) == [""]
        assert one.drivers() == OWN


class _Killed(BaseException):
    """What kill -9 is."""


async def test_after_a_reboot_a_claim_is_bound_again(folder: Path) -> None:
    async with node(folder) as one:
        claim = one.claim("c", GPU)
        assert await one.prepare(claim) == ""
        one.kernel.reboot()
        await one.passthrough.close()
        await one.room.restart("another boot")
        one.open()
        one.room.rescan()
        await one.passthrough.recover()
        assert one.drivers() == OWN
        assert await one.prepare(claim) == ""
        assert one.drivers()[AUDIO] == "vfio-pci"
