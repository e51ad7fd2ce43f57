"""All checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.cli.node.doctor import agent, cluster, cpus, devices, kubelet, memory, runtime, state
from nodeagent.cli.node.doctor.model import Check, Finding, State, examine
from nodeagent.cli.node.doctor.node import Node

CHECKS: tuple[Check, ...] = (
    *agent.CHECKS,
    *kubelet.CHECKS,
    *runtime.CHECKS,
    *cluster.CHECKS,
    *state.CHECKS,
    *cpus.CHECKS,
    *memory.CHECKS,
    *devices.CHECKS,
)


def findings(node: Node, *, configuration: bool = False) -> Iterator[tuple[Check, Finding]]:
    """Yield each check with what it finds. configuration: only those that compare it with the machine."""
    for check in CHECKS:
        if check.configuration or not configuration:
            yield check, examine(check, node)


def exit_code(found: list[tuple[Check, Finding]]) -> int:
    """Return 0 if all is well, 1 for warnings or what is unknown, 2 for failures."""
    states = {finding.state for _, finding in found}
    if State.FAILURE in states:
        return 2
    return 1 if states & {State.WARNING, State.UNKNOWN} else 0
