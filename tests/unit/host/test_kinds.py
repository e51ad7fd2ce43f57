"""Kinds of devices on synthetic trees: what is found, as what, with which facts, and what a container gets."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.model.device import ContainerEdits, Device, DeviceNode
from nodeagent.core.model.inventory import ABSENT, DEGRADED, PRESENT, KindState
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.all_kinds import CharSelector, Context, Found, PciSelector, UsbSelector
from nodeagent.host.devices.base import short_id
from nodeagent.host.pci import functions
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, edits, kinds_of, look, paths, state
from tests.support.paths import CHECKOUT


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"pci_class": "020000"}, "nic"),
        ({"pci_class": "020700", "vendor": "15b3"}, "nic"),
        ({"pci_class": "010802"}, "nvme"),
        ({"pci_class": "0b4000"}, "accel"),
        ({"pci_class": "120000"}, "accel"),
        ({"pci_class": "120000", "vendor": "1002", "driver": "amdgpu"}, "gpu"),
        ({"pci_class": "060400"}, "bridge"),
        ({"pci_class": "060000"}, "bridge"),
        ({"pci_class": "0c0330"}, "pci"),
        ({"pci_class": "ffff00"}, "pci"),
        ({"pci_class": "030000", "vendor": "1a03", "driver": "ast"}, "pci"),
        ({"pci_class": "030000", "vendor": "1234", "driver": "bochs-drm"}, "pci"),
        ({"pci_class": "030000", "vendor": "1b36", "driver": "qxl"}, "pci"),
        ({"pci_class": "030000", "vendor": "102b"}, "pci"),
        ({"pci_class": "030200", "vendor": "10de"}, "gpu"),
        ({"pci_class": "030000", "vendor": "1002", "driver": "vfio-pci"}, "gpu"),
        ({"pci_class": "030000", "vendor": "8086", "driver": "xe"}, "gpu"),
        ({"pci_class": "038000", "vendor": "8086", "driver": "i915"}, "gpu"),
        ({"pci_class": "040300", "vendor": "10de"}, "pci"),
    ],
)
def test_every_function_has_the_kind_that_its_class_and_driver_make_it(
    tree: DeviceTree, facts: dict[str, str], kind: str
) -> None:
    tree.pci("0000:3b:00.0", **facts)  # type: ignore[arg-type]
    assert kinds_of(look(tree)) == {"0000:3b:00.0": kind}


def test_a_display_with_a_render_node_is_a_gpu_and_without_one_is_not(tree: DeviceTree) -> None:
    """virtio-gpu with and without 3D."""
    for number, address in enumerate(["0000:00:02.0", "0000:00:03.0"]):
        tree.pci(address, pci_class="030000", vendor="1af4", device="1050", driver="virtio-pci")
        tree.drm(address, number, render=number == 1)
    found = look(tree)
    assert kinds_of(found) == {"0000:00:03.0": "gpu", "0000:00:02.0": "pci"}
    assert by_id(found)["0000:00:03.0"].paths == ("/dev/dri/card1", "/dev/dri/renderD129")


def test_devices_come_in_order_of_kind_then_address(tree: DeviceTree) -> None:
    """By number, also where a domain has more digits."""
    for address in ("10000:00:01.0", "0000:5e:00.0", "0000:0a:00.0", "ffff:00:00.0"):
        tree.pci(address)
    tree.pci("0000:00:00.0", pci_class="060000")
    assert [device.id for device in look(tree).devices] == [
        "0000:00:00.0",
        "0000:0a:00.0",
        "0000:5e:00.0",
        "ffff:00:00.0",
        "10000:00:01.0",
    ]


def test_a_selector_marks_the_functions_that_it_matches(tree: DeviceTree) -> None:
    tree.pci("0000:3b:00.0", pci_class="ff0000", vendor="1ae0", device="001f")
    tree.pci("0000:3c:00.0", pci_class="ff0000", vendor="1ae0", device="0020")
    found = by_id(look(tree, pci_selectors=(PciSelector(name="tpu", vendor="1ae0", device="001f"),)))
    assert found["0000:3b:00.0"].attributes == {"selector": "tpu"}
    assert found["0000:3c:00.0"].attributes == {}


def test_dsa_and_iaa_are_accelerators_with_their_enabled_queues(tree: DeviceTree) -> None:
    """Their PCI class says only system peripheral; queues are on the same bus and are no devices."""
    tree.pci("0000:6a:01.0", pci_class="088000", driver="idxd")
    folder = tree.folders["0000:6a:01.0"] / "dsa0"
    for name, value in (("state", "enabled"), ("max_work_queues", 8), ("wq0.0/state", "enabled"), ("wq0.1/state", "x")):
        tree.write(f"{(folder / name).relative_to(tree.root)}", value)
    tree.link("sys/bus/dsa/devices/dsa0", folder)
    tree.link("sys/bus/dsa/devices/wq0.0", folder / "wq0.0")
    tree.node("/dev/dsa/wq0.0")
    device = by_id(look(tree))["0000:6a:01.0"]
    assert device.kind == "accel"
    assert device.attributes == {"name": "dsa0", "state": "enabled", "max_work_queues": "8"}
    assert paths(edits(device)) == ["/dev/dsa/wq0.0"]


def test_what_the_accel_class_lists_is_an_accelerator(tree: DeviceTree) -> None:
    tree.pci("0000:4d:00.0", pci_class="ff0000", vendor="1da3")
    tree.member("accel", "accel0", tree.folders["0000:4d:00.0"] / "accel" / "accel0", {})
    device = by_id(look(tree))["0000:4d:00.0"]
    assert (device.kind, device.paths) == ("accel", ("/dev/accel/accel0",))


@pytest.mark.parametrize("control_class", ["accel", "habanalabs"])
def test_gaudi_comes_with_its_control_node(tree: DeviceTree, control_class: str) -> None:
    """Kernels differ in the class of the second node."""
    tree.pci("0000:4d:00.0", pci_class="120000", vendor="1da3", device="1020", driver="habanalabs")
    folder = tree.folders["0000:4d:00.0"]
    tree.member("accel", "accel0", folder / "accel" / "accel0", {})
    tree.member(control_class, "accel_controlD0", folder / control_class / "accel_controlD0", {})
    device = by_id(look(tree))["0000:4d:00.0"]
    assert paths(edits(device)) == ["/dev/accel/accel0", "/dev/accel/accel_controlD0"]
    assert device.attributes["name"] == "accel0"


def test_each_imex_channel_is_a_device_with_its_node(tree: DeviceTree) -> None:
    assert state(look(tree), "imex") == KindState(
        kind="imex", state=ABSENT, reason="NVIDIA's driver shows no channel below /dev/nvidia-caps-imex-channels"
    )
    for number in (10, 2):
        tree.node(f"/dev/nvidia-caps-imex-channels/channel{number}")
    found = look(tree)
    assert state(found, "imex").state == PRESENT
    channels = [one for one in found.devices if one.kind == "imex"]
    assert [(one.id, one.attributes["channel"]) for one in channels] == [("imex-10", 10), ("imex-2", 2)]
    assert paths(edits(channels[1])) == ["/dev/nvidia-caps-imex-channels/channel2"]
    assert channels[1].exclusive_parts == ("/dev/nvidia-caps-imex-channels/channel2",)


def test_neuron_devices_have_their_nodes_and_a_place_only_where_it_is_known(tree: DeviceTree) -> None:
    """The driver's class devices have no parent: of two, nothing says which function is which."""
    tree.pci("0000:1e:00.0", pci_class="088000", vendor="1d0f", device="7164", driver="neuron", numa_node=1)
    virtual = tree.root / "sys/devices/virtual/neuron_device"
    tree.member("neuron_device", "neuron0", virtual / "neuron0", {})
    device = by_id(look(tree))["neuron0"]
    assert (device.kind, device.parent, device.numa_node) == ("accel", "0000:1e:00.0", 1)
    assert paths(edits(device)) == ["/dev/neuron0"]
    tree.pci("0000:1f:00.0", pci_class="088000", vendor="1d0f", device="7164", driver="neuron", numa_node=0)
    tree.member("neuron_device", "neuron1", virtual / "neuron1", {})
    found = by_id(look(tree))
    assert [(found[one].parent, found[one].numa_node) for one in ("neuron0", "neuron1")] == [(None, None)] * 2


