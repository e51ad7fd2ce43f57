"""The whole agent as a real process: kubelet comes and goes, pods come and go, files vanish, it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.version import VERSION
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import AdmissionError, FakeKubelet, Pod
from tests.support.running import CHAR, CPU, Running, block, running

CPU_RESOURCE = {"name": "cpu", "kind": "cpu"}
SERIAL_RESOURCE = {"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"]}
BOTH = [CPU_RESOURCE, SERIAL_RESOURCE]
QUICK = {
    "resyncSeconds": 0.1,
    "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
}
CPUS, PORTS = 8, 2


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A machine of 8 CPUs on 2 NUMA nodes, with two serial ports."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for number in range(PORTS):
        made.node(f"/dev/ttyS{number}")
    return made


@pytest.fixture
def kubelet_dir(folder: Path) -> Path:
    return folder / "kubelet"


@contextlib.asynccontextmanager
async def registered(folder: Path, tree: DeviceTree, **config: Any) -> AsyncIterator[tuple[Running, FakeKubelet]]:
    """An agent with CPUs and serial ports that kubelet shows."""
    options = {"resources": BOTH, **QUICK, **config}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await shown(kubelet)
        yield agent, kubelet


async def shown(kubelet: FakeKubelet, cpus: int = CPUS, ports: int = PORTS) -> None:
    await kubelet.wait_allocatable(CPU, cpus)
    await kubelet.wait_allocatable(CHAR, ports)


async def named(agent: Running, pods: int) -> list[dict[str, Any]]:
    """The grants, once as many pods are named."""
    found: list[dict[str, Any]] = await agent.until(
        "/v1/grants", lambda grants: len({one["pod"] for one in grants if one["pod"]}) == pods
    )
    return found


def essence(grants: list[dict[str, Any]]) -> list[tuple[str, str, tuple[str, ...]]]:
    return sorted((one["id"], one["pod"], tuple(one["ids"])) for one in grants)


# ---------------------------------------------------------------- kubelet comes and goes


async def test_fifty_restarts_of_kubelet_are_fifty_registrations(folder: Path, tree: DeviceTree) -> None:
    """Wiped or not, with a dead socket left behind or not; what is allocatable is right each time."""
    async with registered(folder, tree) as (agent, kubelet):
        for number in range(50):
            await kubelet.stop(leave_socket=number % 3 == 0)
            await kubelet.start(wipe=number % 5 != 0)
            await shown(kubelet)
        await agent.ready()
        assert kubelet.registrations[CPU] >= 51


async def test_a_pod_keeps_its_grant_over_restarts_of_kubelet(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "a", {"main": {CPU: 2, CHAR: 1}})
        before = essence(await named(agent, 1))
        for _ in range(3):
            await kubelet.restart()
            await shown(kubelet)
        assert essence(await named(agent, 1)) == before


async def test_a_kubelet_that_comes_late_is_waited_for(folder: Path, tree: DeviceTree, kubelet_dir: Path) -> None:
    """Not even its folder is there; readyz says what is waited for."""
    async with running(folder, root=tree.root, resources=BOTH, **QUICK) as agent:
        status = await agent.until("/v1/status", lambda status: len(status["resources"]) == 2)
        assert not status["ready"]
        code, text = await agent.ask("/readyz")
        assert code == 503
        assert CPU in text and "kubelet.sock" in text
        async with FakeKubelet(kubelet_dir) as kubelet:
            await shown(kubelet)
            await agent.ready()
            assert (await agent.ask("/readyz")) == (200, "ok\n")


async def test_sockets_that_somebody_deletes_are_made_again(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (_, kubelet):
        for path in kubelet.plugins_folder.glob("nodeagent*"):
            path.unlink()
        await kubelet.wait_registered(CPU, 2)
        await kubelet.wait_registered(CHAR, 2)
        await shown(kubelet)


async def test_kubelets_whole_folder_may_vanish_and_come_back(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.stop()
        shutil.rmtree(kubelet.plugins_folder)
        await agent.until("/v1/status", lambda status: not status["ready"])
        await kubelet.start()
        await shown(kubelet)
        await agent.ready()


async def test_a_touched_kubelet_socket_changes_nothing(folder: Path, tree: DeviceTree) -> None:
    """Nothing is registered again, and a pod's end is noticed as soon as ever."""
    async with registered(folder, tree) as (agent, kubelet):
        await agent.ready()
        for turn in range(3):
            os.utime(kubelet.socket)
            kubelet.socket.chmod(0o600)
            await kubelet.admit_pod("default", f"pod-{turn}", {"main": {CPU: 2, CHAR: 1}})
            await named(agent, 1)
            await kubelet.delete_pod("default", f"pod-{turn}")
            await agent.until("/v1/grants", lambda grants: grants == [])
        await agent.ready()
        assert kubelet.registrations == {CPU: 1, CHAR: 1}


