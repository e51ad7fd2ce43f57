"""`nodeagent top`: what two readings say, and that it goes on when an agent comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli import main
from nodeagent.cli.agent.top.sample import CpuTime, read
from nodeagent.cli.agent.top.usage import busy
from nodeagent.cli.agent.top.verb import TO_THE_TOP, Watch, _draw, held
from nodeagent.cli.shared.facts import Facts
from nodeagent.core.model.inventory_json import to_document
from nodeagent.errors import HostError, PeerError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.cgroup_tree import CgroupTree
from tests.builders.machines import machine

UID = "0d3f7a52-93a8-4c0c-9b1e-5f2f7f3c8a11"
POD = "kubepods/pod" + UID
TICKS = 100
"""Per second."""


class Busy:
    """Eight CPUs on two nodes; a pod holds 4-5 and eight pages."""

    def __init__(self, folder: Path) -> None:
        self.root = machine(folder, "1s2n8c", hugepages={(1, 2 << 20): (16, 12, 0)})
        self.cgroups = CgroupTree(self.root, cpus="0-7", mems="0-1")
        self.cgroups.make(POD)
        self.cgroups.make(f"{POD}/c1")
        self.second = 0
        self.load = dict.fromkeys(range(8), 0.0)
        self.ticks = dict.fromkeys(range(8), 0)
        self.used_us = self.throttled_us = 0
        self.away = False
        self.turn()

    def turn(self) -> None:
        """A second passes."""
        self.second += 1
        lines = ["cpu  1 2 3 4 5 6 7 8 0 0"]
        for cpu, load in self.load.items():
            self.ticks[cpu] += round(load * TICKS)
            idle = self.second * TICKS - self.ticks[cpu]
            lines.append(f"cpu{cpu} {self.ticks[cpu]} 0 0 {idle} 0 0 0 0 0 0")
        self.write("proc/stat", "\n".join([*lines, "intr 1 2 3", "ctxt 9"]))
        self.write("proc/uptime", f"{self.second}.00 7.00")
        stat = f"usage_usec {self.used_us}\nnr_throttled 3\nthrottled_usec {self.throttled_us}"
        (self.cgroups.mount / POD / "cpu.stat").write_text(stat + "\n")
        (self.cgroups.mount / POD / "c1/cpu.stat").write_text(stat + "\n")
        (self.cgroups.mount / POD / "c1/hugetlb.2MB.current").write_text(f"{3 << 21}\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def page(self, path: str) -> Any:
        if self.away:
            raise PeerError("cannot ask the agent at /run/status.sock: Connection refused")
        if path == "/v1/inventory":
            return to_document(scan(SysFs(self.root), load_kinds()))
        pinned = [{"namespace": "a", "pod": "b", "container": "c", "id": "c1"}]
        return [GRANT] if path == "/v1/grants" else {"pinning": {"pinned": pinned}}

    def watch(self, *steps: Callable[[], None]) -> Watch:
        """Between readings, a second passes and the next step is taken."""
        rest = list(steps)

        def pause() -> None:
            if rest:
                rest.pop(0)()
            self.turn()

        facts = Facts(page=self.page, root=str(self.root), state_dir=Path("/none"), now_s=0.0)
        return Watch(facts, pause)


GRANT = {
    "id": "g-1",
    "namespace": "a",
    "pod": "b",
    "container": "c",
    "claim": "",
    "uid": "",
    "pod_uids": [UID],
    "cpus": "4-5",
    "hugepages": [{"size": "2Mi", "numa_node": 1, "pages": 8}],
}


@pytest.fixture
def node(tmp_path: Path) -> Busy:
    return Busy(tmp_path)


def shown(node: Busy, *steps: Callable[[], None]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(node.watch(*steps).frames("json")))
    return found


def test_a_holder_that_uses_half_of_its_cpus_and_is_throttled_is_shown_so(node: Busy) -> None:
    def work() -> None:
        node.load |= {4: 0.75, 5: 0.25}
        node.used_us, node.throttled_us = 900_000, 100_000

    (one,) = shown(node, work)["holders"]
    assert (one["holder"], one["cpus"], one["numa_nodes"]) == ("a/b/c", "4-5", "1")
    assert (one["busy"], one["cpus_used"], one["throttled"], one["idle"]) == (0.5, 0.9, 0.1, False)
    assert one["hugepages"] == [{"size": "2Mi", "used": 3, "held": 8}]


def test_a_holder_on_whose_cpus_nothing_runs_is_noted(node: Busy) -> None:
    frame = next(node.watch().frames("table"))
    assert frame.startswith("holders: 1, idle: 1; over 1.0 s")
    assert "a/b/c" in frame and "idle" in frame.split("a/b/c")[1].splitlines()[0]


def test_memory_and_pages_are_those_of_the_numa_node(node: Busy) -> None:
    node.write("sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 1048576 kB\nNode 1 MemFree: 262144 kB")
    zero, one = shown(node)["numa_nodes"]
    assert (one["memory_used_bytes"], one["memory_bytes"]) == (768 << 20, 1 << 30)
    assert one["hugepages"] == [{"size": "2Mi", "used": 4, "total": 16}]
    assert zero["cpus"] == "0-3"


def test_the_frequency_is_the_mean_of_its_cpus(node: Busy) -> None:
    for cpu, khz in ((4, 2_000_000), (5, 3_000_000)):
        node.write(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", str(khz))
    assert shown(node)["holders"][0]["mhz"] == 2500


def test_an_agent_that_dies_is_one_line_and_it_goes_on_when_it_is_back(node: Busy) -> None:
    def dies() -> None:
        node.away = True

    def returns() -> None:
        node.away = False

    frames = node.watch(lambda: None, dies, lambda: None, returns).frames("table")
    assert next(frames).startswith("holders: 1")
    assert next(frames) == "cannot ask the agent at /run/status.sock: Connection refused; waiting for it\n"
    assert next(frames).startswith("holders: 1"), "the second reading without an agent says nothing new"


def test_without_an_agent_it_does_not_begin(node: Busy) -> None:
    node.away = True
    with pytest.raises(PeerError):
        next(node.watch().frames("table"))
    assert main(["top", "--socket", str(node.root / "none"), "-n", "1"]) == 1


@pytest.mark.parametrize("words", [["-d", "0"], ["-d", "-1"], ["-d", "nan"], ["-d", "inf"], ["-n", "-1"], ["-d", "x"]])
def test_wrong_numbers_are_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["top", *words]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_is_drawn_over_itself_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    _draw(sys.stdout, "one\n", in_place=True)
    assert capsys.readouterr().out == f"{TO_THE_TOP}one\n"
    _draw(sys.stdout, "one\n", in_place=False)
    assert capsys.readouterr().out == "one\n\n"


def test_two_grants_of_one_container_are_one_holder() -> None:
    more = {**GRANT, "id": "g-2", "cpus": "6", "hugepages": []}
    nothing = {**GRANT, "id": "g-3", "pod": "z", "cpus": "", "hugepages": []}
    (one,) = held([GRANT, more, nothing], {})
    assert (str(one.cpus), dict(one.pages), one.pod_uids) == ("4-6", {2 << 20: 8}, (UID,))


def test_a_node_without_pods_cgroups_shows_the_cpus_alone(tmp_path: Path) -> None:
    root = machine(tmp_path, "1s1n2c")
    (root / "proc/uptime").write_text("5.0 1.0\n")
    (root / "proc/stat").write_text("cpu0 1 0 0 9 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\n")
    found = read(SysFs(root), [0])
    assert found.cpus == {0: CpuTime(1, 10), 1: CpuTime(0, 0)} and not found.pods


@pytest.mark.parametrize("text", ["cpu0 1 2", "cpuX 1 2 3 4 5", "cpu0 1 2 3 x 5"])
def test_a_line_that_the_kernel_does_not_write_is_named(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, "1s1n2c")
    (root / "proc/stat").write_text(f"{text}\n")
    with pytest.raises(HostError, match="proc/stat"):
        read(SysFs(root), [0])


TIMES = st.dictionaries(st.integers(0, 3), st.builds(CpuTime, st.integers(0, 99), st.integers(0, 99)))


@given(st.sets(st.integers(0, 3)), TIMES, TIMES)
def test_a_share_is_never_outside_nought_and_one(
    cpus: set[int], before: dict[int, CpuTime], after: dict[int, CpuTime]
) -> None:
    """Whatever goes offline, comes online or counts backwards."""
    share = busy(cpus, MappingProxyType(before), MappingProxyType(after))
    assert share is None or 0 <= share <= 1
