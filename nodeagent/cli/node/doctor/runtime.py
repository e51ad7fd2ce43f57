"""The container runtime: whether NRI is on, which folders of CDI files it reads, and what cgroups offer.

Sources: containerd's docs/cri/config.md and docs/NRI.md (1.7 and 2), crio.conf(5).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from nodeagent.cli.node.doctor.model import NOT_IN_A_CAPTURE, Check, Finding, failure, ok, skipped, unknown, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.errors import InputError
from nodeagent.host.cgroup.oci_bundle import FOLDERS
from nodeagent.host.cgroup.read import NONE, V2, hierarchy

CONTAINERD, CRIO = "containerd", "crio"
FILES = {CONTAINERD: "etc/containerd/config.toml", CRIO: "etc/crio/crio.conf"}
CRIO_DROP_INS = "etc/crio/crio.conf.d"
NRI = "io.containerd.nri.v1.nri"
CRI = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri")
"""The plugin with CDI's settings in containerd 2, and in 1.7."""
CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")
"""What both runtimes read by default."""
MOST_IMPORTS = 32
CONTROLLERS = ("cpuset", "cpu", "memory")


class Runtime(NamedTuple):
    """The runtime's configuration."""

    name: str
    """ "" if there is none."""
    file: str
    """The path of its configuration, or "" if it has none: its defaults apply."""
    settings: Mapping[str, Any]


def runtime_of(node: Node) -> Runtime:
    """Return the runtime that runs here, or that is configured here. Raise InputError if its file cannot be read."""
    running = {one.words[0].rpartition("/")[2]: one.words for one in node.running(CONTAINERD, CRIO)}
    name = next((one for one in FILES if one in running), "")
    name = name or next((one for one, file in FILES.items() if node.files.exists(file)), "")
    if not name:
        return Runtime("", "", {})
    file = _flag(running.get(name, ()), "--config", "-c").lstrip("/") or FILES[name]
    settings: dict[str, Any] = {}
    for one in _files(node, name, file):
        settings = _merged(settings, one)
    return Runtime(name, f"/{file}" if node.files.exists(file) else "", settings)


def _flag(words: tuple[str, ...], *names: str) -> str:
    for word, after in pairwise((*words, "")):
        name, _, value = word.partition("=")
        if name in names:
            return value or after
    return ""


def _files(node: Node, name: str, file: str) -> Iterator[Mapping[str, Any]]:
    found = _toml(node, file)
    yield found
    if name == CRIO:
        yield from (_toml(node, f"{CRIO_DROP_INS}/{one}") for one in node.names(CRIO_DROP_INS))
        return
    imports = found.get("imports")
    for one in imports[:MOST_IMPORTS] if isinstance(imports, list) else ():
        folder, _, pattern = str(one).lstrip("/").rpartition("/")
        for entry in node.names(folder) if "*" in pattern else [pattern]:
            if entry.endswith(pattern.rpartition("*")[2]):
                yield _toml(node, f"{folder}/{entry}")


def _toml(node: Node, path: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(node.text(path) or "")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{node.files.path(path)} cannot be read: {error}") from None


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in base if isinstance(base[key], dict) and isinstance(more.get(key), dict)}
    return {**base, **more, **{key: _merged(base[key], more[key]) for key in both}}


