"""Devices: what their drivers and the container's access to them need."""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.cli.node.doctor.model import Check, Finding, failure, ok, skipped, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.core.model.inventory import DEGRADED
from nodeagent.host.nvml.driver import driver_version
from nodeagent.host.nvml.library import LIBRARY, candidates
from nodeagent.host.pci import NVIDIA
from nodeagent.host.sysfs.lenient import Tolerant

VFIO_PCI = "sys/bus/pci/drivers/vfio-pci"
GROUPS = "sys/kernel/iommu_groups"
MPS = ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server")
MPS_FOLDERS = ("tmp/nvidia-mps", "var/log/nvidia-mps")
GPU = "gpu"
COMM_LENGTH = 15
"""The kernel cuts the names of processes here."""


def _kinds(node: Node) -> Finding:
    served = {one.kind for one in node.config.served}
    faults = dict(_faults(node))
    if ours := [f"{kind}: {why}" for kind, why in faults.items() if kind in served]:
        return failure("; ".join(ours), "mount or install what is missing", "nodeagent inventory")
    others = f"; not served: {', '.join(faults)}" if faults else ""
    return ok(f"{len(node.inventory.devices)} devices{others}")


def _faults(node: Node) -> Iterator[tuple[str, str]]:
    """Yield the kinds that cannot be discovered, with the reason: as the agent sees it, which has asked NVML, or
    without NVIDIA's GPUs, of which a check of its own speaks."""
    said = node.status.get("kinds")
    if isinstance(said, list):
        every = (one for one in said if isinstance(one, dict))
        yield from ((str(one.get("kind")), str(one.get("reason"))) for one in every if one.get("state") == DEGRADED)
        return
    yield from ((one.kind, one.reason) for one in node.inventory.kinds if one.state == DEGRADED and one.kind != GPU)


def _warnings(node: Node) -> Finding:
    found = node.inventory.warnings
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        return warning(f"{found[0]}{more}", "what cannot be read counts as absent", "nodeagent inventory -o json")
    return ok("every file of the machine could be read")


def _iommu(node: Node) -> Finding:
    groups = node.names(GROUPS)
    bound = _bound(node)
    if groups:
        return ok(f"{len(groups)} IOMMU groups")
    if bound:
        return failure(
            f"no IOMMU, and {', '.join(bound[:3])} bound to vfio-pci: a container could write to all memory",
            "switch the IOMMU on in the firmware and on the kernel's command line (intel_iommu=on, or amd_iommu=on)",
        )
    if any(one.attributes.get("sriov") == "vf" for one in node.inventory.devices):
        return warning(
            "no IOMMU: virtual functions cannot be given to user space safely",
            "switch it on if pods use DPDK or VFIO (intel_iommu=on, or amd_iommu=on, on the kernel's command line)",
        )
    return skipped("no device needs an IOMMU")


def _bound(node: Node) -> list[str]:
    return [one for one in node.names(VFIO_PCI) if one.count(":") == 2]


def _vfio(node: Node) -> Finding:
    bound = _bound(node)
    if not bound:
        return skipped("no device is bound to vfio-pci")
    if not node.files.exists("dev/vfio/vfio"):
        return failure(
            f"{', '.join(bound[:3])} bound to vfio-pci and there is no /dev/vfio/vfio", "load vfio", "modprobe vfio"
        )
    groups = {one: node.files.link_name(f"sys/bus/pci/devices/{one}/iommu_group") for one in bound}
    lost = [f"{one} (group {group})" for one, group in groups.items() if not node.files.exists(f"dev/vfio/{group}")]
    if lost:
        return failure(f"there is no device node of {', '.join(lost[:3])}", "bind again", "udevadm settle")
    return ok(f"{len(bound)} devices are bound to vfio-pci, each with its node")


def _nvidia(node: Node) -> list[str]:
    return [one.id for one in node.inventory.devices if one.kind == GPU and one.vendor == NVIDIA]


def _driver(node: Node) -> Finding:
    gpus = _nvidia(node)
    if not gpus:
        return skipped("no NVIDIA GPU")
    if version := driver_version(Tolerant(node.files)):
        return ok(f"NVIDIA's driver {version[:40]} has {len(gpus)} GPUs")
    return failure(f"{len(gpus)} NVIDIA GPUs and no driver", "install or load it", "modprobe nvidia")


def _library(node: Node) -> Finding:
    if not _nvidia(node):
        return skipped("no NVIDIA GPU")
    if not node.live:
        found = [str(one) for one in candidates(node.below(""))]
        return ok(f"{found[0]} is there") if found else skipped(f"{LIBRARY} is not in this capture")
    if why := node.probes.library_error():
        return failure(
            f"{why}: GPUs have no UUID, no MIG instance and no health",
            "install the library, or mount the driver's root",
            "ldconfig -p | grep nvidia-ml",
        )
    return ok(f"{LIBRARY} loads")


def _mps(node: Node) -> Finding:
    names = {one[:COMM_LENGTH] for one in MPS}
    ours = _mps_of_the_agent(node)
    every = [one for one in node.running(*names) if one.words[0].rpartition("/")[2] in MPS]
    found = [one for one in every if ours.isdisjoint({one.pid, one.parent})]
    folders = [one for one in MPS_FOLDERS if node.names(one)]
    if found:
        return warning(
            f"CUDA's MPS runs (process {found[0].pid}): programs of several pods may share a GPU that one was granted",
            "end it, unless replicas of a GPU are meant to share it: what claims ask for the agent runs itself",
            "echo quit | nvidia-cuda-mps-control",
        )
    if folders and _nvidia(node):
        return warning(
            f"MPS has left /{', /'.join(folders)}: a program that finds its pipe there waits for a server that is gone",
            "remove what it has left",
            *(f"rm -r /{one}" for one in folders),
        )
    return ok(f"MPS runs for claims ({len(ours)})" if ours else "MPS does not run and has left nothing")


def _mps_of_the_agent(node: Node) -> set[int]:
    """Return the pids of the daemons that the agent keeps; none if it does not answer."""
    if not node.live or node.agent_error:
        return set()
    sharing = node.status.get("sharing")
    daemons = sharing.get("mps", []) if isinstance(sharing, dict) else []
    return {one["pid"] for one in daemons if isinstance(one, dict) and isinstance(one.get("pid"), int)}


CHECKS = (
    Check("devices.kinds", "operations.md#troubleshooting", _kinds, configuration=True),
    Check("devices.readable", "inventory.md#devices", _warnings),
    Check("devices.iommu", "doctor.md#devices", _iommu),
    Check("devices.vfio", "doctor.md#devices", _vfio),
    Check("devices.nvidia-driver", "install.md#nvidia", _driver),
    Check("devices.nvml", "install.md#nvidia", _library),
    Check("devices.mps", "doctor.md#devices", _mps),
)
