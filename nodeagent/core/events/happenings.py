"""Which happenings become which Kubernetes Event: on which object, with which reason, type, action and words.

Every Event of the agent is made by a function of this file or of states.py. docs/operations.md lists the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from nodeagent.core.model.claim import Claim, ClaimRef
from nodeagent.core.model.cpuset import CpuSet

MOST_PODS = 8
"""Highest number of pods that one happening is reported on."""


class PodRef(NamedTuple):
    """A pod that an Event is about."""

    namespace: str
    name: str
    uid: str


class Reason(StrEnum):
    """Event.reason: why it was written, for machines."""

    CLAIM_REFUSED = "ClaimRefused"
    ALLOCATION_REFUSED = "AllocationRefused"
    CONTAINER_REFUSED = "ContainerRefused"
    NO_CPU_REQUEST = "NoCPURequest"
    DRIFT_REPAIRED = "DriftRepaired"
    DRIFT_NOT_REPAIRED = "DriftNotRepaired"
    DEVICE_HEALTHY = "DeviceHealthy"
    DEVICE_UNHEALTHY = "DeviceUnhealthy"
    DEVICE_HEALTH_UNKNOWN = "DeviceHealthUnknown"
    DEVICE_DEGRADED = "DeviceDegraded"
    DEVICE_LOST = "DeviceLost"
    DEVICE_RETURNED = "DeviceReturned"
    MPS_RESTARTED = "MPSRestarted"
    RESOURCE_NOT_SERVED = "ResourceNotServed"
    RESOURCE_SERVED = "ResourceServed"
    KUBELET_CONFLICT = "KubeletConflict"
    CPUS_NOT_EXCLUSIVE = "CPUsNotExclusive"
    CPUS_EXCLUSIVE = "CPUsExclusive"
    LEDGER_INCOMPLETE = "LedgerIncomplete"
    LEDGER_REBUILT = "LedgerRebuilt"
    LEDGER_REPLACED = "LedgerReplaced"
    CONFIGURATION_REFUSED = "ConfigurationRefused"
    CONFIGURATION_APPLIED = "ConfigurationApplied"


class Rule(NamedTuple):
    """What all Events of one reason have in common."""

    action: str
    """Event.action: what the agent was doing."""
    warns: bool
    """Whether the type is Warning instead of Normal."""


RULES: Mapping[Reason, Rule] = MappingProxyType(
    {
        Reason.CLAIM_REFUSED: Rule("PrepareClaim", warns=True),
        Reason.ALLOCATION_REFUSED: Rule("Allocate", warns=True),
        Reason.CONTAINER_REFUSED: Rule("PinContainer", warns=True),
        Reason.NO_CPU_REQUEST: Rule("PrepareClaim", warns=True),
        Reason.DRIFT_REPAIRED: Rule("VerifyCgroup", warns=False),
        Reason.DRIFT_NOT_REPAIRED: Rule("VerifyCgroup", warns=True),
        Reason.DEVICE_HEALTHY: Rule("WatchDevice", warns=False),
        Reason.DEVICE_UNHEALTHY: Rule("WatchDevice", warns=True),
        Reason.DEVICE_HEALTH_UNKNOWN: Rule("WatchDevice", warns=True),
        Reason.DEVICE_DEGRADED: Rule("WatchDevice", warns=True),
        Reason.DEVICE_LOST: Rule("WatchDevice", warns=True),
        Reason.DEVICE_RETURNED: Rule("WatchDevice", warns=False),
        Reason.MPS_RESTARTED: Rule("WatchMPS", warns=True),
        Reason.RESOURCE_NOT_SERVED: Rule("ServeResource", warns=True),
        Reason.RESOURCE_SERVED: Rule("ServeResource", warns=False),
        Reason.KUBELET_CONFLICT: Rule("CompareWithKubelet", warns=True),
        Reason.CPUS_NOT_EXCLUSIVE: Rule("CompareWithKubelet", warns=True),
        Reason.CPUS_EXCLUSIVE: Rule("CompareWithKubelet", warns=False),
        Reason.LEDGER_INCOMPLETE: Rule("RebuildLedger", warns=True),
        Reason.LEDGER_REBUILT: Rule("RebuildLedger", warns=False),
        Reason.LEDGER_REPLACED: Rule("SaveLedger", warns=True),
        Reason.CONFIGURATION_REFUSED: Rule("ReloadConfiguration", warns=True),
        Reason.CONFIGURATION_APPLIED: Rule("ReloadConfiguration", warns=False),
    }
)


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to report. It is reported on its pods, or on the Node if it has none or `on_node` is set."""

    reason: Reason
    subject: str
    """What it is about, such as a device: of several happenings that wait to be written, only the newest about one
    subject is."""
    note: str
    """Event.note: the same words for the same happening, since equal Events are counted instead of written again."""
    pods: tuple[PodRef, ...] = ()
    on_node: bool = False
    found: bool = False
    """Whether it was found at the start of the agent, so that an earlier agent may have reported it already."""


