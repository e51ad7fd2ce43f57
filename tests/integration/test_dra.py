"""The whole agent as a real process, with kubelet's both sides and an API server: one ledger over both APIs."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import CLAIMS, NODES, Fault
from tests.doubles.kubelet import AdmissionError
from tests.support.dra_node import (
    CHAR,
    CPU,
    CPUS,
    DRIVER,
    MEMORY,
    NODE,
    PAGES,
    SERIAL,
    SHARED,
    DraNode,
    consumed,
    dra_node,
    result,
)
from tests.support.running import running
from tests.support.until import until

HELD, UNHEALTHY = "nodeagent.dev/held-by-device-plugin", "nodeagent.dev/unhealthy"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A machine of 8 CPUs on 2 NUMA nodes, with two serial ports."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for number in range(2):
        made.node(f"/dev/ttyS{number}")
    return made


def port(node: DraNode, number: int) -> str:
    """The name of a serial port in its pool."""
    (name,) = [name for name in node.devices("char") if name.startswith(f"dev-ttys{number}")]
    return name


def taints(node: DraNode, kind: str, name: str) -> list[str]:
    return [taint["key"] for taint in node.devices(kind)[name].get("taints", ())]


# ---------------------------------------------------------------- one claim


async def test_a_claim_gets_cpus_of_the_node_that_the_scheduler_chose(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        capacities = {name: one["capacity"]["cpus"]["value"] for name, one in node.devices("cpu").items()}
        assert capacities == {"numa0": "4", "numa1": "4"}
        claim = node.claim("c", consumed("cpu", "numa1", cpus="2"))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        assert node.env(claim)["NODEAGENT_CPUS"] == "2,6"
        assert node.env(claim)["NODEAGENT_NUMA_NODES"] == "1"
        assert node.metadata(claim)["devices"][0]["cpus"] == "2,6"
        assert await node.unprepare(claim) == [""]
        assert await node.grants() == []
        assert not [*node.cdi.glob("*.json"), *(folder / "run" / "claims").iterdir()]


async def test_the_same_claim_has_the_same_answer_and_its_files_are_put_back(folder: Path, tree: DeviceTree) -> None:
    """Also after kill -9, and while the API server is away."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", port(node, 0), "port"))
        first, spec = await node.prepare(claim), None
        spec = node.spec(claim)
        shutil.rmtree(node.cdi)
        assert await node.prepare(claim) == first
        assert node.spec(claim) == spec
        await node.agent.stop(signal.SIGKILL)
        shutil.rmtree(node.cdi)
        await node.agent.start()
        await until(lambda: [*node.cdi.glob("*.json")])
        assert node.spec(claim) == spec
        await node.dra.wait_registered(DRIVER, 2)
        async with node.api.away():
            assert await node.prepare(claim) == first
            other = claim.__class__("default", "other", "8f2d2c1e-0000-4000-8000-000000000001")
            (unknown,) = await node.prepare(other)
            assert "cannot prepare claim default/other: " in unknown.error


async def test_files_that_somebody_deletes_are_put_back(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="1"))
        await node.prepare(claim)
        spec = node.spec(claim)
        for _ in range(3):
            shutil.rmtree(node.cdi)
            await until(lambda: [*node.cdi.glob("*.json")])
            assert node.spec(claim) == spec


async def test_orphans_of_ours_are_removed_and_those_of_others_are_not(folder: Path, tree: DeviceTree) -> None:
    (folder / "cdi").mkdir()
    orphan = folder / "cdi" / f"{DRIVER}-claim_0ddba11d-0000-4000-8000-000000000000.json"
    foreign = folder / "cdi" / "nvidia.com-gpu.json"
    for one in (orphan, foreign):
        one.write_text("{}")
    async with dra_node(folder, tree, [CPUS]):
        await until(lambda: not orphan.exists())
        assert foreign.exists()


async def test_a_claim_outlives_a_state_folder_that_was_restored_from_an_older_copy(
    folder: Path, tree: DeviceTree
) -> None:
    """The ledger and its lock file together: nothing in them tells what is missing."""
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        await node.agent.stop(signal.SIGTERM)
        shutil.copytree(folder / "state", folder / "copy")
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 2)
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        first = await node.prepare(claim)
        before, spec = await node.grants(), node.spec(claim)
        await node.agent.stop(signal.SIGKILL)
        shutil.rmtree(folder / "state")
        shutil.copytree(folder / "copy", folder / "state")
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 3)
        while (again := await node.prepare(claim)) != first:
            assert "it is being rebuilt" in again[0].error
        assert (await node.grants(), node.spec(claim)) == (before, spec)


