"""The whole agent alongside another device plugin at the same kubelet: no device is given away by both."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.kube.apiserver.client import SLICES, ApiServer
from nodeagent.kube.apiserver.credentials import Access
from nodeagent.kube.kubelet.registration import Registrar
from nodeagent.pb import podresources_pb2 as pods_pb
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import FakeApiServer
from tests.doubles.kubelet import AdmissionError, FakeKubelet
from tests.support import registering
from tests.support.dra_node import NODE
from tests.support.running import CHAR, CPU, running
from tests.support.shelf import Shelf

PF, FIRST, SECOND = "0000:81:00.0", "0000:81:02.0", "0000:81:02.1"
LABEL = "0000-81-02-0"
"""The first function's address, as a name of a DRA device."""
VF, THEIRS = "nodeagent.dev/vf", "intel.com/sriov_netdevice"
QUICK: dict[str, Any] = {
    "resources": [{"name": "vf", "kind": "nic", "match": {"sriov": "vf"}}],
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.5},
}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """An adapter with two virtual functions."""
    found = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    found.pci(PF, pci_class="020000", device="1572", driver="i40e", numa_node=0)
    for number, address in enumerate((FIRST, SECOND)):
        found.vf(PF, number, address)
        found.net(address, f"ens1f0v{number}")
    return found


@contextlib.asynccontextmanager
async def other_plugin(node: FakeKubelet, *ids: str) -> AsyncIterator[None]:
    """Another plugin that offers functions by their addresses, as the SR-IOV network device plugin does."""
    registrar = Registrar([Shelf(THEIRS, ids=ids)], node.plugins_folder, pace=registering.QUICK)
    async with registering.running(registrar):
        await node.wait_allocatable(THEIRS, len(ids))
        yield


async def test_what_another_plugin_offers_is_not_served_and_what_it_gave_stays_held(
    folder: Path, tree: DeviceTree
) -> None:
    """The reason names the device, the resource and the way out. When the plugin is gone its pods still have what they
    were given: an agent that starts then offers the rest."""
    async with FakeKubelet(folder / "kubelet") as node:
        async with other_plugin(node, FIRST):
            await node.admit_pod("default", "theirs", {"main": {THEIRS: 1}})
            async with running(folder, root=tree.root, **QUICK) as agent:
                status = await agent.until("/v1/status", lambda found: found["refused"])
                assert status["refused"] == {
                    VF: f"another device plugin offers {FIRST} as {THEIRS}; set match so that the two have no device "
                    "in common, or remove that plugin"
                }
                assert node.allocatable(VF) == 0
                agent.configure(**{**QUICK, "resources": [{"name": "vf", "kind": "nic", "match": {"id": SECOND}}]})
                await node.wait_allocatable(VF, 1)
                assert node.healthy(VF) == [SECOND]
        await node.admit_pod("default", "plain", {"main": {}})
        async with running(folder, root=tree.root, **QUICK) as agent:
            await node.wait_allocatable(VF, 1)
            assert node.healthy(VF) == [SECOND]
            (grant,) = await agent.until("/v1/grants", lambda found: found and found[0]["pod"])
            assert (grant["api"], grant["resource"], grant["pod"], grant["devices"]) == (
                "other-plugin",
                THEIRS,
                "theirs",
                [FIRST],
            )
            (first, _) = await agent.until("/v1/devices", lambda found: len(found) == 2)
            assert (first["id"], first["healthy"], first["holder"]) == (FIRST, False, "default/theirs/main")
            with pytest.raises(AdmissionError):
                await node.admit_pod("default", "two", {"main": {VF: 2}})
            await node.delete_pod("default", "theirs")
            await node.wait_allocatable(VF, 2)


async def test_a_plugin_that_is_installed_later_takes_over_what_the_agent_did_not_give_away(
    folder: Path, tree: DeviceTree
) -> None:
    """The agent stops offering as soon as kubelet shows the other; its own pods keep what they have."""
    async with FakeKubelet(folder / "kubelet") as node, running(folder, root=tree.root, **QUICK) as agent:
        await node.wait_allocatable(VF, 2)
        await node.admit_pod("default", "ours", {"main": {VF: 1}})
        async with other_plugin(node, FIRST, SECOND):
            agent.configure(**QUICK, resyncSeconds=61)
            await agent.until("/v1/status", lambda found: VF in found["refused"])
            (grant,) = await agent.until("/v1/grants", lambda found: found and found[0]["pod"])
            assert (grant["api"], grant["pod"]) == ("device-plugin", "ours")


