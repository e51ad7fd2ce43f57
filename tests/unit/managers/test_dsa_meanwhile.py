"""What an admin does to an accelerator in the middle of a call that divides it stays done; and what scans read in the
middle of one, or without a record, is no fault."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.cli.shared.source import read_root
from nodeagent.core.dsa.division import Division, Rule
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import PRESENT
from nodeagent.daemon.dsa import divided_accelerators
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.accelerators.accel import Accel
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.accelerators.dsa_queue import DsaQueue
from nodeagent.host.sysfs.sysfs import SysFs
from tests.support.dsa_keeper_node import QUEUES, Node

APP = {"type": "user", "name": "app", "mode": "dedicated", "driver_name": "user"}
RULES = (Rule(accelerators=("dsa*",), queues=QUEUES),)
KINDS = Accel(), Dsa(), DsaQueue()
BY_ANOTHER = "configured by another program"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def _devices(node: Node, selector: all_kinds.DsaSelector) -> list[Device]:
    context = all_kinds.read_context(node.sysfs, dsa=selector)
    return list(all_kinds.discover(node.sysfs, KINDS, context).devices)


def test_an_accelerator_that_an_admin_has_enabled_is_not_disabled(node: Node) -> None:
    """The agent was about to enable it."""

    def admin(path: str, _: str) -> None:
        if path.endswith("wq0.0/driver_name") and not node.kernel.driver("dsa0"):
            node.kernel.configures("wq0.5", size=16, group_id=0, **APP)
            node.kernel._start("dsa0")
            node.kernel.written.clear()

    node.kernel.after = admin
    with pytest.raises(HostError, match=BY_ANOTHER):
        node.make(0)
    assert not [path for path, text in node.kernel.written if text == "dsa0"]
    assert node.kernel.get("wq0.5", "name") == "app"


def test_a_queue_that_an_admin_enables_while_a_record_is_written_stays_enabled(node: Node) -> None:
    """The record is that the accelerator, which this call has enabled, is about to be disabled again."""
    steps: list[str] = []

    def admin(path: str, _: str) -> None:
        if path.endswith("idxd/bind"):
            node.kernel.configures("wq0.1", **APP)
            steps.append("configured")

    def recording(_: str) -> None:
        if steps == ["configured"]:
            node.kernel._start_queue("wq0.1", "user")
            node.kernel.opens("wq0.1", 1)
            steps.append("enabled")

    node.kernel.after = admin
    node.journal.before = recording  # type: ignore[method-assign]
    with pytest.raises(HostError, match=BY_ANOTHER):
        node.make(0)
    assert steps == ["configured", "enabled"]
    assert (node.kernel.driver("wq0.1"), node.kernel.get("dsa0", "state")) == ("user", "enabled")


def test_an_engine_that_an_admin_has_given_another_group_keeps_it(node: Node) -> None:
    def admin(path: str, text: str) -> None:
        if path.endswith("engine0.3/group_id") and text == "0":
            node.kernel.configures("engine0.2", group_id=1)

    node.kernel.after = admin
    with pytest.raises(HostError, match=BY_ANOTHER):
        node.make(0)
    assert not [path for path, _ in node.kernel.written if path.endswith("idxd/bind")]
    assert [node.kernel.get(f"engine0.{index}", "group_id") for index in range(4)] == ["-1", "-1", "1", "-1"]


def test_who_reads_a_machine_without_the_record_blames_no_unknown_agent(node: Node) -> None:
    node.make(0)
    found = read_root(str(node.kernel.tree.root))
    (state,) = (one for one in found.kinds if one.kind == "accel")
    (whole,) = (one for one in found.devices if one.kind == "accel")
    assert (state.state, state.reason or "", whole.withheld_for) == (PRESENT, "", ())


def test_a_scan_reads_the_record_a_few_times_however_many_functions_there_are(node: Node) -> None:
    for bus, slot in itertools.product(range(16), range(16)):
        node.kernel.tree.pci(f"0000:{bus + 16:02x}:{slot:02x}.0", pci_class="020000", device="1572", driver="i40e")
    node.make(0)
    reads: list[Mapping[str, Division]] = []

    def divided() -> Mapping[str, Division]:
        reads.append(node.keeper.records())
        return reads[-1]

    assert _devices(node, all_kinds.DsaSelector(rules=RULES, divided=divided))
    assert 0 < len(reads) < 10


def test_other_accelerators_are_found_though_it_cannot_be_read_whether_there_is_a_record(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Paths(
        state_dir=node.state, runtime_dir=node.state, kubelet_dir=node.state, sysfs=node.sysfs, config_file=None
    )
    node.kernel.tree.pci("0000:99:00.0", pci_class="120000", device="1020", driver="habanalabs")
    stat = Path.stat

    def fails(path: Path, **more: Any) -> os.stat_result:
        if path.name == "dsa-queues.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", fails)
    found = _devices(node, all_kinds.DsaSelector(divided=divided_accelerators(where, "boot-0")))
    assert "0000:99:00.0" in [one.id for one in found]


def test_a_scan_that_reads_a_queue_while_it_gets_its_name_takes_no_slot_away(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads one file after the other, and the record is the same all the while."""
    node.make(1, "d")
    label, read, reads = node.label(0), SysFs.text, itertools.count()
    found: list[tuple[list[str], str]] = []

    def then(sysfs: SysFs, path: str, *default: Any) -> Any:
        text = read(sysfs, path, *default)
        if path.endswith("wq0.0/name") and next(reads) == 2:  # the kinds accel and dsa have read it
            node.kernel._store("wq0.0", "name", label)
            node.kernel._store("wq0.0", "priority", "10")
        return text

    def scan(path: str, text: str) -> None:
        if path.endswith("wq0.0/type") and text == "user":
            monkeypatch.setattr(SysFs, "text", then)
            found.append((node.slots(), node.said))
            monkeypatch.setattr(SysFs, "text", read)

    node.kernel.after = scan
    node.make(0)
    assert next(reads) > 2 and found == [(["0", "1", "2"], "")]
