"""The whole agent with network adapters: what it writes for CNI plugins, and what it asks of the kernel."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import running
from tests.support.until import until

PF, VFS = "0000:3b:00.0", [f"0000:3b:01.{index}" for index in range(2)]
NAME = "intel.com/dpdk"
RESOURCES = [{"name": NAME, "kind": "nic", "match": {"sriov": "vf"}}]
QUICK = {
    "resyncSeconds": 0.1,
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
}


async def test_a_pod_has_its_file_and_its_variables_over_a_kill_and_both_end_with_it(folder: Path) -> None:
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    tree.pci(PF, driver="ice")
    for index, vf in enumerate(VFS):
        tree.vf(PF, index, vf)
    info = folder / "devinfo" / "dp"
    options = {"resources": RESOURCES, "network": {"deviceInfoDir": str(info)}, **QUICK}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await kubelet.wait_allocatable(NAME, 2)
        await kubelet.admit_pod("default", "a", {"main": {NAME: 1}})
        (file,) = info.iterdir()
        address = json.loads(file.read_text())["pci"]["pci-address"]
        assert address in VFS and file.name == f"intel.com-dpdk-{address}-device.json"
        await agent.stop(signal.SIGKILL)
        file.unlink()
        await agent.start()
        await until(file.exists)
        await kubelet.delete_pod("default", "a")
        await until(lambda: not file.exists())


async def test_the_number_of_functions_is_recorded_and_asked_for(folder: Path) -> None:
    """Before and after a reload. Files stand for the kernel's here, so no function appears."""
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    tree.pci(PF, driver="ice", files={"sriov_totalvfs": 8, "sriov_numvfs": 0, "sriov_drivers_autoprobe": 1})
    number = tree.folders[PF] / "sriov_numvfs"
    rule = {"match": {"id": PF}, "count": 4}
    async with running(folder, root=tree.root, resources=[], network={"vfs": []}, **QUICK) as agent:
        await agent.ready()
        assert number.read_text() == "0\n"
        agent.configure(resources=[], network={"vfs": [{**rule, "count": 9}]}, **QUICK)
        status = await agent.until("/v1/status", lambda status: any("network.vfs" in one for one in status["notes"]))
        assert f"network.vfs: {PF}: 9 wanted, 0 there: it can have at most 8" in status["notes"]
        agent.configure(resources=[], network={"vfs": [rule]}, **QUICK)
        await until(lambda: number.read_text() == "4")
        assert json.loads((agent.state / "vfs.json").read_text())["made"] == {PF: 4}
