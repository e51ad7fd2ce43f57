"""Intel SGX: the kind `sgx`, with one device for the enclave memory (EPC) of each NUMA node, and one for provisioning.

Enclaves of all programs are made through the same node, so its devices exclude no program and are meant to be served in
shares (`replicas`). The kernel takes enclave memory from the node nearest to a program first, and swaps it where it
does not last: the amounts that are granted are kept apart in the ledger, and are not enforced. Source:
Documentation/arch/x86/sgx.rst; Documentation/ABI/stable/sysfs-devices-node, sgx_total_bytes (Linux 5.17). An older
kernel does not say how much there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, nodes
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

ENCLAVE, PROVISION = "/dev/sgx_enclave", "/dev/sgx_provision"
NODES = "sys/devices/system/node"


class Sgx:
    """The kind `sgx`."""

    name = "sgx"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        if not sysfs.exists(ENCLAVE.lstrip("/")):
            reason = f"there is no {ENCLAVE}: no SGX, or the firmware has it off"
            return Found(state=KindState(kind="sgx", state=ABSENT, reason=reason))
        devices = tuple(_devices(reader, context))
        return Found(state=KindState(kind="sgx", state=PRESENT), devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the node through which enclaves are made, or that for attestation."""
        return ContainerEdits(device_nodes=nodes(device.paths))


def _devices(reader: Tolerant, context: Context) -> Iterator[Device]:
    sizes = _epc_bytes(reader)
    for node, size in sizes.items():
        attributes = {"memory_bytes": size, "provision": False}
        yield Device(
            kind="sgx", id=f"sgx-{node}", numa_node=node, paths=(ENCLAVE,), exclusive=(), attributes=attributes
        )
    if not sizes:
        yield Device(kind="sgx", id="sgx", paths=(ENCLAVE,), exclusive=(), attributes={"provision": False})
    if reader.sysfs.exists(PROVISION.lstrip("/")):
        yield Device(kind="sgx", id="sgx-provision", paths=(PROVISION,), exclusive=(), attributes={"provision": True})


def _epc_bytes(reader: Tolerant) -> Mapping[int, int]:
    """Return the enclave memory of each NUMA node that has any."""
    every = reader.read(lambda path: list(reader.sysfs.numbered(path, "node")), NODES) or []
    found = {node: reader.number(f"{path}/x86/sgx_total_bytes") for node, path in every}
    return {node: size for node, size in found.items() if size}
