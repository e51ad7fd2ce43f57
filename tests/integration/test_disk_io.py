"""The real agent on a machine whose pods have no I/O controller: a claim with limits is refused with the reason, and no
other claim is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.io_files import add_disk
from tests.builders.machines import machine
from tests.support.dra_node import DRIVER, dra_node, result

DISKS = {"name": "disk", "kind": "block", "serve": "dra"}
CLASSES = {"pinning": {"mode": "cgroup", "io": {"classes": [{"name": "slow", "readIOPS": 5}]}}}


def asking(**config: Any) -> dict[str, Any]:
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "BlockConfig", **config}
    return {"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": parameters}}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs and two disks."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for name, number in (("sda", "8:0"), ("sdb", "8:16")):
        add_disk(made.root, name, number)
        (made.root / "sys/class/block" / name / "serial").write_text(f"S-{name}\n")
    return made


@pytest.mark.parametrize("config", [{"readBytesPerSecond": "1Mi"}, {"ioClass": "slow"}])
async def test_a_claim_with_limits_is_refused_where_the_pods_have_no_io_controller(
    folder: Path, tree: DeviceTree, config: dict[str, str]
) -> None:
    top = tree.root / "sys/fs/cgroup/kubepods"
    top.mkdir(parents=True)
    for place in (top.parent, top):
        (place / "cgroup.controllers").write_text("cpuset cpu memory\n")
    async with dra_node(folder, tree, [DISKS], more=CLASSES) as node:
        await node.published("block")
        first, second = node.devices("block")
        plain = node.claim("plain", result("block", first))
        limited = node.claim("limited", result("block", second), config=[asking(**config)])
        granted, refused = await node.prepare(plain, limited)
        assert not granted.error
        assert "kubepods has no io, only 'cpuset cpu memory'" in refused.error
        document: Any = (await node.agent.ask("/v1/status"))[1]
        assert document["pinning"]["io"] == {"cgroups": [], "errors": {}}
