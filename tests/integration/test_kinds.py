"""A third-party kind with all hooks, installed as an entry point, in the whole agent as a real process: the kind of
docs/kinds.md as it is written there, and one that does everything wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.support import npu
from tests.support.dra_node import DRIVER, DraNode, dra_node, result
from tests.support.paths import CHECKOUT
from tests.support.until import until

STUBBORN = '''
import os, time
from pathlib import Path
from nodeagent.kinds import ContainerEdits, Device, DeviceNode, Draws, Found, HEALTHY, KindState, Sight, UNHEALTHY

FOLDER = Path(os.environ["STUBBORN"])

def does(hook, device):
    said = FOLDER / f"{hook}-{device.id}"
    with (FOLDER / "calls").open("a") as file:
        file.write(f"{hook} {device.id}\\n")
    if not said.exists():
        return None
    what = said.read_text()
    if what == "raise":
        raise RuntimeError("it is jammed")
    while what == "hang" and said.exists():
        time.sleep(0.05)
    return 7 if what == "wrong" else None

class Stubborn:
    name = "stubborn"
    def discover(self, sysfs, context):
        devices = tuple(Device(kind="stubborn", id=f"s{n}") for n in range(4))
        return Found(state=KindState(kind="stubborn", state="present"), devices=devices)
    def edits(self, device, devices):
        return ContainerEdits(env={"STUBBORN": device.id})
    def prepare(self, device, config):
        return does("prepare", device)
    def unprepare(self, device, config):
        does("unprepare", device)
    def health(self, device):
        return does("health", device) or Sight(HEALTHY)

class Plain:
    """For both APIs: it prepares nothing."""
    name = "plain"
    def discover(self, sysfs, context):
        sizes = {"p1": 1, "p2": 2, "p3": 3}
        devices = tuple(
            Device(kind="plain", id=id, draws=Draws(of="whole", takes={"parts": size}, has={"parts": 4}))
            for id, size in sizes.items()
        )
        return Found(state=KindState(kind="plain", state="present"), devices=devices)
    def edits(self, device, devices):
        return ContainerEdits(env={"PLAIN": device.id})
    def health(self, device):
        ill = FOLDER / f"ill-{device.id}"
        return Sight(UNHEALTHY, ill.read_text()) if ill.exists() else Sight(HEALTHY)

class Half(Plain):
    name = "half"
    prepare = Stubborn.prepare
'''
STUBBORNS = {"name": "stubborn", "kind": "stubborn", "serve": "dra"}
PLAINS = {"name": "plain", "kind": "plain", "serve": "both"}
HEALTH = {"pollSeconds": 0.2, "recoverSeconds": 0.1}


@contextlib.asynccontextmanager
async def hooked_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *resources: dict[str, Any], tree: DeviceTree | None = None
) -> AsyncIterator[DraNode]:
    (folder / "said").mkdir()
    monkeypatch.setenv("STUBBORN", str(folder / "said"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]))
    tree = tree or DeviceTree(machine(folder / "root", "1s1n4c"))
    async with dra_node(folder, tree, resources, more={"health": HEALTH}) as node:
        yield node


async def test_the_kind_of_the_page_does_all_that_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices with counters, a claim with a configuration, its order to the vendor's daemon, and the card's health."""
    assert len(npu.source().splitlines()) <= 80
    npu.install(folder / "site", "npu_package", npu.source(), npu="Npu")
    tree = DeviceTree(machine(folder / "root", "1s1n4c"))
    npu.card(tree)
    async with hooked_node(folder, monkeypatch, npu.RESOURCE, tree=tree) as node:
        await node.published("npu")
        devices = node.devices("npu")
        assert len(devices) == 7
        (counters,) = [it for one in node.api.slices() for it in one["spec"].get("sharedCounters", ())]
        assert counters["counters"] == {"cores": {"value": "4"}}
        two = devices["0000-3b-00-0-2c-0"]
        assert two["consumesCounters"] == [{"counterSet": counters["name"], "counters": {"cores": {"value": "2"}}}]

        claim = _claim(node, "two-cores", "0000-3b-00-0-2c-0", mode="latency", queueDepth=16)
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        order = tree.root / "run/npu" / "0000:3b:00.0-2c-0"
        assert order.read_text() == "latency 16"
        assert (node.env(claim)["NPU_CORES"], node.env(claim)["NPU_MODE"]) == ("2", "latency")
        edits = node.spec(claim)["devices"][0]["containerEdits"]
        assert [(one["hostPath"], one["path"]) for one in edits["deviceNodes"]] == [
            ("/dev/npu/0000:3b:00.0-2c-0", "/dev/npu0")
        ]

        (answer,) = await node.prepare(_claim(node, "wrong", "0000-3b-00-0-1c-0", queueDept=3))
        assert "NpuConfig has no key $.queueDept; did you mean queueDepth?" in answer.error
        (answer,) = await node.prepare(_claim(node, "large", "0000-3b-00-0-1c-0", queueDepth=65))
        assert "NpuConfig: Expected `int` <= 64 - at `$.queueDepth`, found 65" in answer.error
        (answer,) = await node.prepare(_claim(node, "all", "0000-3b-00-0-4c-0"))
        assert (
            "4 cores of 0000:3b:00.0 are needed, 2 are left, others are held by claim default/two-cores" in answer.error
        )

        tree.write(f"sys/bus/pci/devices/{npu.CARD}/npu_state", "melting")
        await node.api.until(lambda: all("taints" in one for one in node.devices("npu").values()))
        tree.write(f"sys/bus/pci/devices/{npu.CARD}/npu_state", "ok")
        await node.api.until(lambda: not any("taints" in one for one in node.devices("npu").values()))
        assert await node.unprepare(claim) == [""]
        assert not order.exists()
        assert not (node.folder / "state" / "kinds.json").exists()