@pytest.mark.parametrize("older", [False, True], ids=["lost", "older-copy"])
async def test_no_claim_gets_the_cpus_of_a_running_pod_after_the_state_folder_was_lost_or_restored(
    older: bool, folder: Path, tree: DeviceTree
) -> None:
    """Before kubelet lists any pod: its checkpoint says what they hold through the device plugin."""
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.agent.stop(signal.SIGTERM)
        shutil.copytree(folder / "state", folder / "copy")
        await node.agent.start()
        await node.kubelet.wait_allocatable(CPU, 8)
        pod = await node.kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        await node.agent.stop(signal.SIGKILL)
        shutil.rmtree(folder / "state")
        if older:
            shutil.copytree(folder / "copy", folder / "state")
        node.kubelet.knows_pods = False
        await node.agent.start()
        await node.dra.wait_registered(DRIVER, 3)
        (put_back,) = await node.agent.until("/v1/grants", bool)
        assert set(put_back["ids"]) == pod.held(CPU)
        await node.agent.until("/v1/status", lambda status: status["ledger"]["whole"])
        claims = [node.claim(f"c{number}", consumed("cpu", f"numa{number}", cpus="4")) for number in range(2)]
        errors = [(await node.prepare(claim))[0].error for claim in claims]
        assert pod.held(CPU) == {"cpu2", "cpu6"} and not errors[0] and "numa1" in errors[1]
        # Kubelet's double takes an agent that ends while it is called back for one that broke the contract.
        await node.kubelet.wait_allocatable(CPU, 4)


async def test_one_bad_claim_harms_no_other(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        good = node.claim("good", consumed("cpu", "numa0", cpus="2"))
        other_driver = node.claim("a", {**result("cpu", "numa0"), "driver": "gpu.example.com"})
        unknown = node.claim("b", result("cpu", "numa7"))
        too_much = node.claim("c", consumed("cpu", "numa0", cpus="5"))
        gone = node.claim("d", result("char", port(node, 0)))
        node.api.delete(CLAIMS, "d", "default")
        renewed = node.claim("e", result("char", port(node, 0)))
        stale = renewed.__class__("default", "e", "8f2d2c1e-0000-4000-8000-000000000001")
        nobody = node.claim("f", result("char", port(node, 0)), reserved_for=[])
        slip = {"source": "FromClaim", "opaque": {"driver": DRIVER, "parameters": {"apiVersion": "nodeagent.dev/v1"}}}
        wrong = node.claim("g", result("char", port(node, 0)), config=[slip])
        answers = await node.prepare(good, other_driver, unknown, too_much, gone, stale, nobody, wrong)
        assert answers[0].error == ""
        expected = [
            "no device of driver nodeagent.dev, only of gpu.example.com",
            "no device 'numa7'",
            "5 CPUs are consumed of a device with 4",
            "has no such claim",
            f"has UID {renewed.uid}",
            "not reserved for any pod",
            "'nodeagent.dev/v1' at $.apiVersion",
        ]
        for answer, text in zip(answers[1:], expected, strict=True):
            assert text in answer.error
            assert answer.error.startswith("cannot prepare claim default/")
        assert [grant["claim"] for grant in await node.grants()] == ["good"]


async def test_pages_memory_and_shares_are_given_as_the_scheduler_counted_them(folder: Path, tree: DeviceTree) -> None:
    made = DeviceTree(
        machine(folder / "root", "1s2n4c-smt", hugepages={(0, 2 << 20): (8, 8, 0), (1, 2 << 20): (4, 4, 0)})
    )
    made.node("/dev/null")
    async with dra_node(folder, made, [CPUS, PAGES, MEMORY, SHARED]) as node:
        await node.published("cpu", "hugepages", "memory", "char")
        assert node.devices("hugepages")["numa0-2mi"]["capacity"]["size"]["value"] == "16Mi"
        assert node.devices("char")["dev-null"]["capacity"]["shares"]["value"] == "4"
        claim = node.claim(
            "c",
            consumed("cpu", "numa1", "cpus", cpus="1"),
            consumed("hugepages", "numa1-2mi", "pages", size="4Mi"),
            consumed("memory", "numa1", "memory", size="1Mi"),
            consumed("char", "dev-null", "null", shares="2"),
        )
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        assert node.env(claim, 1)["NODEAGENT_HUGEPAGES_2MI"] == "2"
        assert node.env(claim, 2)["NODEAGENT_MEMORY_BYTES"] == str(1 << 20)
        assert [one["kind"] for one in node.metadata(claim)["devices"]] == ["cpu", "hugepages", "memory", "char"]
        words = ["-m", "nodeagent", "grants", "--socket", str(node.agent.socket)]
        asked = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.PIPE)
        head, *lines = (await asked.communicate())[0].decode().splitlines()
        at = head.index("MEMORY")
        assert [one for line in lines if (one := line[at:].split()[0]) != "-"] == ["2x2Mi@node1", "1Mi@node1"]


