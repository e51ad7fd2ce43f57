"""`nodeagent place` with the state of a node: it answers what the node decides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nodeagent.cli.shared.node_state import NodeState
from nodeagent.cli.shared.placed import placed_document, refusal_document
from nodeagent.cli.shared.request_options import RequestLine, request_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import UNHEALTHY, HealthState, Observed, Remedy
from nodeagent.core.placement.place import place
from nodeagent.errors import Refused
from tests.builders import machines
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.node_captures import capture
from tests.support.pages import facts_of

SAID = ({}, {"in_use": True}, {}, {}, {}, {"mig": True})
NODE = inventory_of(
    even_rows(1, 2, 1, 8, 1),
    pages={(0, GIB): 4},
    devices=[
        Device(kind="gpu", id=f"gpu{i}", numa_node=i // 3, paths=(f"/dev/nvidia{i}",), attributes=attributes)
        for i, attributes in enumerate(SAID)
    ],
)
"""CPUs 0-7 on node 0, 8-15 on node 1, three GPUs on each."""
LEDGER = Ledger(
    grants={
        "mine": Grant(id="mine", holder=Holder(api=CLAIM, resource="gpu.d", claim="c", uid="c"), devices=("gpu2",)),
        "cpus": Grant(id="cpus", holder=Holder(api=DEVICE_PLUGIN, resource="d/cpu"), cpus=CpuSet(range(8, 12))),
    },
    foreign={
        "theirs": Grant(id="theirs", holder=Holder(api=DEVICE_PLUGIN, resource="x.com/gpu"), devices=("gpu3",)),
    },
    reserved=CpuSet([0, 1]),
)
XID = Observed(UNHEALTHY, "Xid 79", True, Remedy.REBOOT)
HEALTH = {"gpu0": HealthState(state=UNHEALTHY, since=0.0, reason="Xid 79", seen={"xid": XID})}
REQUESTS: tuple[dict[str, Any], ...] = (
    {"cpus": 2},
    {"cpus": 6, "numa": "single"},
    {"cpus": 11},
    {"devices": {"gpu": 1}},
    {"devices": {"gpu": 2}},
    {"cpus": 2, "devices": {"gpu": 1}, "numa": "single"},
    {"cpus": 7, "devices": {"gpu": 1}, "hugepages": {"1Gi": 2}, "numa": "single"},
)
LINES = b"\n".join(json.dumps(one).encode() for one in REQUESTS)


def decided() -> list[dict[str, Any]]:
    """What the node itself answers."""
    state = NodeState(inventory=NODE, ledger=LEDGER, health=HEALTH)
    found = []
    for one in REQUESTS:
        request = request_of(NODE, RequestLine(**one))
        try:
            found.append(placed_document(NODE, request, place(NODE, LEDGER, state.for_the_healthy(request))))
        except Refused as refusal:
            found.append(refusal_document(refusal))
    answers: list[dict[str, Any]] = json.loads(json.dumps(found))
    return answers


def pages(folder: Path) -> dict[str, Any]:
    """What the node's agent shows."""
    causes = [{"source": "xid", **XID._asdict()}]
    health = [{"device": "gpu0", "state": UNHEALTHY, "reason": "Xid 79", "advice": "", "causes": causes}]
    facts = facts_of(NODE, LEDGER, folder, health=health)
    return {name: facts.page(name) for name in ("/v1/inventory", "/v1/grants", "/v1/health", "/v1/status")}


def nodeagent(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "nodeagent", *words]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=False)


def answers(*words: str) -> list[dict[str, Any]]:
    done = nodeagent(*words, "--batch", "-", stdin=LINES)
    assert (done.returncode, done.stderr) == (0, b"")
    return [json.loads(line) for line in done.stdout.splitlines()]


def written(folder: Path, page: str) -> str:
    file = folder / f"{page}.json"
    file.write_text(json.dumps(pages(folder)[f"/v1/{page}"]))
    return str(file)


def test_the_state_of_a_node_decides_what_the_node_decides(tmp_path: Path) -> None:
    """Bit for bit: with a GPU that is ill, one that another plugin gave, one in use, and reserved CPUs."""
    expected = decided()
    assert [one.get("devices") for one in expected[3:5]] == [["gpu4"], None]
    assert expected[2]["refused"] == "cannot place 11 CPUs: 10 of 16 are free (4 held, 2 reserved)"
    words = ("place", "--inventory", written(tmp_path, "inventory"), "--state", written(tmp_path, "grants"))
    assert answers(*words, "--health", written(tmp_path, "health"), "--reserved", "0-1") == expected


def test_the_state_of_a_captured_node_decides_what_the_node_decides(tmp_path: Path) -> None:
    """What is reserved and ill there is known from the capture; options go before."""
    root = machines.machine(tmp_path / "root", "1s1n4c")
    file = str(capture(tmp_path / "node.tar.zst", root, pages=pages(tmp_path)))
    words = ("replay", file, "place", "--state", written(tmp_path, "grants"))
    assert answers(*words) == decided()
    other = nodeagent(*words, "--reserved", "2", "--cpus", "11", "-o", "json")
    assert json.loads(other.stdout)["cpus"] == "0-1,3-7,12-15"
    (tmp_path / "none.json").write_text("[]")
    well = nodeagent(*words, "--health", f"{tmp_path}/none.json", "--devices", "gpu=2", "-o", "json")
    assert json.loads(well.stdout)["devices"] == ["gpu0", "gpu4"]


def test_a_capture_without_an_agent_has_nothing_reserved(tmp_path: Path) -> None:
    root = machines.machine(tmp_path / "root", "1s1n4c")
    file = str(capture(tmp_path / "node.tar.zst", root))
    (tmp_path / "grants.json").write_text("[]")
    done = nodeagent("replay", file, "place", "--state", f"{tmp_path}/grants.json", "--cpus", "4", "-o", "json")
    assert json.loads(done.stdout)["cpus"] == "0-3"


@pytest.mark.parametrize("wrong", ["{", "{}", '[{"device": "a"}]', '[{"device": "a", "state": "fine"}]'])
def test_health_that_makes_no_sense_is_bad_input(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "health.json"
    file.write_text(wrong)
    words = ("place", "--inventory", written(tmp_path, "inventory"), "--cpus", "1", "--health")
    done = nodeagent(*words, str(file))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"cannot read --health {file}: ".encode() in done.stderr
    assert b"No such file" in nodeagent(*words, str(tmp_path / "none")).stderr
