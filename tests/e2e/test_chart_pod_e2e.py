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
PROBE = "nodeagent-e2e-probe"
MOUNTED = f"{Config().kubelet_dir}/{PROBE}"
OUTSIDE_S = 30.0


def shipped() -> Iterator[Object]:
    yield from yaml.safe_load_all((CHECKOUT / "deploy" / "daemonset.yaml").read_text())


def script(mounts: list[Object]) -> str:
    """Say of each folder whether it can be written to, then at each change whether the probe's mount is there."""
    tries = [f"touch {one['mountPath']}/{PROBE} 2>/dev/null && echo WRITES {one['mountPath']}" for one in mounts]
    look = f"while sleep 0.2; do grep -q ' {MOUNTED} ' /proc/self/mountinfo && echo MOUNTED || echo UNMOUNTED; done"
    tries.append(f"echo SEES $(ls {Config().kubelet_dir})")
    tries.append("mkdir /sys/fs/cgroup/" + PROBE + " && rmdir /sys/fs/cgroup/" + PROBE + " && echo CGROUP")
    return "\n".join([*tries, "echo READY", look])


def daemon_set() -> Object:
    """As shipped, but for the program and its probes."""
    (found,) = [one for one in shipped() if one["kind"] == "DaemonSet"]
    (container,) = found["spec"]["template"]["spec"]["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    container["command"] = ["/bin/sh", "-c", script(container["volumeMounts"])]
    for probe in ("readinessProbe", "livenessProbe"):
        del container[probe]
    return found


def lines(node: Cluster) -> list[str]:
    files = sorted((node.folder / "pods").glob(f"{NAMESPACE}_nodeagent-*/nodeagent/*.log"))
    return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def said(started: Cluster) -> list[str]:
    """What the pod's script said until it was ready."""
    for one in shipped():
        started.api.create(daemon_set() if one["kind"] == "DaemonSet" else one)
    until("the pod is ready", lambda: "READY" in lines(started), 120.0)
    return lines(started)


def test_the_pod_starts_although_kubelet_lacks_files_and_folders(started: Cluster, said: list[str]) -> None:
    """No config.yaml and no memory_manager_state are there, and no NRI."""
    (sees,) = [line.split()[1:] for line in said if line.startswith("SEES")]
    assert {"pods", "device-plugins", "plugins_registry", "pod-resources", "cpu_manager_state"} <= set(sees)
    assert "config.yaml" not in sees


def test_the_pod_writes_to_its_own_folders_alone(said: list[str]) -> None:
    kubelet = Config().kubelet_dir
    wanted = {f"{kubelet}/{one}" for one in ("device-plugins", "plugins/nodeagent.dev", "plugins_registry")}
    wanted |= {"/tmp", "/run/nodeagent", "/var/lib/nodeagent", "/var/run/cdi", "/var/run/nri", "/run/systemd"}
    assert {line.split()[1] for line in said if line.startswith("WRITES")} == wanted
    assert "CGROUP" in said, "folders, but no files, are made there"


def test_what_is_mounted_and_unmounted_on_the_host_is_so_in_the_pod(started: Cluster, said: list[str]) -> None:
    """A volume that kubelet unmounts is not held by the agent."""
    started.run("probe", "mkdir", "-p", MOUNTED)
    started.run("probe", "mount", "-t", "tmpfs", "tmpfs", MOUNTED)
    until("the pod sees the mount", lambda: lines(started)[-1] == "MOUNTED", OUTSIDE_S)
    started.run("probe", "umount", MOUNTED)
    until("the pod has it no longer", lambda: lines(started)[-1] == "UNMOUNTED", OUTSIDE_S)
