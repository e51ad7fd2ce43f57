"""The pod of the shipped DaemonSet, started by a real kubelet and containerd; its program is a shell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from nodeagent.config.schema import Config
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import IMAGE, Object, collection, until
from tests.support.running import CHECKOUT

started = nodeview.started
NAMESPACE = "nodeagent"
PODS = collection("v1", "Pod", NAMESPACE)
MOUNTED = f"{Config().kubelet_dir}/nodeagent-e2e-probe"
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


def daemon_set() -> Object:
    """As shipped, but for the program and its probes."""
    (found,) = [one for one in shipped() if one["kind"] == "DaemonSet"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    container["command"] = ["/bin/sh", "-c", SCRIPT]
    for probe in ("readinessProbe", "livenessProbe"):
        del container[probe]
    return found


def lines(node: Cluster) -> list[str]:
    files = sorted((node.folder / "pods").glob(f"{NAMESPACE}_nodeagent-*/nodeagent/*.log"))
    return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def said(started: Cluster) -> list[str]:
    """What the pod's script said until it was ready. Something is mounted in /sys, as tracing is on most hosts."""
    started.run("probe", "mount", "-t", "tmpfs", "tmpfs", IN_SYS)
    for one in shipped():
        started.api.create(daemon_set() if one["kind"] == "DaemonSet" else one)
    until("the pod is ready", lambda: "READY" in lines(started), 120.0)
    return lines(started)


def test_the_pod_starts_although_kubelet_lacks_files_and_folders(started: Cluster, said: list[str]) -> None:
    """There is no config.yaml, and no folder of NRI or of the driver."""
    (sees,) = [line.split()[1:] for line in said if line.startswith("SEES")]
    assert {"pods", "device-plugins", "plugins_registry", "pod-resources", "cpu_manager_state"} <= set(sees)
    assert "config.yaml" not in sees


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
