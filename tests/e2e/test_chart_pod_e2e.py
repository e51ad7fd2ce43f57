"""The pod of the shipped DaemonSet, started by a real kubelet and containerd.

Once with a shell that looks at its mounts, and once with the agent, with this machine's Python in place of an image.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from nodeagent.config.schema import Config
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import IMAGE, Object, collection, until
from tests.e2e.nodefiles import KUBELET_CONFIG
from tests.support.running import CHECKOUT

started = nodeview.started
NAMESPACE = "nodeagent"
PODS = collection("v1", "Pod", NAMESPACE)
MOUNTED = f"{Config().kubelet_dir}/nodeagent-e2e-probe"
AGENT = "agent"
PYTHON = (sys.executable, "-m", "nodeagent")
OF_THIS_NODE = {"nothing-is-pinned"}
"""What a test's node lacks: control groups of version 2 alone, where the machine has others."""
IN_SYS = "/sys/kernel/debug"
OUTSIDE_S = 30.0


def shipped() -> Iterator[Object]:
    yield from yaml.safe_load_all((CHECKOUT / "deploy" / "daemonset.yaml").read_text())


SCRIPT = f"""
while read -r _ _ _ _ place how _; do echo PLACE $place ${{how%%,*}}; done < /proc/self/mountinfo
echo SEES $(ls {Config().kubelet_dir})
echo READY
while sleep 0.2; do grep -q ' {MOUNTED} ' /proc/self/mountinfo && echo MOUNTED || echo UNMOUNTED; done
"""
"""Say of each mount whether it is "ro" or "rw", then again and again whether the probe's mount is there."""


