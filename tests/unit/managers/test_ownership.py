"""Whose a claim is where the API server has it reserved for a group of pods, or does not answer: kubelet's word counts,
and a container of which it is not known whether the claim is its own is not started on other CPUs instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.grant import Holding
from nodeagent.core.pinning.plan import variable
from nodeagent.errors import PeerError
from nodeagent.kube import resourceclaim as wire
from nodeagent.kube.kubelet_files.claim_state import STATE_FILE
from tests.doubles.runtime import PluginRefusedError
from tests.support.pin_node import PinNode, pin_node

DRIVER, NODE, UID = "nodeagent.dev", "node-a", "c1a1"
GROUP = {"apiGroup": "scheduling.k8s.io", "resource": "podgroups", "name": "gang", "uid": "uid-gang"}
ENV = [f"{variable(f'{UID}-0')}={UID}-0"]


def pod(name: str) -> dict[str, str]:
    return {"resource": "pods", "name": name, "uid": f"uid-{name}"}


def document(*reserved_for: Mapping[str, str]) -> dict[str, Any]:
    """A claim of two CPUs."""
    result = {
        "request": "cpus",
        "driver": DRIVER,
        "pool": f"{NODE}/cpu",
        "device": "numa0",
        "consumedCapacity": {"cpus": "2"},
    }
    return {
        "metadata": {"name": "c", "namespace": "default", "uid": UID},
        "status": {"allocation": {"devices": {"results": [result]}}, "reservedFor": list(reserved_for)},
    }


async def prepare(node: PinNode, *reserved_for: Mapping[str, str]) -> None:
    """Kubelet has the claim prepared, and the API server has it reserved for these."""
    node.claims["c"] = document(*reserved_for)
    claim: Claim = wire.read(node.claims["c"], DRIVER)
    batch = await node.agent.prepare(Catalog(driver=DRIVER, node_name=NODE, kinds={"cpu": CpuPool()}), [claim], "op")
    assert not batch.errors


def lists(node: PinNode, name: str, *, namespace: str = "default", container: str = "main") -> None:
    ids = ("numa0", f"{DRIVER}/claim={UID}-0")
    node.listed.append(Holding(namespace=namespace, pod=name, container=container, resource=DRIVER, ids=ids))


def records(node: PinNode, *pods: str) -> None:
    """What kubelet writes down before it has the claim prepared."""
    claim = {"ClaimUID": UID, "ClaimName": "c", "Namespace": "default", "DriverState": {DRIVER: {}}}
    data = json.dumps({"ClaimInfoStateList": [{**claim, "PodUIDs": {f"uid-{name}": {} for name in pods}}]})
    (node.folder.parent / STATE_FILE).write_text(json.dumps({"Data": data, "Checksum": 0}))


def held(node: PinNode) -> str:
    (grant,) = node.agent.ledger.grants.values()
    return str(grant.cpus)


@pytest.fixture
def place(folder: Path) -> Path:
    """Kubelet's folder is the parent of the node's."""
    made = folder / "device-plugins"
    made.mkdir()
    return made


async def test_a_claim_of_a_group_is_that_of_the_pods_for_which_kubelet_lists_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pod after the other: the API server names the group alone."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, GROUP)
        for name in ("first", "second"):
            lists(node, name)
            await node.run(name, "main", env=ENV)
            assert node.tree.effective(node.path(name, "main")) == held(node)
        assert next(iter(node.agent.ledger.grants.values())).pods == ("uid-first", "uid-second")


async def test_a_claim_of_a_group_that_kubelet_does_not_list_starts_no_container(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the shared CPUs it would run slowly without a word. A pod of that name elsewhere is another one."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, GROUP)
        lists(node, "first", namespace="other")
        lists(node, "second")
        why = (
            "cannot start container default/first/main: cannot prove that claim default/c is its pod's: "
            "it is reserved for a group of pods; kubelet does not show that its pod uses it"
        )
        with pytest.raises(PluginRefusedError, match=why):
            await node.create("first", "main", env=ENV)
        lists(node, "first")
        await node.run("first", "main", env=ENV)
        assert node.tree.effective(node.path("first", "main")) == held(node)


async def test_with_on_failure_warn_it_starts_on_the_shared_cpus(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(place, monkeypatch, onFailure="warn") as node:
        await prepare(node, GROUP)
        await node.run("first", "main", env=ENV)
        assert node.tree.effective(node.path("first", "main")) == node.shared
        (shown,) = node.pins.document()["pinned"]
        assert shown["unproven"] == [f"{UID}-0"]


async def test_an_init_container_that_kubelet_does_not_list_is_known_by_its_pods_uid(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubelet writes the pods of a claim down before it has the claim prepared."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, GROUP)
        node.kubelet_away = True
        records(node, "first")
        await node.run("first", "init", env=ENV)
        assert node.tree.effective(node.path("first", "init")) == held(node)
        with pytest.raises(PluginRefusedError, match="kubelet is silent: cannot list pod resources: on purpose"):
            await node.create("second", "main", env=ENV)


async def test_kubelet_s_word_counts_while_the_api_server_is_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pod that shares a claim."""

    async def away(*_: object) -> None:
        raise PeerError("cannot reach the API server: on purpose")

    monkeypatch.setattr(PinNode, "fetch", away)
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, pod("first"))
        with pytest.raises(PluginRefusedError, match="on purpose; kubelet does not show that its pod uses it"):
            await node.create("second", "main", env=ENV)
        lists(node, "second")
        for name in ("first", "second"):
            await node.run(name, "main", env=ENV)
            assert node.tree.effective(node.path(name, "main")) == held(node)


async def test_a_claim_that_the_api_server_does_not_have_proves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted, or another one has its name."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, pod("first"))
        for other in ({}, {"c": {"metadata": {"name": "c", "namespace": "default", "uid": "another"}}}):
            node.claims = other
            with pytest.raises(PluginRefusedError, match="the API server has no such claim"):
                await node.create("second", "main", env=ENV)


async def test_what_the_api_server_has_reserved_for_other_pods_alone_is_theirs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forged variable gives nothing, and takes nothing from its own pod either."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, pod("first"))
        await node.run("thief", "main", env=ENV)
        assert node.tree.effective(node.path("thief", "main")) == node.shared


async def test_preparing_a_claim_of_a_group_again_forgets_no_pod(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for another pod of the group, or after a restart of kubelet; with the group the pods known by it end."""
    async with pin_node(place, monkeypatch) as node:
        await prepare(node, GROUP)
        lists(node, "first")
        await node.run("first", "main", env=ENV)
        await prepare(node, GROUP, pod("single"))
        assert node.tree.effective(node.path("first", "main")) == held(node)
        assert next(iter(node.agent.ledger.grants.values())).pods == ("uid-single", "uid-first")
        await prepare(node, pod("single"))
        assert next(iter(node.agent.ledger.grants.values())).pods == ("uid-single",)
