"""The parts, each by itself: what was seen, and whether it is as it should be."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.gpu import compare, cuda, smi
from benchmarks.gpu.compare import whole_gpus
from nodeagent.cli.shared.source import read_root
from nodeagent.config.schema import Config
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.xid import effect_of
from nodeagent.core.placement.proximity import Proximity
from nodeagent.errors import HostError
from nodeagent.host import cdi
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.mps.control import Limits, MpsControl
from nodeagent.host.mps.processes import process_id
from nodeagent.host.nvml.client import Probe
from nodeagent.host.nvml.values import Failure, Xid
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.gpu_health import xid_evidence
from nodeagent.resources.offer import offers, selectors

COMMAND_S, PROGRAM_S, XID_S = 20.0, 40.0, 15.0
"""The longest that each may take: all parts together take less than six minutes."""
LIMIT_MIB, WANTED_MIB = 1024, 4096
"""Of the MPS daemon's clients, and what one of them asks for."""
NEARLY = 0.95
"""Copies from near CPUs may be so much slower than those from far ones: what is left is noise."""
XID_ILLEGAL = 31
CONFIG: dict[str, Any] = {
    "resources": [
        {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {"parent": ""}},
        {"name": "mig", "kind": "gpu", "serve": "dra", "mig": {"mode": "dynamic"}},
    ]
}


class Outcome(StrEnum):
    """What a part has shown."""

    PASS = "PASS"
    FAIL = "FAIL"
    NOT_POSSIBLE = "NOT POSSIBLE"


class Result(NamedTuple):
    """The outcome of a part, and what was seen, one line each."""

    outcome: Outcome
    seen: Sequence[str]


class NotPossible(Exception):  # noqa: N818 - an answer, not an error
    """This machine cannot show it."""


class Machine:
    """The machine as the agent sees it."""

    def __init__(self, root: str | None = None) -> None:
        self.config = msgspec.convert(CONFIG, Config)
        self.inventory: Inventory = read_root(root, selectors(self.config))
        self.gpus = whole_gpus(self.inventory)

    def whole(self) -> Device:
        """Return a GPU that programs can use whole."""
        usable = [one for one in self.gpus if not one.attributes.get("mig") and one.driver == "nvidia"]
        if not usable:
            raise NotPossible("no GPU of NVIDIA's that is used whole" if self.gpus else "no GPU of NVIDIA's")
        return usable[0]


def command(*words: str) -> str:
    """Return what a program of the driver prints. Raise NotPossible if it is missing or fails."""
    found = DriverSearch().find(words[0])
    if found is None:
        raise NotPossible(f"there is no {words[0]}")
    done = subprocess.run(
        [str(found.path), *words[1:]],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
        env={**os.environ, **found.env},
    )
    if done.returncode:
        raise NotPossible(f"{' '.join(words)}: {(done.stdout + done.stderr).strip()[:200]}")
    return done.stdout


