"""Kubelet: its files, its managers, its sockets, and who else serves devices through it."""

from __future__ import annotations

from nodeagent.cli.node.doctor.model import DENIED, Check, Finding, failure, ok, skipped, unknown, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.errors import InputError
from nodeagent.kube.kubelet.pod_resources import registered
from nodeagent.managers.dra.other_cpus import REGISTRY, registered_cpu_drivers
from nodeagent.managers.kubelet import SOCKET
from nodeagent.managers.kubelet_conflicts import contradictions, managed_elsewhere, undetermined
from nodeagent.resources.offer import CPU, HUGEPAGES, MEMORY

PLUGINS = "device-plugins"
POD_RESOURCES = "pod-resources/kubelet.sock"
DRIVERS = ("systemd", "cgroupfs")
KUBEPODS = {"systemd": "kubepods.slice", "cgroupfs": "kubepods"}

UNCONFIGURED = skipped("no configuration of a kubelet is known")


def _process(node: Node) -> Finding:
    kubelet = node.kubelet
    if kubelet.started is not None:
        return ok(f"{kubelet.started} runs with folder {node.kubelet_dir}")
    if kubelet.unseen:
        return warning(kubelet.unseen, "set kubeletConfig in the agent's configuration")
    if not node.live:
        return skipped("no kubelet in this capture")
    return warning(
        f"no kubelet with folder {node.kubelet_dir} runs", "start kubelet; the agent waits", "systemctl status kubelet"
    )


def _configuration(node: Node) -> Finding:
    kubelet = node.kubelet
    if error := kubelet.cpus_error or kubelet.memory_error:
        if DENIED in error:
            return unknown(error)
        refused = [line.partition(":")[0] for line in undetermined(kubelet, node.config)]
        seen = f"{error}; until it can be read, these are not served: {', '.join(refused)}" if refused else error
        return failure(seen, "correct kubelet's files, or name others in kubeletConfig")
    if not kubelet.config.known:
        return UNCONFIGURED
    return ok(f"read from {', '.join(kubelet.config.sources) or 'its defaults'}")


def _cpu_manager(node: Node) -> Finding:
    state = node.cpu_manager()
    if not node.kubelet.config.known and not state.static:
        return UNCONFIGURED
    if not node.serves(CPU):
        return skipped(f"no CPUs are served; kubelet's policy is {state.policy}")
    why = managed_elsewhere(node.kubelet, node.inventory, node.reserved()).get(CPU, "")
    if why:
        return failure(why, "let one of the two assign CPUs", "nodeagent import kubelet-state")
    return ok(f"cpuManagerPolicy is {state.policy}")


def _memory_manager(node: Node) -> Finding:
    memory = node.kubelet.memory
    if memory is None:
        return unknown(node.kubelet.memory_error)
    if not node.kubelet.config.known and not memory.static:
        return UNCONFIGURED
    if not node.serves(HUGEPAGES, MEMORY):
        return skipped(f"no pages or memory are served; kubelet's policy is {memory.policy}")
    why = managed_elsewhere(node.kubelet, node.inventory, node.reserved()).get(MEMORY, "")
    return failure(why, "set memoryManagerPolicy: None") if why else ok(f"memoryManagerPolicy is {memory.policy}")


def _topology_manager(node: Node) -> Finding:
    values = node.kubelet.config.values
    if not values:
        return UNCONFIGURED
    policy = str(values.get("topologyManagerPolicy"))
    if policy not in ("single-numa-node", "restricted"):
        return ok(f"topologyManagerPolicy is {policy}")
    claims = [one.name for one in node.config.served_by_dra]
    if not claims:
        return ok(f"topologyManagerPolicy is {policy}; the device plugin passes it the nodes of every id")
    return warning(
        f"topologyManagerPolicy is {policy}: kubelet does not count what claims get ({', '.join(claims)}) and may "
        "refuse pods that fit",
        "set topologyManagerPolicy: none and align in the claim",
    )


