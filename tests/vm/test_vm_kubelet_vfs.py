"""Virtual functions of a real adapter on a real kernel with a real kubelet: the agent makes them, a claim has one with
its own address and VLAN in its pod, or bound to vfio-pci for a virtual machine; each is as before afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.kubeapi import claim, claim_path, request, until
from tests.vm import vmcluster, vmcni
from tests.vm.vmcluster import KUBECONFIG, NODE, RESOURCES, STEP_S, Node
from tests.vm.vmforms import container, document
from tests.vm.vmguest import qemu_version

NEEDS_QEMU = 8
CONFIG, DROP_INS = "/etc/nodeagent/config.yaml", "/etc/systemd/system/nodeagent.service.d"
VF = {"name": "vf", "kind": "nic", "match": {"sriov": "vf", "vendor": "8086"}, "serve": "dra"}
COUNT = 2
ADDRESS = "02:00:00:00:00:0a"
TENANT = {
    "vf": {"mac": ADDRESS, "vlan": 100, "vlanQoS": 3},
    "interface": {"name": "net1", "addresses": ["10.20.0.5/24"]},
}
MACHINE = {"driver": "vfio-pci", "vf": {"vlan": 7}}


def network(count: int) -> dict[str, Any]:
    vfs = [{"match": {"driver": "igb"}, "count": count}]
    return {"vfs": vfs, "vfProperties": ["mac", "vlan"], "moveInterfaces": True}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    if (version := qemu_version()) < NEEDS_QEMU:
        pytest.skip(f"QEMU {version} has no adapter with virtual functions, {NEEDS_QEMU} and later have one")
    dra = {"kubeconfig": KUBECONFIG, "nodeName": NODE, "passthroughDrivers": ["vfio-pci"]}
    with vmcluster.node(resources=[*RESOURCES, VF], network=network(COUNT), dra=dra) as made:
        guest = made.guest
        vmcni.install(guest)
        guest.run("modprobe -a igb igbvf vfio-pci && ls -d /sys/bus/pci/drivers/igb/0000:*", until=True)
        for name in ("interfaces", "vfs", "vf-properties", "passthrough"):
            guest.run(f"install -D -m 644 /share/systemd/nodeagent-{name}.conf {DROP_INS}/nodeagent-{name}.conf")
        guest.run("systemctl daemon-reload && systemctl restart nodeagent")
        made.ready()
        yield made


@pytest.fixture(scope="module")
def pf(node: Node) -> str:
    """The folder of the physical function, once it has the functions that are configured."""
    address = node.guest.run("basename /sys/bus/pci/drivers/igb/0000:*").strip()
    folder = f"/sys/bus/pci/devices/{address}"
    node.guest.run(f"test $(cat {folder}/sriov_numvfs) = {COUNT}", until=True)
    node.guest.run(f"test $(ls -d {folder}/virtfn*/net/* | wc -l) = {COUNT}", until=True)
    return folder


def with_function(node: Node, name: str, **wanted: Any) -> str:
    """A pod that runs, with a virtual function of a claim of the same name; the function's PCI address."""
    asked = claim(name, request("vf", "nic"))
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", **wanted}
    opaque = {"driver": "nodeagent.dev", "parameters": parameters}
    asked["spec"]["devices"]["config"] = [{"requests": ["vf"], "opaque": opaque}]
    node.api.create(asked)
    main = container("main", resources={"claims": [{"name": "net"}]})
    claims = [{"name": "net", "resourceClaimName": name}]
    node.api.create(document(name, main=(main,), hostNetwork=False, resourceClaims=claims))
    node.runs(name)
    (grant,) = json.loads(node.guest.run(f"nodeagent grants --claim default/{name} -o json"))
    (device,) = grant["devices"]
    return str(device)


def inside(node: Node, pod: str, words: str) -> str:
    """What a command prints in the network and mount namespaces of a pod's container."""
    pid = f"$(head -n 1 $({node.scope(pod)})/cgroup.procs)"
    return node.guest.run(f"nsenter --net=/proc/{pid}/ns/net sh -c 'cd /proc/'{pid}'/root && {words}'")


