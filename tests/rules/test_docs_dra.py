"""docs/dra.md against the program: what it says is published, its claims to copy, the messages that it explains."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from nodeagent.admin.state_gauges import STATE_GAUGES
from nodeagent.config.load import parse
from nodeagent.config.schema import schema
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import INDIVIDUAL, L3, NUMA_NODE, SOCKET, CpuPool, PoolKind
from nodeagent.core.dra.device_pool import _RESTLESS, DevicePool
from nodeagent.core.dra.memory_pools import MemoryPool, PagePool
from nodeagent.core.dra.pool import ALL_FEATURES, HELD_TAINT, PATH_TAINT, UNHEALTHY_TAINT, Pool
from nodeagent.core.dsa.division import Queue, Rule
from nodeagent.core.fabrics.target import Port
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import FROM_CLAIM, FROM_CLASS, Opaque, Result
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.decode import CONFIG_KINDS, FORMS, check_all, settings_for
from nodeagent.core.opaque.settings import NO_SETTINGS
from nodeagent.host.devices.all_kinds import (
    CharSelector,
    DsaSelector,
    PartitionSelector,
    TargetSelector,
    UsbSelector,
    builtin_kinds,
)
from nodeagent.host.devices.base import BLOCK_TYPES
from nodeagent.host.nvml.client import Mig, NvGpu, Snapshot
from nodeagent.host.nvml.values import Fabric, GpuInstance
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.telemetry.metrics import REGISTRY
from tests.builders.devices import DeviceTree
from tests.builders.disk_parts import disk_parts
from tests.builders.machines import GIB, MIB, Shape, build
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.mig_driver import profiles_of
from tests.support.paths import CHECKOUT

DOCS, SOURCES = CHECKOUT / "docs", CHECKOUT / "nodeagent"
DRIVER = "nodeagent.dev"
SIZES = (2 * MIB, GIB)
GPU, WHOLE_GPU, AMD_GPU, NIC = "0000:3b:00.0", "0000:3c:00.0", "0000:c1:00.0", "0000:5e:00.0"
LINKED_GPU, OTHER_GPU = "0000:c2:00.0", "0000:c3:00.0"
SWITCH, DOWN = "0000:01:00.0", "0000:02:00.0"
PCI = {"gpu", "nic", "nvme", "accel", "fpga", "pci", "qat"}
DEVICES = {*PCI, "block", "dsa", "dsa-queue", "imex", "nvmeof", "sgx", "usb", "vdpa", "char"}
GROUPS = {"all": {*DEVICES, "cpu", "hugepages", "memory"}, "devices": DEVICES, "PCI": PCI}
QUEUE = Queue(size=16, priority=10)
PORT = Port(transport="tcp", traddr="192.0.2.10", trsvcid=4420, nqn="nqn.2024-01.com.example:fast")
TYPES = {"int": int, "string": str, "bool": bool}
API_VERSIONS = {
    "DaemonSet": "apps/v1",
    "DeviceClass": "resource.k8s.io/v1",
    "Namespace": "v1",
    "Pod": "v1",
    "ResourceClaim": "resource.k8s.io/v1",
    "ResourceClaimTemplate": "resource.k8s.io/v1",
}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the documentation lies in the checkout")


# ---------------------------------------------------------------- a machine that has everything


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """Two sockets of two NUMA nodes each, devices of every kind, and all that they can tell."""
    shape = Shape(
        packages=2,
        nodes_per_package=2,
        cores_per_l3=2,
        threads=2,
        isolated="3",
        hugepages={(node, size): (8, 8, 0) for node in range(4) for size in SIZES},
        pmus={"cpu_core": "0-7", "cpu_atom": "8-15"},
    )
    tree = DeviceTree(build(tmp_path_factory.mktemp("machine"), shape))
    for add in (_add_switch, _add_gpus, _add_nics, _add_disks, _add_accelerators, _add_ports):
        add(tree)
    selectors = Selectors(
        char=(CharSelector(name="serial", globs=("/dev/ttyS*", "/dev/serial/by-id/*")),),
        usb=(UsbSelector(name="camera", vendor="046d"),),
        targets=(TargetSelector(name="fast", selector="san", port=PORT),),
        dsa=DsaSelector(rules=(Rule(accelerators=("dsa2",), queues=(QUEUE,)),)),
        gpu_groups=frozenset({2}),
        partitions=PartitionSelector(),
    )
    found = scan(SysFs(tree.root), builtin_kinds(), selectors, _nvml())
    return replace(found, devices=tuple(map(_as_a_real_node, found.devices)))


def _nvml() -> Snapshot:
    mig = Mig(uuid="MIG-0", profile="3g.40gb", memory_bytes=40 * GIB, gpu_instance=1, compute_instance=0)
    told = {"uuid": "GPU-0", "name": "NVIDIA H100", "memory_bytes": 80 * GIB, "minor": 0, "ecc_uncorrected": 0}
    fabric = Fabric(cluster="5f1c0000-0000-0000-0000-000000000000", clique=1)
    lying = GpuInstance(id=1, profile=9, start=4, size=4)
    divided = {"migs": (mig,), "instances": (lying,), "profiles": profiles_of("h100-80")}
    gpu = NvGpu(pci_address=GPU, mig_enabled=True, nvlinks={WHOLE_GPU: 1}, **divided, **told)  # type: ignore[arg-type]
    whole = NvGpu(pci_address=WHOLE_GPU, mig_enabled=False, fabric=fabric, **told)  # type: ignore[arg-type]
    return Snapshot(driver_version="580.95", gpus=(gpu, whole))


def _as_a_real_node(device: Device) -> Device:
    """The tree's device nodes are plain files: a real one has numbers, and may hang below a PCI function."""
    if device.id != "/dev/ttyS0":
        return device
    told = MappingProxyType({**device.attributes, "major": 4, "minor": 64})
    return replace(device, numa_node=0, pcie_root="pci0000:00", parent="0000:00:1f.0", attributes=told)


