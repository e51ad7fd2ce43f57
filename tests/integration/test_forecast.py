"""`nodeagent forecast` and `nodeagent template` against a running agent, its kubelet and what it has published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import AdmissionError
from tests.integration.test_explain import Said, nodeagent
from tests.support.dra_node import CHAR, CPU, CPUS, PAGES, SERIAL, DraNode, consumed, dra_node

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p"},
    "spec": {
        "initContainers": [{"name": "warm", "resources": {"limits": {CPU: 3}}}],
        "containers": [{"name": "main", "resources": {"limits": {CPU: 2, CHAR: 1}}}],
    },
}
CLASS = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "DeviceClass",
    "metadata": {"name": "cpu.nodeagent.dev"},
    "spec": {"selectors": [{"cel": {"expression": 'device.attributes["nodeagent.dev"].kind == "cpu"'}}]},
}
REQUEST = {"deviceClassName": "cpu.nodeagent.dev", "capacity": {"requests": {"cpus": "2"}}}
CLAIM = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "ResourceClaim",
    "metadata": {"name": "c"},
    "spec": {"devices": {"requests": [{"name": "r", "exactly": REQUEST}]}},
}


def tree(tmp_path: Path) -> DeviceTree:
    """Two nodes of four CPUs, 6 pages of 2 MiB on the first, and three serial lines."""
    found = DeviceTree(machine(tmp_path / "root", "2s2n8c", hugepages={(0, 2 << 20): (6, 6, 0)}))
    for number in range(3):
        found.node(f"/dev/ttyS{number}")
    return found


async def ask(node: DraNode, verb: str, *words: str) -> Said:
    return await nodeagent(node.agent, verb, "--config", str(node.agent.config_file), *words)


def written(folder: Path, *objects: Any) -> str:
    path = folder / f"manifest{len(list(folder.glob('manifest*')))}.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    return str(path)


async def admitted(node: DraNode, count: int) -> int:
    """How many copies of the pod kubelet admits."""
    for number in range(count):
        try:
            await node.kubelet.admit_pod("ns", f"p{number}", {"main": {CPU: 2, CHAR: 1}}, {"warm": {CPU: 3}})
        except AdmissionError:
            return number
        await node.agent.until(
            "/v1/grants", lambda grants, number=number: any(one["pod"] == f"p{number}" for one in grants)
        )
    return count


async def test_kubelet_admits_as_many_pods_as_were_forecast(folder: Path, tmp_path: Path) -> None:
    """Init containers give their CPUs on, so 3 CPUs a pod: 2 fit, although there are 3 serial lines."""
    async with dra_node(folder, tree(tmp_path), [CPUS, SERIAL]) as node:
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 3)
        manifest = written(folder, POD)
        found = (await ask(node, "forecast", "--pod", manifest, "-o", "json")).document()
        assert (found["now"], found["on_empty"]) == (2, 2)
        assert f"it requests 3 of {CPU}, 2 are free" in found["why"]
        assert await admitted(node, 5) == found["now"]
        full = await ask(node, "forecast", "--pod", manifest, "--count", "1")
        assert full.code == 3
        assert "on this node now: 0 of 1 fit" in full.out and "on an empty node of this shape: all 1 fit" in full.out


async def test_devices_that_are_withheld_are_not_forecast(folder: Path, tmp_path: Path) -> None:
    """Of three lines one is the node's console and one is in quarantine. On an empty node of this shape the console is
    one too."""
    root = tree(tmp_path)
    folder_of = root.pci("0000:00:16.3", pci_class="070002")
    root.member("tty", "ttyS0", folder_of / "tty/ttyS0", {"dev": "4:64"})
    root.write("sys/class/tty/console/active", "ttyS0")
    pod = {**POD, "spec": {"containers": [{"name": "m", "resources": {"limits": {CHAR: 1}}}]}}
    async with dra_node(folder, root, [SERIAL], more={"health": {"quarantine": ["/dev/ttyS2"]}}) as node:
        await node.kubelet.wait_allocatable(CHAR, 1)
        found = (await ask(node, "forecast", "--pod", written(folder, pod), "-o", "json")).document()
        assert (found["now"], found["on_empty"]) == (1, 2)
        assert f"it requests 1 of {CHAR}, 0 are free" in found["why"]
        await node.kubelet.admit_pod("ns", "p", {"main": {CHAR: 1}})
        with pytest.raises(AdmissionError):
            await node.kubelet.admit_pod("ns", "q", {"main": {CHAR: 1}})


async def test_without_a_configuration_the_running_agents_counts_and_no_other(folder: Path, tmp_path: Path) -> None:
    """It is not the default one here. Another one, or one that is not in force, is refused."""
    async with dra_node(folder, tree(tmp_path), [CPUS, SERIAL]) as node:
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 3)
        manifest = written(folder, POD)
        found = await nodeagent(node.agent, "forecast", "--pod", manifest, "-o", "json")
        assert (found.code, found.document()["now"]) == (0, 2)
        for resources, served in (([], "nothing"), ([{"name": "cores", "kind": "cpu"}], "nodeagent.dev/cores")):
            other = folder / "other.yaml"
            other.write_text(json.dumps({"resources": resources}))
            for verb in (["forecast", "--pod", manifest], ["template"]):
                refused = await nodeagent(node.agent, *verb, "--config", str(other))
                assert (refused.code, refused.out) == (2, "")
                assert f"{other} is not the configuration that the agent has in force: " in refused.err
                assert f"it serves {served}, the agent {CPU}, {CHAR}; --config names" in refused.err


async def test_as_many_claims_are_prepared_as_were_forecast(folder: Path, tmp_path: Path) -> None:
    """Claims for two CPUs of a node, of which one is prepared already: three more, and no fourth."""
    async with dra_node(folder, tree(tmp_path), [CPUS]) as node:
        await node.published("cpu")
        (first,) = await node.prepare(node.claim("a", consumed("cpu", "numa0", cpus="2")))
        assert not first.error
        manifest = written(folder, CLAIM, CLASS)
        found = (await ask(node, "forecast", "--claim", manifest, "-o", "json")).document()
        assert (found["now"], found["on_empty"]) == (3, 4)
        places = ["numa0", "numa1", "numa1"]
        more = [node.claim(f"b{i}", consumed("cpu", place, cpus="2")) for i, place in enumerate(places)]
        for one in more:
            (prepared,) = await node.prepare(one)
            assert not prepared.error
        assert (await ask(node, "forecast", "--claim", manifest, "-o", "json")).document()["now"] == 0
        unknown = await ask(node, "forecast", "--claim", written(folder, CLAIM))
        assert (unknown.code, unknown.out) == (2, "")
        assert "DeviceClass 'cpu.nodeagent.dev' is not known, none is given" in unknown.err


async def test_the_template_is_what_the_agent_publishes_without_its_node(folder: Path, tmp_path: Path) -> None:
    """The same devices as in the API server, also while some of them are held through the device plugin."""
    async with dra_node(folder, tree(tmp_path), [CPUS, SERIAL, PAGES]) as node:
        await node.published("cpu", "char", "hugepages")
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 3)
        before = {kind: node.devices(kind) for kind in ("cpu", "char", "hugepages")}
        await node.kubelet.admit_pod("ns", "p", {"main": {CPU: 2, CHAR: 1}})
        await node.api.until(lambda: node.devices("char") != before["char"])
        said = await ask(node, "template")
        assert said.code == 0
        assert "node-a" not in said.out
        items = yaml.safe_load(said.out)["items"]
        assert all("nodeName" not in one["spec"] for one in items)
        assert devices(items) == {kind: list(found.values()) for kind, found in before.items()}
        assert json.loads((await ask(node, "template", "-o", "json")).out)["items"] == items


def devices(items: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for one in items:
        found.setdefault(one["spec"]["pool"]["name"], []).extend(one["spec"].get("devices", ()))
    return found


async def test_bad_manifests_get_one_clear_line(folder: Path, tmp_path: Path) -> None:
    async with dra_node(folder, tree(tmp_path), [CPUS]) as node:
        foreign = {**POD, "spec": {"containers": [{"name": "m", "resources": {"limits": {"x.com/tpu": 1}}}]}}
        for words, why in (
            (("--pod", str(folder / "none.yaml")), "cannot read --pod"),
            (("--pod", written(folder, CLASS)), "it has 0 pods or workloads, expected one"),
            (("--pod", written(folder, foreign)), "cannot forecast x.com/tpu: the agent does not serve it"),
            (("--pod", written(folder, POD), "--claim", "x"), "not allowed with argument"),
            (("--pod", written(folder, POD), "--count", "0"), "expected a number from 1 to 1000"),
            ((), "one of the arguments --pod --claim is required"),
        ):
            said = await ask(node, "forecast", *words)
            assert (said.code, said.out) == (2, ""), said
            assert why in said.err and said.err.count("\n") == 1
