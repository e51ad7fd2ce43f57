"""Containers confined to what they hold, and all others kept off it: over a real socket of a runtime's, on a hierarchy
of control groups that answers as the kernel does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from nodeagent.config.schema import Config
from nodeagent.core.model.container import Container, Pod
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import InputError
from nodeagent.host.cgroup.layout import CONFINED, layouts
from nodeagent.host.cgroup.widen import Widener
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT
from nodeagent.managers.pinning.cache_groups import CacheAnswer, NoCacheGroups
from nodeagent.managers.pinning.manager import GRACE_S
from nodeagent.managers.pinning.nri_hooks import CHECK, DIVIDED
from nodeagent.nri.service import PATIENCE, WAITING
from nodeagent.pb import nri_pb2 as pb
from tests.doubles.runtime import PluginRefusedError
from tests.support.observed import observed
from tests.support.pin_node import PinNode, pin_node
from tests.unit.state.test_agent import PAGES, machine

MIB2 = 2 << 20
END_S = 10.0


async def test_a_container_is_created_on_the_cpus_that_it_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        answer = await node.run("db", "main")
        assert answer.adjust.linux.resources.cpu.cpus == "4-5"
        assert node.tree.effective(node.path("db", "main")) == "4-5"
        (shown,) = node.pins.document()["pinned"]
        assert (shown["granted_cpus"], shown["effective_cpus"], shown["drifts"]) == ("4-5", "4-5", 0)


async def test_everybody_else_is_off_its_cpus_before_it_is_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.run("web", "main")
        assert node.tree.effective(node.path("web", "main")) == "1-15"
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.create("db", "main")
        assert node.tree.effective(node.path("web", "main")) == "1-3,6-15" == node.shared


async def test_a_pod_that_comes_later_is_confined_without_a_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sandbox, and containers that were made while the runtime did not ask."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        pod = node.pod("late")
        await node.until(lambda: node.tree.effective(pod) == "1-3,6-15")
        node.tree.make(f"{pod}/sandbox")
        assert node.tree.effective(f"{pod}/sandbox") == "1-3,6-15"


async def test_the_shared_pool_grows_back_when_a_grant_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.run("web", "main")
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        (grant,) = node.agent.ledger.grants
        await node.remove("db", "main")
        await node.agent.release([grant], "op")
        await node.until(lambda: node.tree.effective(node.path("web", "main")) == "1-15")


async def test_a_container_beside_one_with_cpus_of_its_own_is_kept_off_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("db", "sidecar")
        assert node.tree.effective(node.pod("db")) == "1-15"
        assert node.tree.effective(node.path("db", "sidecar")) == "1-3,6-15"
        node.tree.make(f"{node.pod('db')}/sandbox")
        await node.until(lambda: node.tree.effective(f"{node.pod('db')}/sandbox") == "1-3,6-15")


async def test_init_container_and_container_that_share_ids_run_on_the_same_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "init", "cpu4", "cpu5")
        await node.admit("db", "main", "cpu4", "cpu5")
        first = dict(node.entries[0], ContainerName="init")
        node.entries.append(first)
        node.write_checkpoint()
        for name in ("init", "main"):
            await node.run("db", name)
            assert node.tree.effective(node.path("db", name)) == "4-5"


async def test_a_forged_variable_moves_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        (grant,) = node.agent.ledger.grants
        forged = [f"NODEAGENT_CPU_GRANT={grant}", f"NODEAGENT_GRANT_{grant.upper().replace('-', '_')}={grant}"]
        await node.run("thief", "main", env=[*forged, "NODEAGENT_CPUS=4-5"])
        assert node.tree.effective(node.path("thief", "main")) == "1-3,6-15"


async def test_a_container_whose_grant_cannot_be_proven_is_not_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run unpinned; kubelet tries again."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        (grant,) = node.agent.ledger.grants
        (folder / CHECKPOINT).write_text("{")
        with pytest.raises(
            PluginRefusedError, match=r"cannot start container default/db/main: cannot read .*checkpoint"
        ):
            await node.create("db", "main", env=[f"NODEAGENT_CPU_GRANT={grant}"])
        await node.run("web", "main")
        node.write_checkpoint()
        await node.run("db", "main", env=[f"NODEAGENT_CPU_GRANT={grant}"])
        assert node.tree.effective(node.path("db", "main")) == "4-5"


async def test_pages_are_bound_to_their_node_and_limited_to_the_granted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelet limits the pod to none at all; both limits are raised, there and in the container."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("dpdk", "main", "node1-2Mi-0", "node1-2Mi-1", offer=PAGES)
        pod = node.pod("dpdk")
        for file in ("hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"):
            node.tree.set(pod, file, "0")
        await node.run("dpdk", "main")
        path, limit = node.path("dpdk", "main"), str(8 * MIB2)
        assert node.tree.text(path, "cpuset.mems.effective") == "1"
        for file in ("hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"):
            assert node.tree.text(path, file) == limit
            assert int(node.tree.text(pod, file)) >= 8 * MIB2


async def test_two_requests_of_one_page_size_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        node.entries.append(dict(node.entries[0], DeviceIDs={"-1": ["node1-2Mi-5"]}))
        await node.agent.allocate(PAGES.resource, [["node1-2Mi-5"]], PAGES.edits, "op")
        node.write_checkpoint()
        await node.run("dpdk", "main")
        assert node.tree.text(node.path("dpdk", "main"), "hugetlb.2MB.max") == str(8 * MIB2)


async def test_a_wrong_cpuset_is_repaired_counted_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.run("web", "main")
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        path, timed = node.path("db", "main"), observed("pin_drift_repair")
        with capture_logs() as lines:
            node.tree.set(path, "cpuset.cpus", "6")
            await node.until(lambda: node.tree.effective(path) == "4-5")
            node.tree.set(node.pod("web"), "cpuset.cpus", "0-15")
            await node.until(lambda: node.tree.effective(node.path("web", "main")) == "1-3,6-15")
            await node.until(lambda: node.pins.document()["drifts"] == 2)
        said = [line for line in lines if line["event"] == "drift"]
        assert [line["whose"] for line in said] == ["default/db/main", "pod uid-web"]
        assert "cpuset.cpus: '6', not '4-5'" in said[0]["files"]
        assert node.pins.document()["pinned"][0]["drifts"] == 1
        assert observed("pin_drift_repair") == timed + 2


async def test_a_container_that_cannot_be_confined_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        await node.create("dpdk", "main")
        file = f"{node.path('dpdk', 'main')}/hugetlb.2MB.rsvd.max"
        node.tree.refuses[file] = errno.ENOSPC
        with pytest.raises(PluginRefusedError, match=r"cannot start container default/dpdk/main: cannot write .*rsvd"):
            await node.start("dpdk", "main")
        del node.tree.refuses[file]
        await node.start("dpdk", "main")


@pytest.mark.parametrize("counts", [False, True], ids=["kubelet of today", "kubelet that counts claims"])
async def test_a_container_may_use_its_pages_and_those_that_kubelet_allows_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, counts: bool
) -> None:
    """Kubelet never counts what the device plugin gave. The limit stays when the runtime describes it again."""
    async with pin_node(folder, monkeypatch) as node:
        node.kubelet_counts_claims = counts
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        answer = await node.create("dpdk", "main", pages={"2MB": 3 * MIB2})
        (limit,) = answer.adjust.linux.resources.hugepage_limits
        (grant,) = node.agent.ledger.grants.values()
        assert limit.limit == 3 * MIB2 + sum(one.pages for one in grant.hugepages) * MIB2
        await node.start("dpdk", "main")
        node.agent.revisions.ledger.bump()
        assert await node.pins.reconciler.enforce() == {}
        limits = node.tree.mount / node.path("dpdk", "main") / "hugetlb.2MB.max"
        assert int(limits.read_text()) == limit.limit


@pytest.mark.parametrize("again", [False, True], ids=["same agent", "another agent"])
@pytest.mark.parametrize("counts", [False, True], ids=["kubelet of today", "kubelet that counts claims"])
async def test_where_the_runtime_passes_no_limits_on_a_container_has_its_pages_and_those_that_its_pod_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, counts: bool, again: bool
) -> None:
    """containerd by default. Kubelet's limit of the pod is known although the agent has raised it."""
    async with pin_node(folder, monkeypatch) as node:
        node.kubelet_counts_claims = counts
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        pod = node.pod("dpdk")
        for name, allowed in (("2MB", 3 * MIB2), ("1GB", 0)):
            for file in ("max", "rsvd.max"):
                node.tree.set(pod, f"hugetlb.{name}.{file}", str(allowed))
        (grant,) = node.agent.ledger.grants.values()
        whole = 3 * MIB2 + sum(one.pages for one in grant.hugepages) * MIB2
        await node.run("dpdk", "sidecar")
        for number in (1, 2):
            path = f"{pod}/main_{number}"
            answer = await node.runtime.create(f"main_{number}", pod="dpdk", called="main", cgroup=f"/{path}")
            (limit,) = answer.adjust.linux.resources.hugepage_limits
            node.tree.make(path)
            await node.runtime.start_container(f"main_{number}")
            limits = [
                (node.tree.mount / cgroup / f"hugetlb.2MB.{file}").read_text().strip()
                for cgroup in (path, pod)
                for file in ("max", "rsvd.max")
            ]
            assert {int(one) for one in (*limits, limit.limit)} == {whole}
            neighbour = node.tree.mount / node.path("dpdk", "sidecar") / "hugetlb.2MB.max"
            assert int(neighbour.read_text()) == 3 * MIB2
            assert (node.tree.mount / pod / "hugetlb.1GB.max").read_text().strip() == "0"
            await node.runtime.stop_container(f"main_{number}")
            node.tree.remove(path)
            await node.runtime.remove_container(f"main_{number}")
            if again:
                await node.end()
                node.begin()
                await node.runtime.connected(number + 1)


