"""Opaque parameters of claims for NVIDIA's DRA driver, as parameters for the agent.

Source of the format and of its meaning: api/nvidia.com/resource/v1beta1 of NVIDIA's DRA driver for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from nodeagent.core.imports.findings import NOT_SET, Finding, Rule, Said, State, findings, switch, usual
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.errors import InputError

API_VERSION = "resource.nvidia.com/v1beta1"
OWN_API_VERSION, OWN_KIND, VFIO_DRIVER = "nodeagent.dev/v1alpha1", "GpuConfig", "vfio-pci"
DOMAINS = ("ComputeDomainChannelConfig", "ComputeDomainDaemonConfig")
LEAST_LIMIT_BYTES = 1 << 20
"""NVIDIA's driver refuses a smaller limit of memory."""


class _TimeSlicing(msgspec.Struct, frozen=True):
    interval: Literal["Default", "Short", "Medium", "Long"] | None = None


class _Mps(msgspec.Struct, frozen=True, rename="camel"):
    default_active_thread_percentage: int | None = None
    default_pinned_device_memory_limit: str | int | None = None
    default_per_device_pinned_memory_limit: dict[str, str | int] | None = None


class _Sharing(msgspec.Struct, frozen=True, rename="camel"):
    strategy: Literal["TimeSlicing", "MPS"]
    time_slicing_config: _TimeSlicing | None = None
    mps_config: _Mps | None = None


class _Parameters(msgspec.Struct, frozen=True):
    kind: Literal["GpuConfig", "MigDeviceConfig", "VfioDeviceConfig"]
    sharing: _Sharing | None = None


def translate(parameters: Mapping[str, Any], devices: int | None, where: str) -> tuple[dict[str, Any], list[Finding]]:
    """Return the agent's parameters, or {} if there are none for it, and what becomes of each key.

    devices: how many the parameters are for, or None if that is not known. where: begins the place of each finding.
    Raise InputError for what NVIDIA's driver refuses.
    """
    version, kind = parameters.get("apiVersion"), parameters.get("kind")
    if version != API_VERSION:
        return {}, [*_lost(parameters, where, f"only {API_VERSION} is known")]
    if kind in DOMAINS:
        why = (
            "domains of several nodes are made by NVIDIA's controller; channels are devices of kind imex (docs/gpu.md)"
        )
        return {}, [*_lost(parameters, where, why)]
    try:
        read = msgspec.convert(parameters, _Parameters)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise InputError(f"cannot read parameters at {where}: {error}") from None
    made: dict[str, Any] = {"apiVersion": OWN_API_VERSION, "kind": OWN_KIND}
    if read.kind == "VfioDeviceConfig":
        made["driver"] = VFIO_DRIVER
        return made, [*findings(parameters, _VFIO, where=where)]
    found = _shared(read, made, devices, where)
    return made, [*findings(parameters, {**_KEYS, **found}, where=where)]


def _lost(parameters: Mapping[str, Any], where: str, why: str) -> Iterator[Finding]:
    return findings(parameters, {"$": Said(State.LOST), "$.**": Said(State.LOST, why=why)}, where=where)


def _shared(read: _Parameters, made: dict[str, Any], devices: int | None, where: str) -> Mapping[str, Rule]:
    """Add how a GPU is shared to the parameters that are made. Return what becomes of the keys that say so."""
    sharing = read.sharing
    if sharing is None:
        return {"$.sharing": NOT_SET}
    if sharing.strategy == "MPS":
        made["mps"] = mps = dict[str, Any]()
        other = Said(State.IGNORED, why="with strategy MPS NVIDIA's driver refuses it")
        slices = ("$.sharing.timeSlicingConfig", "$.sharing.timeSlicingConfig.interval")
        return {
            "$.sharing.strategy": Said(State.TRANSLATED, "mps"),
            **(dict.fromkeys(slices, other) if read.kind == "GpuConfig" else {}),
            **_mps(sharing.mps_config or _Mps(), mps, devices, where),
        }
    other = Said(State.IGNORED, why="with strategy TimeSlicing NVIDIA's driver refuses it")
    rules: dict[str, Rule] = dict.fromkeys(("$.sharing.mpsConfig", *_mps(_Mps(), {}, None, where)), other)
    if read.kind == "MigDeviceConfig":
        said = Said(State.BUILT_IN, why="a time slice is set for whole GPUs; NVIDIA's driver sets none either")
        return {**rules, "$.sharing.strategy": said}
    interval = (sharing.time_slicing_config or _TimeSlicing()).interval or "Default"
    made["timeSlicing"] = {"interval": interval}
    said = Said(State.TRANSLATED, "timeSlicing.interval")
    return {
        **rules,
        "$.sharing.strategy": Said(State.TRANSLATED, "timeSlicing"),
        "$.sharing.timeSlicingConfig": said,
        "$.sharing.timeSlicingConfig.interval": said,
    }


