"""Checks that types alone cannot express: reports what is wrong with a configuration, one sentence each.

What of them a JSON schema can express is in json_schema.py too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import msgspec

from nodeagent.config.accelerators import DsaConfig
from nodeagent.config.base import LONGEST_DOMAIN
from nodeagent.config.hugepages import LARGEST_PAGE_BYTES, SMALLEST_PAGE_BYTES, HugepagesConfig
from nodeagent.config.isolation import IoClassConfig, IoConfig, ResctrlConfig, UclampConfig, Utilization
from nodeagent.config.listen import ListenAddress
from nodeagent.config.operation import MetricsConfig
from nodeagent.config.resources import ResourceConfig
from nodeagent.config.schema import Config

LONGEST_SOCKET_BYTES = 107
"""sockaddr_un.sun_path has 108 bytes, with the terminating zero (unix(7))."""
_HASH, _TOKEN = "0" * 12, "0" * 8
LONGEST_BELOW_KUBELET_BYTES = max(
    len(f"/device-plugins/nodeagent-{_HASH}-{_TOKEN}.sock"),
    len(f"/plugins_registry/{_HASH}-{_HASH}-reg.sock"),
    len(f"/plugins/{_HASH}/dra-{_HASH}.sock"),
)
"""How much the agent's sockets add to kubelet's folder, where hashes already stand for names that are too long."""
_NOT_PLAIN = re.compile(r"//|.*([%?#\x00-\x1f\x7f])", re.DOTALL)
LONGEST_BELOW_RUNTIME_BYTES = len("/.status.sock.4194304")
"""The status socket, while it is being made: the suffix is a process id, of which 4194304 is the highest (proc(5))."""
IO_LIMITS = tuple(one.encode_name for one in msgspec.structs.fields(IoClassConfig) if one.name not in ("name", "disks"))
"""The keys of an I/O class that limit something."""
MEANT_FOR = {
    "paths": ("char",),
    "usb": ("usb",),
    "targets": ("nvmeof",),
    "pageSize": ("hugepages",),
    "pagesPerBlock": ("hugepages",),
    "options": ("cpu",),
    "numa": ("cpu",),
    "grouping": ("cpu",),
    "driverCapabilities": ("gpu",),
    "mig": ("gpu",),
    "vhostNet": ("nic",),
    "additionalInfo": ("accel", "fpga", "nic", "pci", "qat"),
}
"""Keys that apply only to some kinds, with these."""
TOPOLOGY_KINDS = ("cpu", "hugepages", "memory")
"""Kinds that are no devices."""
ONLY_DEVICES = ("match", "matchAny", "replicas", "deviceNodes", "cdi", "overhead")
"""Keys that apply only to devices, not to CPUs or pages."""
MOST_QUEUES = 128
"""Of one accelerator."""
_NO_ALTERNATIVES = "the device plugin API has no devices of which only some can exist at the same time"
NEEDED = {
    "char": ("paths", "globs such as /dev/ttyUSB*"),
    "usb": ("usb", "vendor and product"),
    "nvmeof": ("targets", "name, nqn and traddr"),
}
"""Keys without which a kind has nothing to serve, with what is expected."""
POOL_NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""What the name of a kind that is served through DRA looks like."""


def wrong(config: Config) -> Iterator[str]:
    """Yield what is wrong, one sentence each."""
    yield from _wrong_sockets(config)
    yield from _wrong_domain(config.domain, "$.domain")
    names: set[str] = set()
    for i, one in enumerate(config.served):
        where = f"$.resources[{i}]"
        if (full_name := config.full_name(one)) in names:
            yield f"name {full_name!r} at {where}.name stands twice"
        names.add(full_name)
        if "/" in one.name:
            yield from _wrong_domain(one.name.partition("/")[0], f"{where}.name")
        yield from _misplaced(one, where)
        yield from _missing(one, where)
        yield from (f"{path!r} at {where}.paths leads out of /dev" for path in one.paths if ".." in path.split("/"))
    yield from _wrong_targets(config)
    yield from _wrong_dra(config)
    yield from _wrong_pages(config.hugepages)
    yield from _wrong_classes(config.pinning.resctrl)
    if config.pinning.resctrl is not None and config.pinning.mode == "off":
        yield "$.pinning.resctrl has no meaning with mode 'off': no container would be put into its group"
    if config.network.move_interfaces and config.pinning.mode not in ("auto", "nri"):
        yield f"$.network.moveInterfaces needs NRI, which mode {config.pinning.mode!r} at $.pinning.mode does not use"
    yield from _wrong_io(config.pinning.io)
    if config.pinning.io is not None and config.pinning.mode == "off":
        yield "$.pinning.io has no meaning with mode 'off': no control group would be written"
    yield from _wrong_uclamp(config.pinning.uclamp)
    if config.pinning.uclamp is not None and config.pinning.mode == "off":
        yield "$.pinning.uclamp has no meaning with mode 'off': no control group would be written"
    yield from _wrong_metrics(config.metrics)
    for i, rule in enumerate(config.amd.partitions):
        if rule.compute is None and rule.memory is None:
            yield f"nothing at $.amd.partitions[{i}], expected compute, memory or both"
    yield from _wrong_queues(config.accelerators.dsa)