def _add_switch(tree: DeviceTree) -> None:
    """A root port and a switch, below which there is a device of every PCI kind."""
    tree.bridge("0000:00:01.0")
    tree.switch(SWITCH, [DOWN], under="0000:00:01.0")


def _add_gpus(tree: DeviceTree) -> None:
    for address in (GPU, WHOLE_GPU):
        facts = {"pci_class": "030200", "vendor": "10de", "device": "2330", "driver": "nvidia", "numa_node": 0}
        tree.pci(address, group=7, under=DOWN, **facts)  # type: ignore[arg-type]
    tree.pci(AMD_GPU, pci_class="038000", vendor="1002", driver="amdgpu", numa_node=1)
    tree.drm(AMD_GPU, 1)
    tree.kfd(0, None)
    for partition in (0, 1):
        tree.kfd(1 + partition, AMD_GPU, [3], partition=partition, render=129 + partition)
    for number, address in enumerate((LINKED_GPU, OTHER_GPU), 3):
        tree.pci(address, pci_class="038000", vendor="1002", driver="amdgpu", numa_node=1)
        tree.drm(address, number)
        tree.kfd(number, address, [1, 7 - number])


def _add_nics(tree: DeviceTree) -> None:
    tree.pci(NIC, vendor="15b3", driver="mlx5_core", numa_node=0, under=DOWN)
    tree.net(NIC, "ens2np0", phys_port_name="p0", phys_switch_id="9a1b", type=1)
    tree.write(f"sys/bus/pci/devices/{NIC}/acpi_index", 101)
    tree.rdma(NIC, "mlx5_0", 0)
    tree.vf(NIC, 0, "0000:5e:01.0")
    tree.link("sys/bus/auxiliary/devices/mlx5_core.sf.2", tree.folders[NIC] / "mlx5_core.sf.2")
    tree.vdpa("0000:5e:01.0", "vdpa0", driver="virtio_vdpa")


def _add_disks(tree: DeviceTree) -> None:
    tree.pci("0000:41:00.0", pci_class="010802", driver="nvme", numa_node=1, under=DOWN)
    (tree.nvme("0000:41:00.0", 0, {1: 1 << 40}) / "firmware_rev").write_text("1.0\n")
    tree.pci("0000:42:00.0", pci_class="010700", driver="mpt3sas", numa_node=1, under=DOWN)
    told = {"device/model": "Disk", "device/wwid": "naa.5000c500", "serial": "S1", "queue/rotational": 1}
    tree.disk("0000:42:00.0", "sda", "host0", 1 << 40, removable=0, **told)