async def test_a_pod_whose_limits_cannot_be_read_is_not_raised_until_they_can(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        file = node.tree.mount / node.pod("dpdk") / "hugetlb.2MB.max"
        file.write_text("what is this\n")
        with capture_logs() as lines:
            await node.create("dpdk", "main")
        assert "page-limits-not-read" in {line["event"] for line in lines}
        assert file.read_text() == "what is this\n"
        file.write_text("0\n")
        node.agent.revisions.ledger.bump()
        await node.pins.reconciler.enforce()
        (grant,) = node.agent.ledger.grants.values()
        assert int(file.read_text()) == sum(one.pages for one in grant.hugepages) * MIB2


async def test_others_go_on_where_one_cannot_be_confined(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        bad, good = node.pod("bad"), node.pod("good")
        node.tree.refuses[f"{bad}/cpuset.cpus"] = errno.EBUSY
        await node.run("good", "main")
        await node.until(lambda: node.tree.effective(good) == "1-15" and bad in node.pins.document()["errors"])
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.create("db", "main")
        assert node.tree.effective(good) == "1-3,6-15"
        with pytest.raises(PluginRefusedError, match="its CPUs 4-5 are used by pod uid-bad too"):
            await node.start("db", "main")
        node.tree.refuses.clear()
        node.agent.revisions.ledger.bump()
        await node.until(lambda: node.tree.effective(bad) == "1-3,6-15")
        await node.start("db", "main")


async def test_who_holds_nothing_is_kept_from_starting_only_where_he_would_be_on_held_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        node.tree.refuses[f"{node.pod('web')}/cpuset.cpus"] = errno.EBUSY
        await node.run("web", "first")
        await node.admit("db", "main", "cpu4", "cpu5")
        answer = await node.run("web", "second")
        assert answer.adjust.linux.resources.cpu.cpus == node.tree.effective(node.path("web", "second")) == "1-3,6-15"
        await node.create("web", "third")
        node.tree.set(node.path("web", "third"), "cpuset.cpus", "")
        with pytest.raises(PluginRefusedError, match=r"cannot start container default/web/third: cannot write .*web"):
            await node.start("web", "third")


async def test_a_container_may_be_let_start_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch, onFailure="warn") as node:
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        await node.create("dpdk", "main")
        node.tree.refuses[f"{node.path('dpdk', 'main')}/hugetlb.2MB.max"] = errno.EINVAL
        with capture_logs() as lines:
            await node.start("dpdk", "main")
        assert any(line["event"] == "started-unconfined" for line in lines)


@pytest.mark.parametrize("name", ["cri-o", "other"])
async def test_a_runtime_that_starts_what_is_refused_finds_it_killed_or_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """CRI-O only logs what a plugin has against a start, which fails then: there is no process to start. What runs all
    the same is confined as soon as that is possible."""
    async with pin_node(folder, monkeypatch, runtime_name=name) as node:
        node.runtime.starts_anyway = True
        await node.admit("dpdk", "main", "node1-2Mi-0", offer=PAGES)
        answer = await node.create("dpdk", "main")
        path = node.path("dpdk", "main")
        node.tree.refuses[f"{path}/hugetlb.2MB.rsvd.max"] = errno.ENOSPC
        node.tree.writes.clear()
        with capture_logs() as lines:
            await node.start("dpdk", "main")
        (line,) = [one for one in lines if one["event"] == "started-unconfined"]
        assert line["why"].startswith("the runtime started it all the same: cannot start container default/dpdk/main")
        killed = (f"{path}/cgroup.kill", "1") in node.tree.writes
        assert killed == (name == "cri-o")
        node.tree.refuses.clear()
        node.agent.revisions.ledger.bump()
        (limit,) = answer.adjust.linux.resources.hugepage_limits
        await node.until(lambda: node.tree.text(path, "hugetlb.2MB.rsvd.max") == str(limit.limit))


class Failing(NoCacheGroups):
    """Raises what no hook foresees, or does not return before the runtime's patience ends."""

    def __init__(self, hangs: bool) -> None:
        self._hangs = hangs

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        if self._hangs:
            await asyncio.sleep(60)
        raise InputError("cannot read its class: it has none")


class Timed(NoCacheGroups):
    """Notes how long it may take, at a creation and at a start."""

    def __init__(self) -> None:
        self.within_s: list[float] = []

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        self.within_s.append(within_s)
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        self.within_s.append(within_s)
        return ""


async def test_what_the_kernel_divides_has_the_time_that_confining_has_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, spent_s = Timed(), 0.2
    async with pin_node(folder, monkeypatch, caches_of=lambda node, table: timed, request_timeout_s=20.0) as node:
        reconciler = node.pins.reconciler

        async def slow(work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            await asyncio.sleep(spent_s)
            return await work(*args)

        monkeypatch.setattr(reconciler, "doubt", functools.partial(slow, reconciler.doubt))
        monkeypatch.setattr(reconciler, "confirm", functools.partial(slow, reconciler.confirm))
        await node.run("db", "main")
    created_s, starting_s = timed.within_s
    assert max(created_s, starting_s) < DIVIDED * WAITING * 20.0 - spent_s / 2
    assert DIVIDED < CHECK < PATIENCE / WAITING, "the check ends before the answer is given up"


@pytest.mark.parametrize(("hangs", "why"), [(False, "cannot read its class"), (True, "not done within")])
async def test_whatever_refuses_a_start_cri_o_does_not_run_the_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool, why: str
) -> None:
    failing = Failing(hangs)
    async with pin_node(folder, monkeypatch, runtime_name="cri-o", caches_of=lambda node, table: failing) as node:
        node.runtime.starts_anyway = True
        await node.admit("dpdk", "main", "cpu2")
        await node.create("dpdk", "main")
        with capture_logs() as lines:
            await node.start("dpdk", "main")
        assert (f"{node.path('dpdk', 'main')}/cgroup.kill", "1") in node.tree.writes
        (line,) = [one for one in lines if one["event"] == "started-unconfined"]
        assert why in line["why"]


async def test_a_monitor_next_to_a_container_with_cpus_of_its_own_is_kept_off_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRI-O may put it into the pod. It is no container that started without a question."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        own, other = (f"{node.pod(pod)}/crio-conmon-{pod}" for pod in ("db", "web"))
        for path in (own, other):
            node.tree.make(path)
        await node.until(lambda: node.tree.effective(own) == node.shared == "1-3,6-15")
        await node.admit("more", "main", "cpu8")
        await node.create("more", "main")
        assert node.tree.effective(own) == node.shared == "1-3,6-7,9-15"
        node.tree.set(own, "cpuset.cpus", "0-15")
        await node.until(lambda: node.tree.effective(own) == node.shared)
        assert node.tree.text(other, "cpuset.cpus") == "" and node.tree.effective(other) == node.shared
        node.tree.remove(own)
        await node.until(lambda: own not in node.pins.reconciler.applied())
        assert node.runtime.connections == 1 and node.pins.document()["errors"] == {}


async def test_nothing_that_an_agent_confined_is_narrow_after_it_was_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kinds of cgroups it confines."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        node.tree.make(f"{node.pod('db')}/crio-conmon-db")
        await node.until(lambda: {*kinds(node)} == {*CONFINED})
        paths = node.pins.reconciler.applied()
    assert "0-15" not in {node.tree.effective(one) for one in paths}
    assert list(Widener(str(node.tree.mount), "/").undo()) == []
    assert {node.tree.effective(one) for one in paths} == {"0-15"}


def kinds(node: PinNode) -> list[str]:
    """The kinds of all cgroups that are confined."""
    found = [one.parse(path) for one in layouts() for path in node.pins.reconciler.applied()]
    return [one.kind for one in found if one is not None]


# An agent, or a runtime, that was away


async def test_what_ran_unpinned_while_no_agent_ran_is_repaired_before_the_runtime_calls(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ledger, kubelet's record and the bundles prove needs no runtime; it is counted and shown."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        await node.end()
        node.runtime.synchronize_after = asyncio.Event()
        await node.remove("db", "main")
        again = f"{node.pod('db')}/again"
        node.bundle("again", "db", "main")
        node.tree.make(again)
        node.tree.set(node.pod("web"), "cpuset.cpus", "0-15")
        assert node.tree.effective(again) == "1-15"
        with capture_logs() as lines:
            node.begin()
            async with asyncio.timeout(5):
                await node.until(lambda: node.tree.effective(again) == "4-5")
                await node.until(lambda: node.tree.effective(node.path("web", "main")) == "1-3,6-15")
                await node.until(lambda: node.pins.document()["drifts"] == 2)
        shown = node.pins.document()
        assert not shown["connected"] and (shown["drifts_repaired"], shown["drifts_not_repaired"]) == (2, 0)
        (one,) = shown["pinned"]
        assert (one["id"], one["drifts"]) == ("again", 1)
        ran = one["ran_unpinned"]
        assert (ran["file"], ran["found"], ran["wanted"]) == ("cpuset.cpus.effective", "1-15", "4-5")
        assert ran["until_unix_s"] <= time.time()
        said = [(line["whose"], line["found"], line["wanted"]) for line in lines if line["event"] == "ran-unpinned"]
        assert sorted(said) == [("default/db/main", "1-15", "4-5"), ("pod uid-web", "0-15", "1-3,6-15")]


async def test_a_container_that_nobody_has_named_yet_keeps_what_its_pod_was_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that does not list its containers, and no bundles, as in a DaemonSet: that is no proof that they hold
    nothing. Others are confined meanwhile, and what is named later was seen to have been right."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        await node.end()
        node.runtime.synchronize_after = asyncio.Event()
        node.tree.set(node.pod("web"), "cpuset.cpus", "0-15")
        node.begin()
        async with asyncio.timeout(5):
            await node.until(lambda: node.tree.effective(node.path("web", "main")) == "1-3,6-15")
        assert node.tree.effective(node.path("db", "main")) == "4-5"
        assert node.tree.effective(node.pod("db")) == "1-15" and node.pins.page_holders() is None
        node.runtime.synchronize_after.set()
        await node.until(lambda: [one["pod"] for one in node.pins.document()["pinned"]] == ["db"])
        assert node.pins.document()["pinned"][0]["drifts"] == 0


@pytest.mark.parametrize("has_bundle", [True, False], ids=["bundle", "no-bundle"])
async def test_a_runtime_that_starts_a_container_without_a_question_is_connected_to_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_bundle: bool
) -> None:
    """It has dropped the agent and kept the connection open. The container is put right, counted and shown."""
    async with pin_node(folder, monkeypatch) as node:
        await node.run("web", "main")
        node.runtime.forget()
        await node.admit("db", "main", "cpu4", "cpu5")
        node.tree.make(f"{node.pod('db')}/sandbox")
        await node.until(lambda: node.tree.effective(f"{node.pod('db')}/sandbox") == "1-15")
        assert node.runtime.connections == 1
        path = node.path("db", "main")
        if has_bundle:
            node.bundle("db_main", "db", "main")
        with capture_logs() as lines:
            node.runtime.add("db_main", pod="db", called="main", cgroup=f"/{path}")
            node.tree.make(path)
            await node.until(lambda: node.tree.effective(path) == "4-5")
            await node.runtime.connected(2)
        named = "default/db/main" if has_bundle else "of pod uid-db"
        why = [line["error"] for line in lines if line["event"] == "runtime-not-connected"]
        assert why[0].startswith(
            f"cannot rely on {node.runtime.socket}: a container {named} started without a question"
        )
        await node.until(lambda: node.tree.effective(f"{node.pod('db')}/sandbox") == "1-3,6-15")
        (one,) = node.pins.document()["pinned"]
        assert one["drifts"] == 1 and one["ran_unpinned"]["found"] == "1-15"


async def test_a_container_whose_question_was_cut_off_is_confined_and_shown_when_it_appears(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime gave up on the answer, closed the connection and made the container without it."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        node.runtime.forgives_late, node.runtime.gives_up_s = True, {"CreateContainer": 0.0}
        node.runtime.synchronize_after = asyncio.Event()
        node.bundle("db_main", "db", "main")
        await node.create("db", "main")
        path = node.path("db", "main")
        await node.until(lambda: node.tree.effective(path) == "4-5")
        await node.until(lambda: node.pins.document()["drifts"] == 1 and node.pins.document()["pinned"])
        assert node.pins.document()["pinned"][0]["ran_unpinned"]["wanted"] == "4-5"


async def test_sandboxes_and_containers_that_were_asked_about_are_no_evidence_against_the_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        for number in range(3):
            pod = f"p{number}"
            await node.admit(pod, "main", f"cpu{2 * number + 1}")
            if number:
                node.bundle(f"s{number}", pod, "")
            sandbox = f"{node.pod(pod)}/s{number}"
            node.tree.make(sandbox)
            await node.run(pod, "main")
            await node.run(pod, "side")
            await node.until(lambda sandbox=sandbox: node.tree.effective(sandbox) == node.shared)  # type: ignore[misc]
        assert node.runtime.connections == 1 and node.pins.document()["drifts"] == 0


async def test_a_drift_that_cannot_be_repaired_is_counted_apart_until_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counts() -> tuple[int, int, int]:
        shown = node.pins.document()
        return shown["drifts"], shown["drifts_repaired"], shown["drifts_not_repaired"]

    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        path = node.path("db", "main")
        node.tree.refuses[f"{path}/cpuset.cpus"] = errno.EBUSY
        node.tree.set(path, "cpuset.cpus", "6")
        timed = observed("pin_drift_repair")
        await node.until(lambda: counts() == (1, 0, 1))
        assert node.pins.document()["pinned"][0]["drifts_not_repaired"] == 1
        assert observed("pin_drift_repair") == timed
        node.tree.refuses.clear()
        node.agent.revisions.ledger.bump()
        await node.until(lambda: counts() == (1, 1, 0))
        assert node.tree.effective(path) == "4-5"
        assert observed("pin_drift_repair") == timed + 1


async def test_a_runtime_that_is_away_for_longer_than_a_moment_makes_the_agent_not_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at each connection that is made again; and without a socket there is nothing to wait for."""
    async with pin_node(folder, monkeypatch) as node:
        assert node.pins.not_ready() == []
        await node.runtime.stop()
        await node.until(lambda: not node.pins.document()["connected"])
        assert node.pins.not_ready() == []
        node.now_s += GRACE_S + 1
        await node.until(lambda: "Connection refused" in node.pins.document()["reason"])
        (why,) = node.pins.not_ready()
        assert why.startswith("pinning: the container runtime does not ask: cannot connect to ")
        await node.runtime.start()
        await node.until(lambda: node.pins.document()["connected"])
        assert node.pins.not_ready() == []
        await node.runtime.stop()
        node.runtime.socket.unlink()
        await node.until(lambda: not node.pins.document()["connected"])
        node.now_s += GRACE_S + 1
        assert node.pins.not_ready() == []


@pytest.mark.parametrize(("mode", "waits"), [("nri", True), ("auto", False), ("cgroup", False), ("off", False)])
async def test_a_runtime_that_was_never_there_is_missed_only_where_it_has_to_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, waits: bool
) -> None:
    async with pin_node(folder, monkeypatch, connected=False, mode=mode) as node:
        await node.until(lambda: not waits or "No such file" in node.pins.document()["reason"])
        node.now_s += GRACE_S + 1
        assert bool(node.pins.not_ready()) == waits


# What takes too long


async def test_a_container_that_holds_nothing_is_answered_in_time_whatever_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pod is confined afterwards; it does not start on CPUs that others hold before that."""
    async with pin_node(folder, monkeypatch, request_timeout_s=0.3) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        node.tree.answers.clear()
        with capture_logs() as lines:
            await node.create("web", "main")
        assert [line["container"] for line in lines if line["event"] == "answered-from-what-is-known"] == [
            "default/web/main"
        ]
        with pytest.raises(
            PluginRefusedError, match=r"cannot start container default/web/main: not done within 0\.21 s"
        ):
            await node.start("web", "main")
        node.tree.answers.set()
        await node.until(lambda: node.tree.effective(node.pod("web")) == "1-3,6-15")
        await node.start("web", "main")
        assert node.runtime.connections == 1


@pytest.mark.parametrize("on_failure", ["refuse", "warn"])
async def test_a_container_that_holds_cpus_while_all_hangs_is_made_only_where_a_warning_is_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    async with pin_node(folder, monkeypatch, request_timeout_s=0.3, onFailure=on_failure) as node:
        await node.run("web", "main")
        await node.admit("db", "main", "cpu4", "cpu5")
        node.tree.answers.clear()
        with capture_logs() as lines, contextlib.suppress(PluginRefusedError):
            await node.create("db", "main")
        node.tree.answers.set()
        why = "others are not known to be off what it holds: not done within 0.21 s"
        if on_failure == "refuse":
            failed = [line["error"] for line in lines if line["event"] == "nri-call-failed"]
            assert (
                failed == [f"cannot start container default/db/main: {why}"]
                and "db_main" not in node.runtime.containers
            )
        else:
            assert [line["why"] for line in lines if line["event"] == "started-unconfined"] == [why]
            assert node.runtime.cpus("db_main") == "4-5"
            await node.until(lambda: node.tree.effective(node.path("web", "main")) == "1-3,6-15")
        assert node.runtime.connections == 1


async def test_a_cpu_that_is_lost_leaves_the_others_of_its_grant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        node.tree.hotplug("0-4,6-15")
        node.agent.see(machine(without=[5]))
        await node.until(lambda: node.pins.document()["pinned"][0]["lost_cpus"] == "5")
        assert node.tree.effective(node.path("db", "main")) == "4"
        node.tree.hotplug("0-3,6-15")
        node.agent.see(machine(without=[4, 5]))
        # The kernel would give it all that its pod has; that is no other pod's CPU.
        await node.until(lambda: node.tree.text(node.path("db", "main"), "cpuset.cpus") == "1-3,6-15")
        node.tree.hotplug("0-15")
        node.agent.see(machine())
        await node.until(lambda: node.tree.effective(node.path("db", "main")) == "4-5")
        assert node.tree.effective(node.path("web", "main")) == "1-3,6-15"


async def test_a_container_whose_cpus_are_all_offline_is_not_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        node.tree.hotplug("0-3,6-15")
        node.agent.see(machine(without=[4, 5]))
        with pytest.raises(PluginRefusedError, match="its CPUs 4-5 are offline"):
            await node.create("db", "main")


async def test_less_cpu_time_than_cpus_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch, verifySeconds=0.2) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        node.tree.set(node.pod("db"), "cpu.max", "150000 100000")
        await node.until(lambda: node.pins.document()["pinned"][0]["quota_cpus"] == 1.5)
        node.tree.set(node.pod("db"), "cpu.max", "200000 100000")
        await node.until(lambda: node.pins.document()["pinned"][0]["quota_cpus"] is None)


async def test_kubelet_s_resize_keeps_the_cpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.runtime.resize("db_main", pb.LinuxResources(cpu=pb.LinuxCPU(cpus="0-15")))
        assert node.runtime.cpus("db_main") == "4-5"


async def test_a_restarted_agent_finds_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was changed while no agent looked is repaired."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        await node.runtime.drop("")
        node.tree.writes.clear()
        await node.runtime.connected(2)
        assert node.tree.writes == [] and node.pins.document()["drifts"] == 0
        assert node.tree.effective(node.path("db", "main")) == "4-5"


async def test_without_a_runtime_that_asks_containers_are_confined_when_they_appear(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch, connected=False, mode="cgroup") as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        node.bundle("abc", "db", "main")
        pod = node.pod("db")
        node.tree.make(f"{pod}/cri-containerd-abc")
        await node.until(lambda: node.tree.effective(f"{pod}/cri-containerd-abc") == "4-5")
        assert node.pins.document()["mode"] == "cgroup"
        assert [one["pod"] for one in node.pins.document()["pinned"]] == ["db"]


async def test_where_control_groups_cannot_be_written_the_runtime_changes_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch, writable=False) as node:
        await node.create("web", "main")
        assert node.runtime.cpus("web_main") == "1-15"
        await node.admit("db", "own", "cpu4", "cpu5")
        answer = await node.create("db", "own")
        assert node.runtime.cpus("db_own") == "4-5" and node.runtime.cpus("web_main") == "1-3,6-15"
        assert [one.container_id for one in answer.update] == ["web_main"]