def _claim(node: DraNode, name: str, device: str, **said: Any) -> ClaimId:
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "NpuConfig", **said}
    config = {"source": "FromClaim", "requests": ["r"], "opaque": {"driver": DRIVER, "parameters": parameters}}
    return node.claim(name, result("npu", device), config=[config])


async def test_hooks_that_raise_hang_or_return_something_else_leave_the_agent_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu.install(folder / "site", "stubborn_package", STUBBORN, stubborn="Stubborn", half="Half")
    async with hooked_node(folder, monkeypatch, STUBBORNS) as node:
        await node.published("stubborn")
        said = folder / "said"
        for number, what in enumerate(("raise", "hang", "wrong")):
            (said / f"prepare-s{number}").write_text(what)
        claims = [node.claim(f"c{number}", result("stubborn", f"s{number}")) for number in range(4)]
        answers = await node.prepare(*claims)
        whys = ("raised RuntimeError: it is jammed", "has not returned for 5 s", "returned int, expected", "")
        for answer, why in zip(answers, whys, strict=True):
            assert why in answer.error and bool(answer.error) == bool(why)
        for number in range(3):
            (said / f"prepare-s{number}").unlink()

        async def prepared() -> bool:
            return [one.error for one in await node.prepare(*claims)] == [""] * 4

        await until(prepared)

        (said / "health-s0").write_text("raise")
        (said / "health-s1").write_text("hang")
        await node.api.until(lambda: _tainted(node, "stubborn") == {"s0", "s1"})
        status = (await node.agent.ask("/v1/status"))[1]
        (half,) = [one for one in (await node.agent.ask("/v1/inventory"))[1]["kinds"] if one["kind"] == "half"]
        assert "it has prepare and lacks unprepare" in half["reason"]
        assert status["ready"]
        for name in ("health-s0", "health-s1"):
            (said / name).unlink()
        await node.api.until(lambda: _tainted(node, "stubborn") == set())
        assert await node.unprepare(*claims) == [""] * 4


