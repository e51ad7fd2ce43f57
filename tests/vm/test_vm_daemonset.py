"""The agent as the DaemonSet's pod, on a real kubelet with cgroup v2 and systemd: the image of `make image`, the
manifests as shipped. What pods hold is theirs from their first instruction on, whichever part is restarted or replaced.

The tests share a guest, and two pods with CPUs of their own, one with a claim of some, and one without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.kubeapi import until
from tests.support.image import build_image
from tests.vm import vmcluster, vmdaemonset
from tests.vm.vmcluster import STEP_S, Node
from tests.vm.vmpods import cpus

RELOADS = 2
REFUSED = ("Permission denied", "Operation not permitted", "Read-only file system")
WHILE_REPLACED = 2
"""Pods that are made while there are two agents."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Skipped where there can be no guest before the image is made: that takes a minute."""
    with vmcluster.without_agent() as made:
        image = build_image(tmp_path_factory.mktemp("image"))
        began = time.monotonic()
        vmdaemonset.install(made, image.archive)
        vmdaemonset.rolled_out(made)
        print(f"vm: image imported, DaemonSet rolled out: {time.monotonic() - began:.1f} s", flush=True)
        yield made


@pytest.fixture(scope="module")
def pods(node: Node) -> Iterator[dict[str, str]]:
    with vmcluster.pods(node) as found:
        yield found


def nobody_else(node: Node) -> None:
    """Of all containers, sandboxes and the agent's own among them, one runs on what is granted, and no other there."""
    found = [cpus(one) for one in vmdaemonset.where_all_run(node)]
    for granted in map(cpus, node.grants(until=True).values()):
        assert [one for one in found if one & granted] == [granted], found


def as_before(node: Node, pods: dict[str, str], grants: dict[str, str]) -> None:
    until("everybody is confined as before", lambda: {name: node.effective(name) for name in pods} == pods, STEP_S)
    assert node.grants() == grants
    nobody_else(node)


def test_containers_are_on_their_cpus_from_their_first_instruction_through_both_apis(
    node: Node, pods: dict[str, str]
) -> None:
    assert {name: node.first_cpus(name) for name in pods} == pods
    assert node.status()["pinning"]["connected"]
    nobody_else(node)


def test_a_restart_of_kubelet_moves_nobody(node: Node, pods: dict[str, str]) -> None:
    grants, began = node.grants(), time.time()
    node.guest.run("systemctl restart kubelet")
    node.listed_since(began)
    as_before(node, pods, grants)
    node.ready()
    as_before(node, pods, grants)


def test_a_reload_of_systemd_moves_nobody_for_longer_than_a_moment(node: Node, pods: dict[str, str]) -> None:
    """Also a pod that is made right after it: systemd writes the cpuset of slices when a scope starts in them."""
    grants = node.grants()
    for _ in range(RELOADS):
        node.guest.run("systemctl daemon-reload")
        as_before(node, pods, grants)
    node.run_pod("reloaded", 1)
    assert cpus(node.first_cpus("reloaded")) == cpus(node.effective("reloaded"))
    nobody_else(node)
    node.delete_pod("reloaded")


def test_a_container_that_ran_unpinned_is_moved_when_the_agent_is_back(node: Node, pods: dict[str, str]) -> None:
    """Restarted by kubelet while there was no agent; a pod that is made meanwhile keeps off what others hold."""
    grants, before = node.grants(), node.container("one")
    held = {cpu for one in grants.values() for cpu in cpus(one)}
    with vmdaemonset.away(node):
        node.kill("one")
        node.runs("one", after=before)
        ran = node.effective("one")
        node.run_pod("meanwhile")
        assert not cpus(node.effective("meanwhile")) & held
    took = vmdaemonset.returned(node, "one", pods["one"])
    print(f"vm: one ran on {ran}; from the agent's start until it listens, until all is right (ms): {took}", flush=True)
    as_before(node, pods, grants)
    (shown,) = [one for one in node.status()["pinning"]["pinned"] if one["id"] == node.container("one")]
    assert (ran == pods["one"]) == (shown["ran_unpinned"] is None)
    node.delete_pod("meanwhile")


def test_a_container_is_on_its_cpus_again_after_it_and_the_agent_were_killed(node: Node, pods: dict[str, str]) -> None:
    """Kubelet starts both again."""
    grants, before = node.grants(), node.container("two")
    node.kill("two", "$(pgrep -f '[n]odeagent run')")
    began = time.monotonic()
    node.runs("two", after=before)
    as_before(node, pods, grants)
    took = time.monotonic() - began
    print(f"vm: killed with the agent, two began on {node.first_cpus('two')}, all right: {took:.1f} s", flush=True)


def test_pods_that_start_while_the_agent_is_replaced_are_pinned_from_their_first_instruction(
    node: Node, pods: dict[str, str]
) -> None:
    """There are two agents meanwhile (maxSurge), of which one leads."""
    vmdaemonset.rolled_out(node)  # a pod that is not available is replaced at once, without a second one
    grants, (old,) = node.grants(), vmdaemonset.agents(node)
    vmdaemonset.replace(node, "another")
    until("two agents run", lambda: len(vmdaemonset.containers(node)) == 2, STEP_S)
    made = [f"late-{number}" for number in range(WHILE_REPLACED)]
    for name in made:
        node.run_pod(name, 1)
        assert node.first_cpus(name) == node.effective(name)
        nobody_else(node)
    vmdaemonset.rolled_out(node)
    (new,) = vmdaemonset.agents(node)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert {name: node.first_cpus(name) for name in made} == {name: node.effective(name) for name in made}
    for name in made:
        node.delete_pod(name)
    as_before(node, pods, grants)


def test_nothing_that_the_agents_try_in_their_pods_is_refused(node: Node, pods: dict[str, str]) -> None:
    """Neither control groups nor systemd's files nor kubelet's; that something comes late in an emulated guest is no
    fault."""
    said = vmdaemonset.logged(node)
    assert said and not [one for one in said if any(word in str(one.get("error")) for word in REFUSED)]