def _wrong_queues(rules: list[DsaConfig]) -> Iterator[str]:
    """Yield more queues than any accelerator has, and queues that the kernel does not make as it says."""
    for i, rule in enumerate(rules):
        where = f"$.accelerators.dsa[{i}].queues"
        if (count := sum(one.count for one in rule.queues)) > MOST_QUEUES:
            yield f"{count} queues at {where}, expected at most {MOST_QUEUES}"
        for j, one in enumerate(rule.queues):
            if one.mode != "dedicated":
                why = (
                    "the kernel may keep a shared queue dedicated in the hardware, which one program at a time can use"
                )
                yield f"{one.mode!r} at {where}[{j}].mode, expected 'dedicated': {why}"


def _wrong_sockets(config: Config) -> Iterator[str]:
    """Yield folders and sockets whose paths do not fit into a socket address (sockaddr_un, unix(7))."""
    for where, text, below in (
        ("$.kubeletDir", config.kubelet_dir, LONGEST_BELOW_KUBELET_BYTES),
        ("$.runtimeDir", config.runtime_dir, LONGEST_BELOW_RUNTIME_BYTES),
        ("$.pinning.nriSocket", config.pinning.nri_socket, 0),
    ):
        path, most = str(PurePosixPath(text)), LONGEST_SOCKET_BYTES - below
        try:
            length = len(path.encode())
        except UnicodeEncodeError:
            yield f"{text!r} at {where}, expected characters that UTF-8 can encode"
            continue
        if length > most:
            yield f"{length} bytes at {where}, expected at most {most}: a socket's whole path has room for 107"


def endpoint_fault(path: str) -> str:
    """Return why kubelet does not take a path as the endpoint of a DRA plugin, or "" if it does.

    It dials `unix:PATH` as a URL: an escape is decoded, and what follows a "?" or "#" is no part of the path.
    Kubernetes 1.38 refuses the registration (validateEndpoint, pkg/kubelet/cm/dra/plugin); older kubelets dial another
    path. The length is that of any socket.
    """
    if not path.startswith("/"):
        return "expected an absolute path"
    found = _NOT_PLAIN.match(path)
    if found is None:
        return ""
    what = repr(found[1]) if found[1] else "two slashes at its start"
    return f"kubelet reads it as a URL: expected a path without {what}"


def _wrong_metrics(metrics: MetricsConfig) -> Iterator[str]:
    """Yield an address that is none, and files of TLS without those that they need."""
    if metrics.listen:
        try:
            ListenAddress.parse(metrics.listen)
        except ValueError as error:
            yield f"{metrics.listen!r} at $.metrics.listen, {error}"
    tls = metrics.tls
    if bool(tls.cert_file) != bool(tls.key_file):
        given, missing = ("certFile", "keyFile") if tls.cert_file else ("keyFile", "certFile")
        yield f"nothing at $.metrics.tls.{missing}, expected a file: $.metrics.tls.{given} names one"
    if tls.client_ca_file and not tls.cert_file:
        yield f"{tls.client_ca_file!r} at $.metrics.tls.clientCaFile has no meaning without certFile and keyFile"