def daemon_set() -> tuple[Object, Object]:
    """As shipped, but for the image; and its container."""
    (found,) = [one for one in shipped() if one["kind"] == "DaemonSet"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    return found, container


def with_a_shell() -> Object:
    found, container = daemon_set()
    container["command"] = ["/bin/sh", "-c", SCRIPT]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        del container[probe]
    return found


def with_the_agent() -> Object:
    """With what Python needs mounted at its own place."""
    found, container = daemon_set()
    found["metadata"]["name"] = AGENT
    found["spec"]["selector"]["matchLabels"] = found["spec"]["template"]["metadata"]["labels"] = {"app": AGENT}
    container["command"] = [*PYTHON, *container["command"][1:]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        exec_ = container[probe]["exec"]
        exec_["command"] = [*PYTHON, *exec_["command"][1:]]
    container["workingDir"] = str(CHECKOUT)
    # By ldconfig and its cache ctypes finds libudev.
    places = {
        "/usr",
        "/lib",
        "/lib64",
        "/sbin",
        "/etc/ld.so.cache",
        str(CHECKOUT),
        sys.prefix,
        sys.base_prefix,
    }
    for i, place in enumerate(
        sorted(one for one in places if not any(one.startswith(f"{other}/") for other in places))
    ):
        container["volumeMounts"].append({"name": f"python-{i}", "mountPath": place, "readOnly": True})
        volume = {"name": f"python-{i}", "hostPath": {"path": os.path.realpath(place)}}
        found["spec"]["template"]["spec"]["volumes"].append(volume)
    return found


def lines(node: Cluster, name: str = "nodeagent") -> list[str]:
    """What the container of a DaemonSet of this name has printed."""
    files = sorted((node.folder / "pods").glob(f"{NAMESPACE}_{name}-*/nodeagent/*.log"))
    return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def said(started: Cluster) -> list[str]:
    """What the pod's script said until it was ready. Something is mounted in /sys, as tracing is on most hosts."""
    started.run("probe", "mount", "-t", "tmpfs", "tmpfs", IN_SYS)
    for one in shipped():
        started.api.create(with_a_shell() if one["kind"] == "DaemonSet" else one)
    until("the pod is ready", lambda: "READY" in lines(started), 120.0)
    return lines(started)


def test_the_pod_starts_although_kubelet_lacks_files_and_folders(started: Cluster, said: list[str]) -> None:
    """There is no folder of NRI or of the driver."""
    (sees,) = [line.split()[1:] for line in said if line.startswith("SEES")]
    assert {"pods", "device-plugins", "plugins_registry", "pod-resources", "cpu_manager_state"} <= set(sees)


def places(said: list[str]) -> dict[str, str]:
    """The uppermost mount of each place: "ro" or "rw"."""
    return {words[1]: words[2] for words in (line.split() for line in said) if words[0] == "PLACE"}


def test_the_pod_writes_to_its_own_folders_alone(said: list[str]) -> None:
    (mounts,) = [one["spec"]["template"]["spec"]["containers"] for one in shipped() if one["kind"] == "DaemonSet"]
    wanted = {one["mountPath"]: "ro" if one.get("readOnly") else "rw" for one in mounts[0]["volumeMounts"]}
    found = places(said)
    assert {path: found[path] for path in wanted} == wanted
    assert found["/"] == "ro"


def test_nothing_in_sys_but_control_groups_can_be_written(said: list[str]) -> None:
    """Neither tracing nor bpf nor firmware variables, which have mounts of their own there."""
    found = places(said)
    assert (found[IN_SYS], found["/sys/fs/cgroup"]) == ("ro", "rw")


def test_what_is_mounted_and_unmounted_on_the_host_is_so_in_the_pod(started: Cluster, said: list[str]) -> None:
    """A volume that kubelet unmounts is not held by the agent."""
    started.run("probe", "mkdir", "-p", MOUNTED)
    started.run("probe", "mount", "-t", "tmpfs", "tmpfs", MOUNTED)
    until("the pod sees the mount", lambda: lines(started)[-1] == "MOUNTED", OUTSIDE_S)
    started.run("probe", "umount", MOUNTED)
    until("the pod has it no longer", lambda: lines(started)[-1] == "UNMOUNTED", OUTSIDE_S)


# ---------------------------------------------------------------- the agent itself


@pytest.fixture(scope="module")
def status(started: Cluster, said: list[str]) -> dict[str, Any]:
    """What the agent in the pod says of itself once the DaemonSet is ready. The node's own one has ended."""
    started.stop("nodeagent")
    started.api.create(with_the_agent())
    path = f"{collection('apps/v1', 'DaemonSet', NAMESPACE)}/{AGENT}"
    until("the DaemonSet is ready", lambda: started.api.call("GET", path)["status"].get("numberReady"), 120.0)

    def shown() -> dict[str, Any]:
        found = asked(started)
        return found if all(one["registered"] for one in found["resources"]) else {}

    return until("kubelet shows its resources", shown, 60.0)


def asked(node: Cluster) -> dict[str, Any]:
    """As `helm test` asks: over the socket on the node."""
    found: dict[str, Any] = json.loads(node.output(*PYTHON, "status", "-o", "json"))
    return found


def test_kubelet_takes_the_resources_of_the_agent_in_the_pod(started: Cluster, status: dict[str, Any]) -> None:
    """Without capabilities, with the runtime's seccomp profile: it is registered, and CPUs can be allocated."""
    assert status["refused"] == {}
    assert {one["name"] for one in status["resources"]} >= {"nodeagent.dev/cpu", "nodeagent.dev/kvm"}
    until("the Node has CPUs of it", lambda: nodeview.allocatable(started, "cpu"))


def test_the_agent_in_the_pod_sees_how_kubelet_runs(started: Cluster, status: dict[str, Any]) -> None:
    kubelet = status["kubelet"]
    assert (kubelet["error"], kubelet["sources"]) == ("", [str(KUBELET_CONFIG)])
    assert kubelet["pid"] is not None


def test_nothing_that_the_agent_tries_in_the_pod_is_refused(started: Cluster, status: dict[str, Any]) -> None:
    """Also not the kernel's events, or a thread of the host that may not be looked at."""
    texts = [one for one in lines(started, AGENT) if one.startswith("{")]
    worse = [one for one in map(json.loads, texts) if one["level"] not in ("debug", "info")]
    assert texts and [one for one in worse if one["event"] not in OF_THIS_NODE] == [], worse
    assert (status["inventory"]["warnings"], status["pinning"]["intruders"]["warnings"]) == ([], [])
