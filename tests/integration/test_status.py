"""The status socket of a running agent: what it shows, to whom, and what it lets whom change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.cli.agent import status as status_of
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CHAR, CPU, Running, running
from tests.support.scraping import free_port, refused, scrape
from tests.support.until import until
from tests.unit.admin.test_reasons import given_twice

RESOURCES = [
    {"name": "cpu", "kind": "cpu"},
    {"name": "serial", "kind": "char", "paths": ["/dev/ttyS*"], "replicas": 2},
]
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@contextlib.asynccontextmanager
async def standing(folder: Path, tmp_path: Path, **config: Any) -> AsyncIterator[tuple[Running, FakeKubelet]]:
    """An agent on a small machine with one pod on it."""
    tree = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    tree.node("/dev/ttyS0")
    options = {
        "resources": RESOURCES,
        "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
        **config,
    }
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.wait_allocatable(CHAR, 2)
        await kubelet.admit_pod("shop", "till", {"main": {CPU: 2, CHAR: 1}})
        await agent.until("/v1/grants", lambda grants: len([one for one in grants if one["pod"]]) == 2)
        await agent.ready()
        yield agent, kubelet


async def test_every_page_is_there_and_agrees_with_the_others(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        pages = {page: (await agent.ask(f"/v1/{page}"))[1] for page in ("status", "inventory", "grants", "devices")}
        status, grants, devices = pages["status"], pages["grants"], pages["devices"]
        assert status["ready"] and status["not_ready"] == []
        assert status["grants"] == len(grants) == 2
        assert {one["resource"] for one in grants} == {CPU, CHAR}
        assert status["inventory"]["cpus_online"] == pages["inventory"]["cpus_online"] == "0-3"
        held = {(one["resource"], one["id"]) for one in devices if one["holder"] == "shop/till/main"}
        assert held == {(one["resource"], identity) for one in grants for identity in one["ids"]}
        assert [(r["name"], r["devices"], r["healthy"], r["held"]) for r in status["resources"]] == [
            (CPU, 4, 4, 2),
            (CHAR, 2, 2, 1),
        ]
        assert (await agent.ask("/healthz")) == (200, "ok\n")
        assert (await agent.ask("/readyz")) == (200, "ok\n")


async def test_the_metrics_can_be_parsed_and_say_the_same(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, kubelet):
        _, text = await agent.ask("/metrics")
        samples = {
            (one.name, tuple(sorted(one.labels.items()))): one.value
            for family in text_string_to_metric_families(text)
            for one in family.samples
        }

        def value(name: str, **labels: str) -> float:
            return samples[f"nodeagent_{name}", tuple(sorted(labels.items()))]

        assert value("ready") == 1
        assert value("registered", resource=CPU) == 1
        assert value("devices", resource=CPU, health="healthy") == 4
        assert value("held", resource=CPU) == 2
        assert value("allocations_total", resource=CPU, outcome="granted") == 1
        assert value("allocate_seconds_count", resource=CPU) == 1
        assert value("prefer_seconds_count", resource=CPU) >= 1
        assert value("registration_seconds_count", resource=CPU) == 1
        assert value("ledger_write_seconds_count") >= 2
        assert value("numa_cpus", numa_node="0", state="free") == value("numa_cpus", numa_node="0", state="held") == 2
        assert value("numa_devices", numa_node="none", kind="char", state="held") == 1
        assert value("holder", resource=CHAR, namespace="shop", pod="till", container="main", claim="") == 1
        await kubelet.delete_pod("shop", "till")
        await agent.until("/v1/grants", lambda grants: grants == [])
        _, text = await agent.ask("/metrics")
        assert "till" not in text
        assert "nodeagent_releases_total 2.0" in text


async def test_readyz_is_503_with_reasons_until_kubelet_comes(folder: Path, tmp_path: Path) -> None:
    tree = machine(tmp_path / "root", "1s1n4c")
    async with running(folder, root=tree, resources=RESOURCES[:1]) as agent:
        await agent.until("/v1/status", lambda status: status["resources"])
        code, text = await agent.ask("/readyz")
        assert code == 503
        assert text.startswith(f"{CPU}: waiting for ")
        assert "nodeagent_ready 0.0" in (await agent.ask("/metrics"))[1]
        assert (await agent.ask("/healthz"))[0] == 200
        async with FakeKubelet(folder / "kubelet"):
            await agent.ready()
            assert (await agent.ask("/readyz")) == (200, "ok\n")


@pytest.mark.parametrize(
    ("method", "page", "code", "said"),
    [
        ("GET", "/v2/status", 404, "/v1/status"),
        ("GET", "/v1/status/", 404, "/v1/status"),
        ("DELETE", "/v1/status", 405, "only be read"),
        ("PUT", "/v1/grants", 405, "only be read"),
        ("DELETE", "/v1/grants/g-none", 404, "no such grant"),
        ("GET", "/v1/reload", 404, "expected one of"),
    ],
)
async def test_what_cannot_be_done_says_why(
    folder: Path, tmp_path: Path, method: str, page: str, code: int, said: str
) -> None:
    async with running(folder, root=machine(tmp_path / "root", "1s1n4c"), resources=[]) as agent:
        await agent.ready()
        found, answer = await agent.ask(page, method)
        assert found == code
        assert said in answer["error"]


def as_user(uid: int, gid: int, path: Path, request: str) -> str:
    """The first line of the answer that another user gets, or why there is none."""
    code = f"""
