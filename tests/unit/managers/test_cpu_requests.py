"""A pod with exclusive CPUs that asks kubelet for none is told so, once, and no other pod is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.aio.supervise import cancel_all
from nodeagent.core.events.happenings import Happening
from nodeagent.core.ledger.ledger import Ledger, grant, release
from nodeagent.core.model.claim import Claim, ClaimRef
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers.dra.cpu_requests import CpuRequests
from nodeagent.managers.events.pace import Pace
from nodeagent.managers.events.recorder import EventRecorder
from tests.builders.pod_cgroups import PodCgroupTree
from tests.builders.pools import DRIVER, NODE, result
from tests.doubles.api_server import EVENTS, FakeApiServer
from tests.support.until import until

WAIT_S = 20.0
SILENT = 2
"""Shares of CPU of a pod without a request (MinShares of kubelet)."""


def claim_of(name: str, *pods: str) -> Claim:
    ref = ClaimRef(namespace="ns", name=name, uid=f"uid-{name}")
    return Claim(ref=ref, allocated=True, reserved_for=tuple(f"uid-{one}" for one in pods), pods=pods)


def grant_of(name: str, cpus: str, *pods: str) -> Grant:
    holder = Holder(api=CLAIM, resource=f"cpu.{DRIVER}", namespace="ns", claim=name, uid=f"uid-{name}")
    return Grant(
        id=f"g-{name}",
        holder=holder,
        cpus=CpuSet.parse(cpus),
        result=result("cpu", "numa0"),
        pods=tuple(f"uid-{one}" for one in pods),
    )


class Bench:
    def __init__(self, api: FakeApiServer, requests: CpuRequests) -> None:
        self.api, self.requests = api, requests

    async def events(self, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(WAIT_S):
            await self.api.until(lambda: len(self.api.objects(EVENTS)) >= count)
        found = self.api.objects(EVENTS)
        assert len(found) == count
        return found


@contextlib.asynccontextmanager
async def bench(folder: Path, ledger: Ledger) -> AsyncIterator[Bench]:
    async with FakeApiServer() as api:
        client = LazyApi(api.kubeconfig(folder))
        asks = PodCgroups(SysFs(folder)).requests_cpus
        recorder = EventRecorder(client, NODE, DRIVER, Pace(100, 0.01))
        recorder.enable(True)
        requests = CpuRequests(asks, lambda: ledger, recorder.report)
        tasks = [asyncio.create_task(work) for work in (requests.follow(), recorder.run())]
        try:
            yield Bench(api, requests)
        finally:
            await cancel_all(tasks)
            await client.close()
            assert not api.rejected


def ledger_of(*grants: Grant) -> Ledger:
    ledger = Ledger()
    for one in grants:
        ledger = grant(ledger, one)
    return ledger


# ---------------------------------------------------------------- who is told


@pytest.mark.parametrize("controller", ["", "cpu"], ids=["cgroup v2", "cgroup v1"])
async def test_a_pod_with_cpus_that_requests_none_gets_one_event_and_a_note(folder: Path, controller: str) -> None:
    """On the pod, where `kubectl describe pod` shows it; once, however often kubelet asks."""
    cgroups = PodCgroupTree(folder, controller=controller)
    cgroups.run("uid-silent", shares=SILENT, qos="besteffort")
    cgroups.run("uid-last", shares=SILENT)
    mine, last = grant_of("c", "2-3", "silent"), grant_of("last", "7", "last")
    async with bench(folder, ledger_of(mine)) as it:
        it.requests.prepared(claim_of("c", "silent"), [mine])
        await it.events(1)
        it.requests.prepared(claim_of("c", "silent"), [mine])
        it.requests.prepared(claim_of("last", "last"), [last])  # looked at after the one before
        (event,) = [one for one in await it.events(2) if one["regarding"]["name"] != "last"]
        told = {"apiVersion": "v1", "kind": "Pod", "namespace": "ns", "name": "silent", "uid": "uid-silent"}
        assert (event["regarding"], event["type"], event["reason"]) == (told, "Warning", "NoCPURequest")
        assert "claim ns/c gives it the exclusive CPUs 2-3" in event["note"]
        assert it.requests.notes() == ["pods with CPUs of claims request no CPU of kubelet: ns/c (2-3)"]


async def test_a_pod_that_requests_cpus_or_is_not_seen_or_holds_none_is_not_told(folder: Path) -> None:
    """A cgroup that is not there proves nothing; the claim that comes last shows that the others were looked at."""
    cgroups = PodCgroupTree(folder)
    for name, shares in (("modest", 102), ("pages", SILENT), ("last", SILENT)):
        cgroups.run(f"uid-{name}", shares=shares)
    grants = [grant_of(name, cpus, name) for name, cpus in (("modest", "4"), ("unseen", "5"), ("last", "7"))]
    async with bench(folder, ledger_of(*grants)) as it:
        it.requests.prepared(claim_of("pages", "pages"), [replace(grants[0], cpus=CpuSet())])
        for one in grants:
            it.requests.prepared(claim_of(one.holder.claim, one.holder.claim), [one])
        (event,) = await it.events(1)
        assert event["regarding"]["name"] == "last"
        assert it.requests.notes() == ["pods with CPUs of claims request no CPU of kubelet: ns/last (7)"]


async def test_a_claim_of_several_pods_tells_those_alone_that_request_none(folder: Path) -> None:
    """Some of them may be on other nodes."""
    cgroups = PodCgroupTree(folder)
    cgroups.run("uid-a", shares=1024)
    cgroups.run("uid-b", shares=SILENT)
    mine = grant_of("c", "2-3", "a", "b", "elsewhere")
    async with bench(folder, ledger_of(mine)) as it:
        it.requests.prepared(claim_of("c", "a", "b", "elsewhere"), [mine])
        (event,) = await it.events(1)
        assert event["regarding"]["name"] == "b"


# ---------------------------------------------------------------- the note


async def test_the_note_is_there_again_after_a_restart_without_another_event(folder: Path) -> None:
    PodCgroupTree(folder).run("uid-silent", shares=SILENT)
    mine = grant_of("c", "2-3", "silent")
    async with bench(folder, ledger_of(mine)) as it:
        await until(lambda: bool(it.requests.notes()))
        assert "ns/c (2-3)" in it.requests.notes()[0]
        assert not it.api.requests


async def test_the_note_goes_with_the_claim_and_names_a_few_of_many(folder: Path) -> None:
    cgroups, ledgers = PodCgroupTree(folder), [Ledger()]
    for number in range(7):
        cgroups.run(f"uid-p{number}", shares=SILENT)
        ledgers.append(grant(ledgers[-1], grant_of(f"c{number}", str(number), f"p{number}")))
    now = ledgers.pop()
    requests = CpuRequests(PodCgroups(SysFs(folder)).requests_cpus, lambda: now, _nothing)
    task = asyncio.create_task(requests.follow())
    try:
        await until(lambda: "and 2 more" in "".join(requests.notes()))
        now = release(now, [f"g-c{number}" for number in range(1, 7)])
        assert requests.notes() == ["pods with CPUs of claims request no CPU of kubelet: ns/c0 (0)"]
        now = Ledger()
        assert requests.notes() == []
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _nothing(happening: Happening) -> None:
    raise AssertionError("the names of these pods are not known")
