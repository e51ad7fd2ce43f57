"""`nodeagent status`: the state of a running agent."""

from __future__ import annotations

import argparse
import time
from typing import Any

from nodeagent.admin.reasons import once
from nodeagent.cli.output import forms
from nodeagent.cli.shared import ask, watch
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.cpuset import CpuSet

EXAMPLES = (
    ("nodeagent status", "whether the agent is ready, what it serves, how containers are confined"),
    ("nodeagent status -o wide", "also every kind of device, and what was looked for in vain"),
    ("nodeagent status --watch", "again at each change"),
    ("nodeagent status -o jsonpath='{.ready}'", "true or false"),
)
REPLAYABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent status`."""
    ask.add_socket(parser)
    forms.add_output(parser, forms.DOCUMENT_FORMS)
    watch.add_watch(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return watch.show(
        args,
        lambda: ask.pages(args)("/v1/status"),
        lambda status: forms.write(args, status, lambda shown: _print(args, shown)),
    )


def _print(args: argparse.Namespace, status: Any) -> None:
    _print_lines(status)
    print()
    print_table(
        ("RESOURCE", "KIND", "DEVICES", "HEALTHY", "HELD", "KUBELET"),
        [
            (
                r["name"],
                r["kind"],
                r["devices"],
                r["healthy"],
                r["held"],
                "shown" if r["registered"] else r["registration"],
            )
            for r in status["resources"]
        ],
        whole=args.no_trunc,
    )
    if args.output.kind == forms.WIDE:
        print()
        kinds = [(one["kind"], one["state"], one["reason"]) for one in status["kinds"]]
        print_table(("KIND", "STATE", "REASON"), kinds, whole=args.no_trunc)
    if instances := status.get("mig", {}).get("instances"):
        _print_instances(instances, whole=args.no_trunc)
    if partitions := status.get("amd", {}).get("partitions"):
        _print_partitions(partitions, whole=args.no_trunc)
    if status["pinning"]["pinned"]:
        _print_pinned(status["pinning"]["pinned"], whole=args.no_trunc)


def _print_lines(status: Any) -> None:
    """Print what there is to say in sentences."""
    machine = status["inventory"]
    print(f"nodeagent {status['version']}, up {status['uptime_s']} s, {'ready' if status['ready'] else 'NOT ready'}")
    outside = f", {machine['cpus_outside']} not for pods" if machine["cpus_outside"] else ""
    print(
        f"CPUs {machine['cpus_online']} online, {machine['cpus_reserved'] or 'none'} reserved{outside}; "
        f"{machine['numa_nodes']} NUMA nodes, {machine['devices']} devices, generation {machine['generation']}"
    )
    sections = (
        ("not ready", status["not_ready"]),
        ("refused", [f"{name}: {why}" for name, why in status["refused"].items()]),
        ("configuration", [status["config_error"]] if status["config_error"] else []),
        ("conflict", status["conflicts"]),
        ("disputed", status["disputed"]),
        ("note", status["notes"]),
        ("kubelet", [_kubelet(status["kubelet"])]),
        ("dra", _dra(status["dra"]) if status["dra"] else []),
        ("pinning", _pinning(status["pinning"])),
        ("warning", machine["warnings"]),
        ("kind", [f"{k['kind']} {k['state']}: {k['reason']}" for k in status["kinds"] if k["state"] == "degraded"]),
    )
    for line in once(sections):
        print(line)


def _print_instances(instances: Any, *, whole: bool) -> None:
    """Print the MIG instances that the agent makes, has made or destroys."""
    print()
    print_table(
        ("GPU", "MIG", "SLICES", "STATE", "CLAIM", "UUID", "WHY"),
        [
            (
                one["gpu"],
                one["profile"],
                f"{one['start']}-{one['start'] + one['size'] - 1}" if one["size"] else one["start"],
                one["state"],
                one["claim"],
                one["uuid"],
                one["why"],
            )
            for one in instances
        ],
        whole=whole,
    )


def _print_partitions(gpus: Any, *, whole: bool) -> None:
    """Print how AMD's GPUs are partitioned, where the agent has to do with it."""
    print()
    rows = [
        (one["gpu"], kind, one[kind]["now"], one[kind]["configured"], one[kind]["waits"])
        for one in gpus
        for kind in ("compute", "memory")
    ]
    print_table(("GPU", "PARTITION", "NOW", "CONFIGURED", "WAITS FOR"), rows, whole=whole)


def _print_pinned(pinned: Any, *, whole: bool) -> None:
    """Print for each container what it was granted and what is in effect."""
    print()
    print_table(
        ("POD", "CONTAINER", "GRANTED", "EFFECTIVE", "NUMA", "DRIFT", "NOTE"),
        [
            (
                f"{one['namespace']}/{one['pod']}",
                one["container"],
                one["granted_cpus"] or "-",
                one["effective_cpus"] or "-",
                one["effective_mems"] or "-",
                one["drifts"],
                _note(one),
            )
            for one in pinned
        ],
        whole=whole,
    )


def _kubelet(kubelet: Any) -> str:
    """Return kubelet's configuration in one line."""
    process = f"process {kubelet['pid']}" if kubelet["pid"] is not None else "process not seen"
    if kubelet["error"]:
        return f"{process}; {kubelet['error']}"
    said = kubelet["settings"]
    known = [
        f"{name} {said[key]}"
        for name, key in (
            ("CPU manager", "cpuManagerPolicy"),
            ("memory manager", "memoryManagerPolicy"),
            ("reserves CPUs", "reservedSystemCPUs"),
        )
        if said.get(key)
    ]
    return ", ".join((process, *known, f"configured by {' '.join(kubelet['sources']) or 'defaults'}"))


def _pinning(pinning: Any) -> list[str]:
    """Return how containers are confined, in a few lines."""
    if pinning["mode"] == "off":
        return [f"off: {pinning['unsupported'] or 'as configured'}"]
    by = pinning["runtime"] if pinning["mode"] == "nri" else "control groups alone"
    state = f"{by}, {pinning['containers']} containers, shared CPUs {pinning['shared_cpus'] or 'all'}"
    lines = [f"{state}, drifts: {pinning['drifts_repaired']} repaired, {pinning['drifts_not_repaired']} not repaired"]
    if pinning["mode"] == "nri" and not pinning["connected"]:
        lines.append(f"NOT connected: {pinning['reason']}")
    return [*lines, *_intruders(pinning["intruders"]), *(f"NOT confined: {why}" for why in pinning["errors"].values())]


def _intruders(found: Any) -> list[str]:
    threads, irqs = found["threads_total"], sum(not one["moved"] for one in found["irqs"])
    known = f"{threads} threads" if threads is not None else "an unknown number of threads"
    said = f"{known} of the host and {irqs} interrupts may run on exclusive CPUs (-o json names them)"
    return [*([said] if threads != 0 or irqs else []), *map(_interrupts_of, found.get("devices", ()))]


def _interrupts_of(one: Any) -> str:
    """Return where the interrupts of a held device are."""
    wanted = f"{one['interrupts']} CPUs {one['cpus']}" if one["cpus"] else str(one["interrupts"])
    there = f"{len(one['irqs']) - len(one['misplaced'])} of {len(one['irqs'])}"
    why = f"; {one['why']}" if one["why"] else ""
    return f"interrupts of {one['device']} ({one['holder']}): {wanted}, {there}{why}"


def _note(one: Any) -> str:
    """Return what is wrong with a container's pins."""
    notes = [one["error"], _ran(one["ran_unpinned"]) if one["ran_unpinned"] else ""]
    outside = CpuSet.parse(one["outside_cpus"])
    offline = CpuSet.parse(one["lost_cpus"]) - outside
    notes.append(f"threads {one['hidden_cpus']} are hidden" if one.get("hidden_cpus") else "")
    notes.append(f"in pool {', '.join(one['pools'])}" if one.get("pools") else "")
    notes.append(f"CPUs {offline} are offline" if offline else "")
    notes.append(f"CPUs {outside} are outside the cpuset of all pods" if outside else "")
    notes.append(f"throttled to {one['quota_cpus']:g} CPUs" if one["quota_cpus"] is not None else "")
    notes.append(f"names {', '.join(one['unproven'])} of another pod" if one["unproven"] else "")
    return "; ".join(filter(None, notes))


def _ran(elsewhere: Any) -> str:
    """Return where a container ran before it was first pinned, in the machine's local time."""
    now, found, wanted = elsewhere["until_unix_s"] is None, elsewhere["found"], elsewhere["wanted"]
    if elsewhere["file"].startswith("cpuset.mems"):
        what = f"{'uses' if now else 'used'} memory of NUMA nodes {found} instead of {wanted}"
    else:
        what = f"{'runs' if now else 'ran'} on {found} instead of {wanted}"
    return what if now else f"{what} until {time.strftime('%H:%M:%S', time.localtime(elsewhere['until_unix_s']))}"


def _dra(dra: Any) -> list[str]:
    """Return the state of DRA in a few lines."""
    state = "registered" if dra["registered"] else f"NOT registered: {dra['reason'] or dra['registration']}"
    lines = [f"{dra['driver']} on node {dra['node']}: {state}, {dra['claims']} claims"]
    slices = dra["slices"]
    if slices:
        lines += [
            f"pool {one['name']}: {one['state']}, {one['devices']} devices in {one['slices']} slices"
            + (f"; {one['reason']}" if one["reason"] else "")
            for one in slices["pools"]
        ]
        lines += [f"the API server keeps {', '.join(slices['kept'])}"] if slices["kept"] else []
        lines += [f"the API server does not keep {name}" for name in slices["lost"]]
        lines += [f"left out: {why}" for why in slices["broken"]]
        lines += [f"not counted by the scheduler: {slices['withheld']}"] if slices.get("withheld") else []
    if dra.get("counted"):
        lines.append(f"the scheduler counts what claims take of the node's {', '.join(dra['counted'])}")
    return lines