def _add_accelerators(tree: DeviceTree) -> None:
    tree.pci("0000:6a:01.0", pci_class="088000", driver="idxd", numa_node=0, under=DOWN)
    folder = tree.folders["0000:6a:01.0"] / "dsa0"
    for name, value in {"state": "enabled", "max_work_queues": 8, "max_groups": 4, "max_engines": 4}.items():
        tree.write(f"{folder.relative_to(tree.root)}/{name}", value)
    tree.link("sys/bus/dsa/devices/dsa0", folder)
    tree.queue("0000:6a:01.0", "dsa0", 0)
    IdxdKernel(tree).add("dsa2", "0000:e7:01.0")
    services = {"qat/cfg_services": "sym;asym", "qat/state": "up"}
    tree.pci(
        "0000:6b:00.0",
        pci_class="0b4000",
        device="4940",
        driver="4xxx",
        numa_node=0,
        under=DOWN,
        group=9,
        files=services,
    )
    tree.sgx({0: GIB})
    tree.pci("0000:b1:00.0", pci_class="120000", device="bcce", driver="dfl-pci", numa_node=1, under=DOWN)
    fpga = tree.folders["0000:b1:00.0"]
    tree.member("fpga_manager", "fpga0", fpga / "fpga_manager/fpga0", {"name": "FPGA Manager", "state": "operating"})
    tree.member("fpga_region", "region0", fpga / "fpga_region/region0", {})


def _add_ports(tree: DeviceTree) -> None:
    tree.pci("0000:00:14.0", pci_class="0c0330", driver="xhci_hcd", numa_node=0)
    tree.usb("0000:00:14.0", "1-1", vendor="046d", product="082d", manufacturer="Maker", serial="A1", speed=480)
    tree.write("sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/product", "Camera")
    tree.pci("0000:00:1f.0", pci_class="ff0000", numa_node=0)
    tree.node("/dev/nvidia-caps-imex-channels/channel0")
    tree.node("/dev/ttyS0")
    tree.link("dev/serial/by-id/usb-Maker", tree.node("/dev/ttyUSB0"))


@pytest.fixture(scope="module")
def published(machine: Inventory, tmp_path_factory: pytest.TempPathFactory) -> list[Pool]:
    """Every pool in every form: CPUs in all groupings, devices whole and by shares."""
    kinds: list[PoolKind] = [CpuPool(group=one) for one in (NUMA_NODE, SOCKET, L3, INDIVIDUAL)]
    kinds += [PagePool(sizes=SIZES), MemoryPool()]
    for name in sorted(DEVICES):
        for replicas in (1, 4):
            resource = DeviceResource(name=f"{DRIVER}/{name}", kind=name, replicas=replicas)
            sets = DeviceResource(name=f"{DRIVER}/{name}-set", kind=name, match={"group": "?*"})
            kinds.append(DevicePool(kind=name, resources=(resource, sets)))
    parts = DeviceResource(name=f"{DRIVER}/mig", kind="gpu", partitions=True)
    kinds.append(DevicePool(kind="gpu", resources=(parts,)))
    made = [one.pool(machine, Ledger(), NO_HEALTH, ALL_FEATURES) for one in kinds]
    drives = disk_parts(tmp_path_factory.mktemp("drives"))
    drives.write("sys/class/block/nvme0n1/nguid", "6b9a0000000000000025385b71b00001")
    disks = scan(SysFs(str(drives.root)), builtin_kinds(), Selectors(block_types=frozenset(BLOCK_TYPES)))
    every = DeviceResource(name=f"{DRIVER}/part", kind="block", match={"type": "*"})
    made.append(DevicePool(kind="block", resources=(every,)).pool(disks, Ledger(), NO_HEALTH, ALL_FEATURES))
    assert all(pool.devices for pool in made)
    return made


# ---------------------------------------------------------------- reading the documentation