def test_an_fpga_is_known_by_its_manager_and_regions(tree: DeviceTree) -> None:
    """One on PCI with a port, one of a system on chip."""
    tree.pci("0000:b1:00.0", pci_class="120000", vendor="8086", driver="dfl-pci")
    region = tree.folders["0000:b1:00.0"] / "fpga_region" / "region0"
    tree.member("fpga_region", "region0", region, {"compat_id": "1"})
    (region / "dfl-port.0").mkdir()
    chip = tree.root / "sys/devices/platform/axi/f8007000.devcfg/fpga_manager/fpga0"
    tree.member("fpga_manager", "fpga0", chip, {"name": "Zynq FPGA Manager", "state": "operating"})
    found = by_id(look(tree))
    assert (found["0000:b1:00.0"].kind, found["0000:b1:00.0"].paths) == ("fpga", ("/dev/dfl-port.0",))
    assert found["fpga-f8007000.devcfg"].attributes == {
        "manager": "fpga0",
        "manager_name": "Zynq FPGA Manager",
        "manager_state": "operating",
    }


def test_usb_devices_are_those_that_the_configuration_names(tree: DeviceTree) -> None:
    """By vendor, product and serial number; the id is the port; the serial port's node comes along."""
    tree.pci("0000:00:14.0", pci_class="0c0330", numa_node=0)
    tree.usb("0000:00:14.0", "1-1.4", vendor="0403", product="6001", serial="A9", tty="ttyUSB0")
    tree.usb("0000:00:14.0", "1-2", vendor="0403", product="6001", serial="B7")
    found = look(tree, usb=(UsbSelector(name="serial", vendor="0403", product="6001", serial="A9"),))
    device = by_id(found)["usb-1-1.4"]
    assert {one.id for one in found.devices if one.kind == "usb"} == {"usb-1-1.4"}
    assert (device.numa_node, device.parent) == (0, "0000:00:14.0")
    assert device.attributes["selector"] == "serial"
    assert paths(edits(device)) == ["/dev/bus/usb/001/007", "/dev/ttyUSB0"]


