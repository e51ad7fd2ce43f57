"""How kubelet and the container runtimes name cgroups: from a path to pod and container, and back.

Nothing is read here. Paths are relative to the root of the cgroup hierarchy and have no leading slash. Both of
kubelet's cgroup drivers, with and without its cgroupRoot:

    systemd   a.slice/a-kubepods.slice/a-kubepods-burstable.slice/a-kubepods-burstable-podUID.slice/PREFIX-ID.scope
    cgroupfs  a/kubepods/burstable/podUID/ID

The systemd driver replaces each "-" in a UID with "_". Guaranteed pods are directly below kubepods.
Sources: k8s.io/kubernetes pkg/kubelet/cm/cgroup_manager_linux.go, systemd.slice(5), the runtimes' OCI cgroupsPath.
"""

from __future__ import annotations

import re

import msgspec

from nodeagent.errors import InputError

SYSTEMD, CGROUPFS = "systemd", "cgroupfs"
DRIVERS = (SYSTEMD, CGROUPFS)
GUARANTEED, BURSTABLE, BEST_EFFORT = "guaranteed", "burstable", "besteffort"
TOP, QOS, POD, CONTAINER, MONITOR = "top", "qos", "pod", "container", "monitor"
"""Cgroup.kind: kubepods itself, the folder of a QoS class, a pod, a container (or a pod's sandbox), and the process
that watches over a container, where CRI-O is configured to put it next to that (conmon, `monitor_cgroup = "pod"`)."""
LEAVES = (CONTAINER, MONITOR)
"""Kinds of cgroups below which nothing is looked for. What is there is the container's, apart from a copy that crun
makes (INNER in read.py)."""
CONFINED = (POD, *LEAVES)
"""Kinds of cgroups that an agent confines while it runs, and that are widened once it has been removed."""

_TOP = "kubepods"
_CLASSES = (BURSTABLE, BEST_EFFORT)
_POD = re.compile(r"pod([A-Za-z0-9][A-Za-z0-9_-]*)")
_KUBELETS_UID = re.compile(r"[A-Za-z0-9]+(?:-[A-Za-z0-9]+){4}|[0-9a-f]{32}")
"""The UIDs of the API server, and those that kubelet makes up for static pods: an MD5 sum in hexadecimal (applyDefaults
in pkg/kubelet/config/common.go)."""
_NEXT_TO_US = re.compile(r"/\.\./(?:(?:cri-containerd|crio)-)?[0-9a-f]{64}(?:\.scope)?(?:/|$)")
"""A container that shares its parent with the agent's, within the agent's cgroup namespace: one of its own pod."""
_SCOPE = re.compile(r"(?:(?P<prefix>.+)-)?(?P<id>[A-Za-z0-9_]+)\.scope")
_BARE = re.compile(r"(?:(?P<prefix>.+)-)?(?P<id>[A-Za-z0-9_]+)")
_MONITOR = "conmon"


class Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    """What a path at or below kubepods refers to."""

    path: str
    kind: str
    driver: str
    qos: str = ""
    """QoS class of a pod, a container or a QoS folder."""
    pod_uid: str = ""
    container_id: str = ""
    """The id as the runtime knows it, without "containerd://"; of a monitor, the id of its container."""
    prefix: str = ""
    """The runtime's prefix before the id: "cri-containerd", "crio"."""


class CgroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The names that one kubelet uses. cgroup_root is its cgroupRoot ("/" or "", "/a/b")."""

    driver: str
    cgroup_root: str = "/"

    def __post_init__(self) -> None:
        if self.driver not in DRIVERS:
            raise InputError(f"cannot name cgroups: {self.driver!r} is not one of {', '.join(DRIVERS)}")
        _parts(self.cgroup_root)

    @property
    def top(self) -> str:
        """Return the path of kubepods."""
        return self._path(_TOP)

    def qos(self, qos: str) -> str:
        """Return the folder that holds the pods of a QoS class; for guaranteed, that is kubepods itself."""
        return self.top if qos == GUARANTEED else self._path(_TOP, _class(qos))

    def pod(self, uid: str, qos: str) -> str:
        """Return the path of a pod's cgroup. Raise InputError if `uid` is not a valid UID."""
        if not _POD.fullmatch(f"pod{uid}") or "_" in uid:
            raise InputError(f"cannot name the cgroup of a pod: {uid!r} is not a UID")
        between = () if qos == GUARANTEED else (_class(qos),)
        return self._path(_TOP, *between, f"pod{uid}")

    def container(self, uid: str, qos: str, container_id: str, prefix: str = "") -> str:
        """Return the path of a container's cgroup. prefix: the runtime's prefix of the id, such as "cri-containerd"."""
        name = f"{prefix}-{container_id}" if prefix else container_id
        return f"{self.pod(uid, qos)}/{name}.scope" if self.driver == SYSTEMD else f"{self.pod(uid, qos)}/{name}"

    def parse(self, path: str) -> Cgroup | None:
        """Return what a path refers to, or None if it is not one of kubelet's cgroups or is below a container."""
        top = self.top
        if path == top:
            return Cgroup(path=path, kind=TOP, driver=self.driver)
        if not path.startswith(f"{top}/"):
            return None
        return self._below(path, path[len(top) + 1 :].split("/"))

    def _below(self, path: str, parts: list[str]) -> Cgroup | None:
        first = self._own(parts[0], ())
        qos = first if first in _CLASSES else GUARANTEED
        if qos != GUARANTEED:
            del parts[0]
        if not parts:
            return Cgroup(path=path, kind=QOS, driver=self.driver, qos=qos)
        pod = _POD.fullmatch(self._own(parts[0], () if qos == GUARANTEED else (qos,)) or "")
        if pod is None or len(parts) > 2:
            return None
        uid = pod[1].replace("_", "-") if self.driver == SYSTEMD else pod[1]
        if len(parts) == 1:
            return Cgroup(path=path, kind=POD, driver=self.driver, qos=qos, pod_uid=uid)
        return self._container(path, parts[1], qos, uid)

    def _container(self, path: str, name: str, qos: str, uid: str) -> Cgroup | None:
        found = (_SCOPE if self.driver == SYSTEMD else _BARE).fullmatch(name)
        if found is None:
            return None
        prefix = found["prefix"] or ""
        return Cgroup(
            path=path,
            kind=MONITOR if prefix.endswith(_MONITOR) else CONTAINER,
            driver=self.driver,
            qos=qos,
            pod_uid=uid,
            container_id=found["id"],
            prefix=prefix,
        )

    def _own(self, name: str, between: tuple[str, ...]) -> str | None:
        """Return what a folder's name adds to that of its parent, or None if it does not extend it."""
        if self.driver == CGROUPFS:
            return name
        head = "-".join((*_escaped(_parts(self.cgroup_root)), _TOP, *between, ""))
        return name[len(head) : -len(".slice")] if name.startswith(head) and name.endswith(".slice") else None

    def _path(self, *names: str) -> str:
        parts = (*_parts(self.cgroup_root), *names)
        return "/".join(parts) if self.driver == CGROUPFS else expand_slice("-".join(_escaped(parts)) + ".slice")


def layouts(cgroup_root: str = "/") -> tuple[CgroupLayout, ...]:
    """Return the layouts of both drivers. Which one a node uses is found by looking at its cgroups."""
    return tuple(CgroupLayout(driver=driver, cgroup_root=cgroup_root) for driver in DRIVERS)


def runtime_path(cgroups_path: str) -> str:
    """Return the path that a runtime's cgroupsPath stands for: SLICE:PREFIX:ID (systemd) or a path (cgroupfs).

    Raise InputError if it is neither.
    """
    if ":" not in cgroups_path:
        parts = _parts(cgroups_path)
        if not parts:
            raise InputError(f"cannot read cgroup path {cgroups_path[:200]!r}: it names no cgroup")
        return "/".join(parts)
    fields = cgroups_path.split(":")
    if len(fields) != 3 or not fields[2] or any("/" in one or one in (".", "..") for one in fields):
        raise InputError(f"cannot read cgroup path {cgroups_path[:200]!r}: expected SLICE:PREFIX:ID or a path")
    above, prefix, name = fields
    unit = name if name.endswith(".slice") else f"{prefix or 'runc'}-{name}.scope"
    return "/".join(part for part in (expand_slice(above or "system.slice"), unit) if part)


def expand_slice(name: str) -> str:
    """Return the path of a systemd slice: "a-b.slice" is in "a.slice"; "-.slice" is the root, "". Raise InputError if
    the name is malformed."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return ""
    parts = stem.split("-")
    if stem == name or not all(parts) or "/" in name:
        raise InputError(f"cannot read slice {name[:200]!r}: expected NAME.slice with names between its dashes")
    return "/".join("-".join(parts[: end + 1]) + ".slice" for end in range(len(parts)))


def is_pods(path: str) -> bool:
    """Return whether a process in this cgroup (as shown in /proc/PID/cgroup) belongs to a pod, for any cgroupRoot.

    Within a cgroup namespace a path may begin with "/..", and the pod's folder, or a container next to the agent's own,
    may be the only visible part.
    """
    parts = path.split("/")
    return any(map(_is_ours, parts)) or any(map(_is_in_class, parts, parts[1:])) or _NEXT_TO_US.match(path) is not None


def _is_ours(part: str) -> bool:
    if part.endswith(".slice"):
        return _TOP in part.removesuffix(".slice").split("-")
    pod = _POD.fullmatch(part)
    return part == _TOP or (pod is not None and _KUBELETS_UID.fullmatch(pod[1]) is not None)


def _is_in_class(above: str, part: str) -> bool:
    """Return whether a folder is a pod's because it lies in that of a QoS class. A manifest may give a static pod any
    UID."""
    return above in _CLASSES and _POD.fullmatch(part) is not None


def _class(qos: str) -> str:
    if qos not in _CLASSES:
        raise InputError(f"cannot name cgroups: {qos!r} is not one of {GUARANTEED}, {', '.join(_CLASSES)}")
    return qos


def _escaped(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.replace("-", "_") for part in parts)


def _parts(path: str) -> tuple[str, ...]:
    parts = tuple(part for part in path.split("/") if part)
    if any(part in (".", "..") or "\0" in part for part in parts):
        raise InputError(f"cannot read cgroup path {path[:200]!r}: it does not stay below the root")
    return parts