def section(title: str, name: str = "dra.md") -> str:
    """The text below one heading, to the next one."""
    (found,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", (DOCS / name).read_text(), re.M | re.S)
    assert isinstance(found, str)
    return found


def rows(text: str, head: str) -> Iterator[list[str]]:
    """The rows of the tables whose first column is headed so; a pipe in code is written as backslash and pipe."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif inside and set(line) - set("|- "):
            yield cells
        inside = inside or bool(cells and cells[0] == head)


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def only_code(cell: str) -> str:
    (found,) = codes(cell)
    return found


def kinds_of(cell: str) -> set[str]:
    return {kind for word in cell.split() for kind in GROUPS.get(word, {word})}


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """The claims to copy, each with its file's name."""
    paths = sorted((DOCS / "examples").glob("*.yaml"))
    return [(path.name, one) for path in paths for one in yaml.safe_load_all(path.read_text())]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / "dra.md").read_text(), re.M | re.S)


def inner(value: Any, key: str) -> Iterator[Any]:
    """Every value at a key, however deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and key in value:
        yield value[key]
    for one in parts:
        yield from inner(one, key)


@functools.cache
def said() -> frozenset[str]:
    """All texts of the sources, with "…" where they are filled in."""
    trees = [ast.parse(path.read_text()) for path in SOURCES.rglob("*.py")]
    return frozenset(text for tree in trees for node in ast.walk(tree) if (text := _text(node)))


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in parts)
    return ""


# ---------------------------------------------------------------- what is published


def test_the_table_of_attributes_has_what_is_published_and_nothing_else(published: list[Pool]) -> None:
    table = {
        only_code(name): (TYPES[form], kinds_of(kinds))
        for name, form, _, kinds, _ in rows(section("Attributes"), "attribute")
    }
    shown: dict[str, set[str]] = {}
    for pool in published:
        for device in pool.devices:
            for name, value in device.attributes.items():
                assert name in table, f"{name} of kind {pool.kind} is not in the table"
                assert type(value) is table[name][0], (name, value)
                assert pool.kind in table[name][1], f"{name} is published for kind {pool.kind} too"
                shown.setdefault(name, set()).add(pool.kind)
    assert shown.keys() == table.keys()
    several = {name: kinds for name, (_, kinds) in table.items() if kinds not in GROUPS.values()}
    assert {name: shown[name] for name in several} == several


def test_the_table_of_capacities_has_what_is_published_and_nothing_else(published: list[Pool]) -> None:
    cells = rows(section("Capacities"), "capacity")
    table = {(only_code(name), kind) for name, _, kinds, _ in cells for kind in kinds_of(kinds)}
    assert table == {(name, pool.kind) for pool in published for one in pool.devices for name in one.capacity}


def test_the_tables_of_counters_and_taints_have_every_name(published: list[Pool]) -> None:
    text = section("Counters and taints")
    every = {name for pool in published for one in pool.counters for name in one.counters}
    counters = {re.sub(r"[0-9]+$", "N", name) for name in every}
    assert {only_code(cells[0]) for cells in rows(text, "counter")} == counters
    assert {only_code(cells[0]) for cells in rows(text, "taint")} == {UNHEALTHY_TAINT, HELD_TAINT, PATH_TAINT}


def test_what_is_never_published_is_named(machine: Inventory) -> None:
    text = section("Attributes")
    (listed,) = re.findall(r"would be a write to the API server:(.*?)\. For the same", text, re.S)
    assert {*codes(listed)} == _RESTLESS
    assert {name for device in machine.devices for name in device.attributes} & _RESTLESS


def test_the_names_of_devices_are_those_that_are_given(published: list[Pool]) -> None:
    names = {device.name for pool in published for device in pool.devices}
    text = section("What is published")
    examples = {"numa0", "socket0", "l3-0", "cpu7", "numa0-2mi", "numa0-1gi", "usb-1-1", "dev-ttys0-a2c0f4d0"}
    assert examples <= {*codes(text)} and examples <= names


# ---------------------------------------------------------------- claims to copy


def test_every_example_is_an_object_of_a_known_kind_and_is_in_the_list() -> None:
    for name, one in manifests():
        assert one["apiVersion"] == API_VERSIONS[one["kind"]], name
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", one["metadata"]["name"])
    listed = {only_code(f"`{cells[0]}`") for cells in rows(section("Claims to copy"), "file")}
    assert listed == {f"[examples/{name}](examples/{name})" for name, _ in manifests()}


def test_pods_of_the_examples_name_claims_and_requests_that_there_are() -> None:
    files = {name for name, _ in manifests()}
    for name in files:
        mine = [one for where, one in manifests() if where == name]
        templates = {one["metadata"]["name"]: one for one in mine if one["kind"] == "ResourceClaimTemplate"}
        for claims in (found for one in mine for found in inner(one, "resourceClaims")):
            by_name = {claim["name"]: templates[claim["resourceClaimTemplateName"]] for claim in claims}
            for used in (it for one in mine for found in inner(one, "claims") for it in found):
                requests = {it["name"] for it in next(inner(by_name[used["name"]], "requests"))}
                assert used.get("request") in {None, *requests}


def test_pods_of_the_examples_request_the_cpus_of_their_claims_of_kubelet_too() -> None:
    """Otherwise the scheduler does not count them, and the pod has the lowest weight. Pages are not repeated: the limit
    would be the sum."""
    seen = 0
    for name in {name for name, _ in manifests()}:
        mine = [one for where, one in manifests() if where == name]
        for container in (it for one in mine if one["kind"] == "Pod" for it in one["spec"]["containers"]):
            templates = [one for one in mine if one["kind"] == "ResourceClaimTemplate"]
            claimed = sum(int(amount) for one in templates for amount in inner(one, "cpus") if isinstance(amount, str))
            requests = container["resources"].get("requests", {})
            assert int(requests.get("cpu", 0)) == claimed, name
            assert not [one for one in requests if one.startswith("hugepages")], name
            seen += bool(claimed)
    assert seen == 3


def classes() -> set[str]:
    shipped = yaml.safe_load_all((CHECKOUT / "deploy" / "deviceclasses.yaml").read_text())
    own = [one for _, one in manifests() if one["kind"] == "DeviceClass"]
    return {one["metadata"]["name"] for one in (*shipped, *own)}


def test_every_class_of_an_example_is_shipped_or_beside_it() -> None:
    named = {name for _, one in manifests() for name in inner(one, "deviceClassName")}
    assert named and named <= classes()


def expressions() -> list[str]:
    examples = [text for _, one in manifests() for text in inner(one, "expression")]
    return [*examples, *(only_code(cells[0]) for cells in rows(section("Claims to copy"), "CEL"))]


def test_expressions_speak_of_what_is_published_alone(published: list[Pool]) -> None:
    devices = [device for pool in published for device in pool.devices]
    known = {
        "attributes": {name for one in devices for name in one.attributes},
        "capacity": {name for one in devices for name in one.capacity},
    }
    assert len(expressions()) > 8
    for text in expressions():
        named = re.findall(r'device\.(attributes|capacity)\["([^"]+)"\]\.(\w+)', text)
        assert named and len(named) == len(re.findall(r"device\.(?!driver)", text)), text
        for where, domain, name in named:
            assert domain == DRIVER and name in known[where], text


def test_constraints_and_capacities_name_what_is_published(published: list[Pool]) -> None:
    devices = [(pool.kind, device) for pool in published for device in pool.devices]
    matched = {name for _, one in manifests() for name in inner(one, "matchAttribute")}
    assert matched and matched <= {name for _, one in devices for name in one.attributes}
    asked = [one for _, each in manifests() for one in inner(each, "exactly") if "capacity" in one]
    assert asked
    for one in asked:
        kind = one["deviceClassName"].partition(".")[0].replace("whole-cores", "cpu")
        assert one["capacity"]["requests"].keys() <= {name for of, it in devices if of == kind for name in it.capacity}
    keys = {one["key"] for _, each in manifests() for found in inner(each, "tolerations") for one in found}
    assert keys == {UNHEALTHY_TAINT, HELD_TAINT}


def test_what_the_text_shows_is_in_the_examples() -> None:
    """Without the comments; what is no object of Kubernetes is a configuration that the agent takes."""
    shown = [yaml.safe_load(text) for text in fenced("yaml")]
    objects = [one for one in shown if "metadata" in one]
    assert len(objects) == 1 and all(one in [it for _, it in manifests()] for one in objects)
    for one in (one for one in shown if "metadata" not in one):
        assert parse(yaml.safe_dump(one), source="docs/dra.md").served_by_dra


# ---------------------------------------------------------------- opaque configuration


def configurations(only: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """(source, an entry of `config`) of all examples, or of one file."""
    found = []
    for one in (one for name, one in manifests() if only in ("", name)):
        source = FROM_CLASS if one["kind"] == "DeviceClass" else FROM_CLAIM
        found += [(source, entry) for some in inner(one, "config") for entry in some]
    return found


def opaque(source: str, entry: Mapping[str, Any]) -> Opaque:
    said = entry["opaque"]
    requests = tuple(entry.get("requests", ()))
    return Opaque(source=source, driver=said["driver"], requests=requests, parameters=said["parameters"])


def test_every_configuration_of_the_examples_is_one_that_is_taken() -> None:
    found = [opaque(*one) for one in configurations()]
    check_all(found, DRIVER)
    assert {one.parameters["kind"] for one in found} == FORMS.keys() - {"MemoryConfig"}


def test_each_request_of_the_example_has_its_own_configuration() -> None:
    found = [opaque(*one) for one in configurations("configured.yaml")]
    kinds = {"workers": "cpu", "control": "cpu", "pages": "hugepages", "gpu": "gpu", "net": "nic", "port": "char"} | {
        "disk": "block"
    }
    in_force = {
        request: settings_for(Result(request=request, driver=DRIVER, pool="n", device="d"), kind, found, DRIVER)
        for request, kind in kinds.items()
    }
    assert NO_SETTINGS not in in_force.values()
    assert in_force["workers"].options == {"full-pcpus-only"}
    assert in_force["control"].options == {"prefer-efficiency-cores", "avoid-isolated-cpus"}


def test_the_table_of_configurations_has_every_kind_and_field() -> None:
    table: dict[str, set[str]] = {}
    kind = ""
    for cells in rows(section("Opaque configuration"), "kind"):
        kind = only_code(cells[0]) if cells[0] else kind
        table.setdefault(kind, set()).update(one.partition(".")[0] for one in codes(cells[2]))
    assert table == {name: {*form.__struct_encode_fields__} for name, form in FORMS.items()}
    assert {*CONFIG_KINDS.values()} | {"DeviceConfig"} == table.keys()


# ---------------------------------------------------------------- messages, metrics, keys


def test_every_message_that_is_explained_is_one_that_is_said() -> None:
    messages = [only_code(cells[0]) for cells in rows(section("Troubleshooting"), "what it says")]
    assert len(messages) > 25
    unknown = [one for one in messages if not any(one in text for text in said())]
    assert not unknown


def test_every_event_of_the_log_is_one_that_is_logged() -> None:
    events = [name for cells in rows(section("Troubleshooting"), "in the log") for name in codes(cells[0])]
    assert len(events) > 12 and {*events} <= said()


@pytest.mark.parametrize("name", ["dra.md", "operations.md"])
def test_every_metric_that_is_named_is_one_that_there_is(name: str) -> None:
    named = {*re.findall(r"\b(nodeagent_\w+)", (DOCS / name).read_text())}
    assert named and named <= metric_names()


def metric_names() -> set[str]:
    """As a query names them."""
    found = [one for one in REGISTRY.collect() if one.name.startswith("nodeagent_")]
    happened = {f"{one.name}_total" if one.type == "counter" else one.name for one in found}
    return happened | {one.name for one in STATE_GAUGES}


def test_every_metric_is_explained() -> None:
    text = section("Metrics", "operations.md")
    assert metric_names() == {*re.findall(r"\b(nodeagent_\w+)", text)}


def test_every_key_of_the_configuration_is_explained() -> None:
    parts = schema()["$defs"]
    text = (DOCS / "configuration.md").read_text()
    for name in parts["DraConfig"]["properties"]:
        assert f"`dra.{name}`" in text
    for name in parts["PinningConfig"]["properties"]:
        assert f"`pinning.{name}`" in text
    for name in {*parts["ResourceConfig"]["properties"]} - {"cdi", "mig"}:
        assert f"`{name}`" in text
