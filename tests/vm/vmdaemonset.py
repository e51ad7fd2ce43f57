"""The agent as the DaemonSet's pod in the guest: the image of `make image`, and the manifests as they are shipped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.e2e import programs
from tests.e2e.kubeapi import Object, collection, until
from tests.support.paths import CHECKOUT
from tests.vm import vmcluster
from tests.vm.vmcluster import HOST_ADDRESS, STEP_S, Node

NAMESPACE = "nodeagent"
PODS = collection("v1", "Pod", NAMESPACE)
DAEMON_SET = f"{collection('apps/v1', 'DaemonSet', NAMESPACE)}/nodeagent"
IMPORT_S, ROLLOUT_S = 600.0, 600.0
MERGE = "application/strategic-merge-patch+json"
LISTENS = "*' 00010000 '*/run/nodeagent/.status.sock.*"
"""A line of /proc/net/unix: the flag of a socket that listens (__SO_ACCEPTCON), and the name that it was bound with."""
PROBES_S, PROBE_S = {"startupProbe": 5, "readinessProbe": 60, "livenessProbe": 600}, 120
"""How often kubelet asks, and how long it waits. One core emulates sixteen: as shipped, the questions would use most of
it, and be answered too late."""
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task"
PROXY = "/usr/lib/systemd/systemd-socket-proxyd"
CONFIG: Mapping[str, Any] = {
    "apiVersion": "nodeagent.dev/v1alpha1",
    "kind": "NodeAgentConfiguration",
    "resyncSeconds": 3600,
    "resources": vmcluster.RESOURCES,
    "log": {"format": "json"},
}


def install(node: Node, archive: Path) -> None:
    """Load the image as docs/install.md does, and create what `kubectl apply -k deploy` does; wait for nothing."""
    shutil.copy(archive, node.guest.share / "image.tar")
    node.guest.run("ctr -n k8s.io image import /share/image.tar", IMPORT_S)
    _reach_the_api_server(node)
    for name in ("admission.yaml", "daemonset.yaml"):
        for document in yaml.safe_load_all((CHECKOUT / "deploy" / name).read_text()):
            if document["kind"] == "ConfigMap":
                document["data"] = {"config.yaml": json.dumps(CONFIG)}
            if document["kind"] == "DaemonSet":
                _be_patient(document["spec"]["template"]["spec"]["containers"][0])
                _see_bundles(document["spec"]["template"]["spec"])
            node.api.create(document)


def _see_bundles(spec: Object) -> None:
    """As the chart does with `runtimeBundles`."""
    mount = {"name": "bundles", "mountPath": BUNDLES, "readOnly": True, "mountPropagation": "HostToContainer"}
    spec["containers"][0]["volumeMounts"].append(mount)
    spec["volumes"].append({"name": "bundles", "hostPath": {"path": BUNDLES, "type": "Directory"}})


def _be_patient(container: Object) -> None:
    for probe, period_s in PROBES_S.items():
        container[probe] |= {"periodSeconds": period_s, "timeoutSeconds": PROBE_S}


def rolled_out(node: Node) -> None:
    """As `kubectl rollout status` waits; then until kubelet shows what the agent serves."""
    until("the DaemonSet is rolled out", lambda: _is_rolled_out(node.api.call("GET", DAEMON_SET)), ROLLOUT_S)
    until("one agent is left", lambda: len(agents(node)) == 1, ROLLOUT_S)
    node.ready()


def replace(node: Node, mark: str) -> None:
    """Change the pod's template, which replaces the pods."""
    change = {"spec": {"template": {"metadata": {"annotations": {"tests/mark": mark}}}}}
    node.api.call("PATCH", DAEMON_SET, change, MERGE)


@contextlib.contextmanager
def away(node: Node) -> Iterator[None]:
    """Without an agent: the DaemonSet wants another kind of node."""
    _select(node, {"tests/away": "yes"})
    try:
        until("no agent is left", lambda: not agents(node), ROLLOUT_S)
        yield
    finally:
        _select(node, {"tests/away": None})


def _select(node: Node, labels: Mapping[str, str | None]) -> None:
    change = {"spec": {"template": {"spec": {"nodeSelector": labels}}}}
    node.api.call("PATCH", DAEMON_SET, change, MERGE)


def returned(node: Node, pod: str, wanted: str) -> str:
    """How long after the agent's process has come it listens, and a pod's container may run on these CPUs alone, in
    milliseconds. Looks with what the shell has itself: programs would take the agent's time."""
    return node.guest.run(
        f"""file=$({node.scope(pod)})/cpuset.cpus.effective
        until pgrep -f '[n]odeagent run' >/dev/null; do sleep 0.5; done; began=$EPOCHREALTIME
        while [ -z "$up" ] || [ -z "$right" ]; do
            now=$(( (${{EPOCHREALTIME/./}} - ${{began/./}}) / 1000 ))
            while [ -z "$up" ] && read -r line; do [[ $line != {LISTENS} ]] || up=$now; done </proc/net/unix
            read -r seen <$file; [ "$right" ] || [ "$seen" != {wanted} ] || right=$now
            sleep 0.2
        done; echo $up $right""",
        STEP_S,
    ).strip()


def agents(node: Node) -> list[Object]:
    """The agent's pods, the oldest first."""
    return sorted(node.api.items(PODS), key=lambda one: str(one["metadata"]["creationTimestamp"]))


def containers(node: Node) -> list[str]:
    """The ids of their running containers."""
    each = [status for one in agents(node) for status in one["status"].get("containerStatuses", ())]
    return [one["containerID"].rpartition("/")[2] for one in each if "running" in one["state"]]


def where_all_run(node: Node) -> list[str]:
    """The CPUs in effect for each container of any pod, sandboxes included."""
    scopes = "find /sys/fs/cgroup/kubepods.slice -name 'cri-containerd-*.scope'"
    return node.guest.run(f"cat $({scopes} -printf '%p/cpuset.cpus.effective ')").split()


def logged(node: Node) -> list[Object]:
    """What all agents have logged."""
    lines = node.guest.run(f"cat /var/log/pods/{NAMESPACE}_nodeagent-*/nodeagent/*.log").splitlines()
    texts = [line.split(" ", 3)[3] for line in lines]
    assert not [one for one in texts if "Traceback" in one], texts
    return [json.loads(one) for one in texts if one.startswith("{")]


def _is_rolled_out(found: Object) -> bool:
    status = found["status"]
    counts = [status.get(key, 0) for key in ("updatedNumberScheduled", "numberAvailable", "currentNumberScheduled")]
    return status.get("observedGeneration") == found["metadata"]["generation"] and counts == [1, 1, 1]


def _reach_the_api_server(node: Node) -> None:
    """At the address of its Service, which kube-proxy does on a real node."""
    listen = f"--socket-property=ListenStream={programs.API_SERVICE}:{programs.API_PORT}"
    server = f"{HOST_ADDRESS}:{node.plane.ports['api']}"
    node.guest.run(f"systemd-run -q --unit=api-service {listen} {PROXY} {server}")
