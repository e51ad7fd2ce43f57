"""What a real kubelet limits alongside the agent: what becomes of the CPU time of pods with exclusive CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.kubeapi import until
from tests.vm import vmcluster
from tests.vm.vmcluster import STEP_S, Node
from tests.vm.vmforms import container, created, first, gone, held, of_container, of_pod
from tests.vm.vmpods import cpus

BURN_S = 2
"""For how long as many processes as a pod has CPUs do nothing but use them."""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with vmcluster.node() as made:
        yield made


def amounts(cpu: str) -> dict[str, str]:
    return {"cpu": cpu, "memory": "64Mi"}


def quotas(node: Node) -> dict[str, float | None]:
    """By pod, CPU time of its container in CPUs, where that is less than it has CPUs."""
    return {one["pod"]: one["quota_cpus"] for one in node.status()["pinning"]["pinned"]}


def throttled(node: Node, pod: str, processes: int) -> int:
    """How often the kernel had a pod's container wait while so many processes used all that they got."""
    loop = f"timeout {BURN_S} sh -c 'while :; do :; done'"
    burn = f"for one in $(seq {processes}); do (echo $BASHPID >cgroup.procs; exec {loop}) & done; wait"
    node.guest.run(f"cd $({node.scope(pod)}) && {{ {burn}; }}")
    found = dict(line.split() for line in of_container(node, pod, "cpu.stat"))
    return int(found["nr_throttled"])


def test_the_quota_of_a_pinned_container_stays_kubelets_and_is_said_where_it_is_less(node: Node) -> None:
    """Of the container or of its pod; where there is no limit there is no quota."""
    created(node, "less", main=(container("main", 2, limits=amounts("1500m")),))
    created(node, "enough", main=(container("main", 2, limits=amounts("2")),))
    created(node, "free", main=(container("main", 2),))
    quota = {name: of_container(node, name, "cpu.max") for name in ("less", "enough", "free")}
    assert quota == {"less": ["150000 100000"], "enough": ["200000 100000"], "free": ["max 100000"]}
    assert {name: of_pod(node, name, "cpu.max") for name in quota} == quota
    for name in quota:
        assert first(node, name, "main") == cpus(node.effective(name)) == held(node, name)["main"]
    until("it is said", lambda: quotas(node) == {"less": 1.5, "enough": None, "free": None}, STEP_S)
    assert "throttled to 1.5 CPUs" in node.guest.run("nodeagent status")
    assert throttled(node, "less", 2) > 0
    for name in ("less", "enough"):
        node.delete_pod(name)
    gone(node, "free")