async def test_a_cut_stream_is_a_new_registration(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (_, kubelet):
        await kubelet.cut_streams()
        await shown(kubelet)


async def test_a_kubelet_that_hangs_does_not_keep_the_agent_from_ending(
    folder: Path, tree: DeviceTree, kubelet_dir: Path
) -> None:
    """It accepts connections and never answers."""
    (kubelet_dir / "device-plugins").mkdir(parents=True)
    (kubelet_dir / "pod-resources").mkdir()
    with contextlib.ExitStack() as sockets:
        for path in ("device-plugins/kubelet.sock", "pod-resources/kubelet.sock"):
            hung = sockets.enter_context(socket.socket(socket.AF_UNIX))
            hung.bind(str(kubelet_dir / path))
            hung.listen()
        async with running(folder, root=tree.root, resources=BOTH, **QUICK) as agent:
            await agent.until("/v1/status", lambda status: len(status["resources"]) == 2)
            began = time.monotonic()
            assert await agent.stop() == 0
            assert time.monotonic() - began < 5
            assert not agent.socket.exists()


# ---------------------------------------------------------------- pods come and go


async def test_a_pod_is_named_and_its_end_is_noticed(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        pod = await kubelet.admit_pod("shop", "till", {"main": {CPU: 3, CHAR: 1}})
        grants = await agent.until("/v1/grants", lambda grants: {one["namespace"] for one in grants} == {"shop"})
        assert {identity for one in grants for identity in one["ids"]} == pod.held(CPU) | pod.held(CHAR)
        await kubelet.delete_pod("shop", "till")
        await agent.until("/v1/grants", lambda grants: grants == [])
        released = await agent.said("released")
        assert "shop/till" in released["holder"]


async def test_what_an_init_container_holds_stays_held_while_its_pod_runs(folder: Path, tree: DeviceTree) -> None:
    """Kubelet's list leaves init containers out; its checkpoint has them for as long as their pod is there."""
    async with registered(folder, tree) as (agent, kubelet):
        pod = await kubelet.admit_pod("shop", "till", {"main": {CPU: 1}}, init_containers={"setup": {CPU: 3}})
        await named(agent, 1)
        patient = time.time() + 1.0
        await agent.until("/v1/status", lambda status: (status["listed_at"] or 0) > patient)
        _, grants = await agent.ask("/v1/grants")
        assert {identity for one in grants for identity in one["ids"]} == pod.held(CPU)
        assert len(pod.held(CPU)) == 3
        await kubelet.delete_pod("shop", "till")
        after = await kubelet.admit_pod("shop", "next", {"main": {CPU: 1}})
        await agent.until("/v1/grants", lambda grants: {i for one in grants for i in one["ids"]} == after.held(CPU))


async def test_another_pod_with_the_same_parts_has_another_grant(folder: Path, tree: DeviceTree) -> None:
    """Its id is in the old pod's variables and in the audit: it means one pod indefinitely."""
    async with registered(folder, tree, release={**QUICK["release"], "unobservedSeconds": 3600}) as (agent, kubelet):
        await kubelet.admit_pod("shop", "till", {"main": {CPU: CPUS}})
        (before,) = await named(agent, 1)
        await kubelet.delete_pod("shop", "till")
        await kubelet.admit_pod("shop", "next", {"main": {CPU: CPUS}})
        await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["next"])
        _, (after,) = await agent.ask("/v1/grants")
        assert sorted(after["ids"]) == sorted(before["ids"])
        assert after["id"] != before["id"]


async def test_the_ledgers_folder_is_nobody_elses_to_read(folder: Path, tree: DeviceTree) -> None:
    """The runtime folder is: who may use the socket in it is the socket's own mode."""
    async with registered(folder, tree):
        assert (folder / "state").stat().st_mode & 0o777 == 0o700
        assert (folder / "run").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restarted_agent_has_the_same_grants(folder: Path, tree: DeviceTree, how: signal.Signals) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        await kubelet.admit_pod("default", "b", {"main": {CPU: 3, CHAR: 1}})
        before = essence(await named(agent, 2))
        assert await agent.stop(how) == (0 if how == signal.SIGTERM else -how)
        await kubelet.wait_allocatable(CPU, 0)
        await agent.start()
        await shown(kubelet)
        assert essence(await named(agent, 2)) == before
        with pytest.raises(AdmissionError):
            await kubelet.admit_pod("default", "c", {"main": {CPU: 4}})
        assert essence(await named(agent, 2)) == before


async def test_root_may_release_a_grant_by_hand(folder: Path, tree: DeviceTree) -> None:
    """What kubelet lists still comes back with its next list: the two never contradict each other for long."""
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "a", {"main": {CPU: 1}})
        (grant,) = await named(agent, 1)
        code, gone = await agent.ask(f"/v1/grants/{grant['id']}", "DELETE")
        assert code == 200
        assert [one["id"] for one in gone] == [grant["id"]]
        code, _ = await agent.ask(f"/v1/grants/{grant['id']}", "DELETE")
        assert code == 404


