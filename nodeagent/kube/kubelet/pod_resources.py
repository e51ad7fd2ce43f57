"""What kubelet reports that pods hold: the pod-resources API v1, and the file that changes with it. Nothing is
cached."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import msgspec

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.grant import Holding
from nodeagent.errors import InputError, PeerError
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.rpc import client
from nodeagent.kube.rpc.status import RpcError
from nodeagent.kube.rpc.wire import method_of
from nodeagent.pb import podresources_pb2 as pb

CHECKPOINT = "kubelet_internal_checkpoint"
"""The file in kubelet's device-plugins folder that is replaced whenever a pod receives or releases devices."""
LARGEST_ANSWER_BYTES = 16 << 20


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One response from kubelet."""

    holdings: tuple[Holding, ...]
    """What every container holds of every device-plugin resource, ordered by name."""
    pods: frozenset[tuple[str, str]]
    """(namespace, name) of every listed pod, including those that hold nothing."""
    claims: Mapping[str, ClaimRef]
    """The claim behind each CDI device that containers use, by device id. Claim UIDs are not listed."""
    claimed: tuple[Holding, ...] = ()
    """What containers have through claims, of all drivers: `resource` is the driver, `ids` are the device's name and
    the names of its CDI devices."""
    kubelet: Hashable
    """Which kubelet answered: the identities of all its sockets. Every kubelet start re-creates all of them, though
    seconds apart."""


NO_LISTING = Listing(holdings=(), pods=frozenset(), claims=MappingProxyType({}), kubelet=None)
"""Placeholder when kubelet was not asked."""


class PodResources:
    """Client of the pod-resources API. Every call opens its own connection, so a restarted kubelet is found at once."""

    def __init__(self, socket: Path, *others: Path) -> None:
        """Watch the sockets without connecting.

        `others` are further sockets of the same kubelet that distinguish one start from another. Raise ConfigError if
        the socket's path is too long.
        """
        self.path = sockets.checked(socket)
        self._kubelets = tuple(sockets.SocketWatch(one) for one in (self.path, *others))

    def close(self) -> None:
        """Release the open handles that distinguish one kubelet start from the next."""
        for one in self._kubelets:
            one.close()

    async def list(self, timeout_s: float = 5.0) -> tuple[Holding, ...]:
        """Return Listing.holdings. Raise PeerError."""
        return (await self.listing(timeout_s)).holdings

    async def listing(self, timeout_s: float = 5.0) -> Listing:
        """Return what kubelet lists. Raise PeerError, also if kubelet restarted during the call: the response may be
        from the previous one."""
        before = self._kubelet()
        answer = await self._ask("List", pb.ListPodResourcesRequest(), "list pod resources", timeout_s)
        if self._kubelet() != before:
            raise PeerError(f"cannot list pod resources at {self.path}: kubelet restarted meanwhile")
        return Listing(
            holdings=tuple(sorted(_holdings(answer), key=_names)),
            pods=frozenset((pod.namespace, pod.name) for pod in answer.pod_resources),
            claims=MappingProxyType(dict(_claims(answer))),
            claimed=tuple(_claimed(answer)),
            kubelet=before,
        )

    def _kubelet(self) -> Hashable:
        return tuple(one.look() for one in self._kubelets)

    async def claims(self, timeout_s: float = 5.0) -> frozenset[tuple[str, str]]:
        """Return (namespace, name) of every ResourceClaim that a container uses. Raise PeerError."""
        answer = await self._ask("List", pb.ListPodResourcesRequest(), "list pod resources", timeout_s)
        containers = (container for pod in answer.pod_resources for container in pod.containers)
        return frozenset(
            (one.claim_namespace, one.claim_name) for container in containers for one in container.dynamic_resources
        )

    async def allocatable(self, timeout_s: float = 5.0) -> Mapping[str, tuple[str, ...]]:
        """Return the ids that kubelet counts as allocatable, by resource, both sorted. Raise PeerError."""
        request = pb.AllocatableResourcesRequest()
        answer = await self._ask("GetAllocatableResources", request, "read allocatable resources", timeout_s)
        merged = _merged(answer.devices)
        return MappingProxyType({name: merged[name] for name in sorted(merged)})

    async def _ask(self, method: str, request: object, what: str, timeout_s: float) -> Any:
        called = method_of(pb.DESCRIPTOR, "PodResourcesLister", method)
        try:
            return await client.call(self.path, called, request, timeout_s, largest_answer_bytes=LARGEST_ANSWER_BYTES)
        except RpcError as error:
            raise PeerError(f"cannot {what} at {self.path}: {error}") from None


class FileVersion(NamedTuple):
    """Identifies the content of a file that is always replaced whole. An inode number alone may be reused."""

    device: int
    inode: int
    changed_ns: int


def version(path: Path) -> FileVersion | None:
    """Return the version of a file that is always replaced whole, or None if it cannot be seen."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return FileVersion(found.st_dev, found.st_ino, found.st_mtime_ns)
    return None