def test_character_devices_are_matched_below_the_root(tree: DeviceTree) -> None:
    """A stable link is the id; a node that two globs match is one device; plain files stand for nodes."""
    tree.node("/dev/fuse")
    real = tree.node("/dev/ttyUSB0")
    tree.link("dev/serial/by-id/usb-FTDI-A9", real)
    selectors = (
        CharSelector(name="fuse", globs=("/dev/fuse", "/dev/no-such")),
        CharSelector(name="serial", globs=("/dev/serial/by-id/*", "/dev/ttyUSB*")),
    )
    found = by_id(look(tree, char=selectors))
    assert list(found) == ["/dev/fuse", "/dev/serial/by-id/usb-FTDI-A9"]
    assert edits(found["/dev/serial/by-id/usb-FTDI-A9"]).device_nodes == (
        DeviceNode(host_path="/dev/ttyUSB0", container_path="/dev/serial/by-id/usb-FTDI-A9"),
    )


@pytest.mark.parametrize("glob", ["/etc/*", "dev/fuse", "/dev/../etc/passwd"])
def test_a_glob_that_leaves_dev_is_refused_by_name(tree: DeviceTree, glob: str) -> None:
    tree.write("etc/passwd", "root")
    found = look(tree, char=(CharSelector(name="bad", globs=(glob,)),))
    assert found.devices == ()
    assert repr(glob) in found.warnings[0]


def test_the_real_null_device_has_its_numbers() -> None:
    selector = CharSelector(name="null", globs=("/dev/null",))
    context = Context(char=(selector,))
    char = next(kind for kind in all_kinds.builtin_kinds() if kind.name == "char")
    (device,) = char.discover(SysFs("/"), context).devices
    status = os.stat("/dev/null").st_rdev
    assert (device.id, device.attributes["major"], device.attributes["minor"]) == (
        "/dev/null",
        os.major(status),
        os.minor(status),
    )


def test_kinds_that_need_configuration_are_absent_without_it(tree: DeviceTree) -> None:
    found = look(tree)
    assert state(found, "char").reason == "no character device is configured"
    assert state(found, "usb").state == ABSENT


class Falls:
    """A kind that raises."""

    name = "falls"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        raise RuntimeError("its library is broken")

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        return ContainerEdits()


class Card(Falls):
    """A kind that knows a function better than ours, and names it as it likes."""

    name = "card"

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        devices = tuple(Device(kind="card", id=id) for id in self.ids)
        return Found(state=KindState(kind="card", state=PRESENT), devices=devices)


def test_a_kind_that_raises_is_degraded_and_all_else_goes_on(tree: DeviceTree) -> None:
    tree.pci("0000:3b:00.0")
    found = look(tree, Falls())
    assert state(found, "falls") == KindState(
        kind="falls",
        state=DEGRADED,
        reason="cannot look for falls devices: RuntimeError: its library is broken",
    )
    assert kinds_of(found) == {"0000:3b:00.0": "nic"}