# ---------------------------------------------------------------- kubelet's own managers


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cpu_manager_state", '{"policyName":"static","defaultCpuSet":"0-7","checksum":1}'),
        ("config.yaml", "cpuManagerPolicy: static\n"),
    ],
)
async def test_cpus_are_refused_beside_kubelets_static_manager(
    folder: Path, tree: DeviceTree, kubelet_dir: Path, file: str, text: str
) -> None:
    """With the reason in the log and the status; the other resources go on."""
    kubelet_dir.mkdir()  # noqa: ASYNC240
    (kubelet_dir / file).write_text(text)
    async with FakeKubelet(kubelet_dir) as kubelet, running(folder, root=tree.root, resources=BOTH, **QUICK) as agent:
        await kubelet.wait_allocatable(CHAR, PORTS)
        status = await agent.ready()
        assert file in status["refused"][CPU]
        assert [one["name"] for one in status["resources"]] == [CHAR]
        assert (await agent.said("resource-refused", resource=CPU))["reason"] == status["refused"][CPU]
        assert CPU not in kubelet.registrations


async def test_a_kubelet_that_stops_managing_cpus_gets_ours(folder: Path, tree: DeviceTree, kubelet_dir: Path) -> None:
    kubelet_dir.mkdir()  # noqa: ASYNC240
    (kubelet_dir / "config.yaml").write_text("cpuManagerPolicy: static\n")
    async with FakeKubelet(kubelet_dir) as kubelet, running(folder, root=tree.root, resources=BOTH, **QUICK):
        await kubelet.wait_allocatable(CHAR, PORTS)
        (kubelet_dir / "config.yaml").write_text("cpuManagerPolicy: none\nreservedSystemCPUs: '0,4'\n")
        await kubelet.restart()
        await shown(kubelet)


async def test_disjoint_cpus_are_served_beside_the_static_manager(
    folder: Path, tree: DeviceTree, kubelet_dir: Path
) -> None:
    kubelet_dir.mkdir()  # noqa: ASYNC240
    state = '{"policyName":"static","defaultCpuSet":"0-1,4-5","checksum":1}'
    (kubelet_dir / "cpu_manager_state").write_text(state)
    options = {"resources": BOTH, "reservedCpus": "0-1,4-5", **QUICK}
    async with FakeKubelet(kubelet_dir) as kubelet, running(folder, root=tree.root, **options) as agent:
        await shown(kubelet, cpus=4)
        assert (await agent.ready())["refused"] == {}


