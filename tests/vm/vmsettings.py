"""Other settings for a node that runs: of kubelet, which is restarted with them, and of the agent."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.e2e.kubeapi import until
from tests.e2e.nodefiles import KUBELET_CONFIG
from tests.vm.vmcluster import STEP_S, Node

AGENT_CONFIG = "/etc/nodeagent/config.yaml"
STATES = "/var/lib/kubelet/cpu_manager_state /var/lib/kubelet/memory_manager_state"


def configure_kubelet(node: Node, **settings: Any) -> None:
    """Restart kubelet with the settings of this node's beginning and these, and without what its CPU and memory
    managers remember: they refuse to start with another policy. Return when the agent has listed its pods."""
    share = node.guest.share
    base = json.loads((share / "kubernetes" / KUBELET_CONFIG.name).read_text())
    (share / "kubelet.yaml").write_text(json.dumps({**base, **settings}))
    node.guest.run("systemctl stop kubelet")
    began = time.time()
    node.guest.run(f"rm -f {STATES} && install -m 644 /share/kubelet.yaml {KUBELET_CONFIG} && systemctl start kubelet")
    node.listed_since(began)
    print(f"vm: kubelet restarted and listed: {time.time() - began:.1f} s", flush=True)


def configure_agent(node: Node, **keys: Any) -> None:
    """Have the agent read its configuration of this node's beginning with these keys in their places."""
    share = node.guest.share
    base = json.loads((share / "config.yaml").read_text())
    (share / "agent.yaml").write_text(json.dumps({**base, **keys}))
    node.guest.run(f"install -m 644 /share/agent.yaml {AGENT_CONFIG} && nodeagent reload", until=True)


def refused(node: Node, *resources: str) -> dict[str, str]:
    """Why resources are not served, once these are not and all others are, by their names in the configuration."""

    def look() -> dict[str, Any]:
        found = {_short(name): why for name, why in node.status()["refused"].items()}
        return {"why": found} if set(found) == set(resources) else {}

    why: dict[str, str] = until(f"refused: {', '.join(resources) or 'nothing'}", look, STEP_S)["why"]
    return why


def _short(name: str) -> str:
    """ "nodeagent.dev/cpu", "cpu through DRA" -> "cpu" """
    return name.rpartition("/")[2].partition(" ")[0]
