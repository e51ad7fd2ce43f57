"""A node carries only what it uses: the daemon does not load what a default configuration does not ask for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

UNUSED = (
    "nodeagent.cli",
    "nodeagent.core.network.addresses",
    "nodeagent.core.network.vf_checks",
    "nodeagent.core.resctrl",
    "nodeagent.host.amd",
    "nodeagent.core.blockio",
    "nodeagent.core.uclamp",
    "nodeagent.core.fabrics.pool",
    "nodeagent.host.blockio",
    "nodeagent.host.cgroup.line_keeper",
    "nodeagent.host.devices.storage.parts",
    "nodeagent.host.driver_programs",
    "nodeagent.host.driver_root.find",
    "nodeagent.host.dsa",
    "nodeagent.host.fabrics",
    "nodeagent.host.mps",
    "nodeagent.host.netlink",
    "nodeagent.host.resctrl",
    "nodeagent.host.sriov",
    "nodeagent.host.tuning",
    "nodeagent.host.uclamp",
    "nodeagent.host.vfio",
    "nodeagent.kube.lease",
    "nodeagent.managers.dsa",
    "nodeagent.managers.fabrics",
    "nodeagent.managers.kinds",
    "nodeagent.managers.blockio",
    "nodeagent.managers.cgroup_limits",
    "nodeagent.managers.network",
    "nodeagent.managers.partitions.amd",
    "nodeagent.managers.partitions.manager",
    "nodeagent.managers.passthrough",
    "nodeagent.managers.resctrl",
    "nodeagent.managers.sharing",
    "nodeagent.managers.tuning",
    "nodeagent.managers.uclamp",
)
PROGRAM = """
import asyncio, sys
from pathlib import Path
from nodeagent.config.load import parse
from nodeagent.daemon import daemon
from nodeagent.daemon.paths import checked, paths_of

async def main(state, root):
    config = parse(f"stateDir: {state}\\nruntimeDir: {state}\\n", source="test")
    where = paths_of(config, config_file=None, root=root, kubelet_dir=f"{state}/kubelet")
    built, stop = daemon.build(config, where, checked(config, where)), asyncio.Event()
    running = asyncio.create_task(built.run(stop))
    await asyncio.sleep(1)
    stop.set()
    await running

asyncio.run(main(*sys.argv[1:]))
print(*sorted(sys.modules), file=sys.stderr)
"""


def test_a_running_daemon_has_not_loaded_what_nothing_uses(folder: Path, recorded_tree: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(recorded_tree("128arm-2pa2n8cluster4co"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "nodeagent.managers.on_demand" in loaded
    assert sorted(loaded.intersection(UNUSED)) == []