# ---------------------------------------------------------------- one ledger


async def test_what_a_claim_holds_the_device_plugin_shows_unhealthy(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 2)
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"), result("char", port(node, 0), "port"))
        await node.prepare(claim)
        await node.kubelet.wait_allocatable(CPU, 6)
        await node.kubelet.wait_allocatable(CHAR, 1)
        await node.unprepare(claim)
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 2)


async def test_what_a_container_holds_is_tainted_and_a_claim_of_it_refused_by_its_name(
    folder: Path, tree: DeviceTree
) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        await node.kubelet.wait_allocatable(CHAR, 2)
        await node.kubelet.admit_pod("default", "a", {"main": {CHAR: 2, CPU: 3}})
        await node.api.until(lambda: all(taints(node, "char", port(node, n)) == [HELD] for n in (0, 1)))
        await node.api.until(
            lambda: sum(int(one["capacity"]["cpus"]["value"]) for one in node.devices("cpu").values()) == 5
        )
        await node.agent.until("/v1/grants", lambda grants: all(one["pod"] == "a" for one in grants))
        claim = node.claim("c", result("char", port(node, 0), "port"))
        (answer,) = await node.prepare(claim)
        assert "held by default/a/main" in answer.error
        assert f"request port, device {NODE}/char/" in answer.error
        await node.kubelet.delete_pod("default", "a")
        await node.api.until(lambda: not taints(node, "char", port(node, 0)))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""


async def test_a_container_that_is_faster_than_the_news_is_refused_with_the_claims_name(
    folder: Path, tree: DeviceTree
) -> None:
    async with dra_node(folder, tree, [SERIAL]) as node:
        await node.published("char")
        await node.kubelet.wait_allocatable(CHAR, 2)
        both = [node.claim(f"c{n}", result("char", port(node, n))) for n in (0, 1)]
        prepared = asyncio.create_task(node.prepare(*both))
        await asyncio.sleep(0)
        refused = []
        while not prepared.done():
            try:
                await node.kubelet.admit_pod("default", "late", {"main": {CHAR: 1}})
                break
            except AdmissionError as error:
                refused.append(str(error))
            await asyncio.sleep(0)
        answers = await prepared
        granted = sum(not answer.error for answer in answers) + len(node.kubelet.pods)
        assert granted == 2
        for text in refused:
            assert "held by claim default/c" in text or "Available: 0" in text


async def test_shares_of_one_device_are_given_through_both_apis_up_to_their_number(
    folder: Path, tree: DeviceTree
) -> None:
    tree.node("/dev/null")
    async with dra_node(folder, tree, [SHARED]) as node:
        await node.published("char")
        await node.kubelet.wait_allocatable("nodeagent.dev/null", 4)
        claim = node.claim("c", consumed("char", "dev-null", shares="2"))
        await node.prepare(claim)
        await node.kubelet.wait_allocatable("nodeagent.dev/null", 2)
        await node.kubelet.admit_pod("default", "a", {"main": {"nodeagent.dev/null": 1}})
        await node.api.until(lambda: node.devices("char")["dev-null"]["capacity"]["shares"]["value"] == "3")
        (answer,) = await node.prepare(node.claim("d", consumed("char", "dev-null", shares="2")))
        assert "1 are left" in answer.error


# ---------------------------------------------------------------- the server and the driver