async def test_what_a_claim_of_another_driver_holds_is_not_offered(folder: Path, tree: DeviceTree) -> None:
    """By the name of its device, or by the device nodes of its CDI devices."""
    cdi = folder / "cdi"
    cdi.mkdir()
    serial = {"name": "port", "containerEdits": {"deviceNodes": [{"path": "/dev/ttyS0"}]}}
    (cdi / "x.json").write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "k8s.x.example/claim", "devices": [serial]}))
    tree.node("/dev/ttyS0")
    tree.node("/dev/ttyS1")
    resources = [*QUICK["resources"], {"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"]}]
    config = {**QUICK, "resources": resources, "dra": {"cdiDir": str(cdi)}}
    async with FakeKubelet(folder / "kubelet") as node, running(folder, root=tree.root, **config) as agent:
        await node.wait_allocatable(VF, 2)
        pod = await node.admit_pod("default", "theirs", {"main": {}})
        pod.claimed["main"] = [
            pods_pb.ClaimResource(driver_name="sriov.example", pool_name="p", device_name=LABEL),
            pods_pb.ClaimResource(
                driver_name="x.example",
                pool_name="p",
                device_name="port",
                cdi_devices=[pods_pb.CDIDevice(name=f"k8s.x.example/claim={one}") for one in ("port", "gone")],
            ),
        ]
        await node.wait_allocatable(VF, 1)
        await node.wait_allocatable(CHAR, 1)
        assert (node.healthy(VF), node.healthy(CHAR)) == ([SECOND], ["/dev/ttyS1"])
        grants = await agent.until("/v1/grants", lambda found: len(found) == 2)
        assert {(one["resource"], one["pod"], one["devices"][0]) for one in grants} == {
            ("sriov.example", "theirs", FIRST),
            ("x.example", "theirs", "/dev/ttyS0"),
        }
        unknown = await agent.said("claimed-devices-unknown")
        assert "no CDI spec has k8s.x.example/claim=gone" in str(unknown), "silence is no proof that nothing is held"
        await node.delete_pod("default", "theirs")
        await node.wait_allocatable(VF, 2)
        await node.wait_allocatable(CHAR, 2)


async def test_cpus_that_a_dra_driver_publishes_are_served_only_where_the_two_have_none_in_common(
    folder: Path, tree: DeviceTree
) -> None:
    """As with kubelet's static CPU manager. Slices are as dra-driver-cpu writes them; the server checks them."""
    config: dict[str, Any] = {**QUICK, "resources": [{"name": "cpu", "kind": "cpu"}], "reservedCpus": "0"}
    async with FakeApiServer() as api, FakeKubelet(folder / "kubelet") as node:
        api.add_node(NODE)
        await publish_cpus(api, 4, 5, 6, 7)
        config["dra"] = {"kubeconfig": str(api.kubeconfig(folder)), "nodeName": NODE}
        async with running(folder, root=tree.root, **config) as agent:
            status = await agent.until("/v1/status", lambda found: found["refused"])
            assert status["refused"] == {
                CPU: "another DRA driver, dra.cpu, hands out CPUs 4-7 too; remove that driver, or set reservedCpus so "
                "that the two sets of CPUs have none in common"
            }
            await node.wait_allocatable(CPU, 0)
            agent.configure(**{**config, "reservedCpus": "0,4-7"})
            await node.wait_allocatable(CPU, 3)
            assert (await agent.ask("/v1/status"))[1]["refused"] == {}
        assert api.rejected == []


async def publish_cpus(api: FakeApiServer, *cpus: int) -> None:
    """Publish CPUs one by one, as dra-driver-cpu does in its mode `individual`."""
    devices = [
        {
            "name": f"cpudev{cpu:03d}",
            "attributes": {
                "dra.cpu/cpuID": {"int": cpu},
                "dra.cpu/coreID": {"int": cpu % 4},
                "dra.cpu/socketID": {"int": 0},
                "dra.cpu/cacheL3ID": {"int": 0},
                "dra.cpu/coreType": {"string": "standard"},
                "dra.cpu/smtEnabled": {"bool": True},
                "resource.kubernetes.io/numaNode": {"int": 0},
            },
        }
        for cpu in cpus
    ]
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    spec = {"driver": "dra.cpu", "nodeName": NODE, "pool": pool, "devices": devices}
    client = ApiServer(Access(source="test", host="127.0.0.1", port=api.port, tls=False))
    try:
        await client.create(SLICES, {"metadata": {"name": f"{NODE}-dra.cpu"}, "spec": spec})
    finally:
        await client.close()


async def test_what_the_agents_own_pods_hold_is_not_taken_for_anothers_after_a_lost_ledger(
    folder: Path, tree: DeviceTree
) -> None:
    """The ledger is rebuilt from kubelet's checkpoint; devices stay healthy and are free when their pods have ended."""
    async with FakeKubelet(folder / "kubelet") as node:
        async with running(folder, root=tree.root, **QUICK) as agent:
            await node.wait_allocatable(VF, 2)
            await node.admit_pod("default", "ours", {"main": {VF: 1}})
            await agent.until("/v1/grants", lambda found: found and found[0]["pod"])
        shutil.rmtree(folder / "state")
        async with running(folder, root=tree.root, **QUICK) as agent:
            await node.wait_allocatable(VF, 2)
            (grant,) = await agent.until("/v1/grants", lambda found: found and found[0]["pod"])
            assert (grant["api"], grant["pod"]) == ("device-plugin", "ours")
            await node.delete_pod("default", "ours")
            await agent.until("/v1/grants", lambda found: not found)
            assert node.allocatable(VF) == 2
