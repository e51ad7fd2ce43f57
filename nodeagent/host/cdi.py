"""Files of a prepared claim for the container runtime: one CDI file per claim, always replaced and never edited.

Source: the Container Device Interface specification, 0.3.0 to 1.1.0. A file states the lowest version that has the
features it uses, its bytes are a function of its content, and files of other drivers in the same folder are left alone.
No file here is synced to disk: all of them are written again from the ledger when the agent starts, if they differ.
Names follow CDI's rule for transient specs, VENDOR-CLASS_ID.json, where ID is the claim's UID.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.core.model.device import ContainerEdits, DeviceNode, Mount
from nodeagent.errors import HostError, InputError
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import SysFs

CLASS = "claim"
UID = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"
"""A claim's UID, in the form allowed in file names and device names."""
MOUNT_OPTIONS = ("nosuid", "nodev")
_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")
_TYPES = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV)


class CdiDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a spec. The runtime applies the edits to every container that requests the device.

    Annotations and CDI names among the edits are not written to the spec; they go into the answer to kubelet.
    """

    name: str
    edits: ContainerEdits


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of the host's device node (inode(7))."""

    type: str
    """c, b or p (a pipe)."""
    major: int
    minor: int
    mode: int
    """Permission bits."""
    uid: int
    gid: int


def node_facts(sysfs: SysFs, devices: Sequence[CdiDevice]) -> dict[str, NodeFacts]:
    """Return the facts of all device nodes by host path. Raise HostError if one is missing. Blocks.

    A captured tree has no device nodes, so below any root other than / missing nodes are left out.
    """
    paths = sorted({node.host_path for device in devices for node in device.edits.device_nodes})
    found = {path: _facts(sysfs, path) for path in paths}
    return {path: facts for path, facts in found.items() if facts is not None}


def spec(kind: str, devices: Sequence[CdiDevice], nodes: Mapping[str, NodeFacts]) -> bytes:
    """Return the content of a CDI file. Raise InputError for what CDI forbids: every
    runtime would skip the whole file."""
    if not _KIND.fullmatch(kind):
        raise InputError(
            f'cannot write CDI kind "{kind}": expected VENDOR/CLASS, each of letters, digits, ".", "_", "-"'
        )
    _check(devices)
    content = [{"name": one.name, "containerEdits": _edits(one.edits, nodes)} for one in devices]
    document = {"cdiVersion": _version(kind, devices), "kind": kind, "devices": content}
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


class CdiFolder:
    """The CDI files of one driver's claims, in a folder (/var/run/cdi) shared by all drivers."""

    def __init__(self, folder: Path, driver: str, sysfs: SysFs) -> None:
        self.kind = f"{driver}/{CLASS}"
        if not _KIND.fullmatch(self.kind):
            raise InputError(f'cannot use "{driver}" as CDI vendor: expected a letter, then letters, digits, ".", "-"')
        self._folder = folder
        self._sysfs = sysfs
        self._stem = f"{driver}-{CLASS}_"
        self._name = f"{re.escape(self._stem)}({UID})\\.json"

    def device_id(self, uid: str, name: str) -> str:
        """Return the name that kubelet passes to the runtime, VENDOR/CLASS=NAME."""
        return f"{self.kind}={self.device_name(uid, name)}"

    def device_name(self, uid: str, name: str) -> str:
        """Return CdiDevice.name for a claim's device: unique on the node, as CDI requires."""
        return _checked_device(f"{_checked_uid(uid)}-{name}")

    def write(self, uid: str, devices: Sequence[CdiDevice]) -> None:
        """Write a claim's whole file unless it is unchanged. Raise HostError with path and cause."""
        path = self._path(uid)
        files.replace(path, spec(self.kind, devices, node_facts(self._sysfs, devices)), durable=False)

    def version(self, uid: str) -> object:
        """Return what differs after each change of a claim's file; None without one."""
        return files.version(self._path(uid))

    def remove(self, uid: str) -> bool:
        """Remove a claim's file. Return whether it existed."""
        return files.remove(self._path(uid), durable=False)

    def claim_of(self, device_id: str) -> str:
        """Return the UID of the claim that a `device_id` refers to, or an empty string if it is not one of ours."""
        kind, _, name = device_id.partition("=")
        return name.rpartition("-")[0] if kind == self.kind else ""

    def uids(self) -> frozenset[str]:
        """Return the UIDs of the claims that have a file of ours."""
        found = (re.fullmatch(self._name, entry.name) for entry in files.entries(self._folder))
        return frozenset(one[1] for one in found if one is not None)

    def sweep(self, keep: Container[str]) -> list[str]:
        """Remove our files of all other claims and drafts left by a killed agent. Return their names."""
        return [path.name for path in self.orphans(keep) if files.remove(path)]

    def orphans(self, keep: Container[str]) -> list[Path]:
        """Return our files of all other claims, and drafts left by a killed agent."""
        others = [self._path(uid) for uid in sorted(self.uids()) if uid not in keep]
        return [*others, *files.drafts(self._folder, self._name)]

    def _path(self, uid: str) -> Path:
        return self._folder / f"{self._stem}{_checked_uid(uid)}.json"