def _table(settings: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return a table, empty where there is none."""
    for step in path:
        found = settings.get(step)
        settings = found if isinstance(found, dict) else {}
    return settings


def _nri(node: Node) -> Finding:
    mode, path = node.config.pinning.mode, node.config.pinning.nri_socket
    if mode in ("cgroup", "off"):
        return skipped(f"pinning.mode is {mode}")
    runtime = runtime_of(node)
    configured = nri_setting(runtime)
    if node.below(path).exists():
        return ok(f"{path} is there" + (f" ({runtime.name})" if runtime.name else ""))
    if not runtime.name and not node.live:
        return skipped("no runtime in this capture")
    place = runtime.file or f"the defaults of {runtime.name or 'the runtime'}"
    if configured and not node.live:
        return ok(f"NRI is on by {place}")
    if node.in_pod and configured is None:
        return unknown(f"{path} is not mounted in this pod, or NRI is off")
    seen = f"{path} is missing" + ("" if configured is None else f"; NRI is {'on' if configured else 'off'} by {place}")
    fix = "switch NRI on and restart the runtime; running containers stay"
    commands = (_switch_on(runtime.name), f"systemctl restart {runtime.name or CONTAINERD}")
    return failure(seen, fix, *commands) if mode == "nri" else warning(seen, fix, *commands)


def nri_setting(runtime: Runtime) -> bool | None:
    """Return whether a runtime's configuration has NRI on, or None if it leaves that to the version's default."""
    if runtime.name == CRIO:
        found = _table(runtime.settings, "crio", "nri").get("enable_nri")
        return found if isinstance(found, bool) else None
    off = _table(runtime.settings, "plugins", NRI).get("disable")
    return not off if isinstance(off, bool) else None


def _switch_on(name: str) -> str:
    if name == CRIO:
        return "printf '[crio.nri]\\nenable_nri = true\\n' > /etc/crio/crio.conf.d/10-nri.conf"
    return f"printf '[plugins.\"{NRI}\"]\\n  disable = false\\n' >> /etc/containerd/config.toml"


def _cdi(node: Node) -> Finding:
    mine = node.config.dra.cdi_dir
    if not node.config.served_by_dra and not any(one.cdi for one in node.config.served):
        return skipped("no resource uses CDI")
    runtime = runtime_of(node)
    if not runtime.name or (node.in_pod and not runtime.file):
        return unknown("the runtime's configuration is not seen from here")
    enabled, folders = cdi_settings(runtime)
    place = runtime.file or f"{runtime.name}'s defaults"
    if enabled is False:
        return failure(f"CDI is off by {place}", f"set enable_cdi = true and restart {runtime.name}")
    if not {_plain(mine)} <= {_plain(one) for one in folders}:
        return failure(
            f"{runtime.name} reads CDI files in {', '.join(folders) or 'none'} ({place}), the agent writes to {mine}",
            f"add {mine} to cdi_spec_dirs, or set dra.cdiDir, and restart both",
        )
    if enabled is None and runtime.name == CONTAINERD:
        return ok(f"{mine} is read if CDI is on; it is by default from containerd 2 on")
    return ok(f"{mine} is read by {runtime.name} ({place})")


def cdi_settings(runtime: Runtime) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether a runtime has CDI on, None if that is left to its default, and which folders it reads."""
    if runtime.name == CRIO:
        enabled, said = True, _table(runtime.settings, "crio", "runtime").get("cdi_spec_dirs")
        return enabled, _texts(said) or CDI_FOLDERS
    tables = [_table(runtime.settings, "plugins", one) for one in CRI]
    flags = [one["enable_cdi"] for one in tables if isinstance(one.get("enable_cdi"), bool)]
    lists = [one["cdi_spec_dirs"] for one in tables if isinstance(one.get("cdi_spec_dirs"), list)]
    return (flags[0] if flags else None), _texts(lists[0]) if lists else CDI_FOLDERS


def _texts(found: Any) -> tuple[str, ...]:
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _plain(path: str) -> str:
    """Return a path in the form in which two are compared: /var/run is a link to /run."""
    path = path.rstrip("/")
    return path.removeprefix("/var") if path.startswith("/var/run/") else path


def _bundles(node: Node) -> Finding:
    if node.config.pinning.mode == "off":
        return skipped("pinning.mode is off")
    if seen := [f"/{one}" for one in FOLDERS if node.files.exists(one)]:
        return ok(f"bundles are read from {', '.join(seen)}")
    if not node.in_pod:
        return skipped("no runtime keeps bundles here")
    return warning(
        "no folder of bundles is mounted: a container that starts while NRI is away is pinned only when it is back",
        "set the chart's value runtimeBundles to the folder of the nodes' runtime",
    )


# ---------------------------------------------------------------- control groups


def _hierarchy(node: Node) -> Finding:
    found = hierarchy(node.files)
    if found.mode == NONE and not node.live:
        return NOT_IN_A_CAPTURE
    if node.config.pinning.mode == "off":
        return skipped("pinning.mode is off")
    if found.unsupported:
        return failure(
            f"{found.unsupported}: nothing is confined",
            "boot with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1 on the kernel's command line)",
        )
    return ok("cgroup v2" + (", a part of it" if found.namespaced else ""))


def _controllers(node: Node) -> Finding:
    found = hierarchy(node.files)
    if found.mode != V2:
        return skipped(f"the hierarchy is {found.mode}")
    wanted = {*CONTROLLERS, *(("hugetlb",) if node.serves("hugepages") else ())}
    tops = [one for one in ("kubepods.slice", "kubepods") if node.files.exists(f"sys/fs/cgroup/{one}")]
    for folder in ("", *tops):
        path = f"sys/fs/cgroup/{folder}{'/' if folder else ''}cgroup.controllers"
        if missing := wanted - {*(node.text(path) or "").split()}:
            return failure(
                f"{node.files.path(path)} lacks {', '.join(sorted(missing))}",
                "let kubelet enable them, or remove cgroup_disable= from the kernel's command line",
                f"echo '{' '.join(f'+{one}' for one in sorted(missing))}' > /sys/fs/cgroup/cgroup.subtree_control",
            )
    return ok(f"{', '.join(sorted(wanted))} are there")


def _outside(node: Node) -> Finding:
    outside = node.inventory.cpus_outside
    if node.inventory.pods_cgroup is None:
        return skipped("there is no cgroup of pods")
    if outside:
        return failure(
            f"CPUs {outside} are outside the cpuset of all pods",
            "widen the cpuset of kubepods: its parent, AllowedCPUs= of a slice, or kubelet's reservedSystemCPUs set it",
            "systemctl show kubepods.slice -p AllowedCPUs -p DropInPaths",
        )
    return ok("pods may use every online CPU")


CHECKS = (
    Check("runtime.nri", "install.md#nri", _nri, configuration=True),
    Check("runtime.cdi", "doctor.md#runtime", _cdi, configuration=True),
    Check("runtime.bundles", "install.md#bundles", _bundles, live=True),
    Check("cgroup.hierarchy", "pinning.md#what-it-needs", _hierarchy),
    Check("cgroup.controllers", "pinning.md#what-it-needs", _controllers),
    Check("cgroup.pods", "pinning.md#when-pods-are-confined-from-outside", _outside),
)