async def test_beside_kubelet_s_own_cpu_manager_nobody_else_is_touched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        node.kubelet_confines = True
        await node.pins.apply(Config())
        await node.run("web", "main")
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        assert node.tree.effective(node.path("db", "main")) == "4-5"
        assert CpuSet.parse(node.tree.effective(node.path("web", "main"))) == CpuSet(range(16))


async def test_pods_get_back_what_kubelet_may_give_them_when_its_cpu_manager_takes_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelet writes cpusets of containers, which cannot leave what their pod has. CPUs that the agent has granted stay
    out of reach where kubelet does not have them too."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        assert node.tree.effective(node.path("web", "main")) == "1-3,6-15"
        node.kubelet_confines = True
        await node.pins.apply(Config())
        await node.until(lambda: node.pins.shared_cpus == CpuSet())
        assert node.tree.effective(node.pod("web")) == "1-3,6-15"
        for kubelets, left in (("0-3", "0-3,6-15"), ("0-4", "0-4,6-15")):
            node.kubelet_cpus = CpuSet.parse(kubelets)
            await node.pins.apply(Config())
            await node.until(lambda left=left: node.tree.effective(node.pod("web")) == left)
            assert node.tree.effective(node.pod("db")) == "0-15"
            assert node.tree.effective(node.path("db", "main")) == "4-5"


