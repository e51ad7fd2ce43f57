"""What `nodeagent doctor` asks the API server: its rights by SelfSubjectAccessReview, and its Node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.cli.node.doctor.cluster import judged_kubelet, judged_runtime
from nodeagent.cli.node.doctor.model import Finding, State, examine
from nodeagent.cli.node.doctor.registry import CHECKS
from tests.builders.doctor_node import BuiltNode
from tests.doubles.api_server import NODES, FakeApiServer

BY_NAME = {check.name: check for check in CHECKS}
DRA = [{"name": "cpu", "kind": "cpu", "serve": "dra"}]


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[FakeApiServer, BuiltNode]]:
    """An API server with a Node n1, and that node."""
    async with FakeApiServer() as server:
        built = BuiltNode(folder)
        built.configure(resources=DRA, dra={"kubeconfig": server.kubeconfig(folder), "nodeName": "n1"})
        info = {"kubeletVersion": "v1.37.0", "containerRuntimeVersion": "containerd://2.1.4"}
        server.add(NODES, {"metadata": {"name": "n1"}, "status": {"nodeInfo": info}})
        yield server, built


async def found(name: str, built: BuiltNode) -> Finding:
    return await asyncio.to_thread(examine, BY_NAME[name], built.node())


async def test_an_account_with_all_rights_is_well(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, built):
        finding = await found("cluster.rights", built)
        assert finding.state is State.OK and server.user in finding.seen
        asked = {seen.verb for seen in server.requests}
        assert asked == {"create", "get"}, "nothing is written to find out"


async def test_a_right_that_is_missing_is_named(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, built):
        server.denied = {"deletecollection resourceslices", "patch resourceclaims/status"}
        finding = await found("cluster.rights", built)
        assert finding.state is State.FAILURE and finding.commands == ("kubectl apply -k deploy",)
        assert "may not deletecollection resourceslices, patch resourceclaims/status" in finding.seen


async def test_rights_of_newer_versions_are_asked_for_there_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, built):
        server.denied = {"associated-node:update resourceclaims/driver"}
        assert "associated-node:update resourceclaims/driver" in (await found("cluster.rights", built)).seen
        node = server.find(NODES, "n1") or {}
        node["status"]["nodeInfo"]["kubeletVersion"] = "v1.35.4"
        server.add(NODES, node)
        assert (await found("cluster.rights", built)).state is State.OK


async def test_what_kubelets_own_account_may_do_in_general_proves_nothing(tmp_path: Path) -> None:
    """The API server judges each object for it."""
    async with cluster(tmp_path) as (server, built):
        server.user, server.denied = "system:node:n1", {"get resourceclaims"}
        assert (await found("cluster.rights", built)).state is State.UNKNOWN


async def test_an_api_server_that_is_away_is_unknown(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, built):
        await server.stop()
        for name in ("cluster.rights", "cluster.node-name"):
            finding = await found(name, built)
            assert finding.state is State.UNKNOWN and "cannot" in finding.seen


async def test_the_node_must_exist_under_the_agents_name(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, built):
        assert await found("cluster.node-name", built) == Finding(State.OK, "there is a Node n1")
        built.configure(dra={**built.configuration["dra"], "nodeName": "n2"})
        finding = await found("cluster.node-name", built)
        assert finding.state is State.FAILURE and "no Node n2" in finding.seen


async def test_versions_are_those_of_the_node(tmp_path: Path) -> None:
    """Without a program that runs here, as in a pod."""
    async with cluster(tmp_path) as (_, built):
        assert "1.37.0" in (await found("cluster.kubelet-version", built)).seen
        assert (await found("cluster.runtime-version", built)).state is State.OK


@pytest.mark.parametrize(
    ("text", "by_dra", "state"),
    [
        ("v1.34.2", True, State.OK),
        ("v1.38.0-rc.1", True, State.OK),
        ("v1.33.9", True, State.FAILURE),
        ("v1.33.9", False, State.WARNING),
        ("v1.39.0", True, State.WARNING),
        ("v9999999999999999999999.1", True, State.WARNING),
        ("", True, State.UNKNOWN),
        ("unreleased", True, State.UNKNOWN),
    ],
)
def test_kubelets_version_is_held_against_the_table(text: str, by_dra: bool, state: State) -> None:
    assert judged_kubelet(text, by_dra).state is state


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("containerd://1.7.24", State.OK),
        ("containerd://1.6.8", State.FAILURE),
        ("cri-o://1.34.0", State.WARNING),
        ("cri-o://1.36.3", State.OK),
        ("crio://1.36.0", State.OK),
        ("cri-o://1.37.0", State.WARNING),
        ("containerd://3.0.0", State.WARNING),
        ("podman://5.0", State.WARNING),
        ("docker", State.UNKNOWN),
    ],
)
def test_the_runtimes_version_is_held_against_what_was_tested(text: str, state: State) -> None:
    assert judged_runtime(text).state is state