# ---------------------------------------------------------------- configuration, live


@pytest.mark.parametrize("by_signal", [True, False])
async def test_only_what_changed_is_registered_again(folder: Path, tree: DeviceTree, by_signal: bool) -> None:
    """One resource is removed, one changed, one added, one left alone: that one is not touched."""
    gone = {"name": "gone", "kind": "char", "paths": ["/dev/ttyS1"]}
    narrow = {"name": "serial", "kind": "char", "paths": ["/dev/ttyS0"]}
    changed = {**narrow, "replicas": 3}
    new = {"name": "new", "kind": "char", "paths": ["/dev/ttyS1"]}
    async with FakeKubelet(folder / "kubelet") as kubelet:
        options = {"resources": [CPU_RESOURCE, narrow, gone], **QUICK}
        async with running(folder, root=tree.root, **options) as agent:
            await shown(kubelet, ports=1)
            await kubelet.wait_allocatable("nodeagent.dev/gone", 1)
            agent.configure(resources=[CPU_RESOURCE, changed, new], **QUICK)
            if by_signal:
                agent.signal(signal.SIGHUP)
            said = await agent.said("configuration-reloaded")
            assert any("replicas" in one for one in said["changed"])
            await shown(kubelet, ports=3)
            await kubelet.wait_allocatable("nodeagent.dev/new", 1)
            await kubelet.wait_allocatable("nodeagent.dev/gone", 0)
            assert kubelet.registrations == {CPU: 1, CHAR: 2, "nodeagent.dev/gone": 1, "nodeagent.dev/new": 1}


async def test_a_quarantined_device_is_never_offered_until_it_is_taken_out_of_the_configuration(
    folder: Path, tree: DeviceTree
) -> None:
    async with FakeKubelet(folder / "kubelet") as kubelet:
        health = {"quarantine": ["/dev/ttyS1", "GPU-*"], "recoverSeconds": 0.1}
        async with running(folder, root=tree.root, resources=BOTH, health=health, **QUICK) as agent:
            await shown(kubelet, ports=1)
            (device,) = [one for one in (await agent.ask("/v1/devices"))[1] if one["id"] == "/dev/ttyS1"]
            assert device["reason"] == "quarantined by the configuration (/dev/ttyS1)"
            status = await agent.until("/v1/status", lambda status: status["notes"])
            assert any("serial number GPU-*" in one for one in status["notes"])
            agent.configure(resources=BOTH, health={"recoverSeconds": 0.1}, **QUICK)
            await shown(kubelet, ports=2)
            assert not any(one.health != "Healthy" for one in kubelet.devices(CHAR))


async def test_a_bad_configuration_is_said_and_not_taken(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        agent.write_config("resorces: []\n")
        said = await agent.said("configuration-refused")
        assert "did you mean resources?" in said["error"]
        status = await agent.until("/v1/status", lambda status: status["config_error"])
        assert "did you mean resources?" in status["config_error"]
        assert "nodeagent_config_refused 1.0" in (await agent.ask("/metrics"))[1]
        code, answer = await agent.ask("/v1/reload", "POST")
        assert code == 409 and "resorces" in answer["error"]
        assert kubelet.registrations == {CPU: 1, CHAR: 1}
        agent.configure(resources=BOTH, **QUICK)
        await agent.until("/v1/status", lambda status: not status["config_error"])
        text = (await agent.ask("/metrics"))[1]
        assert "nodeagent_config_refused 0.0" in text and "nodeagent_conflicts 0.0" in text


async def test_what_kubelet_lists_and_the_ledger_contradicts_is_a_state_of_its_own(
    folder: Path, tree: DeviceTree
) -> None:
    """A pod that kubelet lists with what there never was: the agent stays ready, and says and counts it."""
    async with registered(folder, tree) as (agent, kubelet):
        kubelet.pods["default", "b"] = Pod("default", "b", devices={"main": {CPU: ["cpu77"]}})
        (conflict,) = (await agent.until("/v1/status", lambda one: one["ready"] and one["conflicts"]))["conflicts"]
        assert conflict == f"default/b: cannot allocate cpu77 of {CPU}: unknown"
        assert "nodeagent_conflicts 1.0" in (await agent.ask("/metrics"))[1]
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(agent.socket)]
        shown = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        assert f"conflict: {conflict}" in shown.stdout.splitlines()
        del kubelet.pods["default", "b"]
        await agent.until("/v1/status", lambda status: not status["conflicts"])


