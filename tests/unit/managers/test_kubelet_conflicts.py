"""Alongside kubelet: what it reserves is never granted, and where the two disagree an admin can read it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
import structlog
from msgspec.structs import replace

from nodeagent.config.load import parse
from nodeagent.config.schema import Config
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.errors import ConfigError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers import kubelet_conflicts as alongside
from nodeagent.managers.kubelet import Kubelet
from nodeagent.managers.kubelet_conflicts import KubeletConflicts
from tests.builders.inventories import even_rows, inventory_of
from tests.doubles.kubelet_process import ends, kubelet, put

INVENTORY = inventory_of(even_rows(1, 2, 2, 4, 2))
"""16 CPUs."""


class Node:
    def __init__(self, folder: Path) -> None:
        self.root, self.dir = folder / "root", folder / "kubelet"
        self.dir.mkdir()
        self.alongside = KubeletConflicts(SysFs(self.root), self.dir)

    def starts(self, *flags: str, config: str = "", state: str = "") -> None:
        """A kubelet with a configuration file, and the state of its CPU manager."""
        put(self.root / "k.yaml", config)
        (self.dir / "cpu_manager_state").write_text(state) if state else None
        kubelet(self.root, self.dir, "--config=/k.yaml", *flags)

    def look(self, text: str = "{}") -> Kubelet:
        return self.alongside.look(parse(text, source="test"))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def static(shared: str) -> str:
    return f'{{"policyName":"static","defaultCpuSet":"{shared}","checksum":1}}'


# ---------------------------------------------------------------- other drivers


@pytest.mark.parametrize("socket", ["dra.cpu-reg.sock", "dra.cpu-1234-reg.sock"])
def test_a_driver_that_hands_out_cpus_too_is_a_note_while_kubelet_has_its_socket(node: Node, socket: str) -> None:
    """Without an API server nothing else shows it. Where no CPUs are served it concerns no one."""
    node.starts()
    put(node.dir / "plugins_registry" / socket, "")
    put(node.dir / "plugins_registry/gpu.nvidia.com-reg.sock", "")
    node.look('{"resources": [{"name": "cpu", "kind": "cpu"}]}')
    (note,) = node.alongside.notes
    assert note.startswith("the DRA driver dra.cpu is registered with kubelet and hands out CPUs too, as cpu does: ")
    node.look('{"resources": [{"name": "gpu", "kind": "gpu"}]}')
    assert node.alongside.notes == []
    node.look('{"resources": [{"name": "cpu", "kind": "cpu"}]}')
    (node.dir / "plugins_registry" / socket).unlink()
    node.look('{"resources": [{"name": "cpu", "kind": "cpu"}]}')
    assert node.alongside.notes == []


# ---------------------------------------------------------------- the system's own CPUs


def test_a_cpu_reserved_in_a_drop_in_is_reserved(node: Node) -> None:
    put(node.root / "etc/kubelet.d/20-reserve.conf", 'reservedSystemCPUs: "0,8"\n')
    node.starts("--config-dir=/etc/kubelet.d", config="cpuManagerPolicy: none\n")
    assert alongside.reserved_cpus(Config(), node.look(), INVENTORY) == CpuSet.parse("0,8")


def test_cpus_that_the_machine_cannot_have_are_no_reservation(node: Node) -> None:
    """A typo must not leave the system without CPUs; one that is offline stays reserved."""
    config = parse("reservedCpus: '0,300'", source="test")
    with pytest.raises(
        ConfigError, match=r"^cannot reserve CPUs 300 of reservedCpus: this machine can have CPUs 0-31$"
    ):
        alongside.reserved_cpus(config, node.look(), INVENTORY)
    online = INVENTORY.cpus_online
    without = replace(INVENTORY, cpus=INVENTORY.cpus[1:], cpus_online=online - CpuSet([0]), cpus_possible=online)
    assert alongside.reserved_cpus(parse("reservedCpus: '0'", source="test"), node.look(), without) == CpuSet([0])


def test_what_the_admin_reserves_counts_more_than_kubelets_and_that_they_differ_is_reported(node: Node) -> None:
    node.starts("--reserved-cpus=0,8")
    config = parse("reservedCpus: '0-1'", source="test")
    known = node.alongside.look(config)
    assert alongside.reserved_cpus(config, known, INVENTORY) == CpuSet.parse("0-1")
    assert node.alongside.notes == [
        "kubelet reserves CPUs 0,8 (--reserved-cpus of kubelet (process 812)), reservedCpus says 0-1: CPUs 8 may be "
        "granted"
    ]


@pytest.mark.parametrize(
    ("flags", "config", "notes"),
    [
        (("--reserved-cpus=0,8",), "reservedCpus: '0,8'", []),
        (("--reserved-cpus=0,8",), "{}", []),
        ((), "reservedCpus: '0,8'", []),
        (("--reserved-cpus=0",), "reservedCpus: '0-1'", ["reservedCpus says 0-1"]),
        (("--reserved-cpus=0",), "reservedCpus: ''", ["reservedCpus says none: CPUs 0 may be granted"]),
        (("--cgroup-root=/a/",), "pinning: {cgroupRoot: /a}", []),
        (("--cgroup-root=/a",), "{}", ["kubelet's cgroupRoot is /a", "pinning.cgroupRoot says /: containers are not"]),
        ((), "pinning: {cgroupRoot: /a}", ["kubelet's cgroupRoot is / (its default), pinning.cgroupRoot says /a"]),
        (("--hostname-override=Node-7",), "dra: {nodeName: node-7}\nresources: [{name: c, kind: cpu, serve: dra}]", []),
        (("--hostname-override=Node-7",), "dra: {nodeName: other}", []),
        (
            ("--hostname-override=Node-7",),
            "dra: {nodeName: other}\nresources: [{name: cpu, kind: cpu, serve: dra}]",
            ["kubelet's node is node-7 (--hostname-override of kubelet (process 812)), the agent's other"],
        ),
    ],
)
def test_contradictions_between_kubelets_configuration_and_the_agents(
    flags: tuple[str, ...], config: str, notes: list[str], node: Node
) -> None:
    """Reserved CPUs, the control groups' root, and the node's name where claims need it."""
    node.starts(*flags)
    node.look(config)
    assert len(node.alongside.notes) == bool(notes)
    for note in notes:
        assert note in node.alongside.notes[0]


def test_a_state_of_another_policy_is_reported(node: Node) -> None:
    node.starts(config="cpuManagerPolicy: none\n", state=static("0-15"))
    node.look()
    assert node.alongside.notes == [
        f"cpuManagerPolicy is none ({node.root}/k.yaml) and static in {node.dir}/cpu_manager_state: kubelet refuses to "
        "start with both"
    ]


def test_what_changes_about_kubelet_is_logged_once(node: Node) -> None:
    """How it is configured, and each contradiction."""

    def logged() -> list[str]:
        with structlog.testing.capture_logs() as lines:
            node.look("reservedCpus: '0'")
        return [one["event"] for one in lines]

    node.starts("--reserved-cpus=0")
    assert logged() == ["kubelet-configuration"]
    assert logged() == []
    node.starts("--reserved-cpus=0,8")
    assert logged() == ["kubelet-configuration", "kubelet-contradiction"]
    assert logged() == []
    node.starts("--reserved-cpus=0,8", config="cpuManagerPolicy: 1\n")
    with structlog.testing.capture_logs() as lines:
        node.look("reservedCpus: '0'")
    assert [(one["event"], one["log_level"]) for one in lines] == [("kubelet-configuration", "warning")]
    assert "cannot read cpuManagerPolicy of" in lines[0]["error"]


def test_what_can_be_read_again_is_noticed(node: Node) -> None:
    """Without another start of kubelet."""
    node.starts(config="cpuManagerPolicy: none\n")
    node.look()
    assert not node.alongside.recovered(Config())
    node.starts(config="cpuManagerPolicy: 1\n")
    node.look()
    assert not node.alongside.recovered(Config())
    node.starts(config="cpuManagerPolicy: static\n")
    assert node.alongside.recovered(Config())
    assert alongside.confines_all(node.alongside.kubelet)


def test_flags_are_remembered_while_kubelet_is_away(node: Node) -> None:
    node.starts("--reserved-cpus=0,8")
    node.look()
    ends(node.root / "proc/812")
    assert alongside.reserved_cpus(Config(), node.look(), INVENTORY) == CpuSet.parse("0,8")
    assert node.alongside.document()["pid"] == 812


def test_the_status_shows_how_kubelet_is_configured(node: Node) -> None:
    node.starts("--reserved-cpus=0,8", config="maxPods: 7\nsystemReserved: {cpu: '1'}\n")
    node.look()
    assert node.alongside.document() == {
        "pid": 812,
        "sources": [f"{node.root}/k.yaml", "--reserved-cpus"],
        "settings": {
            "cgroupDriver": "cgroupfs",
            "cpuManagerPolicy": "none",
            "memoryManagerPolicy": "None",
            "reservedSystemCPUs": "0,8",
            "systemReserved": {"cpu": "1"},
            "topologyManagerPolicy": "none",
            "topologyManagerScope": "container",
        },
        "error": "",
    }


# ---------------------------------------------------------------- CPUs that are no longer exclusive

MINE = Grant(id="g-1", cpus=CpuSet.parse("4-5"), holder=Holder(api=DEVICE_PLUGIN, namespace="default", pod="a"))
CLAIMED = Grant(id="g-2", cpus=CpuSet.parse("6"), holder=Holder(api=CLAIM, namespace="default", claim="c"))
KUBELETS = Grant(id="k-1", cpus=CpuSet.parse("7"), holder=Holder(api=KUBELET, uid="uid-a", container="app"))


def ledger(*grants: Grant) -> Ledger:
    return Ledger(grants=MappingProxyType({one.id: one for one in grants}))


def test_cpus_that_kubelets_static_manager_gives_to_all_containers_are_not_exclusive(node: Node) -> None:
    """With the pods and claims that had them; those that it has itself are its own affair."""
    node.starts(config="cpuManagerPolicy: static\n", state=static("0-15"))
    assert alongside.unprotected(node.look(), ledger(CLAIMED, MINE, KUBELETS)) == (
        f"CPUs 4-6 of claim default/c, default/a are not exclusive: kubelet's CPU manager is static "
        f"({node.root}/k.yaml) and confines all containers itself; set cpuManagerPolicy: none, or drain these pods"
    )


@pytest.mark.parametrize(
    ("config", "state", "hit"),
    [
        ("cpuManagerPolicy: none\n", "", ""),
        ("cpuManagerPolicy: static\n", static("0-3,7-15"), ""),
        ("cpuManagerPolicy: static\n", static("0-4"), "4-5"),
        ("cpuManagerPolicy: static\nreservedSystemCPUs: '4-6'\n", static("0-15"), "4-6"),
        ("cpuManagerPolicy: static\n", "", "4-6"),
        ("cpuManagerPolicy: 1\n", "", "4-6"),
    ],
)
def test_only_cpus_on_which_kubelet_lets_others_run_are_hit(config: str, state: str, hit: str, node: Node) -> None:
    """It lets them run on reserved CPUs too; where it is not known, all are."""
    node.starts(config=config, state=state)
    said = alongside.unprotected(node.look(), ledger(MINE, CLAIMED))
    assert said.startswith(f"CPUs {hit} of " if hit else "")
    assert bool(said) == bool(hit)


def test_without_grants_nothing_is_lost(node: Node) -> None:
    node.starts(config="cpuManagerPolicy: static\n")
    assert alongside.unprotected(node.look(), ledger(KUBELETS)) == ""


CPU_AND_PAGES = {
    "resources": [
        {"name": "cores", "kind": "cpu"},
        {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "serve": "dra"},
        {"name": "nvme", "kind": "nvme"},
    ]
}


@pytest.mark.parametrize(
    ("config", "memory", "hit"),
    [
        ("cpuManagerPolicy: none\n", "", []),
        ("cpuManagerPolicy: static\n", "", []),
        ("cpuManagerPolicy: [\n", "", ["cores", "pages"]),
        ("cpuManagerPolicy: none\n", "{", ["pages"]),
    ],
    ids=["none", "static", "no-configuration", "no-memory-state"],
)
def test_resources_that_are_refused_as_kubelet_cannot_be_read_are_named(
    config: str, memory: str, hit: list[str], node: Node
) -> None:
    """A policy that is known, or a kind that kubelet does not assign, is no such reason."""
    node.starts(config=config)
    if memory:
        (node.dir / "memory_manager_state").write_text(memory)
    found = alongside.undetermined(node.look(), msgspec.convert(CPU_AND_PAGES, Config))
    assert [one.partition(": cannot determine whether kubelet manages ")[0] for one in found] == hit


def test_lost_exclusiveness_is_logged_when_it_changes(node: Node) -> None:
    def logged(*grants: Any) -> list[str]:
        with structlog.testing.capture_logs() as lines:
            node.alongside.watch(ledger(*grants))
        return [one["event"] for one in lines]

    node.starts(config="cpuManagerPolicy: static\n")
    node.look()
    assert logged() == []
    assert logged(MINE) == ["cpus-not-exclusive"]
    assert logged(MINE) == []
    assert logged(MINE, CLAIMED) == ["cpus-not-exclusive"]
