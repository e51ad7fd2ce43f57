"""A claim whose virtual function is set on its physical one and whose interface is in the pod, by the whole agent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nodeagent.pb import nri_pb2 as pb
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.runtime import FakeRuntime
from tests.doubles.vf_kernel import Vf
from tests.support.dra_node import DRIVER, dra_node, result
from tests.support.namespaces import FIRST_GROUP, Namespace, device_of, needs_namespaces
from tests.support.vf_agent import kernel_of

GROUP = FIRST_GROUP + 1
PF, VF = "0000:3b:00.0", device_of(GROUP)
MAC, OWN = "02:00:00:00:00:0a", "02:00:00:00:00:07"
NICS = {"name": "nic", "kind": "nic", "serve": "dra", "match": {"sriov": "vf"}}
ASKED = {"vf": {"mac": MAC, "vlan": 100}, "interface": {"name": "net1"}}
NETWORK = {"moveInterfaces": True, "vfProperties": ["mac", "vlan"]}
pytestmark = needs_namespaces


def tree_of(root: Path) -> DeviceTree:
    tree = DeviceTree(machine(root, "1s1n4c"))
    mount = root / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    tree.pci(PF, driver="ice")
    tree.net(PF, "ens1f0")
    tree.vf(PF, 0, VF)
    tree.net(VF, "ens7", address=OWN)
    return tree


async def test_the_interface_in_the_pod_has_the_address_and_both_are_as_before_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"pf": PF, "interface": "ens1f0", "count": 1, "state": str(folder / "kernel"), "doom": str(folder / "doom")}
    with Namespace() as host, Namespace() as pod:
        host.veth("ens7", mac=OWN, group=GROUP, up=True)
        for name, said in (("VF_NODE", facts), ("INTERFACE_NODE", {"host": host.path, "doom": str(folder / "doom")})):
            (folder / name).write_text(json.dumps(said))
            monkeypatch.setenv(name, str(folder / name))
        async with FakeRuntime(folder) as runtime:
            more = {"pinning": {"nriSocket": str(runtime.socket)}, "network": NETWORK}
            tree, module = tree_of(folder / "root"), "tests.support.vf_agent"
            async with dra_node(folder, tree, [NICS], more=more, module=module) as node:
                await node.published("nic")
                await runtime.connected()
                parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", **ASKED}
                opaque = {"driver": DRIVER, "parameters": parameters}
                config = {"source": "FromClaim", "requests": ["r"], "opaque": opaque}
                device = result("nic", VF.replace(":", "-").replace(".", "-"))
                claim = node.claim("web", device, config=[config], reserved_for=["uid-web"])
                (answer,) = await node.prepare(claim)
                assert answer.error == ""
                assert _functions(facts) == [Vf(mac=MAC.replace(":", ""), vlan=100)]
                assert host.link("ens7")["address"] == OWN
                linux = pb.LinuxPodSandbox(namespaces=[pb.LinuxNamespace(type="network", path=pod.path)])
                runtime.pods["sandbox-web"] = pb.PodSandbox(
                    id="sandbox-web", uid="uid-web", name="web", namespace="default", linux=linux
                )
                await runtime.pod_event(pb.RUN_POD_SANDBOX, "web")
                assert (pod.link("net1")["address"], host.names()) == (MAC, {"ens7-far"})
                await runtime.pod_event(pb.STOP_POD_SANDBOX, "web")
                assert host.link("ens7")["address"] == OWN
                assert _functions(facts)[0].vlan == 100, "as long as the claim holds it"
                assert await node.unprepare(claim) == [""]
                assert _functions(facts) == [Vf()]


def _functions(facts: dict[str, object]) -> list[Vf]:
    kernel = kernel_of(facts)
    kernel.load()
    return kernel.pfs["ens1f0"].vfs