def functions(node: Node, pf: str) -> list[dict[str, Any]]:
    """What the physical function says of each virtual one, in order of their numbers."""
    (shown,) = json.loads(node.guest.run(f"ip -j -d link show $(ls {pf}/net)"))
    return list(shown["vfinfo_list"])


def set_on(node: Node, pf: str, vf: str) -> dict[str, Any]:
    """The same of one."""
    number = node.guest.run(f"basename $(ls -l {pf}/ | grep -F {vf} | grep -o 'virtfn[0-9]*')").strip()
    return functions(node, pf)[int(number.removeprefix("virtfn"))]


def driver(node: Node, vf: str) -> str:
    return node.guest.run(f"basename $(readlink -f /sys/bus/pci/devices/{vf}/driver)").strip()


def until_own(node: Node, vf: str) -> None:
    """Wait until the host has a function with its own driver and interface."""
    node.guest.run(f"ls /sys/bus/pci/drivers/igbvf/{vf}/net/*", STEP_S, until=True)


def ended(node: Node, name: str) -> None:
    """The pod's and the claim's end."""
    node.delete_pod(name)
    node.api.delete(claim_path(name))
    until("nothing is held", lambda: not node.grants(), STEP_S)


def test_a_pod_has_a_function_with_its_address_and_vlan_and_the_host_has_it_back(node: Node, pf: str) -> None:
    before = functions(node, pf)
    vf = with_function(node, "tenant", **TENANT)
    (link,) = json.loads(inside(node, "tenant", "ip -j addr show net1"))
    assert link["address"] == ADDRESS and "10.20.0.5" in str(link["addr_info"])
    has = set_on(node, pf, vf)
    assert (has["address"], has["vlan_list"][0]) == (ADDRESS, {"vlan": 100, "qos": 3})
    ended(node, "tenant")
    until_own(node, vf)
    assert functions(node, pf) == before
    records = node.guest.run("ls /var/lib/nodeagent")
    assert "vf-properties.json" not in records and "interfaces.json" not in records


def test_a_function_is_bound_for_a_virtual_machine_and_given_back(node: Node, pf: str) -> None:
    before = functions(node, pf)
    vf = with_function(node, "machine", **MACHINE)
    group = node.guest.run(f"basename $(readlink /sys/bus/pci/devices/{vf}/iommu_group)").strip()
    assert (driver(node, vf), set_on(node, pf, vf)["vlan_list"][0]["vlan"]) == ("vfio-pci", 7)
    assert inside(node, "machine", "ls dev/vfio").split() == sorted([group, "vfio"])
    ended(node, "machine")
    until_own(node, vf)
    assert functions(node, pf) == before


def test_what_a_claim_had_is_given_back_though_its_pod_ended_while_the_agent_was_away(node: Node, pf: str) -> None:
    before = functions(node, pf)
    vf = with_function(node, "away", **MACHINE)
    node.guest.run("systemctl kill -s KILL nodeagent && systemctl stop nodeagent")
    node.api.delete("/api/v1/namespaces/default/pods/away")
    node.guest.run(f"test ! -e $({node.scope('away')})/cgroup.procs", STEP_S, until=True)
    assert driver(node, vf) == "vfio-pci"
    node.guest.run("systemctl start --no-block nodeagent")
    until_own(node, vf)
    node.ready()
    ended(node, "away")
    assert functions(node, pf) == before


def test_another_number_waits_for_the_end_of_the_claim_that_holds_one(node: Node, pf: str) -> None:
    vf = with_function(node, "holder", vf={"vlan": 9})
    config = json.loads(node.guest.run(f"cat {CONFIG}"))
    config["network"] = network(COUNT - 1)
    (node.guest.share / "fewer.yaml").write_text(json.dumps(config))
    node.guest.run(f"install -m 644 /share/fewer.yaml {CONFIG} && systemctl reload nodeagent")
    node.guest.run(f"nodeagent status | grep -F '{vf}: held'", until=True)
    assert node.guest.run(f"cat {pf}/sriov_numvfs").strip() == str(COUNT)
    ended(node, "holder")
    node.guest.run(f"test $(cat {pf}/sriov_numvfs) = {COUNT - 1}", STEP_S, until=True)
