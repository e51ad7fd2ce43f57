"""Device information files: there before kubelet is answered, gone after the release, and no others touched."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from nodeagent.config.network import NetworkConfig
from nodeagent.core.model.claim import ClaimRef
from nodeagent.host.devices import all_kinds
from nodeagent.managers.deviceplugin.adapter import OfferAdapter
from nodeagent.managers.dra.prepare import ClaimPreparer
from nodeagent.managers.network.device_info import DeviceInfoManager, left_files
from nodeagent.resources.offer import offers
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import result

PF, VFS = "0000:3b:00.0", [f"0000:3b:01.{index}" for index in range(3)]
RESOURCES = (
    {"name": "intel.com/dpdk", "kind": "nic", "serve": "both", "match": {"vf_index": "[01]"}, "vhostNet": True},
    {"name": "intel.com/dpdk-slow", "kind": "nic", "serve": "both", "match": {"vf_index": "2"}},
)


async def _nothing() -> None:
    """Refresh nothing."""


class Node:
    """A port with three virtual functions, and what looks after their files."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.folder = room.folder / "devinfo" / "dp"
        self.memory = room.folder / "state" / "device-info.json"
        self.shown = str(self.folder)
        self.open()

    def open(self) -> None:
        """As after kill -9."""
        room = self.room
        self.files = DeviceInfoManager(room.agent, all_kinds.builtin_kinds(), self.memory, self._config)
        room.claims = ClaimPreparer(
            room.agent, lambda: room.dra, room.fetch, room.rendering, room.tell, followed=self.files.granted
        )

    def _config(self) -> object:
        return msgspec.structs.replace(self.room.config, network=NetworkConfig(device_info_dir=self.shown))

    def names(self) -> list[str]:
        return sorted(one.name for one in self.folder.iterdir()) if self.folder.exists() else []

    async def allocate(self, name: str, *ids: str) -> None:
        offer = next(one for one in offers(self.room.config, all_kinds.builtin_kinds()) if one.name == name)
        await OfferAdapter(self.room.agent, offer, granted=self.files.granted).allocate([ids], "op")

    def claim(self, name: str, vf: str) -> ClaimRef:
        return self.room.claim(name, result("nic", vf.replace(":", "-").replace(".", "-")))


@contextlib.asynccontextmanager
async def node(folder: Path) -> AsyncIterator[Node]:
    async with claim_room(folder, *RESOURCES) as room:
        room.tree.pci(PF, driver="ice", numa_node=0)
        for index, address in enumerate(VFS):
            room.tree.vf(PF, index, address)
        room.rescan()
        yield Node(room)


async def test_a_container_of_the_device_plugin_has_its_file_before_kubelet_is_answered(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.allocate("intel.com/dpdk", VFS[0], VFS[1])
        await one.allocate("intel.com/dpdk-slow", VFS[2])
        assert one.names() == [
            f"intel.com-dpdk-{VFS[0]}-device.json",
            f"intel.com-dpdk-{VFS[1]}-device.json",
            f"intel.com-dpdk-slow-{VFS[2]}-device.json",
        ]
        found = json.loads((one.folder / one.names()[0]).read_text())
        assert found["pci"] == {"pci-address": VFS[0], "pf-pci-address": PF, "vhost-net": "/dev/vhost-net"}
        assert (one.folder / one.names()[0]).stat().st_mode & 0o777 == 0o444


async def test_a_claim_has_its_file_from_prepare_to_unprepare(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        ref = one.claim("c", VFS[1])
        (answer,) = await one.room.prepare(ref)
        assert (answer.error, one.names()) == ("", [f"intel.com-dpdk-{VFS[1]}-device.json"])
        await one.room.unprepare(ref)
        await one.files.settle()
        assert one.names() == [] and not one.memory.exists()


async def test_after_kill_9_the_next_agent_removes_what_is_no_longer_held_and_nothing_else(tmp_path: Path) -> None:
    """Killed between release and removal. Another plugin's file has a name that begins like ours."""
    async with node(tmp_path) as one:
        ref = one.claim("c", VFS[1])
        await one.room.prepare(ref)
        await one.allocate("intel.com/dpdk", VFS[0])
        theirs = one.folder / f"intel.com-dpdk-fast-{VFS[1]}-device.json"
        theirs.write_text("{}")
        await one.room.unprepare(ref)
        await one.room.restart()
        one.open()
        await one.files.settle()
        assert one.names() == [f"intel.com-dpdk-{VFS[0]}-device.json", theirs.name]


async def test_files_that_vanish_are_written_again(tmp_path: Path) -> None:
    """/var/run is empty after a reboot, and an admin may empty the folder."""
    async with node(tmp_path) as one:
        await one.allocate("intel.com/dpdk", VFS[0])
        for path in one.folder.iterdir():
            path.unlink()
        one.folder.rmdir()
        await one.files.settle()
        assert one.names() == [f"intel.com-dpdk-{VFS[0]}-device.json"]


@pytest.mark.parametrize("shown", ["", "elsewhere"])
async def test_with_another_folder_or_none_the_old_files_go(tmp_path: Path, shown: str) -> None:
    async with node(tmp_path) as one:
        await one.allocate("intel.com/dpdk", VFS[0])
        one.shown = str(tmp_path / shown) if shown else ""
        await one.files.settle()
        assert one.names() == []
        there = [path.name for path in (tmp_path / "elsewhere").iterdir()] if shown else []
        assert there == ([f"intel.com-dpdk-{VFS[0]}-device.json"] if shown else [])
        assert one.memory.exists() is bool(shown)


async def test_nothing_is_removed_while_the_ledger_may_lack_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path) as one:
        ref = one.claim("c", VFS[1])
        await one.room.prepare(ref)
        await one.room.unprepare(ref)
        monkeypatch.setattr(one.room.agent, "refresh", _nothing)
        one.room.agent.loss = "moved aside"
        await one.files.settle()
        assert one.names() == [f"intel.com-dpdk-{VFS[1]}-device.json"]


async def test_a_folder_that_cannot_be_written_holds_up_no_pod_and_is_a_note(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        (tmp_path / "file").write_text("")
        one.shown = str(tmp_path / "file" / "dp")
        await one.allocate("intel.com/dpdk", VFS[0])
        (note,) = one.files.notes()
        assert note.startswith("network.deviceInfoDir: cannot write ")
        one.shown = str(one.folder)
        await one.files.settle()
        assert one.files.notes() == []


async def test_an_uninstall_finds_the_files(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.allocate("intel.com/dpdk", VFS[0])
        (one.folder / "other-device.json").write_text("{}")
        assert [path.name for path in left_files(one.memory)] == [f"intel.com-dpdk-{VFS[0]}-device.json"]
        assert left_files(tmp_path / "none") == []
