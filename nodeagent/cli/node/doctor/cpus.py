"""CPUs: which are reserved, which the kernel keeps free, and what disturbs or slows down the rest.

Sources: Documentation/admin-guide/kernel-parameters.txt (isolcpus, nohz_full), irqbalance(1),
Documentation/admin-guide/pm/cpufreq.rst, Documentation/scheduler/sched-rt-group.rst.
"""

from __future__ import annotations

from collections import defaultdict

from nodeagent.cli.node.doctor.model import NOT_IN_A_CAPTURE, Check, Finding, failure, ok, skipped, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.resources.offer import CPU

CPU_FOLDER = "sys/devices/system/cpu"
BANS = ("IRQBALANCE_BANNED_CPUS", "IRQBALANCE_BANNED_CPULIST")
IRQBALANCE_FILES = ("etc/default/irqbalance", "etc/sysconfig/irqbalance", "etc/irqbalance.env")
MOST_BANNED = 16
"""Highest number of interrupts named in a command."""
PERFORMANCE = "performance"
RT_RUNTIME = "proc/sys/kernel/sched_rt_runtime_us"
NO_CPUS = skipped("no CPUs are served")


def _reserved(node: Node) -> Finding:
    reserved, online = node.reserved(), node.inventory.cpus_online
    if not node.serves(CPU):
        return NO_CPUS
    if not online - reserved:
        return failure(
            f"CPUs {reserved} are reserved, and there are no others: none can be granted",
            "reserve fewer (reservedCpus)",
        )
    if not reserved & online:
        return warning(
            "no online CPU is reserved: the host and pods without exclusive CPUs may be left with none",
            "set reservedCpus, or reservedSystemCPUs of kubelet",
        )
    if split := _split_cores(node, reserved):
        return warning(
            f"CPUs {reserved} are reserved and CPUs {split} on the same cores are not: the host disturbs their holders",
            "reserve whole cores",
        )
    return ok(f"CPUs {reserved} are reserved, {len(online - reserved)} of {len(online)} can be granted")


def _split_cores(node: Node, reserved: CpuSet) -> CpuSet:
    """Return the CPUs that are not reserved and share a core with one that is."""
    cores: dict[object, list[int]] = defaultdict(list)
    for cpu in node.inventory.cpus:
        cores[cpu.core].append(cpu.id)
    siblings = [CpuSet(one) for one in cores.values() if not CpuSet(one).isdisjoint(reserved)]
    return CpuSet(cpu for one in siblings for cpu in one - reserved)


def _isolated(node: Node) -> Finding:
    node.kernel_text(f"{CPU_FOLDER}/isolated")
    isolated = node.inventory.cpus_isolated
    if not isolated:
        return ok("isolcpus is not set; the agent confines by control groups")
    shared = isolated & node.reserved()
    if shared:
        return warning(
            f"isolcpus has the reserved CPUs {shared}: the kernel does not balance the host's threads among them",
            "take the reserved CPUs out of isolcpus",
        )
    return warning(
        f"isolcpus has CPUs {isolated}: the threads of a pod without exclusive CPUs are not balanced there",
        "let isolcpus be; pinning.partition: isolated does it for each grant",
    )


def _tickless(node: Node) -> Finding:
    node.kernel_text(f"{CPU_FOLDER}/nohz_full")
    tickless, reserved = node.inventory.cpus_nohz_full, node.reserved()
    if not tickless:
        return ok("nohz_full is not set")
    if both := tickless & reserved:
        return warning(
            f"nohz_full has the reserved CPUs {both}: every system call of the host is slower there",
            "take the reserved CPUs out of nohz_full",
        )
    return ok(f"nohz_full has CPUs {tickless}, none of them reserved")


def _irqbalance(node: Node) -> Finding:
    if not node.running("irqbalance"):
        return ok("irqbalance does not run")
    if (found := _as_the_agent_found(node)) is not None:
        return found
    banned = [word for file in IRQBALANCE_FILES for word in _settings(node.text(file) or "")]
    pinning = node.config.pinning
    if pinning.writes_interrupts:
        key = "moveInterrupts" if pinning.move_interrupts else "deviceInterrupts"
        return failure(
            f"irqbalance runs and pinning.{key} is on: each undoes what the other writes",
            f"end irqbalance, or switch {key} off",
            "systemctl disable --now irqbalance",
        )
    if not banned:
        return warning(
            "irqbalance runs and may send interrupts to every CPU, those of grants among them",
            "ban the CPUs that are granted, or end it and set pinning.moveInterrupts",
            f"echo IRQBALANCE_BANNED_CPULIST={node.grantable()} >> /etc/default/irqbalance",
            "systemctl restart irqbalance",
        )
    return ok(f"irqbalance runs with {', '.join(banned)}")