import os, socket
os.setgroups([]); os.setgid({gid}); os.setuid({uid})
try:
    s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r})
    s.sendall(b"{request} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print(s.recv(100).decode().splitlines()[0])
except OSError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


@as_root
async def test_a_member_of_the_group_may_read_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Everybody else may not even connect."""
    import grp

    other = next(one for one in grp.getgrall() if one.gr_gid not in (0, NOBODY))
    folder.chmod(0o755)  # noqa: ASYNC240
    async with standing(folder, tmp_path, status={"group": other.gr_name}) as (agent, _):
        (grant, *_) = (await agent.ask("/v1/grants"))[1]
        path = agent.socket
        assert "200" in as_user(NOBODY, other.gr_gid, path, "GET /v1/status")
        assert "403" in as_user(NOBODY, other.gr_gid, path, f"DELETE /v1/grants/{grant['id']}")
        assert "403" in as_user(NOBODY, other.gr_gid, path, "POST /v1/reload")
        assert as_user(NOBODY, NOBODY, path, "GET /v1/status") == "PermissionError"
        assert len((await agent.ask("/v1/grants"))[1]) == 2


async def test_a_group_that_does_not_exist_is_said(folder: Path, tmp_path: Path) -> None:
    tree = machine(tmp_path / "root", "1s1n4c")
    async with running(folder, root=tree, resources=[], status={"group": "no-such-group"}) as agent:
        await agent.said("no-status-group", group="no-such-group")
        await agent.ready()


async def test_raw_garbage_does_not_disturb_the_agent(folder: Path, tmp_path: Path) -> None:
    async with running(folder, root=machine(tmp_path / "root", "1s1n4c"), resources=[]) as agent:
        await agent.ready()
        for seed in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(agent.socket))
                client.sendall(os.urandom(1 + seed * 50))
        assert (await agent.ask("/healthz")) == (200, "ok\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_reads_it(folder: Path, tmp_path: Path) -> None:
    async with running(folder, root=machine(tmp_path / "root", "1s1n4c"), resources=[]) as agent:
        await agent.ready()
        command = ["curl", "-sS", "--fail", "--unix-socket", str(agent.socket), "http://agent/v1/status"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)  # noqa: ASYNC221
        assert json.loads(done.stdout)["ready"]


@pytest.mark.parametrize(
    ("ran", "note"),
    [
        (None, ""),
        ({"file": "cpuset.cpus.effective", "until_unix_s": 1.0}, "ran on 0-15 instead of 4-7 until {}"),
        ({"file": "cpuset.cpus.effective", "until_unix_s": None}, "runs on 0-15 instead of 4-7"),
        (
            {"file": "cpuset.mems.effective", "until_unix_s": 1.0},
            "used memory of NUMA nodes 0-15 instead of 4-7 until {}",
        ),
    ],
)
def test_the_note_of_a_container_says_where_it_ran_before_it_was_pinned(ran: dict[str, Any] | None, note: str) -> None:
    """With the time of day, of the machine where it is read."""
    shown = {**ran, "found": "0-15", "wanted": "4-7"} if ran else None
    one = {"error": "", "ran_unpinned": shown, "lost_cpus": "", "outside_cpus": "", "quota_cpus": None, "unproven": []}
    assert status_of._note(one) == note.format(time.strftime("%H:%M:%S", time.localtime(1.0)))


async def test_a_group_of_readers_that_does_not_exist_is_named(folder: Path, tmp_path: Path) -> None:
    """The agent runs, only root reads, and the status says why."""
    async with standing(folder, tmp_path, status={"group": "no-such-group"}) as (agent, _):
        note = (
            "status.group: there is no group 'no-such-group' here; only root can read the status socket until the "
            "group exists and the agent is restarted"
        )
        assert (await agent.ask("/v1/status"))[1]["notes"] == [note]
        assert (await agent.said("no-status-group"))["reason"] == note
        assert agent.socket.stat().st_mode & 0o777 == 0o600


async def test_a_key_of_match_that_no_device_has_is_a_note(folder: Path, tmp_path: Path) -> None:
    """Of a resource of either API; the agent serves nothing of it, and says why on the page for admins too."""
    tree = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    tree.pci("0000:3b:00.0", pci_class="030200", vendor="10de")
    gpu = {"name": "gpu", "kind": "gpu", "match": {"vender": "10de"}}
    claimed = {"name": "claimed", "kind": "gpu", "serve": "dra", "match": {"vendor": "10de", "colour": "x"}}
    known = {"name": "known", "kind": "gpu", "match": {"vendor": "1002"}}
    notes = [
        "nodeagent.dev/gpu: match names 'vender', which no gpu of this machine has",
        "nodeagent.dev/claimed: match names 'colour', which no gpu of this machine has",
    ]
    async with running(folder, root=tree.root, resources=[gpu, claimed, known]) as agent:
        status = await agent.until("/v1/status", lambda found: len(found["notes"]) > 1)
        assert [one for one in status["notes"] if "match" in one] == notes
        assert {one["name"]: one["devices"] for one in status["resources"]} == {
            "nodeagent.dev/gpu": 0,
            "nodeagent.dev/known": 0,
        }
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(agent.socket)]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        assert {f"note: {one}" for one in notes} <= set(done.stdout.splitlines())


async def test_a_node_with_many_faults_gives_each_reason_once(folder: Path, tmp_path: Path) -> None:
    """No kubelet, no API server, no cgroups, pools that cannot be: in the lists and on the page for admins."""
    tree = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    tree.node("/dev/ttyS0")
    options: dict[str, Any] = {
        "resources": [{**one, "serve": "both"} for one in RESOURCES] + [{"name": "more", "kind": "cpu"}],
        "dra": {"nodeName": "n", "kubeconfig": str(folder / "none"), "spreadSeconds": 0},
        "pinning": {"mode": "nri", "nriSocket": str(folder / "nri.sock")},
        "hugepages": [{"pageSize": size, "node": 7, "pages": 1} for size in ("2Mi", "1Gi")],
        "status": {"group": "no-such-group"},
    }
    async with running(folder, root=tree.root, **options) as agent:
        status = await agent.until("/v1/status", lambda found: len(found["notes"]) > 1 and len(found["not_ready"]) > 2)
        for lines in (status["not_ready"], status["notes"]):
            assert given_twice(lines) == [], lines
        names = "nodeagent.dev/cpu, nodeagent.dev/serial, nodeagent.dev/more"
        assert any(line.startswith(f"{names}") for line in status["not_ready"]), status["not_ready"]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "nodeagent", "status", "--socket", str(agent.socket)],
            capture_output=True,
            text=True,
            check=True,
        )
    page = done.stdout.partition("\n\n")[0].splitlines()[2:]
    assert len(page) > 4
    assert given_twice(line.partition(": ")[2] for line in page) == [], page


async def test_the_metrics_are_scraped_over_tcp_as_configured(folder: Path, tmp_path: Path) -> None:
    """They are the same as on the status socket, and a changed configuration applies without a restart."""
    port, other = free_port(), free_port()
    async with standing(folder, tmp_path, metrics={"listen": f"127.0.0.1:{port}"}) as (agent, _):
        await agent.said("metrics-served", listen=f"127.0.0.1:{port}")
        status, _, text = await scrape(port)
        assert status == 200
        lines = {line for line in text.splitlines() if line.startswith(("nodeagent_held", "nodeagent_numa_cpus"))}
        assert f'nodeagent_held{{resource="{CPU}"}} 2.0' in lines
        assert lines < {*(await agent.ask("/metrics"))[1].splitlines()}
        assert (await scrape(port, "/readyz"))[2] == "ok\n"
        assert (await scrape(port, "/v1/grants"))[0] == (await scrape(port, "/v1/grants/x", "DELETE"))[0] == 404
        (folder / "token").write_text("t0ken")
        (folder / "token").chmod(0o600)
        before = len(agent.log)
        metrics = {"listen": f"127.0.0.1:{other}", "tokenFile": str(folder / "token")}
        agent.configure(resources=RESOURCES, metrics=metrics)
        await agent.said("metrics-served", before, listen=f"127.0.0.1:{other}")
        assert (await scrape(other))[0] == 401
        assert (await scrape(other, headers=["Authorization: Bearer t0ken"]))[0] == 200
        await until(lambda: refused(port))
        agent.configure(resources=RESOURCES)
        await until(lambda: refused(other))


async def test_an_agent_whose_port_is_taken_is_ready_and_says_so(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with standing(folder, tmp_path, metrics={"listen": address}) as (agent, _):
            note = f"cannot serve metrics.listen {address}: Address already in use"
            await agent.until("/v1/status", lambda status: status["notes"])
            status = (await agent.ask("/v1/status"))[1]
            assert (status["notes"], status["ready"]) == ([note], True)
            assert (await agent.said("metrics-not-served"))["error"] == note


async def test_the_verb_prints_the_page_and_writes_it_for_node_exporter(folder: Path, tmp_path: Path) -> None:
    """The file has no metric that node_exporter has itself, and its age shows whether it is still written."""
    file = tmp_path / "textfile" / "nodeagent.prom"
    async with standing(folder, tmp_path) as (agent, _):
        command = [sys.executable, "-m", "nodeagent", "metrics", "--socket", str(agent.socket)]
        page = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert f'nodeagent_held{{resource="{CPU}"}} 2.0\n' in page and "process_cpu_seconds_total" in page
        await asyncio.to_thread(subprocess.check_call, [*command, "--textfile", str(file)])
        families = {one.name for one in text_string_to_metric_families(file.read_text())}
        assert "nodeagent_held" in families and not [one for one in families if not one.startswith("nodeagent_")]
        assert file.stat().st_mode & 0o777 == 0o644
        os.utime(file, (0, 0))
        await asyncio.to_thread(subprocess.check_call, [*command, "--textfile", str(file)])
        assert file.stat().st_mtime > 0
    failed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert (failed.returncode, "cannot ask the agent at" in failed.stderr) == (1, True)