@pytest.mark.parametrize("known", [True, False], ids=["drop-ins of systemd's", "no trace"])
async def test_pods_that_an_earlier_agent_confined_get_their_cpus_back_if_its_traces_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        if known:
            (folder / "root/run/systemd/system").mkdir(parents=True)
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        await node.run("web", "main")
        await node.end()
        node.kubelet_confines, node.kubelet_cpus = True, CpuSet.parse("0-3")
        node.begin()
        await node.pins._seen.wait()
        await node.run("late", "main")
        left = "0-3,6-15" if known else "1-3,6-15"
        await node.until(lambda: node.tree.effective(node.pod("web")) == left)
        assert node.tree.effective(node.path("db", "main")) == "4-5"
        assert not [*(folder / "root/run/systemd/system").glob("*")]


@pytest.mark.parametrize("ticks", range(8))
async def test_an_agent_that_is_stopped_in_the_moment_of_its_first_look_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ticks: int
) -> None:
    """Whichever turn of the loop after the look it is: none swallows the cancellation."""
    async with pin_node(folder, monkeypatch) as node:
        await node.end()
        node.begin()
        await node.pins._seen.wait()
        for _ in range(ticks):
            await asyncio.sleep(0)
        ending = asyncio.create_task(node.end())
        done, _ = await asyncio.wait([ending], timeout=END_S)
        assert done
        node.begin()
