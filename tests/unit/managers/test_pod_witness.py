"""Whose a grant is and whether its pods live, by everybody but kubelet's list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.ledger.witness import Sight, Witnesses
from nodeagent.core.model.container import RUNNING, STOPPED, Container
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet.pod_resources import CHECKPOINT, NO_LISTING
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pod_witness import PodWitness
from tests.builders.pod_cgroups import PodCgroupTree

HOLDER = Holder(api=DEVICE_PLUGIN, resource="r", namespace="ns", pod="p", container="c")


class Node:
    """Kubelet's folder, pods' cgroups, and what the runtime told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugins = folder / "kubelet/device-plugins"
        self.plugins.mkdir(parents=True)
        self.table = ContainerTable(layouts())
        self.witness = PodWitness(PodCgroups(SysFs(folder)), self.table, self.plugins, frozenset({"n1"}))

    def checkpoint(self, uid: str, *ids: str) -> None:
        entries = [{"PodUID": uid, "ContainerName": "c", "ResourceName": "r", "DeviceIDs": {"-1": list(ids)}}]
        (self.plugins / CHECKPOINT).write_text(json.dumps({"Data": {"PodDeviceEntries": entries}}))

    def runs(self, uid: str, *, pod: str = "p", state: str = RUNNING, env: dict[str, str] | None = None) -> None:
        named = {"namespace": "ns", "pod_name": pod, "name": "c", "env": env or {}}
        self.table.tell(Container(id=f"id-{uid}", pod_id="s", pod_uid=uid, state=state, **named))  # type: ignore[arg-type]

    async def ask(self, one: Grant, *listed: str) -> Witnesses:
        pods = frozenset(("ns", name) for name in listed)
        return await self.witness.witnesses(grant(Ledger(), one), replace(NO_LISTING, pods=pods, kubelet=1))

    async def sight(self, one: Grant, *listed: str) -> Sight:
        witnesses = await self.ask(one, *listed)
        return witnesses.sighting(witnesses.pods_of[one.id]).sight


def held(*, confirmed: bool = True, pods: tuple[str, ...] = (), holder: Holder = HOLDER) -> Grant:
    return Grant(id="g-1", holder=holder, ids=("1",), confirmed=confirmed, pods=pods)


async def test_the_checkpoint_says_whose_a_grant_is(folder: Path) -> None:
    """Before what was recorded: the ids may be another pod's by now."""
    node, cgroups = Node(folder), PodCgroupTree(folder)
    cgroups.run("old")
    node.checkpoint("new", "1")
    assert (await node.ask(held(pods=("old",)))).pods_of == {"g-1": ("new",)}
    assert await node.sight(held(pods=("old",))) is Sight.ABSENT
    node.checkpoint("new", "2")
    assert await node.sight(held(pods=("old",))) is Sight.LIVES


async def test_a_pod_of_the_same_name_that_kubelet_lists_is_not_the_holder(folder: Path) -> None:
    """A stateful set's next pod has the name and other devices: kubelet itself says what it holds."""
    node = Node(folder)
    PodCgroupTree(folder).run("next")
    node.runs("next")
    assert (await node.ask(held())).pods_of == {"g-1": ("next",)}
    assert (await node.ask(held(), "p")).pods_of == {"g-1": ()}


async def test_a_container_that_names_a_grant_keeps_it_where_nothing_better_is_known(folder: Path) -> None:
    """Kubelet was killed before it wrote its checkpoint."""
    node = Node(folder)
    PodCgroupTree(folder).run("u")
    node.runs("u", pod="x", env={"NODEAGENT_CPU_GRANT": "g-1"})
    nobody = Holder(api=DEVICE_PLUGIN, resource="r")
    assert await node.sight(held(confirmed=False, holder=nobody)) is Sight.LIVES
    assert await node.sight(held(confirmed=False, holder=nobody, pods=("other",))) is Sight.ABSENT


@pytest.mark.parametrize(
    ("connected", "state", "sight"),
    [
        (True, RUNNING, Sight.LIVES),
        (True, STOPPED, Sight.STOPPED),
        (False, RUNNING, Sight.UNSEEN),
        (False, STOPPED, Sight.UNSEEN),
    ],
)
async def test_without_cgroups_the_runtime_is_asked_as_long_as_it_tells(
    folder: Path, connected: bool, state: str, sight: Sight
) -> None:
    """What it told before its connection ended may be old."""
    node = Node(folder)
    node.runs("u", state=state)
    node.table.runtime_connected(connected)
    assert await node.sight(held(pods=("u",))) is sight


async def test_the_runtime_may_know_better_than_a_cgroup_that_is_not_there(folder: Path) -> None:
    """A runtime may keep a pod's processes in cgroups of its own."""
    node = Node(folder)
    PodCgroupTree(folder)
    node.table.runtime_connected(True)
    node.runs("u")
    assert await node.sight(held(pods=("u",))) is Sight.LIVES
    assert await node.witness.living([held(pods=("u",))]) == {"g-1": "the runtime runs container ns/p/c"}


async def test_claims_and_imported_grants_are_asked_about_by_their_pods(folder: Path) -> None:
    """A claim's pods are those that it is reserved for."""
    node = Node(folder)
    PodCgroupTree(folder).run("u")
    claim, imported = Holder(api=CLAIM, uid="claim-uid"), Holder(api=KUBELET, uid="u", container="c")
    assert await node.witness.living([held(holder=claim, pods=("a", "u"))])
    assert not await node.witness.living([held(holder=claim, pods=("a", "claim-uid"))])
    assert await node.witness.living([held(holder=imported)])


async def test_a_list_of_static_pods_alone_does_not_show_that_the_api_server_answered(folder: Path) -> None:
    """Kubelet appends the node's name to theirs."""
    node = Node(folder)
    assert not (await node.ask(held())).knows_pods
    assert not (await node.ask(held(), "proxy-n1")).knows_pods
    assert (await node.ask(held(), "proxy-n1", "web")).knows_pods


async def test_what_cannot_be_read_is_not_known_rather_than_empty(folder: Path) -> None:
    """No folders of pods, no checkpoint, a damaged one."""
    node = Node(folder)
    assert ((await node.ask(held())).given, (await node.ask(held())).folders) == (None, None)
    (node.plugins / CHECKPOINT).write_text("{")
    (folder / "kubelet/pods/u").mkdir(parents=True)
    assert ((await node.ask(held())).given, (await node.ask(held())).folders) == (None, {"u"})
    node.checkpoint("u")
    assert (await node.ask(held())).given == {("u", "c"): frozenset()}
