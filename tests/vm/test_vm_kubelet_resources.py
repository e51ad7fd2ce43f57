"""What a real kubelet counts and limits alongside the agent: CPU time, hugepages, whole pods, claims in its books.
Then metrics are scraped from another machine, and another version of the agent takes over and gives back."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.kubeapi import Object, claim, claim_path, request, until
from tests.support.paths import CHECKOUT
from tests.support.scraping import free_port, scrape
from tests.vm import vmcluster, vmimage
from tests.vm.vmcluster import CLAIMED, STEP_S, Node
from tests.vm.vmforms import container, created, first, gone, held, of_claims, of_container, of_pod
from tests.vm.vmpods import cpus
from tests.vm.vmsettings import configure_agent, configure_kubelet

GATE = "DRANodeAllocatableResources"
PORT = 9464
PAGES, KUBELETS_PAGES = "nodeagent.dev/hugepages-2Mi", "hugepages-2Mi"
BLOCK, POOL = 4, 32
"""Pages of 2 MiB: in one unit of the resource, and on the one NUMA node that has some."""
PAGES_NODE = 1
MIB = 1 << 20
RESOURCES = [
    *vmcluster.RESOURCES,
    {"name": "hugepages-2Mi", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": BLOCK, "serve": "both"},
]
PROGRAM = "/run/vm-pages"
MAPS = f"{PROGRAM} 21 $PAGES; echo DONE=$?; exec sleep infinity"
LIMITS = ("hugetlb.2MB.max", "hugetlb.2MB.rsvd.max")
BURN_S = 2
"""For how long as many processes as a pod has CPUs do nothing but use them."""
FIRST_WITH_PINS = "f860692"
"""The first build of 0.1 that pins containers."""
PIP = "/opt/nodeagent/bin/pip install -q --no-index --no-deps --force-reinstall"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Kubelet has seen the pages, which it counts when it starts."""
    pools = [{"pageSize": "2Mi", "node": PAGES_NODE, "pages": POOL}]
    with vmcluster.node(gates=(GATE,), resources=RESOURCES, hugepages=pools) as made:
        configure_kubelet(made)
        until("kubelet counts the pages", lambda: allocatable(made).get(KUBELETS_PAGES) == f"{POOL * 2}Mi", STEP_S)
        made.ready()
        yield made


@pytest.fixture(scope="module")
def program(node: Node) -> str:
    with vmimage.unshared():
        made = vmimage.program(vmimage.image() / "root", vmimage.HERE / "inside" / "pages.c")
        shutil.copy(made, node.guest.share)
    node.guest.run(f"install -m 755 /share/{made.name} {PROGRAM}")
    return PROGRAM


def allocatable(node: Node) -> dict[str, str]:
    found: dict[str, str] = node.api.call("GET", f"/api/v1/nodes/{vmcluster.NODE}")["status"]["allocatable"]
    return found


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


# ---------------------------------------------------------------- CPU time


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


def test_resources_of_a_whole_pod_bound_it_and_its_containers_keep_their_cpus(node: Node) -> None:
    whole = {**amounts("1"), KUBELETS_PAGES: "4Mi"}
    level = {"limits": whole, "requests": whole}
    mains = (
        container("main", 2, limits={PAGES: "1"}),
        container("plain", limits={KUBELETS_PAGES: "2Mi", "memory": "16Mi"}),
    )
    created(node, "level", main=mains, resources=level)
    own = held(node, "level")["main"]
    assert cpus(node.effective("level")) == first(node, "level", "main") == own and len(own) == 2
    assert not first(node, "level", "plain") & own
    assert of_pod(node, "level", "cpu.max", "memory.max") == ["100000 100000", str(64 * MIB)]
    assert of_container(node, "level", "cpu.max", "memory.max") == ["100000 100000", str(64 * MIB)]
    until("it is said", lambda: quotas(node) == {"level": 1.0}, STEP_S)
    assert of_container(node, "level", *LIMITS) == [str((BLOCK * 2 + 4) * MIB)] * 2
    assert of_pod(node, "level", *LIMITS) == [str((BLOCK * 2 + 4) * MIB)] * 2
    gone(node, "level")