async def test_slices_are_published_once_and_put_back_when_kubelet_wipes_them(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.agent.ready()
        before = node.api.writes
        for _ in range(5):
            await node.agent.ask("/v1/status")
        assert node.api.writes == before == 2
        node.api.wipe(NODE)
        await node.published("cpu", "char")
        owner = node.api.slices(node=NODE)[0]["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["name"]) == ("Node", NODE)


async def test_the_slices_are_withdrawn_at_the_end_and_the_claims_kept(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        before = await node.prepare(claim)
        assert await node.agent.stop() == 0
        assert node.api.slices(node=NODE) == []
        await node.agent.start()
        await node.published("cpu")
        await node.dra.wait_registered(DRIVER, 2)
        assert await node.prepare(claim) == before


async def test_an_api_server_that_is_away_is_waited_for_and_everything_else_goes_on(
    folder: Path, tree: DeviceTree
) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        async with node.api.away():
            await node.kubelet.wait_allocatable(CPU, 8)
            await node.kubelet.admit_pod("default", "a", {"main": {CPU: 8}})
            await node.agent.until("/v1/status", lambda status: not status["ready"])
        await node.api.until(lambda: taints(node, "cpu", "numa0") == [HELD])
        await node.agent.ready()


async def test_a_server_that_hangs_keeps_nobody_but_the_claims_waiting(folder: Path, tree: DeviceTree) -> None:
    """32 claims are being read: kubelet registers the driver again, pods are admitted, claims given back."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        held = node.claim("held", result("char", port(node, 0)))
        (answer,) = await node.prepare(held)
        assert answer.error == ""
        claims = [node.claim(f"c{n}", consumed("cpu", "numa0", cpus="1")) for n in range(32)]
        node.api.answers.extend(Fault(kind="hang", verb="get", resource=CLAIMS) for _ in range(40))
        before = node.api.count("get", CLAIMS)
        waiting = asyncio.create_task(node.prepare(*claims))
        await node.api.until(lambda: node.api.count("get", CLAIMS) > before)
        async with asyncio.timeout(5):
            await node.kubelet.admit_pod("default", "a", {"main": {CPU: 4}})
            assert await node.unprepare(held) == [""]
            await node.dra.restart()
            await node.dra.wait_registered(DRIVER, 2)
        assert max(node.dra.get_info_s) < 0.5
        assert node.api.count("get", CLAIMS) < before + 32
        waiting.cancel()
        await asyncio.wait({waiting})


async def test_an_older_server_gets_what_it_keeps(folder: Path, tree: DeviceTree) -> None:
    """CPUs one by one where it knows no consumable capacity; said in the status."""
    async with dra_node(folder, tree, [CPUS]) as node:
        node.api.dropped_fields |= {"consumable"}
        node.api.wipe(NODE)
        await node.api.until(lambda: set(node.devices("cpu")) == {f"cpu{n}" for n in range(8)})
        status = await node.agent.until("/v1/status", lambda status: status["dra"]["slices"]["lost"])
        assert (status["dra"]["slices"]["lost"], status["dra"]["slices"]["kept"]) == (["consumable"], [])
        claim = node.claim("c", result("cpu", "cpu3"), result("cpu", "cpu7"))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        assert node.env(claim)["NODEAGENT_CPUS"] == "3,7"


async def test_claims_are_counted_while_the_node_says_so_and_the_configuration_does(
    folder: Path, tree: DeviceTree
) -> None:
    """Kubelet gets the feature and loses it; counting is turned off and on live. The status says what is counted."""
    declared = {"declaredFeatures": ["DRANodeAllocatableResources"]}

    async def counted(node: DraNode, *names: str) -> None:
        def shown() -> bool:
            devices = node.devices("cpu").values()
            return bool(devices) and all([*it.get("nodeAllocatableResources", ())] == [*names] for it in devices)

        await node.api.until(shown)
        await node.agent.until("/v1/status", lambda status: status["dra"]["counted"] == [*names])

    async with dra_node(folder, tree, [CPUS]) as node:
        node.api.node_allocatable = True
        await counted(node)
        node.api.change(NODES, NODE, status=declared)
        await counted(node, "cpu")
        node.agent.configure(**node.options | {"dra": {**node.options["dra"], "nodeAllocatable": "off"}})
        await counted(node)
        node.agent.configure(**node.options)
        await counted(node, "cpu")
        node.api.change(NODES, NODE, status={})
        await counted(node)


async def test_what_was_prepared_is_in_the_claims_status(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        await node.prepare(claim)
        await node.api.until(lambda: bool((node.api.find(CLAIMS, "c", "default") or {})["status"].get("devices")))
        (device,) = (node.api.find(CLAIMS, "c", "default") or {})["status"]["devices"]
        assert (device["pool"], device["device"]) == (f"{NODE}/cpu", "numa0")
        (condition,) = device["conditions"]
        assert (condition["type"], condition["status"], condition["message"]) == ("Ready", "True", "CPUs 0,4")


async def test_health_reaches_kubelet_and_the_slices(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.dra.wait_health(DRIVER, f"{NODE}/char", port(node, 0), "HEALTHY")
        await node.dra.wait_health(DRIVER, f"{NODE}/cpu", "numa0", "HEALTHY")


async def test_a_live_configuration_begins_and_ends_to_serve_through_dra(folder: Path, tree: DeviceTree) -> None:
    """Claims that are held when it ends can still be unprepared; the device plugin's side is not even registered
    again."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        await node.prepare(claim)
        plain = [{key: value for key, value in one.items() if key != "serve"} for one in (CPUS, SERIAL)]
        node.agent.configure(**{**node.options, "resources": plain})
        await node.api.until(lambda: not node.api.slices(node=NODE))
        assert await node.unprepare(claim) == [""]
        await node.dra.until(lambda: not node.dra.plugins.get(DRIVER))
        node.agent.configure(**node.options)
        await node.published("cpu", "char")
        await node.dra.wait_registered(DRIVER, 2)
        assert (node.kubelet.registrations[CPU], node.kubelet.registrations[CHAR]) == (1, 1)


async def test_another_driver_name_waits_for_a_restart(folder: Path, tree: DeviceTree) -> None:
    """Sockets, files and slices are named after it: what is published goes on to be prepared."""
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        node.agent.configure(**{**node.options, "dra": {**node.options["dra"], "driver": "other.example.com"}})
        said = await node.agent.said("configuration-reloaded")
        assert any(line.startswith("dra.driver:") and "after a restart" in line for line in said["changed"])
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        assert (await node.prepare(claim))[0].error == ""
        assert {one["spec"]["driver"] for one in node.api.slices(node=NODE)} == {DRIVER}


async def test_claims_that_everybody_forgot_are_released(
    folder: Path, tree: DeviceTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown in test_claimcare for each reason; here that a stopped agent's leftovers do not stay indefinitely."""
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        await node.prepare(claim)
        (grant,) = await node.grants()
        assert grant["claim"] == "c" and grant["api"] == "claim"
        code, _ = await node.agent.ask(f"/v1/grants/{grant['id']}", "DELETE")
        assert code == 200
        await until(lambda: not [*node.cdi.glob("*.json")])


# ---------------------------------------------------------------- two instances


async def test_a_rolling_upgrade_serves_claims_all_the_time(folder: Path, tree: DeviceTree) -> None:
    """The second instance answers kubelet alongside the first, on the same ledger, and takes over when that ends."""
    async with dra_node(folder, tree, [CPUS, SERIAL]) as node:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        first = node.claim("first", consumed("cpu", "numa0", cpus="2"))
        before = await node.prepare(first)
        async with running(folder, root=tree.root, **node.options) as second:
            await second.stop(signal.SIGKILL)
            await second.start(env={"POD_UID": "8f2d2c1e-0000-4000-8000-00000000000a"})
            await second.said("another-agent-leads")
            await node.dra.wait_registered(DRIVER, 2)
            assert await node.prepare(first) == before
            claim = node.claim("second", consumed("cpu", "numa0", cpus="2"))
            (answer,) = await node.prepare(claim)
            assert answer.error == ""
            await second.said("claim-prepared", uid=claim.uid)
            await node.kubelet.wait_allocatable(CPU, 4)
            written = [node.api.count(verb, "resourceslices") for verb in ("create", "replace")]
            assert await node.agent.stop() == 0
            await second.said("leading")
            await node.kubelet.wait_registered(CPU, 2)
            await node.kubelet.wait_allocatable(CPU, 4)
            assert await node.prepare(first) == before
            assert node.api.count("delete", "resourceslices") == 0
            assert [node.api.count(verb, "resourceslices") for verb in ("create", "replace")] == written
            assert await node.unprepare(first, claim) == ["", ""]
            assert await second.stop() == 0
            assert node.api.slices(node=NODE) == []


async def test_the_ledger_says_json_that_an_admin_can_query(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        claim = node.claim("c", consumed("cpu", "numa0", cpus="2"))
        await node.prepare(claim)
        (grant,) = await node.grants()
        assert json.dumps(grant)
        assert (grant["resource"], grant["uid"], grant["cpus"]) == ("cpu.nodeagent.dev", claim.uid, "0,4")
        status = await node.agent.ready()
        assert status["dra"]["claims"] == 1
        assert [pool["name"] for pool in status["dra"]["slices"]["pools"]] == [f"{NODE}/cpu"]