def _as_the_agent_found(node: Node) -> Finding | None:
    """Return whether irqbalance bans what the agent moves, or None if the agent does not know or moves nothing."""
    shown: object = node.status
    for key in ("pinning", "intruders", "irqbalance"):
        shown = shown.get(key) if isinstance(shown, dict) else None
    if not isinstance(shown, dict) or not shown.get("running") or shown.get("error"):
        return None
    if cpus := shown.get("missing_cpus"):
        return failure(
            f"irqbalance runs and may send interrupts to CPUs {cpus}, off which the agent keeps them",
            "ban these CPUs, or end it",
            f"echo IRQBALANCE_BANNED_CPULIST={cpus} >> /etc/default/irqbalance",
            "systemctl restart irqbalance",
        )
    if irqs := shown.get("missing_irqs"):
        return failure(
            f"irqbalance runs and may move {len(irqs)} interrupts away from the CPUs that their device's holder has",
            "ban these interrupts in its arguments or its policy script, or end it",
            " ".join(["irqbalance", *(f"--banirq={irq}" for irq in irqs[:MOST_BANNED])]),
        )
    return ok(f"irqbalance runs and has banned what the agent moves (CPUs: {shown.get('banned_cpus') or 'none'})")


def _settings(text: str) -> list[str]:
    lines = (line.strip().removeprefix("export ") for line in text.splitlines())
    return [line for line in lines if line.partition("=")[0] in BANS and line.partition("=")[2].strip("\"' ")]


def _governor(node: Node) -> Finding:
    if not node.serves(CPU):
        return NO_CPUS
    found: dict[str, list[int]] = defaultdict(list)
    for cpu in node.grantable():
        found[node.text(f"{CPU_FOLDER}/cpu{cpu}/cpufreq/scaling_governor") or ""].append(cpu)
    slower = {name: CpuSet(cpus) for name, cpus in found.items() if name not in ("", PERFORMANCE)}
    if slower:
        seen = "; ".join(f"CPUs {cpus}: {name[:20]}" for name, cpus in sorted(slower.items()))
        return warning(
            f"the frequency follows the load ({seen})",
            "set the governor performance where latency counts",
            f"for cpu in /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor; do echo {PERFORMANCE} > $cpu; done",
        )
    if PERFORMANCE not in found:
        return skipped("the kernel does not control the frequency here") if node.live else NOT_IN_A_CAPTURE
    return ok("the governor is performance")


def _offline(node: Node) -> Finding:
    offline = node.inventory.cpus_offline
    if not offline:
        return ok(f"{len(node.inventory.cpus_online)} CPUs, none offline")
    held = [(one, one.cpus & offline) for one in (node.ledger() if node.has_ledger else ())]
    lost = [f"{cpus} of {one.holder}" for one, cpus in held if cpus]
    if lost:
        return failure(
            f"CPUs {', '.join(lost)} are offline: these pods run on fewer",
            "bring them online again, or restart the pods",
            *(f"echo 1 > /sys/devices/system/cpu/cpu{cpu}/online" for _, cpus in held for cpu in cpus),
        )
    return ok(f"CPUs {offline} are offline; no grant holds them")


def _real_time(node: Node) -> Finding:
    text = node.kernel_text(RT_RUNTIME)
    if text is None:
        return skipped("the kernel has no limit of real-time threads")
    if text == "-1":
        return warning(
            "a real-time thread may use all of a CPU: one that spins keeps the kernel's own threads from it",
            "restore the limit",
            "sysctl kernel.sched_rt_runtime_us=950000",
        )
    return ok(f"real-time threads get {text[:20]} µs of each period")


def _possible(node: Node) -> Finding:
    known = node.inventory.cpus_online
    stray = (node.reserved() if node.config.reserved_cpus is not None else EMPTY) - known
    if not known:
        return failure("no online CPU is found", "mount /sys: the agent sees no machine")
    if stray:
        return warning(f"the reserved CPUs {stray} are offline", "reserve CPUs that are online")
    return ok(f"{len(known)} CPUs on {len(node.inventory.numa_nodes)} NUMA nodes")


CHECKS = (
    Check("cpus.machine", "inventory.md#cpus", _possible, configuration=True),
    Check("cpus.reserved", "configuration.md#configuration", _reserved, configuration=True),
    Check("cpus.isolcpus", "doctor.md#cpus", _isolated, configuration=True),
    Check("cpus.nohz-full", "doctor.md#cpus", _tickless, configuration=True),
    Check("cpus.irqbalance", "pinning.md#who-else-runs-on-exclusive-cpus", _irqbalance, configuration=True),
    Check("cpus.governor", "doctor.md#cpus", _governor),
    Check("cpus.offline", "pinning.md#cpus-that-go-offline", _offline),
    Check("cpus.real-time", "doctor.md#cpus", _real_time),
)
