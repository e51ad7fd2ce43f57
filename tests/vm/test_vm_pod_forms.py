"""A real kubelet on cgroup v2: containers of every form that a pod may have are where they belong, from their first
instruction on: init containers, sidecars, ephemeral ones, static pods, shared and several claims, resized pods."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.kubeapi import Object, claim, claim_path, pod, pod_path, request, template, until
from tests.e2e.nodefiles import KUBELET_CONFIG, NODE
from tests.vm import vmcluster
from tests.vm.vmcluster import STEP_S, Node
from tests.vm.vmforms import container, created, first, gone, held, of_claims, patched
from tests.vm.vmpods import cpus

STATIC_PODS = "/etc/kubernetes/manifests"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with vmcluster.node() as made:
        yield made


@pytest.fixture(scope="module")
def shared(node: Node) -> set[int]:
    """CPUs on which containers without any of their own run while nothing is held."""
    return cpus(node.status()["pinning"]["shared_cpus"])


def test_each_container_of_a_pod_is_on_the_cpus_that_it_was_given(node: Node, shared: set[int]) -> None:
    """An init container that ends, a sidecar that goes on, two containers, and one without any of its own."""
    init = container("before", 1, ends=True), container("sidecar", 1, restartPolicy="Always")
    created(node, "forms", init=init, main=(container("main", 2), container("second", 1), container("plain")))
    own = held(node, "forms")
    assert {name: len(one) for name, one in own.items() if name != "before"} == {"sidecar": 1, "main": 2, "second": 1}
    running = [one for name, one in own.items() if name != "before"]
    assert len(set().union(*running)) == sum(map(len, running))
    for name in ("sidecar", "main", "second"):
        assert first(node, "forms", name) == own[name]
    assert len(first(node, "forms", "before")) == 1
    assert first(node, "forms", "plain") == shared - set().union(*own.values())
    gone(node, "forms")


def test_an_ephemeral_container_is_off_exclusive_cpus(node: Node, shared: set[int]) -> None:
    """Also off those of the pod that it looks into."""
    created(node, "looked-at", main=(container("main", 2),))
    own = held(node, "looked-at")["main"]
    debug = {key: value for key, value in container("debug").items() if key != "resources"}
    change = {"spec": {"ephemeralContainers": [debug]}}
    patched(node, f"{pod_path('looked-at')}/ephemeralcontainers", change)
    assert first(node, "looked-at", "debug") == shared - own
    assert cpus(node.effective("looked-at")) == own
    gone(node, "looked-at")


def test_a_static_pod_is_off_exclusive_cpus_also_while_it_is_there_first(node: Node, shared: set[int]) -> None:
    settings = json.loads(node.guest.run(f"cat {KUBELET_CONFIG}"))
    (node.guest.share / "static.json").write_text(json.dumps({**settings, "staticPodPath": STATIC_PODS}))
    static = pod("static")
    static["spec"]["containers"] = [container("main")]
    (node.guest.share / "static-pod.json").write_text(json.dumps(static))
    node.guest.run(f"install -D -m 644 /share/static-pod.json {STATIC_PODS}/static.json")
    node.guest.run(f"install -m 644 /share/static.json {KUBELET_CONFIG} && systemctl restart kubelet")
    mirror = f"static-{NODE}"
    node.runs(mirror)
    assert first(node, mirror, "main") == shared
    created(node, "exclusive", main=(container("main", 2),))
    own = held(node, "exclusive")["main"]
    assert cpus(node.effective(mirror)) == shared - own
    node.guest.run(f"rm {STATIC_PODS}/static.json")
    until("the static pod has ended", lambda: node.api.find(pod_path(mirror)) is None, STEP_S)
    gone(node, "exclusive")


def test_claims_that_pods_share_and_pods_with_several_claims(node: Node) -> None:
    """Each container is on the CPUs of the claims that it names, and on no others of its pod's."""
    wanted = request("cpus", "cpu", cpus="2")
    node.api.create(claim("shared", wanted))
    node.api.create(template("each", request("cpus", "cpu", cpus="1")))
    claims = [
        {"name": "ours", "resourceClaimName": "shared"},
        {"name": "mine", "resourceClaimTemplateName": "each"},
    ]
    both = container("main", resources={"claims": [{"name": "ours"}, {"name": "mine"}]})
    ours = container("second", resources={"claims": [{"name": "ours"}]})
    created(node, "several", main=(both, ours), resourceClaims=claims)
    one = container("main", resources={"claims": [{"name": "ours"}]})
    created(node, "sharing", main=(one,), resourceClaims=claims[:1])
    own = of_claims(node)
    assert sorted(map(len, own.values())) == [1, 2]
    assert first(node, "several", "main") == set().union(*own.values())
    assert first(node, "several", "second") == first(node, "sharing", "main") == own["shared"]
    node.delete_pod("several")
    until("the template's claim is released", lambda: list(of_claims(node)) == ["shared"], STEP_S)
    assert cpus(node.effective("sharing")) == own["shared"]
    gone(node, "sharing")
    node.api.delete(claim_path("shared"))


def test_a_pod_that_is_resized_in_place_stays_on_its_cpus(node: Node) -> None:
    """Kubelet writes the quota again through the runtime, which knows of no cpuset."""

    def plain(name: str, cpu: str) -> Object:
        amounts = {"cpu": cpu, "memory": "64Mi"}
        return container(name, 2 if name == "main" else 0, limits=amounts, requests=amounts)

    created(node, "resized", main=(plain("main", "2"), plain("plain", "100m")))
    own = held(node, "resized")["main"]
    grown = {"limits": {"cpu": "1500m", "memory": "96Mi"}, "requests": {"cpu": "1500m", "memory": "96Mi"}}
    for name in ("main", "plain"):
        patched(node, f"{pod_path('resized')}/resize", {"spec": {"containers": [{"name": name, "resources": grown}]}})
    quota = f"cat $({node.scope('resized')})/cpu.max"
    until("the kernel has it", lambda: node.guest.run(quota).split() == ["150000", "100000"], STEP_S)
    assert cpus(node.effective("resized")) == own == held(node, "resized")["main"]
    node.ready()
    gone(node, "resized")