def _contradictions(node: Node) -> Finding:
    if not node.kubelet.config.known:
        return UNCONFIGURED
    found = [one for one in contradictions(node.kubelet, node.config) if one]
    return warning("; ".join(found), "make the two configurations agree") if found else ok("none")


def _cgroup_driver(node: Node) -> Finding:
    there = [one for one, top in KUBEPODS.items() if node.files.exists(f"sys/fs/cgroup/{top}")]
    said = str(node.kubelet.config.values.get("cgroupDriver", ""))
    if not there:
        return skipped("there are no cgroups of pods")
    if len(there) > 1:
        return warning(
            f"pods have cgroups of both drivers, {' and '.join(KUBEPODS.values())}; kubelet's cgroupDriver is "
            f"{said or 'unknown'}",
            "drain the node and reboot it: what an earlier kubelet left is not removed otherwise",
        )
    return ok(f"pods are in {KUBEPODS[there[0]]}")


def _sockets(node: Node) -> Finding:
    missing = [name for name in (SOCKET, POD_RESOURCES) if not (node.kubelet_dir / name).exists()]
    if not missing:
        return ok(f"{SOCKET} and {POD_RESOURCES} are in {node.kubelet_dir}")
    if node.kubelet.started is None:
        return skipped(f"no kubelet runs; {', '.join(missing)} is missing in {node.kubelet_dir}")
    return failure(
        f"kubelet runs and {node.kubelet_dir / missing[0]} is missing",
        "check kubeletDir, or restart kubelet",
        "systemctl restart kubelet",
    )


def _plugins(node: Node) -> Finding:
    ours = {node.config.full_name(one) for one in node.config.served}
    known = registered(node.kubelet_dir / PLUGINS)
    if known is None:
        return skipped(f"kubelet has written no checkpoint in {node.kubelet_dir / PLUGINS}")
    others = [one for one in sorted(known) if one.partition("/")[0] != node.config.domain and one not in ours]
    if not others:
        return ok("no other device plugin is registered")
    same = [name for name in others if name.rpartition("/")[2] in {one.name for one in node.config.served}]
    seen = f"other device plugins serve {', '.join(others)}"
    if not same:
        return ok(seen)
    return warning(
        f"{seen}; {', '.join(same)} may be the same devices as ours",
        "make match disjoint, or remove the other plugin: a device that both offer is served by neither",
    )


def _drivers(node: Node) -> Finding:
    folder = node.kubelet_dir / REGISTRY
    try:
        names = sorted(one.name for one in folder.iterdir())
    except FileNotFoundError:
        return skipped(f"there is no {folder}")
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    others = [name for name in names if not name.startswith(node.config.dra.driver) and not name.startswith(".")]
    if node.serves(CPU) and (drivers := registered_cpu_drivers(node.kubelet_dir)):
        return warning(
            f"the DRA driver {', '.join(drivers)} hands out CPUs, and so does the agent",
            "remove one of the two, or set reservedCpus and that driver's so that they have no CPU in common",
        )
    return ok(f"other drivers: {', '.join(others)}" if others else "no other driver is registered")


CHECKS = (
    Check("kubelet.process", "operations.md#what-the-agent-knows-of-kubelet", _process),
    Check("kubelet.configuration", "operations.md#what-the-agent-knows-of-kubelet", _configuration),
    Check("kubelet.cpu-manager", "migrating.md#a-running-node", _cpu_manager, configuration=True),
    Check("kubelet.memory-manager", "migrating.md#a-running-node", _memory_manager, configuration=True),
    Check("kubelet.topology-manager", "doctor.md#kubelet", _topology_manager, configuration=True),
    Check(
        "kubelet.contradictions", "operations.md#what-the-agent-knows-of-kubelet", _contradictions, configuration=True
    ),
    Check("kubelet.cgroup-driver", "doctor.md#kubelet", _cgroup_driver),
    Check("kubelet.sockets", "install.md#where-kubelet-is-elsewhere", _sockets, live=True),
    Check("kubelet.plugins", "migrating.md#other-device-plugins", _plugins, configuration=True),
    Check("kubelet.drivers", "migrating.md#other-device-plugins", _drivers),
)