async def test_the_first_line_of_the_log_says_what_runs_and_where(folder: Path, tree: DeviceTree) -> None:
    async with running(folder, root=tree.root, resources=[]) as agent:
        line = await agent.said("starting")
        assert {
            key: line[key] for key in ("version", "config", "root", "kubelet_dir", "state_dir", "status_socket")
        } == {
            "version": VERSION,
            "config": str(agent.config_file),
            "root": f"{tree.root}/",
            "kubelet_dir": str(folder / "kubelet"),
            "state_dir": str(agent.state),
            "status_socket": str(agent.socket),
        }


async def test_a_reload_can_be_asked_for_on_the_socket(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        mark = len(agent.log)
        agent.configure(resources=BOTH, **{**QUICK, "auditDays": 7, "runtimeDir": str(agent.socket.parent)})
        await agent.said("configuration-reloaded", mark)
        assert (await agent.ask("/v1/reload", "POST")) == (200, {"changed": []})
        assert kubelet.registrations == {CPU: 1, CHAR: 1}


async def test_what_needs_a_restart_is_marked(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, _):
        agent.configure(resources=BOTH, **QUICK, status={"group": "root"})
        said = await agent.said("configuration-reloaded")
        assert said["changed"] == ["status.group: '' -> 'root' (after a restart)"]


# ---------------------------------------------------------------- the machine changes


async def test_a_device_that_appears_is_told(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (_, kubelet):
        tree.node("/dev/ttyS7")
        await kubelet.wait_allocatable(CHAR, PORTS + 1)
        (tree.root / "dev/ttyS7").unlink()
        await kubelet.wait_allocatable(CHAR, PORTS)


async def test_a_cpu_that_goes_offline_is_told(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        tree.write("sys/devices/system/cpu/online", "0-6")
        tree.write("sys/devices/system/cpu/offline", "7")
        await kubelet.wait_allocatable(CPU, CPUS - 1)
        status = await agent.ready()
        assert status["inventory"]["cpus_offline"] == "7"
        assert status["inventory"]["generation"] > 1


async def test_a_cpu_that_cannot_be_read_is_a_warning(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, _):
        tree.write("sys/devices/system/cpu/cpu3/topology/core_cpus_list", "3-1")
        said = await agent.said("machine-unreadable")
        assert "3-1" in said["warning"] and "core_cpus_list" in said["warning"]


async def test_a_new_device_is_found_without_a_root(folder: Path, tmp_path: Path) -> None:
    """On the machine itself: the kernel's events may be out of reach, the resync is not."""
    link = Path(f"/dev/na-test-{os.getpid()}-0")
    if not os.access("/dev", os.W_OK):
        pytest.skip("cannot write to /dev")
    resource = {"name": "serial", "kind": "char", "paths": [f"/dev/na-test-{os.getpid()}-*"]}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, resources=[resource], **QUICK):
        await kubelet.wait_registered(CHAR)
        link.symlink_to("/dev/null")  # noqa: ASYNC240
        try:
            await kubelet.wait_allocatable(CHAR, 1)
        finally:
            link.unlink()  # noqa: ASYNC240
        await kubelet.wait_allocatable(CHAR, 0)


# ---------------------------------------------------------------- files vanish


async def test_the_runtime_folder_may_be_deleted(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, _):
        await agent.ready()
        with contextlib.suppress(OSError):  # the agent may put its socket back while the folder is being emptied
            shutil.rmtree(agent.socket.parent)
        await agent.ready()


@pytest.mark.parametrize("stale", ["socket", "file", "folder", "link"])
async def test_what_lies_in_the_sockets_place_is_no_obstacle(folder: Path, tree: DeviceTree, stale: str) -> None:
    path = folder / "run" / "status.sock"
    path.parent.mkdir()
    if stale == "socket":
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(path))
    elif stale == "file":
        path.write_text("")
    elif stale == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nonexistent")
    async with registered(folder, tree) as (agent, _):
        await agent.ready()


@pytest.mark.parametrize("what", ["folder", "file", "journal"])
async def test_a_deleted_ledger_is_put_back(folder: Path, tree: DeviceTree, what: str) -> None:
    """At once, not with the next decision: after kill -9 nothing is lost."""
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        before = essence(await named(agent, 1))
        if what == "folder":
            gone = agent.state.rename(agent.state.with_name("gone"))
            shutil.rmtree(gone)
        else:
            (agent.state / ("ledger.db" if what == "file" else "ledger.db-wal")).unlink()
        said = await agent.said("ledger-replaced")
        assert "written again" in said["note"]
        await kubelet.admit_pod("default", "b", {"main": {CPU: 2}})
        both = essence(await named(agent, 2))
        assert set(before) < set(both)
        await agent.stop(signal.SIGKILL)
        await agent.start()
        await shown(kubelet)
        assert essence(await named(agent, 2)) == both


async def test_a_ledger_that_cannot_be_written_fails_the_pod(folder: Path, tree: DeviceTree) -> None:
    """Something lies where the folder has to be: the pod's error says it, nothing is granted, later it works again."""
    async with registered(folder, tree) as (agent, kubelet):
        block(agent.state)
        await agent.said("ledger-not-durable")
        with pytest.raises(AdmissionError, match="state"):
            await kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        assert await agent.until("/v1/grants", lambda grants: True) == []
        agent.state.unlink()
        await kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        await named(agent, 1)


async def test_a_second_agent_waits_and_takes_over(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (agent, kubelet):
        await kubelet.admit_pod("default", "a", {"main": {CPU: 2}})
        before = essence(await named(agent, 1))
        async with running(folder, root=tree.root, resources=BOTH, **QUICK) as second:
            said = await second.said("another-agent-leads")
            assert said["lock"] == str(folder / "state" / "leader.lock")
            assert await agent.stop() == 0
            await kubelet.wait_allocatable(CPU, 0)
            await shown(kubelet)
            assert essence(await named(second, 1)) == before
            assert await second.stop() == 0


async def test_an_agent_that_waits_for_another_ends_when_told(folder: Path, tree: DeviceTree) -> None:
    async with registered(folder, tree) as (_, _):  # noqa: SIM117 - the second one begins when the first is shown
        async with running(folder, root=tree.root, resources=BOTH, **QUICK) as second:
            await second.said("another-agent-leads")
            second.signal(signal.SIGHUP)
            assert await second.stop() == 0


async def test_a_damaged_ledger_is_moved_aside_and_said(folder: Path, tree: DeviceTree) -> None:
    (folder / "state").mkdir()
    (folder / "state" / "ledger.db").write_bytes(b"not a ledger" * 1000)
    async with registered(folder, tree) as (agent, _):
        status = await agent.ready()
        (note,) = status["notes"]
        assert "moved to" in note
        assert (await agent.said("ledger-replaced"))["note"] == note


async def test_a_damaged_record_is_kept_and_is_a_note_until_an_admin_removes_it(folder: Path, tree: DeviceTree) -> None:
    state, content = folder / "state", b'{"version": 1, "boot_id": "b'
    state.mkdir()
    (state / "tuning.json").write_bytes(content)
    RecordFile(state / "tuning.json", dict).save(None)  # as any user of it does
    async with registered(folder, tree) as (agent, _):
        (aside,) = state.glob("tuning.json.damaged-*")
        assert aside.read_bytes() == content
        status = await agent.ready()
        (note,) = status["notes"]
        assert note.startswith(f"{aside} could not be read and was set aside: ")
        aside.unlink()
        await agent.until("/v1/status", lambda status: not status["notes"])


# ---------------------------------------------------------------- mistakes of the admin who starts it


def start(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodeagent", "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **options)


def mistaken(folder: Path, **config: Any) -> str:
    """What the agent says on a configuration that it cannot start with: one line, exit code 2."""
    agent = Running(folder, **config)
    done = start("--config", str(agent.config_file), "--kubelet-dir", str(folder / "kubelet"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    return done.stderr


def test_a_socket_path_that_is_too_long_is_one_line(folder: Path) -> None:
    said = mistaken(folder, runtimeDir=str(folder / ("r" * 100)))
    assert "bytes at $.runtimeDir, expected at most 86: a socket's whole path has room for 107 (line 1" in said


def test_a_kubelet_folder_that_is_too_deep_is_one_line(folder: Path) -> None:
    agent = Running(folder, resources=[CPU_RESOURCE])
    done = start("--config", str(agent.config_file), "--kubelet-dir", str(folder / ("k" * 90)))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the limit is 107" in done.stderr


def test_an_empty_name_of_kubelets_folder_is_one_line(folder: Path) -> None:
    """As of a variable that is not set: it must not mean the folder of the machine's own kubelet."""
    done = start("--config", str(Running(folder).config_file), "--kubelet-dir", "")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nodeagent: cannot use --kubelet-dir '': expected kubelet's folder\n"


def test_a_state_folder_that_is_a_file_is_one_line(folder: Path) -> None:
    (folder / "state").write_text("")
    assert "cannot use folder" in mistaken(folder)


def test_an_unknown_key_is_one_line(folder: Path) -> None:
    assert "did you mean auditDays?" in mistaken(folder, auditDay=3)


def test_an_unknown_kind_is_one_line(folder: Path) -> None:
    assert "unknown kind 'gpus'" in mistaken(folder, resources=[{"name": "gpu", "kind": "gpus"}])


def test_a_cpu_list_that_runs_backwards_is_one_line(folder: Path) -> None:
    assert "'3-1'" in mistaken(folder, reservedCpus="3-1")


def test_a_reservation_of_cpus_that_cannot_be_ends_with_one_line(folder: Path) -> None:
    """After what was learnt of kubelet, which may reserve CPUs too."""
    agent = Running(folder, reservedCpus="8000")
    done = start("--config", str(agent.config_file), "--kubelet-dir", str(folder / "kubelet"))
    assert done.returncode == 2
    why = f"nodeagent: cannot use {agent.config_file}: cannot reserve CPUs 8000 of reservedCpus: this machine can have "
    last = done.stderr.splitlines()[-1]
    assert last.startswith(why)
    assert " (line 1, column " in last


@pytest.mark.parametrize(
    ("root", "why"), [("no", "expected a folder with sys below it"), (".", "it has no folder sys")]
)
def test_a_root_that_is_no_machine_is_one_line(folder: Path, root: str, why: str) -> None:
    """Such a tree must not pass for a machine that has nothing."""
    (folder / "empty").mkdir()
    agent = Running(folder)
    done = start("--config", str(agent.config_file), "--root", str(folder / root))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nodeagent: cannot read --root {folder / root}: {why}\n"


def test_a_missing_configuration_is_one_line(folder: Path) -> None:
    done = start("--config", str(folder / "none.yaml"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No such file or directory" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_no_permission_is_one_line(folder: Path) -> None:
    agent = Running(folder)
    folder.chmod(0o755)
    # What is imported comes first: nobody may not even read this interpreter's libraries.
    become = "import os, sys, nodeagent.daemon.daemon, nodeagent.cli.node.run; from nodeagent.cli import main"
    become += "; os.setgid(65534); os.setuid(65534)"
    words = [sys.executable, "-c", f"{become}; sys.exit(main(sys.argv[1:]))", "run", "--config", str(agent.config_file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot use folder" in done.stderr and "ermission" in done.stderr


async def test_no_resource_at_all_is_a_quiet_agent(folder: Path, tree: DeviceTree) -> None:
    async with running(folder, root=tree.root, resources=[], **QUICK) as agent:
        status = await agent.ready()
        assert status["resources"] == []
        assert await asyncio.wait_for(agent.stop(), 10) == 0