# ---------------------------------------------------------------- hugepages


def paged(node: Node, name: str, pages: int, *, limits: dict[str, str], claims: bool = False) -> dict[str, str]:
    """Create a pod that maps so many pages, and one more; what it says of that, by the first word."""
    claimed: Object = {}
    if claims:
        node.api.create(claim(name, request("pages", "hugepages", size="4Mi")))
        claimed = {"resourceClaims": [{"name": "pages", "resourceClaimName": name}]}
    main = container("main", limits=limits, env=[{"name": "PAGES", "value": str(pages)}])
    main["command"] = ["/bin/sh", "-c", MAPS]
    main["volumeMounts"] = [{"name": "program", "mountPath": PROGRAM}]
    if claims:
        main["resources"]["claims"] = [{"name": "pages"}]
    volumes = [{"name": "program", "hostPath": {"path": PROGRAM, "type": "File"}}]
    created(node, name, main=(main,), volumes=volumes, **claimed)
    log = f"/var/log/pods/default_{name}_*/main/*.log"
    node.guest.run(f"grep -q ' DONE=' {log}", until=True)
    texts = [line.split(" ", 3)[3] for line in node.guest.run(f"cat {log}").splitlines()]
    return dict(text.split("=", 1) for text in texts)


def has_pages(node: Node, name: str, pages: int, said: dict[str, str]) -> None:
    """The kernel allows the container and its pod these pages, on their NUMA node, and none beyond them."""
    assert of_container(node, name, *LIMITS) == [str(pages * 2 * MIB)] * 2
    assert of_pod(node, name, *LIMITS) == [str(pages * 2 * MIB)] * 2
    assert of_container(node, name, "cpuset.mems.effective") == [str(PAGES_NODE)]
    assert (said["DONE"], said["OVER"]) == ("0", "Cannot allocate memory")
    assert f" N{PAGES_NODE}={pages} " in f"{said['MAP']} "


def test_limits_of_pages_are_what_is_held_and_what_kubelet_allows(node: Node, program: str) -> None:
    """Kubelet limits a pod that asks it for none to 0."""
    node.run_pod("none")
    assert of_pod(node, "none", *LIMITS) == ["0", "0"]
    node.delete_pod("none")
    has_pages(node, "ours", BLOCK, paged(node, "ours", BLOCK, limits={PAGES: "1"}))
    both = {PAGES: "1", KUBELETS_PAGES: "4Mi", **amounts("100m")}
    has_pages(node, "both", BLOCK + 2, paged(node, "both", BLOCK + 2, limits=both))
    node.delete_pod("both")
    gone(node, "ours")


@pytest.mark.parametrize("counted", [False, True], ids=["by the agent alone", "by kubelet too"])
def test_limits_of_pages_count_a_claim_once(node: Node, program: str, counted: bool) -> None:
    """Where claims are in the scheduler's books kubelet's limit has them already."""
    if counted:
        configure_kubelet(node, featureGates={GATE: True})
        until("claims are counted", lambda: KUBELETS_PAGES in node.status()["dra"]["counted"], STEP_S)
    names = claimed, alone = [f"{one}-{counted}".lower() for one in ("claimed", "alone")]
    plain = {KUBELETS_PAGES: "4Mi", **amounts("100m")}
    has_pages(node, claimed, 4, paged(node, claimed, 4, limits=plain, claims=True))
    has_pages(node, alone, 2, paged(node, alone, 2, limits={}, claims=True))
    status = node.api.call("GET", f"/api/v1/namespaces/default/pods/{claimed}")["status"]
    assert bool(status.get("nodeAllocatableResourceClaimStatuses")) == counted
    node.delete_pod(alone)
    gone(node, claimed)
    for name in names:
        node.api.delete(claim_path(name))


# ---------------------------------------------------------------- from outside