def test_a_kind_that_ends_its_program_ends_nothing(tree: DeviceTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """As command-line tools that are used as libraries do."""
    monkeypatch.setattr(Falls, "discover", lambda *_: sys.exit("no such card"))
    tree.pci("0000:3b:00.0")
    found = look(tree, Falls())
    assert state(found, "falls").reason == "cannot look for falls devices: SystemExit: no such card"
    assert kinds_of(found) == {"0000:3b:00.0": "nic"}


def test_a_device_appears_once_with_the_first_kind_that_knows_it(tree: DeviceTree) -> None:
    tree.pci("0000:3b:00.0")
    assert kinds_of(look(tree, Card("0000:3b:00.0"))) == {"0000:3b:00.0": "card"}


@pytest.mark.parametrize("id", ["", "x" * 64])
def test_a_kind_with_ids_that_no_api_can_carry_is_degraded(tree: DeviceTree, id: str) -> None:
    assert f"device id {id!r}" in state(look(tree, Card(id)), "card").reason


def test_a_long_id_is_cut_and_stays_distinct() -> None:
    one, other = short_id("a" * 80 + "1"), short_id("a" * 80 + "2")
    assert len(one) == len(other) == 63
    assert one != other
    assert short_id("a" * 63) == "a" * 63


def _entry_points(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str, source: str) -> None:
    """A distribution on the path as an installer would leave it."""
    (folder / "thirdparty.py").write_text(source)
    info = folder / "thirdparty-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[nodeagent.kinds]\n{lines}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_a_third_partys_kind_is_loaded_and_a_broken_one_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A good one, one that is not there, one that raises when made, one that is no kind, one that takes our name."""
    source = (
        "from nodeagent.kinds import ContainerEdits, Device, Found, KindState, replace\n"
        "class Card(Device, frozen=True, kw_only=True):\n"
        "    slot: int\n"
        "class Dongle:\n"
        "    name = 'dongle'\n"
        "    def discover(self, sysfs, context):\n"
        "        device = replace(Card(kind='dongle', id='d', slot=1), id='d0')\n"
        "        return Found(state=KindState(kind='dongle', state='present'), devices=(device,))\n"
        "    def edits(self, device, devices):\n"
        "        return ContainerEdits(env={'DONGLE': device.id})\n"
        "from builtins import dict\n"
        "class Gpu(Dongle):\n"
        "    name = 'gpu'\n"
        "def raises():\n"
        "    raise OSError('no firmware')\n"
        "def ends():\n"
        "    raise SystemExit('no license')\n"
    )
    lines = (
        "dongle = thirdparty:Dongle\nmissing = thirdparty:Nothing\nraises = thirdparty:raises\n"
        "ends = thirdparty:ends\n"
        "nokind = thirdparty:dict\ngpu2 = thirdparty:Gpu"
    )
    _entry_points(monkeypatch, tmp_path, lines, source)
    loaded = all_kinds.load_kinds()
    found = all_kinds.discover(SysFs(tmp_path / "empty"), loaded, Context())
    assert [device.id for device in found.devices] == ["d0"]
    assert state(found, "dongle").state == PRESENT
    assert state(found, "missing").state == state(found, "nokind").state == DEGRADED
    assert state(found, "raises").reason == "cannot load thirdparty:raises: OSError: no firmware"
    assert state(found, "ends").reason == "cannot load thirdparty:ends: SystemExit: no license"
    assert state(found, "gpu2").reason == "cannot use thirdparty:Gpu: the kind 'gpu' is built in"
    dongle = next(kind for kind in loaded if kind.name == "dongle")
    assert all_kinds.edits(dongle, found.devices).env == {"DONGLE": "d0"}


def test_the_kind_of_the_documentation_works_as_it_is_written(tree: DeviceTree) -> None:
    text = (CHECKOUT / "docs" / "kinds.md").read_text()
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    tree.pci("0000:3b:00.0", pci_class="120000", vendor="1ae0")
    found = all_kinds.discover(
        SysFs(tree.root), [names["Tpu"]()], Context(functions=functions(Tolerant(SysFs(tree.root))))
    )
    (device,) = found.devices
    assert (device.kind, device.id, device.paths) == ("tpu", "0000:3b:00.0", ("/dev/accel0",))
    assert all_kinds.edits(names["Tpu"](), found.devices).env == {"TPU_COUNT": "1"}


def test_an_empty_root_has_no_device_and_no_warning(tmp_path: Path) -> None:
    found = look(DeviceTree(tmp_path))
    assert (found.devices, found.links, found.warnings) == ((), (), ())
    assert state(found, "pci") == KindState(kind="pci", state=ABSENT, reason="there is no PCI function")


def test_this_machine_is_read_without_a_warning() -> None:
    """The real tree: every PCI function is in the inventory exactly once."""
    sysfs = SysFs("/")
    context = all_kinds.read_context(sysfs)
    found = all_kinds.discover(sysfs, all_kinds.builtin_kinds(), context)
    addresses = [device.id for device in found.devices if device.pci_address == device.id]
    assert sorted(addresses) == sorted(function.address for function in context.functions)
    assert found.warnings == ()
