"""Which sandboxes keep interfaces, from what the runtime tells of them. What moves them writes the real journal and
changes nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import cancel_all
from nodeagent.core.model.container import Pod
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.interface import Interface
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.errors import InputError
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.network.interface_journal import Moved
from nodeagent.managers.network.interface_mover import Asked, InterfaceMover, Sandbox
from nodeagent.managers.network.interfaces import InterfacesManager
from nodeagent.state.agent import Agent
from tests.support.unreadable import unreadable
from tests.support.until import until

ID = "0000:5e:00.1"
POD = Pod(id="s", uid="uid", namespace="default", name="web", network="/run/netns/web")
SECOND = replace(POD, id="s2", uid="uid-2", name="db")
GRANT = Grant(
    id="c-0",
    holder=Holder(api=CLAIM, uid="c"),
    ids=("nic",),
    devices=(ID,),
    settings=to_json(OpaqueConfig(interface=Interface(name="net1"))),
    pods=(POD.uid,),
)


@dataclass
class Node:
    """One node's claims, and what was done for them."""

    manager: InterfacesManager
    goes_on: threading.Event = field(default_factory=threading.Event)
    """Until it is set, moving an interface hangs."""
    given: list[Sandbox] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)

    def records(self) -> Collection[str]:
        return self.manager._mover.records().keys()


def node_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    async def refresh() -> None:
        return

    async def record_reserved_for(uid: str, pods: Sequence[str], op: str) -> None:
        ledger.grants = {GRANT.id: replace(GRANT, pods=tuple(pods))}

    def prepared_for(uid: str) -> Collection[str]:
        assert uid == GRANT.holder.uid
        if not node.goes_on.is_set():
            raise InputError("cannot read kubelet's file")
        return POD.uid, SECOND.uid

    ledger = SimpleNamespace(grants={GRANT.id: GRANT})
    agent: Any = SimpleNamespace(
        settings=SimpleNamespace(boot_id="boot"),
        revisions=SimpleNamespace(ledger=Revision()),
        ledger=ledger,
        newest=ledger,
        inventory=Inventory(),
        loss=None,
        refresh=refresh,
        record_reserved_for=record_reserved_for,
    )
    node = Node(InterfacesManager(cast(Agent, agent), SysFs(folder), folder, lambda: True, prepared_for))

    def hand_over(mover: InterfaceMover, asked: Asked, sandbox: Sandbox) -> bool:
        assert node.goes_on.wait(10)
        node.given.append(sandbox)
        before = Link(index=7, name="ens7")
        record = Moved(
            device=asked.device,
            claim=asked.claim,
            pod=sandbox.pod,
            pod_name=sandbox.pod_name,
            sandbox=sandbox.id,
            namespaces=sandbox.namespaces,
            name="net1",
            before=before,
        )
        mover._journal.keep({record.device: record})
        return True

    def give_back(mover: InterfaceMover, devices: Collection[str]) -> dict[str, str]:
        for one in devices:
            node.taken.append(one)
            mover._journal.forget(one)
        return {}

    monkeypatch.setattr(InterfaceMover, "hand_over", hand_over)
    monkeypatch.setattr(InterfaceMover, "give_back", give_back)
    node.manager.learn([])
    return node


async def test_a_sandbox_that_is_too_late_to_start_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime ends it and says nothing of that."""
    node = node_of(tmp_path, monkeypatch)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await node.manager.started(POD)
    lead = asyncio.create_task(node.manager.lead())
    await asyncio.sleep(0)
    node.goes_on.set()
    await until(lambda: node.taken == [ID] and not node.records())
    assert [one.id for one in node.given] == ["s"]
    await cancel_all([lead])
    await node.manager.close()


async def test_an_interface_that_may_be_with_another_claim_s_pod_is_handed_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of(tmp_path, monkeypatch)
    node.goes_on.set()
    await node.manager.creating(POD)
    plain = replace(GRANT, id="d-0", holder=Holder(api=CLAIM, uid="d"), settings="")
    cpu = replace(plain, devices=(), cpus=CpuSet((3,)))
    with unreadable("interfaces.json"):
        errors = await node.manager.bind({"d": [plain], "e": [cpu]})
        assert [*errors] == ["d"] and "Input/output error" in errors["d"]
    assert await node.manager.bind({"d": [plain]}) == {
        "d": f"the interface of {ID} is not given back by default/web yet"
    }
    await node.manager.close()


async def test_what_is_moved_before_a_container_is_created_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the claim was not known to be the pod's when its sandbox started."""
    node = node_of(tmp_path, monkeypatch)
    node.goes_on.set()
    await node.manager.creating(POD)
    await node.manager.settle()
    assert node.records() == {ID} and not node.taken
    await node.manager.stopped(POD)
    assert node.taken == [ID]
    await node.manager.close()


async def test_a_second_pod_of_a_claim_that_only_kubelet_knows_of_asks_for_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of starting without it."""
    node = node_of(tmp_path, monkeypatch)
    await node.manager.started(SECOND)
    assert not node.given
    node.goes_on.set()
    await node.manager.started(replace(SECOND, id="s3", uid="uid-3"))
    assert not node.given
    await node.manager.started(SECOND)
    assert [one.id for one in node.given] == ["s2"]
    await node.manager.close()


@pytest.mark.parametrize(
    ("pod", "paths"),
    [
        (POD, ("/run/netns/web", "/proc/1/root/run/netns/web")),
        (replace(POD, network="/n", pid=7), ("/n", "/proc/1/root/n")),
        (replace(POD, network="", pid=7), ("/proc/7/ns/net",)),
    ],
)
async def test_a_network_is_looked_for_where_the_runtime_says_and_by_a_process_only_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pod: Pod, paths: tuple[str, ...]
) -> None:
    """An agent in a container sees the host's files below the root of its first process; a PID may be another's."""
    node = node_of(tmp_path, monkeypatch)
    node.goes_on.set()
    await node.manager.started(pod)
    assert [one.namespaces for one in node.given] == [paths]
    await node.manager.close()
