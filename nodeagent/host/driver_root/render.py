"""What a container gets of NVIDIA's driver besides device nodes. Pure: what is there was found before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device, DriverFiles, DriverUse, Mount
from nodeagent.errors import HostError
from nodeagent.host.devices.base import nodes
from nodeagent.host.pci import NVIDIA

AUTO, INJECT, OFF = "auto", "inject", "off"
"""Whether containers get the files: if they are found; always, and refused without; never."""
VISIBLE_DEVICES = "NVIDIA_VISIBLE_DEVICES"
NOTHING = "void"
"""For NVIDIA's runtime: there is nothing to add."""


def with_driver(
    edits: ContainerEdits,
    files: DriverFiles | None,
    devices: Sequence[Device],
    same_request: Sequence[Device],
    *,
    uses: Collection[str] = (),
    mode: str = AUTO,
) -> ContainerEdits:
    """Return the edits of some devices with the driver's files, which go with the first GPU of a request.

    uses: what is wanted in addition to computing. Raise HostError if libcuda is missing; with AUTO only if other
    libraries of the driver are there, as otherwise NVIDIA's runtime may be what adds them.
    """
    mine = [one for one in devices if is_driven(one)]
    if mode == OFF or not mine or (mode == AUTO and (files is None or not files.files)):
        return edits
    if files is None or not files.has_cuda:
        raise HostError(_lacking(mine[0], files))
    wanted = {DriverUse.COMPUTE, *uses}
    carries = next(one.id for one in same_request if is_driven(one)) in {one.id for one in mine}
    mounts = (
        Mount(host_path=one.host_path, container_path=path)
        for one in (files.files if carries else ())
        if one.use in wanted
        for path in one.container_paths
    )
    drawing = [node for one in mine for node in _drm_nodes(one)] if DriverUse.GRAPHICS in wanted else []
    return replace(
        edits,
        env=MappingProxyType({**edits.env, VISIBLE_DEVICES: NOTHING}),
        device_nodes=tuple(dict.fromkeys((*edits.device_nodes, *nodes(drawing)))),
        mounts=(*edits.mounts, *mounts),
        hooks=(*edits.hooks, *([files.hook] if carries and files.hook is not None else [])),
    )


def is_driven(device: Device) -> bool:
    """Return whether a device is a GPU, or part of one, that NVIDIA's driver has."""
    return device.kind == "gpu" and device.vendor == NVIDIA and device.driver == "nvidia"


def _drm_nodes(device: Device) -> list[str]:
    names = (str(device.attributes.get(key, "")) for key in ("drm_card", "drm_render"))
    return [f"/dev/dri/{name}" for both in names for name in both.split(",") if name]


def _lacking(device: Device, files: DriverFiles | None) -> str:
    if files is None:
        return f"cannot hand over {device.id}: the version of NVIDIA's driver is unknown"
    folders = ", ".join(files.searched) or "no library folder was found below the driver's roots"
    return f"cannot hand over {device.id}: no libcuda.so.{files.version} of NVIDIA's driver in {folders}"