def program(*words: str, env: Mapping[str, str] | None = None, before: Sequence[str] = ()) -> dict[str, Any]:
    """Return the answer of a program of cuda.py in a process of its own. before: what starts it."""
    file = str(Path(cuda.__file__).resolve())
    done = subprocess.run(
        [sys.executable, *(before or [file]), *words],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
        env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **(env or {})},
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": f"status {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"}
    return found


def compared(differences: Iterator[str], what: str) -> Result:
    """Return the result of a comparison. what: was compared, if nothing differs."""
    found = list(differences)
    return Result(Outcome.FAIL, found) if found else Result(Outcome.PASS, [what])


def inventory(machine: Machine) -> Result:
    """The inventory against `nvidia-smi -q -x`."""
    version, shown = smi.gpus(command("nvidia-smi", "-q", "-x"))
    if not shown:
        raise NotPossible("nvidia-smi shows no GPU")
    names = ", ".join(sorted({one.name for one in shown}))
    what = f"{len(shown)} GPUs ({names}), driver {version}: the same"
    return compared(compare.inventory(machine.inventory, version, shown), what)


def mig(machine: Machine) -> Result:
    """Profiles and placements that are published with their counters, against `nvidia-smi mig`. Only read."""
    if not any(one.attributes.get("mig") for one in machine.gpus):
        raise NotPossible("no GPU is in MIG mode, and none is put into it here")
    profiles = smi.profiles(command("nvidia-smi", "mig", "-lgip"))
    placements = smi.placements(command("nvidia-smi", "mig", "-lgipp"))
    what = f"{len(profiles)} profiles, {sum(len(one.starts) for one in placements)} placements: the same"
    return compared(compare.mig(machine.inventory, profiles, placements), what)


def topology(machine: Machine) -> Result:
    """The weights of links against `nvidia-smi topo -m`."""
    shown = smi.matrix(command("nvidia-smi", "topo", "-m"))
    if len(machine.gpus) < 2:
        found = list(compare.topology(machine.inventory, shown))
        nodes = f"NUMA nodes {dict(shown.nodes)}"
        raise NotPossible("; ".join([f"one GPU has no links; {nodes}", *found]))
    return compared(compare.topology(machine.inventory, shown), f"{len(list(smi.pairs(shown)))} pairs: the same")


def xid(machine: Machine) -> Result:
    """An illegal store in a process of its own is the application's fault: an Xid that leaves the GPU healthy."""
    gpu = machine.whole()
    return asyncio.run(_xid(machine, gpu))


async def _xid(machine: Machine, gpu: Device) -> Result:
    probe = Probe()
    try:
        if isinstance(shown := await probe.snapshot(20.0), Failure):
            raise NotPossible(f"NVML: {shown.reason}")
        events = probe.events()
        waiting = asyncio.ensure_future(anext(events))
        done = await asyncio.to_thread(program, "illegal", env={"CUDA_VISIBLE_DEVICES": str(gpu.attributes["uuid"])})
        if not done.get("illegal"):
            waiting.cancel()
            return Result(Outcome.FAIL, [f"the store was not refused: {done}"])
        seen = [f"{done['gpu']}: {done['error']}"]
        try:
            async with asyncio.timeout(XID_S):
                said: Xid = await waiting
        except TimeoutError:
            raise NotPossible(f"{seen[0]}, and NVML reported no Xid within {XID_S:g} s") from None
        return judged(machine.inventory, said, gpu, seen)
    finally:
        await probe.close()


def judged(found: Inventory, said: Xid, gpu: Device, seen: Sequence[str]) -> Result:
    """Return what an Xid after an illegal store shows: it is 31, of that GPU, and no evidence against any device."""
    evidence = xid_evidence(said, found)
    lines = [*seen, f"Xid {said.code} of {said.pci_address}: {effect_of(said.code)}, evidence against {len(evidence)}"]
    good = said.code == XID_ILLEGAL and said.pci_address == gpu.pci_address and not evidence
    return Result(Outcome.PASS if good else Outcome.FAIL, lines)


def container(machine: Machine) -> Result:
    """A CUDA program in a root that has of NVIDIA only what the agent's CDI file names."""
    if os.getuid():
        raise NotPossible("only root makes a mount namespace")
    gpu = machine.whole()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        file, root = Path(folder) / "claim.json", Path(folder) / "root"
        root.mkdir()
        file.write_bytes(spec_of(machine, gpu))
        start = ["-m", "benchmarks.gpu.contained", str(root), str(file), str(Path(cuda.__file__).resolve())]
        done = program("add", before=start)
    lines = [f"{len(json.loads(spec_of(machine, gpu))['devices'])} device in the CDI file", str(done)]
    return Result(Outcome.PASS if done.get("right") else Outcome.FAIL, lines)


def spec_of(machine: Machine, gpu: Device) -> bytes:
    """Return the CDI file of a claim for one GPU. Raise NotPossible if the driver's files are not found."""
    if machine.inventory.nvidia_driver is None:
        raise NotPossible("the driver's files are not found")
    offer = offers(machine.config, load_kinds())[0]
    devices = [cdi.CdiDevice(name="gpu", edits=offer.device_edits(machine.inventory, gpu, [gpu]))]
    return cdi.spec("nodeagent.dev/claim", devices, cdi.node_facts(SysFs("/"), devices))


def mps(machine: Machine) -> Result:
    """A daemon of ours in the compute mode that the GPU has, whose limit of memory holds for a program."""
    gpu = machine.whole()
    uuid = str(gpu.attributes["uuid"])
    mode = command("nvidia-smi", "-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader").strip()
    if mode != "Default":
        raise NotPossible(f"the compute mode of {gpu.id} is {mode}")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        daemon = MpsControl(Path(folder) / "d")
        try:
            pid = daemon.start([uuid], multi_user=False)
        except HostError as error:
            raise NotPossible(str(error)) from None
        try:
            daemon.wait_ready(pid)
            daemon.limit(Limits(threads_percent=50, memory_mib={0: LIMIT_MIB}))
            done = program("fill", str(WANTED_MIB), env={"CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe)})
            servers = len(daemon.servers())
        except HostError as error:
            return Result(Outcome.FAIL, [str(error)])
        finally:
            daemon.stop(process_id(pid))
            daemon.remove()
    return limited(done, servers)


def limited(done: Mapping[str, Any], servers: int) -> Result:
    """Return what a program shows that asked for more memory than its limit."""
    lines = [f"limit {LIMIT_MIB} MiB, asked for {WANTED_MIB}: {dict(done)}", f"{servers} servers"]
    good = bool(done.get("out_of_memory")) and 0 < int(done.get("mib", 0)) <= LIMIT_MIB and servers > 0
    return Result(Outcome.PASS if good else Outcome.FAIL, lines)


def bandwidth(machine: Machine) -> Result:
    """Copies to the GPU from memory near its CPUs and far from them."""
    gpu = machine.whole()
    nodes: dict[int, list[int]] = {}
    for one in machine.inventory.cpus:
        if one.id in os.sched_getaffinity(0):
            nodes.setdefault(one.numa_node, []).append(one.id)
    if gpu.numa_node not in nodes or len(nodes) < 2:
        raise NotPossible(f"GPU on NUMA node {gpu.numa_node}, this process on {sorted(nodes)}: nothing is far")
    env = {"CUDA_VISIBLE_DEVICES": str(gpu.attributes["uuid"])}
    far = farthest(machine.inventory, gpu.numa_node or 0, nodes)
    speeds = {
        node: program("bandwidth", ",".join(map(str, nodes[node])), env=env).get("gb_s", 0.0)
        for node in (gpu.numa_node or 0, far)
    }
    return faster(speeds, gpu.numa_node or 0)


def farthest(found: Inventory, near: int, nodes: Iterable[int]) -> int:
    """Return the one of some NUMA nodes that is farthest from another."""
    distance = Proximity(found).node_distance
    return max((one for one in nodes if one != near), key=lambda one: (distance(near, one), one))


def faster(gb_s: Mapping[int, float], near: int) -> Result:
    """Return what the speeds from each NUMA node show, of which one is near the GPU."""
    lines = [f"{'near' if node == near else 'far'}, node {node}: {speed} GB/s" for node, speed in gb_s.items()]
    far = max(speed for node, speed in gb_s.items() if node != near)
    good = gb_s[near] > 0 and far > 0 and gb_s[near] >= NEARLY * far
    return Result(Outcome.PASS if good else Outcome.FAIL, lines)


PARTS = {
    "inventory": inventory,
    "mig": mig,
    "topology": topology,
    "xid": xid,
    "container": container,
    "mps": mps,
    "bandwidth": bandwidth,
}
