"""A real adapter of a real kernel in a pod's network namespace: a claim's interface is there from the sandbox on, with
the name and addresses that it wants, and back on the host at its end, also if the agent was killed or away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.kubeapi import claim, claim_path, request, until
from tests.vm import vmcluster, vmcni
from tests.vm.vmcluster import RESOURCES, STEP_S, Node
from tests.vm.vmforms import container, document

DROP_IN = "/etc/systemd/system/nodeagent.service.d/nodeagent-interfaces.conf"
NIC = {"name": "nic", "kind": "nic", "match": {"driver": "e1000e"}, "serve": "dra"}
INTERFACE = {"name": "net1", "addresses": ["10.20.0.5/24"], "mtu": 1400}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with vmcluster.node(resources=[*RESOURCES, NIC], network={"moveInterfaces": True}) as made:
        guest = made.guest
        vmcni.install(guest)
        guest.run(f"install -D -m 644 /share/systemd/nodeagent-interfaces.conf {DROP_IN}")
        guest.run("systemctl daemon-reload && systemctl restart nodeagent")
        made.ready()
        yield made


@pytest.fixture(scope="module")
def host_name(node: Node) -> str:
    """The adapter's interface on the host."""
    return node.guest.run("ls /sys/bus/pci/drivers/e1000e/0000:*/net").strip()


def with_interface(node: Node, name: str) -> None:
    """A pod that runs, with the interface of a claim of the same name."""
    wanted = claim(name, request("nic", "nic"))
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NicConfig", "interface": INTERFACE}
    opaque = {"driver": "nodeagent.dev", "parameters": parameters}
    wanted["spec"]["devices"]["config"] = [{"requests": ["nic"], "opaque": opaque}]
    node.api.create(wanted)
    main = container("main", resources={"claims": [{"name": "net"}]})
    claims = [{"name": "net", "resourceClaimName": name}]
    node.api.create(document(name, main=(main,), hostNetwork=False, resourceClaims=claims))
    node.runs(name)


def inside(node: Node, pod: str, words: str) -> str:
    """What a command prints in the network namespace of a pod's container."""
    return node.guest.run(f"nsenter --net=/proc/$(head -n 1 $({node.scope(pod)})/cgroup.procs)/ns/net {words}")


def link(node: Node, pod: str) -> dict[str, Any]:
    """The interface in a pod."""
    (found,) = json.loads(inside(node, pod, "ip -j addr show net1"))
    return dict(found)


def until_on_host(node: Node, name: str) -> None:
    node.guest.run(f"ip link show {name}", until=True)


def ended(node: Node, name: str) -> None:
    """The pod's and the claim's end."""
    node.delete_pod(name)
    node.api.delete(claim_path(name))
    until("nothing is held", lambda: not node.grants(), STEP_S)


def test_a_pod_has_its_claims_interface_and_the_host_has_it_back(node: Node, host_name: str) -> None:
    with_interface(node, "net-pod")
    found = link(node, "net-pod")
    assert found["mtu"] == 1400 and "UP" in found["flags"]
    assert ("10.20.0.5", 24) in [(one["local"], one["prefixlen"]) for one in found["addr_info"]]
    assert f"{host_name}:" not in node.guest.run("ip -o link")
    (device,) = node.api.call("GET", claim_path("net-pod"))["status"]["devices"]
    assert device["networkData"]["interfaceName"] == "net1" and device["networkData"]["ips"] == ["10.20.0.5/24"]
    assert device["networkData"]["hardwareAddress"] == found["address"]
    ended(node, "net-pod")
    until_on_host(node, host_name)
    (back,) = json.loads(node.guest.run(f"ip -j addr show {host_name}"))
    assert (back["mtu"], back["address"]) == (1500, found["address"])
    assert "10.20.0.5" not in str(back)


def test_an_interface_comes_back_though_its_pod_ended_while_the_agent_was_away(node: Node, host_name: str) -> None:
    """Kubelet asks for the claim's end again until the agent answers."""
    with_interface(node, "net-away")
    node.guest.run("systemctl kill -s KILL nodeagent && systemctl stop nodeagent")
    assert link(node, "net-away")["mtu"] == 1400
    node.api.delete("/api/v1/namespaces/default/pods/net-away")
    node.guest.run(f"test ! -e $({node.scope('net-away')})/cgroup.procs", STEP_S, until=True)
    node.guest.run("systemctl start --no-block nodeagent")
    until_on_host(node, host_name)
    node.ready()
    ended(node, "net-away")
    assert not node.guest.run("ls /var/lib/nodeagent/interfaces.json 2>/dev/null || true").strip()