def _mps(config: _Mps, made: dict[str, Any], devices: int | None, where: str) -> Mapping[str, Rule]:
    percent = config.default_active_thread_percentage
    limit, why = _limit(config, devices, where)
    if percent is not None and not 0 <= percent <= 100:
        raise InputError(f"cannot read parameters at {where}: {percent} percent of threads, expected 0 to 100")
    if percent:
        made["activeThreadPercentage"] = percent
    if limit:
        made["pinnedDeviceMemoryLimit"] = limit
    to = Said(State.TRANSLATED, "mps.pinnedDeviceMemoryLimit")
    each = Said(State.LOST, why=why) if why else to
    return {
        "$.sharing.mpsConfig.defaultActiveThreadPercentage": Said(State.TRANSLATED, "mps.activeThreadPercentage")
        if percent
        else Said(State.LOST, why="programs without any thread do not run: give 1 to 100"),
        "$.sharing.mpsConfig.defaultPinnedDeviceMemoryLimit": to,
        "$.sharing.mpsConfig.defaultPerDevicePinnedMemoryLimit": NOT_SET,
        "$.sharing.mpsConfig.defaultPerDevicePinnedMemoryLimit.**": each,
    }


def _limit(config: _Mps, devices: int | None, where: str) -> tuple[str, str]:
    """Return the limit of every device, and why the limits of single ones are lost, or "" if they are not.

    The agent has one limit for all devices of a claim. Those of single devices are the same thing if all have the same,
    or if the claim has one device.
    """
    default, single = config.default_pinned_device_memory_limit, config.default_per_device_pinned_memory_limit or {}
    sizes = {_size(one, where) for one in single.values()}
    whole = _size(default, where) if default is not None else None
    text = "" if default is None else str(default)
    if not single or sizes == {whole}:
        return text, ""
    if devices == 1 and single.keys() == {"0"}:
        return str(single["0"]), ""
    return text, "a claim has one limit for all of its devices: use a request and a configuration for each limit"


def _size(quantity: str | int, where: str) -> int:
    try:
        size = parse_quantity(str(quantity))
    except InputError as error:
        raise InputError(f"cannot read parameters at {where}: {error}") from None
    if size < LEAST_LIMIT_BYTES:
        raise InputError(f"cannot read parameters at {where}: a limit of {quantity}, expected 1Mi or more")
    return size


_KIND: Mapping[str, Rule] = {
    "$.apiVersion": Said(State.TRANSLATED, f"apiVersion: {OWN_API_VERSION}"),
    "$.kind": Said(State.TRANSLATED, f"kind: {OWN_KIND}"),
}
_KEYS: Mapping[str, Rule] = {
    **_KIND,
    "$.sharing.mpsConfig": Said(State.TRANSLATED, "mps"),
}
_VFIO: Mapping[str, Rule] = {
    **_KIND,
    "$.kind": Said(State.TRANSLATED, f"driver: {VFIO_DRIVER}"),
    "$.iommu": NOT_SET,
    "$.iommu.backendPolicy": usual(
        frozenset({"", "LegacyOnly"}),
        Said(State.LOST, why="a guest gets the node of its group, /dev/vfio/GROUP, and no iommufd"),
        "the group's node",
    ),
    "$.iommu.enableAPIDevice": switch(
        Said(State.BUILT_IN, why="/dev/vfio/vfio is given always"),
        Said(State.BUILT_IN, why="/dev/vfio/vfio is given always; it gives no access to a device by itself"),
    ),
}
