"""Accelerators other than GPUs: Intel DSA and IAA, vector engines, Gaudi, AWS Neuron, /sys/class/accel, any PCI
co-processor.

DSA and IAA: Documentation/ABI/stable/sysfs-driver-dma-idxd. Their PCI class is only "system peripheral", so they are
recognised by their bus. Gaudi has a second node for its state (drivers/accel/habanalabs/common/device.c). Neuron's
class devices have no parent, so they show no PCI function (sys/devices/virtual/neuron_device).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from nodeagent.core.dsa.division import Division, is_agents
from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import DEGRADED, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Attributes, Context, Found, no_records, node_edits, part_of, pci_device
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_CLASSES = ("0b40", "12")
_ACCEL_CLASSES = ("sys/class/accel", "sys/class/habanalabs")
_NEURON_CLASS = "sys/class/neuron_device"
_IDXD_TOLD = ("state", "max_work_queues", "max_groups", "max_engines")


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel's nodes and attributes of one function."""

    paths: tuple[str, ...] = ()
    attributes: Attributes
    made: tuple[str, ...] = ()
    """The names of its work queues that are as agents give them to those that they make for claims."""


class Accel:
    """The kind `accel`."""

    name = "accel"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        before = context.dsa.divided()
        parts: Mapping[str, _Part] = dict((*_vector_engines(reader), *_accels(reader).items(), *_idxd(reader)))
        unknown = _of_unknown_agents(context, parts, before)
        nothing = _Part(attributes={})
        devices = []
        for function in context.functions:
            if function.is_class(*_CLASSES) or function.address in parts:
                part = parts.get(function.address, nothing)
                if function.address in unknown:  # no other kind is to find it either
                    part = _Part(attributes={**part.attributes, "in_use": True})
                devices.append(pci_device(context, function, "accel", paths=part.paths, attributes=part.attributes))
        devices += _neurons(reader, context)
        state = KindState(kind="accel", state=PRESENT)
        if unknown:
            state = KindState(kind="accel", state=DEGRADED, reason="; ".join(unknown.values()))
        return Found(state=state, devices=tuple(devices), warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the work queues or device nodes, or the vfio nodes."""
        return node_edits(device, devices)


def _accels(reader: Tolerant) -> Mapping[str, _Part]:
    """Return accelerators with nodes below /dev/accel, by PCI address (Documentation/accel/introduction.rst), with the
    node of the accelerator before others of the same function."""
    found: dict[str, list[str]] = {}
    for folder in _ACCEL_CLASSES:
        for name, _, address, _ in pci.members(reader, folder):
            if address is not None and name not in found.setdefault(address, []):
                found[address].append(name)
    return {
        address: _Part(paths=tuple(_accel_node(name) for name in names), attributes={"name": names[0]})
        for address, names in ((address, sorted(names, key=_main_first)) for address, names in found.items())
    }


def _accel_node(name: str) -> str:
    return f"/dev/accel/{name}" if name.startswith("accel") else f"/dev/{name}"


def _main_first(name: str) -> tuple[bool, str]:
    return "control" in name, name


def _neurons(reader: Tolerant, context: Context) -> Iterator[Device]:
    """Yield Neuron devices. If there is one, it is where the only function of the driver is; of several the driver does
    not show which is which."""
    names = [name for name in reader.names(_NEURON_CLASS) if name.startswith("neuron")]
    functions = [function for function in context.functions if function.driver == "neuron"]
    owner = functions[0] if len(names) == len(functions) == 1 else None
    for name in names:
        yield part_of(owner, kind="accel", id=name, paths=(f"/dev/{name}",), attributes={"name": name})


def _vector_engines(reader: Tolerant) -> Iterator[tuple[str, _Part]]:
    for name, _, address, _ in pci.members(reader, "sys/class/ve"):
        if address is not None:
            yield address, _Part(paths=(f"/dev/{name}",), attributes={"name": name})


def _idxd(reader: Tolerant) -> Iterator[tuple[str, _Part]]:
    """Yield DSA and IAA devices. The bus also lists engines, groups and queues; only devices are
    directly below their function."""
    for name, path, address, tail in pci.members(reader, "sys/bus/dsa/devices"):
        if address is None or tail != name:
            continue
        told = {key: reader.text(f"{path}/{key}") for key in _IDXD_TOLD}
        attributes = {"name": name, **{key: value for key, value in told.items() if value is not None}}
        queues = [queue for queue in reader.names(path) if queue.startswith("wq")]
        labels = (reader.text(f"{path}/{queue}/name") or "" for queue in queues)
        made = tuple(label for label in labels if is_agents(label))
        yield address, _Part(paths=tuple(_nodes(reader, name, queues)), attributes=attributes, made=made)


def _of_unknown_agents(
    context: Context, parts: Mapping[str, _Part], before: Mapping[str, Division]
) -> Mapping[str, str]:
    """Return why some accelerators are not to be had whole, by address: a queue was made for a claim, and no record
    says for which. A pod that has the accelerator would have that queue too. before: what was recorded before they
    were read."""
    if context.dsa.divided is no_records:
        return {}
    named = {address: part for address, part in parts.items() if part.made}
    both = (before, context.dsa.divided()) if named else ()
    found: dict[str, str] = {}
    for address, part in named.items():
        records = [record for one in both if (record := one.get(address)) is not None]
        known = {record.label(slot) for record in records for slot in range(len(record.queues))}
        if strange := [label for label in part.made if label not in known]:
            name = part.attributes["name"]
            found[address] = f"{name} has the queue {strange[0]}, of an agent whose records are not here"
    return found


def _nodes(reader: Tolerant, name: str, queues: Sequence[str]) -> Iterator[str]:
    """Yield the nodes of the queues that are enabled for user space."""
    folder = "iax" if name.startswith("iax") else "dsa"
    for queue in queues:
        if reader.sysfs.exists(f"dev/{folder}/{queue}"):
            yield f"/dev/{folder}/{queue}"