class CheckpointWatch:
    """Reports when kubelet's checkpoint file is replaced: the moment to ask what pods hold."""

    def __init__(self, folder: Path, *, poll_s: float = 10.0) -> None:
        """Set up the watch. `folder` is kubelet's device-plugins folder; it need not exist yet."""
        self._path = folder / CHECKPOINT
        self._poll_s = poll_s
        self._folder = FolderWatch(folder, poll_s=poll_s)
        self._seen: FileVersion | None = None

    def __enter__(self) -> Self:
        self._folder.__enter__()
        self._seen = version(self._path)
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.__exit__(*error)

    async def wait(self) -> bool:
        """Return True once the file has changed since the last return, however often, or False after poll_s without a
        change."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                while version(self._path) == self._seen:
                    await self._folder.wait()
        before, self._seen = self._seen, version(self._path)
        return self._seen != before


class _Entry(msgspec.Struct):
    pod_uid: str = msgspec.field(name="PodUID")
    container: str = msgspec.field(name="ContainerName")
    resource: str = msgspec.field(name="ResourceName")
    ids: dict[str, list[str]] = msgspec.field(name="DeviceIDs", default_factory=dict)


class _Data(msgspec.Struct):
    entries: list[_Entry] | None = msgspec.field(name="PodDeviceEntries", default=None)
    registered: dict[str, list[str] | None] | None = msgspec.field(name="RegisteredDevices", default=None)


class _Checkpoint(msgspec.Struct):
    data: _Data = msgspec.field(name="Data")


def given(folder: Path) -> Given | None:
    """Return the devices that kubelet's checkpoint assigns to containers, including init containers, or None without a
    checkpoint.

    Kubelet writes it before it starts any container of a pod, and drops ended pods only when it next admits one. Raise
    InputError if it cannot be read.
    """
    found = _checkpoint(folder / CHECKPOINT)
    if found is None:
        return None
    of: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for entry in found.data.entries or []:
        ids = {(entry.resource, one) for some in entry.ids.values() for one in some}
        of.setdefault((entry.pod_uid, entry.container), set()).update(ids)
    return MappingProxyType({container: frozenset(ids) for container, ids in of.items()})


def registered(folder: Path) -> Mapping[str, tuple[str, ...]] | None:
    """Return the ids that device plugins offered when kubelet last wrote its checkpoint, by resource, or None without
    one. Raise InputError if it cannot be read."""
    found = _checkpoint(folder / CHECKPOINT)
    if found is None:
        return None
    return MappingProxyType({name: tuple(ids or ()) for name, ids in (found.data.registered or {}).items()})


def _checkpoint(path: Path) -> _Checkpoint | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Checkpoint)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _claims(answer: pb.ListPodResourcesResponse) -> Iterator[tuple[str, ClaimRef]]:
    containers = (container for pod in answer.pod_resources for container in pod.containers)
    for claim in (one for container in containers for one in container.dynamic_resources):
        for device in (device for resource in claim.claim_resources for device in resource.cdi_devices):
            yield device.name, ClaimRef(namespace=claim.claim_namespace, name=claim.claim_name, uid="")


def _claimed(answer: pb.ListPodResourcesResponse) -> Iterator[Holding]:
    for pod in answer.pod_resources:
        for container in pod.containers:
            for one in (one for claim in container.dynamic_resources for one in claim.claim_resources):
                yield Holding(
                    namespace=pod.namespace,
                    pod=pod.name,
                    container=container.name,
                    resource=one.driver_name,
                    ids=(one.device_name, *(device.name for device in one.cdi_devices)),
                )


def _holdings(answer: pb.ListPodResourcesResponse) -> Iterator[Holding]:
    for pod in answer.pod_resources:
        for container in pod.containers:
            for resource, ids in _merged(container.devices).items():
                yield Holding(
                    namespace=pod.namespace, pod=pod.name, container=container.name, resource=resource, ids=ids
                )


def _merged(entries: Iterable[pb.ContainerDevices]) -> dict[str, tuple[str, ...]]:
    """Return ids by resource: kubelet reports one resource as several entries, one per NUMA node."""
    merged: dict[str, set[str]] = {}
    for entry in entries:
        merged.setdefault(entry.resource_name, set()).update(entry.device_ids)
    return {resource: tuple(sorted(ids)) for resource, ids in merged.items() if ids}


def _names(holding: Holding) -> tuple[str, str, str, str]:
    return holding.namespace, holding.pod, holding.container, holding.resource