def _tainted(node: DraNode, kind: str) -> set[str]:
    return {name for name, one in node.devices(kind).items() if "taints" in one}


async def test_kill_9_in_a_hook_is_made_good_by_the_next_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `prepare`, after which kubelet asks again; in `unprepare`; and where the grant is gone meanwhile."""
    npu.install(folder / "site", "stubborn_package", STUBBORN, stubborn="Stubborn")
    async with hooked_node(folder, monkeypatch, STUBBORNS) as node:
        await node.published("stubborn")
        said = folder / "said"
        claim = node.claim("c", result("stubborn", "s0"))
        (said / "prepare-s0").write_text("hang")
        await _killed_in(node, "prepare", claim, said, 2)
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        (said / "unprepare-s0").write_text("hang")
        await _killed_in(node, "unprepare", claim, said, 3)
        assert [one["uid"] for one in await node.grants()] == [claim.uid]
        assert await node.unprepare(claim) == [""]
        assert await node.grants() == []
        assert not (node.folder / "state" / "kinds.json").exists()
        calls = [line for line in (said / "calls").read_text().splitlines() if not line.startswith("health")]
        assert calls == ["prepare s0"] * 2 + ["unprepare s0"] * 2


async def _killed_in(node: DraNode, hook: str, claim: ClaimId, said: Path, times: int) -> None:
    """Kill the agent while a hook runs, and start another one. times: how often agents have registered then."""
    before = _called(said, hook)
    call = asyncio.ensure_future(node.prepare(claim) if hook == "prepare" else node.unprepare(claim))
    await until(lambda: _called(said, hook) > before)
    await node.agent.stop(signal.SIGKILL)
    with contextlib.suppress(Exception):
        await call
    (said / f"{hook}-s0").unlink()
    await node.agent.start()
    await node.dra.wait_registered(DRIVER, times)


async def test_uninstall_has_unprepared_what_a_dead_agent_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npu.install(folder / "site", "stubborn_package", STUBBORN, stubborn="Stubborn")
    async with hooked_node(folder, monkeypatch, STUBBORNS) as node:
        await node.published("stubborn")
        (answer,) = await node.prepare(node.claim("c", result("stubborn", "s0")))
        assert answer.error == ""
        await node.agent.stop(signal.SIGKILL)
        words = ["uninstall", "--force", "--config", str(folder / "config.yaml"), "--root", str(folder / "root")]
        words += ["--kubelet-dir", str(folder / "kubelet")]
        done = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nodeagent", *words, cwd=CHECKOUT, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await done.communicate()
        assert "device s0: prepared by kind stubborn -> unprepared" in out.decode()
        assert _called(folder / "said", "unprepare") == 1
        assert not (node.folder / "state" / "kinds.json").exists()


def _called(said: Path, hook: str) -> int:
    """How often a hook was called."""
    lines = (said / "calls").read_text().splitlines() if (said / "calls").exists() else []
    return sum(line.startswith(f"{hook} ") for line in lines)


async def test_health_and_counters_count_under_both_apis(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device plugin gave is missing in what is published, and the other way round."""
    npu.install(folder / "site", "stubborn_package", STUBBORN, plain="Plain")
    name = "nodeagent.dev/plain"
    async with hooked_node(folder, monkeypatch, PLAINS) as node:
        await node.published("plain")
        await node.kubelet.wait_allocatable(name, 3)
        (folder / "said" / "ill-p1").write_text("it leaks")
        await node.kubelet.wait_allocatable(name, 2)
        await node.api.until(lambda: _tainted(node, "plain") == {"p1"})
        (folder / "said" / "ill-p1").unlink()
        await node.kubelet.wait_allocatable(name, 3)
        claim = node.claim("c", result("plain", "p2"))
        (answer,) = await node.prepare(claim)
        assert answer.error == ""
        await node.kubelet.wait_allocatable(name, 1)  # of 4 parts 2 are left: p3 does not fit