def _wrong_pages(pools: list[HugepagesConfig]) -> Iterator[str]:
    """Yield sizes that no processor has, duplicate pools, and limits below the configured size."""
    seen: dict[tuple[int, int], int] = {}
    for i, one in enumerate(pools):
        where = f"$.hugepages[{i}]"
        page_bytes = _page_bytes(one.page_size)
        if not _is_page_size(page_bytes):
            yield f"{one.page_size!r} at {where}.pageSize, expected a size that pages have, such as 2Mi or 1Gi"
        first = seen.setdefault((one.node, page_bytes), i)
        if first != i:
            yield f"{one.page_size!r} on node {one.node} at {where} stands twice, first at $.hugepages[{first}]"
        if 0 < one.max_pages < one.pages:
            yield f"{one.max_pages} at {where}.maxPages, expected at least the {one.pages} of pages, or 0"


def _wrong_classes(resctrl: ResctrlConfig | None) -> Iterator[str]:
    """Yield cache classes that stand twice, and caches whose parts are named too."""
    names: set[str] = set()
    for i, one in enumerate(resctrl.classes if resctrl is not None else ()):
        where = f"$.pinning.resctrl.classes[{i}]"
        if one.name in names:
            yield f"name {one.name!r} at {where}.name stands twice"
        names.add(one.name)
        for cache in one.caches:
            if len(cache) > 2 and cache[:2] in one.caches:
                yield f"{cache} at {where}.caches has no meaning besides {cache[:2]}, which is both of its parts"


def _wrong_io(io: IoConfig | None) -> Iterator[str]:
    """Yield I/O classes that stand twice, or limit nothing."""
    names: set[str] = set()
    for i, one in enumerate(io.classes if io is not None else ()):
        where = f"$.pinning.io.classes[{i}]"
        if one.name in names:
            yield f"name {one.name!r} at {where}.name stands twice"
        names.add(one.name)
        if msgspec.structs.replace(one, disks=[]) == IoClassConfig(name=one.name):
            yield f"{where} limits nothing, expected one of {', '.join(IO_LIMITS)}"


def _wrong_uclamp(uclamp: UclampConfig | None) -> Iterator[str]:
    """Yield classes of clamps that stand twice, clamp nothing or have no range, and a default that is none of them."""
    if uclamp is None:
        return
    names: set[str] = set()
    for i, one in enumerate(uclamp.classes):
        where = f"$.pinning.uclamp.classes[{i}]"
        if one.name in names:
            yield f"name {one.name!r} at {where}.name stands twice"
        names.add(one.name)
        if one.min is None and one.max is None:
            yield f"{where} clamps nothing, expected min, max or both"
        elif one.min is not None and one.max is not None and _percent(one.min) > _percent(one.max):
            yield f"{one.min} at {where}.min is above its max, {one.max}"
    if uclamp.default and uclamp.default not in names:
        yield f"{uclamp.default!r} at $.pinning.uclamp.default, expected the name of one of its classes"


def _percent(said: Utilization) -> float:
    return 100.0 if said == "max" else float(said)