def test_what_is_measured_can_be_scraped_from_another_machine(node: Node) -> None:
    """Over TCP, and nothing else there. The unit's drop-in for DRA has opened the network."""
    configure_agent(node, metrics={"listen": f"0.0.0.0:{PORT}"})
    created(node, "measured", main=(container("main", 3, limits=amounts("500m")),))
    port = free_port()
    node.guest.qmp("human-monitor-command", command_line=f"hostfwd_add user tcp:127.0.0.1:{port}-:{PORT}")
    until("it is said", lambda: quotas(node) == {"measured": 0.5}, STEP_S)
    found = until("it is measured", lambda: samples(port, "nodeagent_throttled_containers") == {(): 1.0}, STEP_S)
    assert found and samples(port, "nodeagent_pinned_containers") == {(): 1.0}
    cpus_held = samples(port, "nodeagent_numa_cpus")
    assert sum(value for labels, value in cpus_held.items() if ("state", "held") in labels) == 3
    (holder,) = samples(port, "nodeagent_holder")
    assert dict(holder)["pod"] == "measured"
    assert answer(port, "/readyz")[0] == 200
    assert answer(port, "/v1/grants")[0] == 404
    gone(node, "measured")
    configure_agent(node)


def answer(port: int, path: str) -> tuple[int, str]:
    """Status and body; (0, "") where nothing answers."""
    try:
        status, _, body = asyncio.run(scrape(port, path))
    except OSError:
        return 0, ""
    return status, body


def samples(port: int, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """The values of one gauge, by their labels."""
    _, body = answer(port, "/metrics")
    every = [one for family in text_string_to_metric_families(body) for one in family.samples if one.name == name]
    return {tuple(sorted(one.labels.items())): one.value for one in every}


# ---------------------------------------------------------------- another version and back


def missing(commit: str) -> str:
    """Why a version cannot be had from the history, or ""."""
    command = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=False)
    except FileNotFoundError:
        return "git is not installed"
    return f"the repository has no commit {commit}, as in a shallow clone" if done.returncode else ""


def older_wheel() -> Path:
    """Built of the history, with what the guest has."""

    def fill(folder: Path) -> None:
        packed = subprocess.run(["git", "archive", FIRST_WITH_PINS], cwd=CHECKOUT, capture_output=True, check=True)
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as tar:
            tar.extractall(folder, filter="data")

    with vmimage.unshared():
        return vmimage.wheel(vmimage.image() / "root", fill, "older-wheel")


def replaced(node: Node, folder: str) -> None:
    """As docs/operations.md says: install the other version, restart."""
    began = time.monotonic()
    node.guest.run(f"{PIP} {folder}/nodeagent-*.whl && systemctl restart nodeagent", 300)
    node.ready()
    print(f"vm: installed from {folder} and ready: {time.monotonic() - began:.1f} s", flush=True)


def as_before(node: Node, where: dict[str, str], grants: dict[str, str]) -> None:
    assert node.grants(until=True) == grants
    assert {name: node.effective(name) for name in where} == where


def test_an_older_version_and_this_one_again_lose_nothing(node: Node) -> None:
    """A pinned pod and a claim are held meanwhile. What is begun under one version is the other's too."""
    if reason := missing(FIRST_WITH_PINS):
        pytest.skip(reason)
    older = node.guest.share / "older"
    older.mkdir()
    shutil.copy(older_wheel(), older)
    with vmcluster.pods(node) as where:
        grants, files = node.grants(), node.guest.run("ls /var/run/cdi")
        replaced(node, "/share/older")
        as_before(node, where, grants)
        node.run_pod("begun", 1)
        begun = node.effective("begun")
        assert node.first_cpus("begun") == begun and len(cpus(begun)) == 1
        assert not cpus(begun) & set().union(*map(cpus, grants.values()))
        with_begun = node.grants()
        assert grants.items() < with_begun.items()
        where = {name: node.effective(name) for name in where} | {"begun": begun}
        replaced(node, "/share")
        as_before(node, where, with_begun)
        assert node.guest.run("ls /var/run/cdi") == files
        node.delete_pod("begun")
        until("its CPU is released", lambda: node.grants() == grants, STEP_S)
        assert of_claims(node) == {"claim": cpus(where[CLAIMED])}
