"""The first five minutes: the agent on this very machine, three pods, a kill -9, the same grants after it, and then
claims over DRA for the same devices.

The kubelet is the small embedded one of the tests: a real gRPC server on real sockets that keeps to kubelet's contract.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo import claims
from tests.doubles.api_server import FakeApiServer
from tests.doubles.dra_kubelet import FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet

DOMAIN = "nodeagent.dev"
PAGE_BYTES = 2 << 20
PAGES = 8
DEADLINE_S = 20.0
NODES = Path("/sys/devices/system/node")


class Hugepages:
    """A few free 2 MiB pages. The host is changed only with DEMO_HUGEPAGES=1, and changed back at the end."""

    def __init__(self) -> None:
        folders = sorted(NODES.glob("node*/hugepages/hugepages-2048kB"))
        self._folder = folders[0] if folders else None
        self._before: str | None = None
        """What was in nr_hugepages, once it was changed."""

    def find(self) -> str:
        """Find or make free pages on one node; why there are none, or ""."""
        if self._folder is None:
            return "the kernel has no 2 MiB hugepages per NUMA node"
        if self._free() >= PAGES:
            return ""
        if os.environ.get("DEMO_HUGEPAGES") != "1":
            return f"{PAGES} free pages of 2 MiB are needed; DEMO_HUGEPAGES=1 lets the demonstration reserve them"
        file = self._folder / "nr_hugepages"
        try:
            before = file.read_text().strip()
            file.write_text(str(int(before) + PAGES - self._free()))
        except OSError as error:
            return f"cannot write {file}: {error.strerror}"
        self._before = before
        return "" if self._free() >= PAGES else "the kernel has no free memory in one piece"

    def put_back(self) -> None:
        if self._before is not None and self._folder is not None:
            (self._folder / "nr_hugepages").write_text(self._before)

    def _free(self) -> int:
        return int((self._folder / "free_hugepages").read_text()) if self._folder is not None else 0


def configuration(folder: Path, pages: bool, api: FakeApiServer) -> Path:
    """A configuration for this machine: keep the first core for the system where there are CPUs to spare."""
    resources = [
        *claims.resources(),
        {"name": "fuse", "kind": "char", "paths": ["/dev/fuse", "/dev/null"], "replicas": 10},
    ]
    if pages:
        resources.append({"name": "hugepages-2Mi", "kind": "hugepages", "pageSize": "2Mi", "pagesPerBlock": 4})
    document: dict[str, Any] = {
        "stateDir": str(folder / "state"),
        "runtimeDir": str(folder / "run"),
        "resources": resources,
        "dra": claims.configuration(folder, api),
        "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 1, "confirmedSeconds": 0.2, "unobservedSeconds": 0.2},
    }
    if claims.few_cpus():
        document["reservedCpus"] = ""
    path = folder / "config.yaml"
    path.write_text(json.dumps(document))
    return path


class Agent:
    """One running `nodeagent run`."""

    def __init__(self, config: Path, folder: Path) -> None:
        self._command = ["run", "--config", str(config), "--kubelet-dir", str(folder / "kubelet")]
        self._log = folder / "agent.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nodeagent", *self._command, stderr=log
            )

    async def stop(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(how)
            await self._process.wait()

    def told(self) -> str:
        return self._log.read_text()


async def show(verb: str, folder: Path, *more: str) -> None:
    """What an admin would type."""
    said = " ".join(("nodeagent", verb, *more))
    print(f"\n$ {said}", flush=True)
    socket = ["--socket", str(folder / "run" / "status.sock")] if verb != "inventory" else []
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "nodeagent", verb, *socket, *more)
    await process.wait()


async def grants(folder: Path) -> list[Mapping[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nodeagent",
        "grants",
        "-o",
        "json",
        "--socket",
        str(folder / "run" / "status.sock"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    return json.loads(out) if out else []


async def named_grants(folder: Path, pods: int) -> list[Mapping[str, Any]]:
    """The grants, once kubelet has told the names of all holders, and that no other holds anything any longer."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await grants(folder)
            if len({one["pod"] for one in found}) == pods and all(one["pod"] for one in found):
                return found
            await asyncio.sleep(0.1)


def wishes(cpus: int, pages: bool) -> dict[str, dict[str, int]]:
    """What three pods ask for."""
    first = max(1, min(4, (cpus - 1) // 2))
    cpu, fuse, huge = f"{DOMAIN}/cpu", f"{DOMAIN}/fuse", f"{DOMAIN}/hugepages-2Mi"
    database = {cpu: 1, **({huge: 1} if pages else {})}
    return {"trader": {cpu: first, fuse: 1}, "database": database, "backup": {fuse: 2, **({huge: 1} if pages else {})}}


async def scene(folder: Path, kubelet: FakeKubelet, dra: FakeDraKubelet, api: FakeApiServer, pages: bool) -> bool:
    cpus = len(os.sched_getaffinity(0))
    agent = Agent(configuration(folder, pages, api), folder)
    began = time.perf_counter()
    await agent.start()
    try:
        wanted = wishes(cpus, pages)
        every = {resource for resources in wanted.values() for resource in resources}
        async with asyncio.timeout(DEADLINE_S):
            await kubelet.until(lambda: all(kubelet.allocatable(one) for one in every))
        print(
            f"\nThe agent read the machine and kubelet shows its resources after {time.perf_counter() - began:.2f} s."
        )
        for name, resources in wanted.items():
            await kubelet.admit_pod("default", name, {"main": resources})
            print(f"admitted pod {name}: {', '.join(f'{r} x {n}' for r, n in resources.items())}")
        before = await named_grants(folder, len(wanted))
        await show("status", folder)
        await show("grants", folder)
        print("\n$ kill -9 $(pidof nodeagent)   # and start it again")
        await agent.stop(signal.SIGKILL)
        began = time.perf_counter()
        await agent.start()
        after = await named_grants(folder, len(wanted))
        print(f"\nback after {time.perf_counter() - began:.2f} s")
        await show("grants", folder)
        same = held(before) == held(after)
        print("\nThe same grants." if same else f"\nNOT the same grants: {held(before)} became {held(after)}")
        for name in wanted:
            await kubelet.delete_pod("default", name)
        await named_grants(folder, 0)
        free = await claims.scene(folder, kubelet, dra, api, show)
        return same and free and not kubelet.violations and not dra.violations
    except BaseException:
        print(agent.told(), file=sys.stderr)
        raise
    finally:
        await agent.stop(signal.SIGTERM)


def held(found: list[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return sorted((one["id"], one["pod"], ",".join(one["ids"])) for one in found)


async def main() -> int:
    began = time.perf_counter()
    pages = Hugepages()
    try:
        if why := pages.find():
            print(f"No hugepages in this demonstration: {why}.")
        with tempfile.TemporaryDirectory(prefix="nodeagent-demo-") as name:
            folder = Path(name)
            await show("inventory", folder)
            async with FakeApiServer() as api, FakeDraKubelet(folder / "kubelet") as dra:
                api.add_node(claims.NODE)
                kubelet = FakeKubelet(folder / "kubelet")
                await kubelet.start()
                try:
                    good = await scene(folder, kubelet, dra, api, not why)
                finally:
                    await kubelet.stop()
    finally:
        pages.put_back()
    print(f"Done in {time.perf_counter() - began:.1f} s.")
    return 0 if good else 1


def run() -> int:
    """Run the demonstration; the exit code. SIGTERM ends it as Ctrl-C does: what was changed is put back."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(main())
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