def _page_bytes(text: str) -> int:
    return int(text[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[text[-2:]]


def _is_page_size(page_bytes: int) -> bool:
    """Return whether any processor has pages of a size: powers of two."""
    return not page_bytes & (page_bytes - 1) and SMALLEST_PAGE_BYTES <= page_bytes <= LARGEST_PAGE_BYTES


def _wrong_dra(config: Config) -> Iterator[str]:
    """Yield what DRA cannot serve: there is one pool per kind, so CPUs have one form, and its
    name is part of a DNS name."""
    kinds = [one.kind for one in config.served_by_dra]
    if kinds and (why := endpoint_fault(str(PurePosixPath(config.kubelet_dir)))):
        yield f"{config.kubelet_dir!r} at $.kubeletDir cannot be used for DRA: {why}"
    for kind in ("cpu", "memory"):
        if kinds.count(kind) > 1:
            yield f"kind {kind} at $.resources is served through DRA {kinds.count(kind)} times, expected once"
    for kind in kinds:
        if not re.fullmatch(POOL_NAME, kind):
            yield f"kind {kind!r} at $.resources cannot name a pool: expected lower-case letters, digits and '-'"


def _wrong_targets(config: Config) -> Iterator[str]:
    """Yield targets that stand twice, under one name or as one subsystem, wherever it is reached: it would be one disk
    under two names. And those whose pool is called as a kind's is by the catalog."""
    first: dict[str, str] = {}
    kinds = {one.kind for one in config.served}
    for i, one in enumerate(config.served):
        for j, target in enumerate(one.targets):
            where = f"$.resources[{i}].targets[{j}]"
            for key, value in (("name", target.name), ("nqn", target.nqn)):
                before = first.setdefault(f"{key} {value!r}", where)
                if before != where:
                    yield f"{key} {value!r} at {where}.{key} stands twice, first at {before}"
            if (kind := f"nvmeof-{target.name}") in kinds:
                yield f"name {target.name!r} at {where}.name is that of a kind, {kind}"
            if target.dhchap_ctrl_secret_file and not target.dhchap_secret_file:
                yield f"{where}.dhchapCtrlSecretFile has no meaning without dhchapSecretFile"


def _wrong_domain(domain: str, where: str) -> Iterator[str]:
    if len(domain) > LONGEST_DOMAIN:
        yield f"a domain of {len(domain)} characters at {where}, expected at most {LONGEST_DOMAIN}"
    # To Kubernetes every name with "kubernetes.io/" in it is its own (v1helper.IsNativeResource).
    if domain.endswith("kubernetes.io") or domain.startswith("requests."):
        yield f"{domain!r} at {where} belongs to Kubernetes itself, expected a domain of your own"


def _misplaced(one: ResourceConfig, where: str) -> Iterator[str]:
    """Yield keys that are set although their kind does not use them."""
    said = msgspec.to_builtins(one)
    silent = msgspec.to_builtins(ResourceConfig(name=one.name, kind=one.kind))
    for key in (key for key in said if said[key] != silent[key]):
        kinds = MEANT_FOR.get(key, (one.kind,))
        if one.kind not in kinds:
            yield f"{where}.{key} has no meaning for kind {one.kind}, only for {', '.join(kinds)}"
        if key in ONLY_DEVICES and one.kind in TOPOLOGY_KINDS:
            yield f"{where}.{key} has no meaning for kind {one.kind}, only for devices"


def _missing(one: ResourceConfig, where: str) -> Iterator[str]:
    if one.overhead and one.serve == "device-plugin":
        yield f"{where}.overhead has no meaning with serve 'device-plugin': only claims have one"
    if one.mig.mode == "dynamic" and one.serve != "dra":
        yield f"{one.serve!r} at {where}.serve, expected 'dra' with mig.mode 'dynamic': {_NO_ALTERNATIVES}"
    if one.mig.mode == "dynamic" and one.replicas > 1:
        yield f"{one.replicas} at {where}.replicas, expected 1 with mig.mode 'dynamic': an instance has one holder"
    if one.mig.gpus and one.mig.mode != "dynamic":
        yield f"{where}.mig.gpus has no meaning with mode 'static': nothing is divided on demand"
    for name, overhead in one.overhead.items():
        if not overhead.per_pod and not overhead.per_container:
            yield f"nothing at {where}.overhead.{name}, expected perPod, perContainer or both"
    if one.kind == "nvmeof" and one.serve != "dra":
        yield f"{one.serve!r} at {where}.serve, expected 'dra': the device plugin API has no devices that nodes share"
    if one.kind == "nvmeof" and one.overhead:
        yield f"{where}.overhead has no meaning for kind nvmeof: its pools belong to no node"
    if one.kind == "nvmeof" and one.replicas > 1:
        yield f"{one.replicas} at {where}.replicas, expected 1: a target has one holder"
    if one.kind == "dsa-queue" and one.serve != "dra":
        yield f"{one.serve!r} at {where}.serve, expected 'dra': a queue is made for a claim"
    if one.kind == "dsa-queue" and one.replicas > 1:
        yield f"{one.replicas} at {where}.replicas, expected 1: a queue is made for one claim"
    if one.kind == "memory" and one.serve != "dra":
        yield f"{one.serve!r} at {where}.serve, expected 'dra': the device plugin API cannot count memory"
    if one.kind == "hugepages" and not re.fullmatch(r"[1-9][0-9]{0,8}(Ki|Mi|Gi)", one.page_size):
        yield f"{one.page_size!r} at {where}.pageSize, expected a size such as 2Mi"
    elif one.kind == "hugepages" and not _is_page_size(_page_bytes(one.page_size)):
        yield f"{one.page_size!r} at {where}.pageSize, expected a size that pages have, such as 2Mi or 1Gi"
    key, expected = NEEDED.get(one.kind, ("", ""))
    if key and not getattr(one, key):
        yield f"nothing at {where}.{key}, expected {expected}"