class ClaimFiles:
    """Files that a claim's containers may read: FOLDER/UID/metadata.json, one mountable folder per claim, and in it
    request-REQUEST.json, one mountable file per request."""

    NAME = "metadata.json"
    REQUEST = r"request-[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.json"
    """The name of a request's file: requests are named by DNS labels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, uid: str) -> Path:
        """Return the path of a claim's file, existing or not. A mount of its folder shows
        every later version of the file."""
        return self._folder / _checked_uid(uid) / self.NAME

    def write(self, uid: str, content: Mapping[str, Any]) -> None:
        """Write a claim's whole file, world-readable, with its keys in order."""
        data = msgspec.json.encode(content, order="deterministic", enc_hook=_plain)
        files.replace(self.path(uid), msgspec.json.format(data, indent=2) + b"\n", durable=False)

    def request_path(self, uid: str, request: str) -> Path:
        """Return the path of a request's file, existing or not. Raise InputError for what no request is called."""
        name = f"request-{request}.json"
        if not re.fullmatch(self.REQUEST, name):
            raise InputError(f"cannot name a file after request {request[:140]!r}: expected a DNS label")
        return self.path(uid).with_name(name)

    def write_requests(self, uid: str, streams: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write the file of each request, a stream of JSON objects, and remove those of other requests."""
        paths = {self.request_path(uid, request): objects for request, objects in streams.items()}
        for path, objects in paths.items():
            stream = b"".join(msgspec.json.encode(one, order="deterministic") + b"\n" for one in objects)
            files.replace(path, stream, durable=False)
        for path in files.entries(self.path(uid).parent):
            if re.fullmatch(self.REQUEST, path.name) and path not in paths:
                files.remove(path, durable=False)

    def version(self, uid: str) -> object:
        """Return what differs after each change of a claim's files."""
        return tuple(map(files.version, files.entries(self.path(uid).parent)))

    def read(self, uid: str) -> Any:
        """Return the content of a claim's file. Raise HostError if it cannot be read or is not JSON."""
        path = self.path(uid)
        try:
            return msgspec.json.decode(path.read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise HostError(f"cannot read {path}: {error}") from None

    def remove(self, uid: str) -> bool:
        """Remove a claim's file and folder. Return whether there were any."""
        return files.remove_folder(self.path(uid).parent)

    def uids(self) -> frozenset[str]:
        """Return the UIDs of the claims that have a folder, with or without a file in it."""
        return frozenset(
            one.name for one in files.entries(self._folder) if re.fullmatch(UID, one.name) and one.is_dir()
        )

    def sweep(self, keep: Container[str]) -> list[str]:
        """Remove the files of all other claims and half-written files. Return their names."""
        gone = [uid for uid in sorted(self.uids()) if uid not in keep and self.remove(uid)]
        names = f"{re.escape(self.NAME)}|{self.REQUEST}"
        left = [one for uid in sorted(self.uids()) for one in files.drafts(self._folder / uid, names)]
        return gone + [f"{path.parent.name}/{path.name}" for path in left if files.remove(path)]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise InputError(f"cannot write {value!r} as JSON")


# ---------------------------------------------------------------- names


def _checked_uid(uid: str) -> str:
    if not re.fullmatch(UID, uid):
        raise InputError(f"cannot name files after claim {uid[:140]!r}: expected a UID of letters, digits and dashes")
    return uid


def _checked_device(name: str) -> str:
    if not _DEVICE.fullmatch(name):
        raise InputError(f'cannot use {name[:140]!r} as CDI device: expected letters, digits, ".", "_", "-" and ":"')
    return name


def _check(devices: Sequence[CdiDevice]) -> None:
    if not devices:
        raise InputError("cannot write a CDI file without devices")
    seen: set[str] = set()
    for device in devices:
        if _checked_device(device.name) in seen:
            raise InputError(f'cannot write CDI device "{device.name}": it stands twice')
        seen.add(device.name)
        _check_edits(device.name, device.edits)


def _check_edits(name: str, edits: ContainerEdits) -> None:
    if not (edits.env or edits.device_nodes or edits.mounts):
        raise InputError(f'cannot write CDI device "{name}": it gives a container nothing')
    for key, value in edits.env.items():
        if not key or "=" in key or "\0" in key + value:
            raise InputError(f'cannot write CDI device "{name}": {key!r}={value!r} is no environment variable')


# ---------------------------------------------------------------- the document


def _version(kind: str, devices: Sequence[CdiDevice]) -> str:
    """Return the lowest version that has all features in use."""
    edits = [device.edits for device in devices]
    if "." in kind.partition("/")[2]:
        return "0.6.0"
    if any(device.name[0].isdigit() for device in devices):
        return "0.5.0"
    if any(node.host_path != node.container_path for one in edits for node in one.device_nodes):
        return "0.5.0"
    return "0.4.0" if any(mount.type for one in edits for mount in one.mounts) else "0.3.0"


def _edits(edits: ContainerEdits, nodes: Mapping[str, NodeFacts]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "env": [f"{key}={value}" for key, value in sorted(edits.env.items())],
        "deviceNodes": [_node(node, nodes.get(node.host_path)) for node in edits.device_nodes],
        "mounts": [_mount(mount) for mount in edits.mounts],
        "hooks": [{"hookName": "createContainer", "path": hook.path, "args": list(hook.args)} for hook in edits.hooks],
    }
    return {key: value for key, value in found.items() if value}


def _node(node: DeviceNode, facts: NodeFacts | None) -> dict[str, Any]:
    """Return a device node. If its owner or group is root, leave it to the runtime, which
    uses those of the container."""
    found: dict[str, Any] = {"path": node.container_path}
    if node.host_path != node.container_path:
        found["hostPath"] = node.host_path
    if facts is not None:
        numbers = {} if facts.type == "p" else {"major": facts.major, "minor": facts.minor}
        found |= {"type": facts.type, **numbers, "fileMode": facts.mode}
    found["permissions"] = node.permissions
    if facts is not None:
        found |= {key: value for key, value in (("uid", facts.uid), ("gid", facts.gid)) if value}
    return found


def _mount(mount: Mount) -> dict[str, Any]:
    """Return a mount. One without a type exposes part of the host, which OCI calls a bind."""
    access = "ro" if mount.read_only else "rw"
    options = (access, *MOUNT_OPTIONS, *(() if mount.type else ("bind",)), *mount.options)
    found = {
        "hostPath": mount.host_path,
        "containerPath": mount.container_path,
        "options": list(dict.fromkeys(options)),
    }
    return {**found, "type": mount.type} if mount.type else found


def _facts(sysfs: SysFs, path: str) -> NodeFacts | None:
    """Return the facts of a device node, or None if it is missing below a captured root."""
    captured = sysfs.root != "/"
    try:
        found = os.stat(sysfs.path(path.lstrip("/")))  # noqa: PTH116 - SysFs speaks in strings
    except OSError as error:
        if captured and error.errno in _MISSING:
            return None
        raise HostError(f"cannot give {path} to a container: {error.strerror}") from None
    if stat.S_IFMT(found.st_mode) not in _TYPES:
        if captured:
            return None
        raise HostError(f"cannot give {path} to a container: it is not a device node")
    return NodeFacts(
        type=_TYPES[stat.S_IFMT(found.st_mode)],
        major=os.major(found.st_rdev),
        minor=os.minor(found.st_rdev),
        mode=stat.S_IMODE(found.st_mode) & 0o777,
        uid=found.st_uid,
        gid=found.st_gid,
    )
