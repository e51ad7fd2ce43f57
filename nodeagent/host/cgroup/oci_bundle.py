"""Containers as the OCI runtime sees them, read from the bundle that containerd or CRI-O leaves for each.

The bundle names a container, its pod and its environment before the container's cgroup exists. It is read where no
runtime announces containers, that is, without NRI. Source: OCI runtime-spec config.md, the annotations of containerd's
CRI plugin and of CRI-O.
"""

from __future__ import annotations

import re
from types import MappingProxyType

import msgspec

from nodeagent.core.model.container import RUNNING, Container
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

_CONTAINERD, _CRIO = "k8s.io/{}/config.json", "{}/userdata/config.json"
FOLDERS = {
    "run/containerd/io.containerd.runtime.v2.task": _CONTAINERD,
    "run/k3s/containerd/io.containerd.runtime.v2.task": _CONTAINERD,
    "run/k0s/containerd/io.containerd.runtime.v2.task": _CONTAINERD,
    "var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task": _CONTAINERD,
    "run/containers/storage/overlay-containers": _CRIO,
    "var/lib/containers/storage/overlay-containers": _CRIO,
}
"""Where runtimes keep bundles, below the root, and the path of one in such a folder: the container's id goes into the
braces. The folder is what the chart mounts into the agent's pod (`runtimeBundles`)."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_KEYS = {
    "name": ("io.kubernetes.cri.container-name", "io.kubernetes.container.name"),
    "namespace": ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
    "pod_name": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
    "pod_uid": ("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
    "pod_id": ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"),
}
_SANDBOX = ("io.kubernetes.cri-o.ContainerType", "sandbox")
"""The annotation of a sandbox in CRI-O, which names it like a container, "POD"."""


class _Process(msgspec.Struct):
    env: list[str] | None = None


class _Linux(msgspec.Struct):
    cgroups_path: str = msgspec.field(name="cgroupsPath", default="")


class _Bundle(msgspec.Struct):
    process: _Process | None = None
    annotations: dict[str, str] | None = None
    linux: _Linux | None = None


def read(sysfs: SysFs, container_id: str) -> Container | None:
    """Return the container with an id, or None if it has no bundle here. A sandbox is returned without a name.
    Raise HostError, naming the file, if a bundle cannot be read."""
    if not _ID.fullmatch(container_id):
        return None
    for folder, below in FOLDERS.items():
        path = f"{folder}/{below.format(container_id)}"
        if (text := sysfs.text(path, None)) is not None:
            return _container(container_id, text, sysfs.path(path))
    return None


def _container(container_id: str, text: str, source: str) -> Container:
    try:
        bundle = msgspec.json.decode(text.encode(), type=_Bundle)
    except msgspec.MsgspecError as error:
        raise HostError(f"cannot read {source}: {error}") from None
    said = bundle.annotations or {}
    names = {field: next((said[key] for key in keys if key in said), "") for field, keys in _KEYS.items()}
    if said.get(_SANDBOX[0]) == _SANDBOX[1]:
        names["name"] = ""
    pairs = (one.partition("=") for one in (bundle.process and bundle.process.env) or ())
    return Container(
        id=container_id,
        state=RUNNING,
        env=MappingProxyType({name: value for name, _, value in pairs}),
        cgroup_path=bundle.linux.cgroups_path if bundle.linux else "",
        name=names["name"],
        namespace=names["namespace"],
        pod_name=names["pod_name"],
        pod_uid=names["pod_uid"],
        pod_id=names["pod_id"],
    )
