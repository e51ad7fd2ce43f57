"""The variables in which a container finds the PCI functions of one resource: named and filled as the SR-IOV network
device plugin does it, so that programs that were written for it run unchanged.

Source: sriov-network-device-plugin, README ("Pod device information"), pkg/resources/pool_stub.go (names),
pkg/infoprovider (one object for each source of information). Go writes the keys of JSON objects in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.device import Device

PCI_KINDS = frozenset({"nic", "accel", "fpga", "pci", "qat"})
"""Kinds whose devices are named in such variables."""
VHOST_NET, TUN = "/dev/vhost-net", "/dev/net/tun"
ANY_DEVICE = "*"
"""Stands for every device in AdditionalInfo."""
AdditionalInfo = Mapping[str, Mapping[str, str]]
"""Values by key, by PCI address or ANY_DEVICE."""
NO_INFO: AdditionalInfo = MappingProxyType({})
_RDMA = (("uverbs", "uverbs"), ("umad", "umad"), ("issm", "issm"), ("rdma_cm", "rdma_cm"))
_VFIO_NODE = re.compile(r"/dev/vfio/(noiommu-)?[0-9]+")


def variable(resource: str) -> str:
    """Return the name of the variable of a resource: DOMAIN/NAME in capitals, with _ for the slash and each dot."""
    return f"PCIDEVICE_{resource.replace('/', '_').replace('.', '_')}".upper()


def pci_variables(
    resource: str,
    devices: Iterable[Device],
    *,
    info: AdditionalInfo = NO_INFO,
    vhost_net: bool = False,
    rdma: bool = True,
) -> dict[str, str]:
    """Return both variables of a resource, or nothing if none of the devices is a PCI function or a part of one.

    resource: its full name. vhost_net, rdma: whether the container gets the nodes of vhost-net, and those of RDMA.
    """
    known = {_id(one): one for one in devices if one.kind in PCI_KINDS and one.pci_address is not None}
    if not known:
        return {}
    ids = sorted(known)
    said = {id: _said(id, known[id], info, vhost_net=vhost_net, rdma=rdma) for id in ids}
    name = variable(resource)
    return {name: ",".join(ids), f"{name}_INFO": msgspec.json.encode(said, order="sorted").decode()}


def _id(device: Device) -> str:
    """Return a device's name in the variables: its PCI address, or the auxiliary device of a scalable function."""
    part = device.attributes.get("auxiliary") if device.id != device.pci_address else None
    return str(part or device.pci_address)


def _said(
    id: str, device: Device, info: AdditionalInfo, *, vhost_net: bool, rdma: bool
) -> dict[str, Mapping[str, str]]:
    found: dict[str, Mapping[str, str]] = {"generic": {"deviceID": id}}
    if nodes := [path for path in device.paths if _VFIO_NODE.fullmatch(path)]:
        found["vfio"] = {"mount": "/dev/vfio/vfio", "dev-mount": nodes[0]}
    if rdma and (nodes := [path for path in device.paths if path.startswith("/dev/infiniband/")]):
        names = str(device.attributes.get("rdma", ""))
        found["rdma"] = {**_rdma_nodes(nodes), **({"rdma_dev": names.partition(",")[0]} if names else {})}
    if vhost_net:
        found["vhost"] = {"net-mount": VHOST_NET, "tun-mount": TUN}
    if info:
        found["extra"] = {**info.get(ANY_DEVICE, {}), **info.get(device.pci_address or "", {})}
    return found


def _rdma_nodes(paths: Iterable[str]) -> dict[str, str]:
    """Return the nodes by what they are; of several alike the last, as the plugin does."""
    return {key: path for path in paths for key, part in _RDMA if part in path}