Report = Callable[[Happening], None]
"""Takes a happening that is to be reported. It returns at once."""


def unreported(happening: Happening) -> None:
    """Report nothing."""


# ---------------------------------------------------------------- refusals


def claim_refused(ref: ClaimRef, claim: Claim | None, why: str) -> Happening:
    """Return the happening that a claim cannot be prepared. claim: as it was read, or None if it could not be; then the
    pods are unknown. why: with what would admit it."""
    pods = pods_of(claim) if claim is not None else ()
    return Happening(reason=Reason.CLAIM_REFUSED, subject=f"claim {ref.uid}", note=why, pods=pods)


def pods_of(claim: Claim) -> tuple[PodRef, ...]:
    """Return the pods for which a claim is reserved."""
    pairs = zip(claim.pods_with(()), claim.pods, strict=False)
    return tuple(PodRef(claim.ref.namespace, name, uid) for uid, name in pairs)


def allocation_refused(resource: str, ids: Sequence[str], why: str) -> Happening:
    """Return the happening that Allocate of the device plugin was refused.

    Kubelet does not tell a device plugin for which pod it asks (AllocateRequest of v1beta1 has ids alone), and what the
    plugin answers it writes on the pod itself (UnexpectedAdmissionError).
    """
    return Happening(reason=Reason.ALLOCATION_REFUSED, subject=f"{resource} {' '.join(ids)}", note=why)


def container_refused(container: str, pod: PodRef | None, why: str) -> Happening:
    """Return the happening that a container was not started since it cannot be confined to what it holds."""
    pods = (pod,) if pod is not None else ()
    return Happening(reason=Reason.CONTAINER_REFUSED, subject=f"container {container}", note=why, pods=pods)


# ---------------------------------------------------------------- devices


def mps_restarted(name: str, devices: Sequence[str], holders: Sequence[str], pods: tuple[PodRef, ...]) -> Happening:
    """Return the happening that an MPS daemon ended and was started again. name: of the daemon."""
    note = (
        f"the MPS daemon of {', '.join(devices)} ended and was started again: programs of {', '.join(holders)} that "
        "used it have lost it and must be started again"
    )
    return Happening(reason=Reason.MPS_RESTARTED, subject=f"MPS daemon {name}", note=note, pods=pods, on_node=True)


# ---------------------------------------------------------------- pods


def no_cpu_request(claim: str, cpus: CpuSet, pod: PodRef) -> Happening:
    """Return the happening that a claim gives CPUs to a pod that requests none of kubelet. claim: NAMESPACE/NAME."""
    note = (
        f"claim {claim} gives it the exclusive CPUs {cpus}, but it requests no CPU of kubelet: it has the lowest CPU "
        "weight, and without any request it is evicted and killed first"
    )
    return Happening(reason=Reason.NO_CPU_REQUEST, subject=f"claim {claim}", note=note, pods=(pod,))


def drift(whose: str, files: Sequence[str], pod: PodRef | None, error: str = "") -> Happening:
    """Return the happening that another process changed a cgroup.

    whose: the container or pod. files: the cgroup files. error: why it could not be repaired, or "" if it was.
    """
    written = ", ".join(dict.fromkeys(one.removesuffix(".effective") for one in files))
    changed = f"another process changed {written or 'the cgroup'} of {whose}"
    return Happening(
        reason=Reason.DRIFT_NOT_REPAIRED if error else Reason.DRIFT_REPAIRED,
        subject=f"cgroup of {whose}",
        note=f"{changed}: {error}" if error else f"{changed}; repaired",
        pods=(pod,) if pod is not None else (),
    )
