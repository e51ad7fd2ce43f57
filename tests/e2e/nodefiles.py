"""The files of a node: how its programs are configured, the one image of its pods, the machine that it seems to be."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.builders.devices import DeviceTree
from tests.builders.machines import MIB, build, named
from tests.e2e.kubeapi import IMAGE

NODE, DRIVER = "e2e-node", "nodeagent.dev"
PORTS = ("/dev/ttyE2E0", "/dev/ttyE2E1", "/dev/ttyE2E2")
GPUS = {"0000:1b:00.0": 0, "0000:3b:00.0": 0, "0000:9b:00.0": 1, "0000:bb:00.0": 1}
"""PCI address -> NUMA node; the addresses are those of the double of libnvidia-ml."""
MIG_MINORS = "gpu3/gi2/access 57\ngpu3/gi2/ci0/access 58\ngpu3/gi9/access 66\ngpu3/gi9/ci0/access 67\n"
"""Capability nodes of the instances of the divided GPU, as the kernel's driver lists them."""
CPUS_OF_NODE = {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
KUBELET_CONFIG = Path("/var/lib/kubelet/config.yaml")
"""On the node, as with kubeadm."""
PAGES = 16
"""Of 2 MiB, on each NUMA node."""
RESOURCES: list[dict[str, Any]] = [
    {"name": "cpu", "kind": "cpu", "serve": "both"},
    {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "serve": "both"},
    {"name": "memory", "kind": "memory", "serve": "dra"},
    {"name": "port", "kind": "char", "paths": ["/dev/ttyE2E*"], "serve": "both"},
    {"name": "gpu", "kind": "gpu", "serve": "dra", "deviceNodes": False, "match": {"mig": "*"}},
]


def write_machine(root: Path) -> None:
    """8 CPUs and 32 hugepages on 2 NUMA nodes, 4 NVIDIA GPUs, the last of them divided."""
    pages = {(node, 2 * MIB): (PAGES, PAGES, 0) for node in CPUS_OF_NODE}
    tree = DeviceTree(build(root, dataclasses.replace(named("1s2n4c-smt"), hugepages=pages)))
    tree.write("proc/driver/nvidia-caps/mig-minors", MIG_MINORS)
    for address, node in GPUS.items():
        tree.pci(address, pci_class="030200", vendor="10de", device="2330", driver="nvidia", numa_node=node)


def write_image(path: Path, busybox: Path) -> None:
    """An image of busybox alone, in the form of `docker save`; without a command it waits."""
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            _add(tar, folder, type=tarfile.DIRTYPE)
        _add(tar, "bin/busybox", busybox.read_bytes())
        for applet in applets:
            if applet != "busybox":
                _add(tar, f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox")
    layer_id = hashlib.sha256(layer.getvalue()).hexdigest()
    config = _image_config(layer_id)
    name = hashlib.sha256(config).hexdigest()
    manifest = [{"Config": f"{name}.json", "RepoTags": [IMAGE], "Layers": [f"{layer_id}/layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        _add(tar, f"{name}.json", config)
        _add(tar, f"{layer_id}/layer.tar", layer.getvalue())
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def _image_config(layer_id: str) -> bytes:
    run = {"Cmd": ["/bin/sleep", "36000"], "Env": ["PATH=/bin"]}
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{layer_id}"]}
    return json.dumps({"architecture": _architecture(), "os": "linux", "config": run, "rootfs": rootfs}).encode()


def _architecture() -> str:
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **more: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755
    for key, value in more.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(content))


def write_kubeconfig(path: Path, port: int, token: str, ca: Path | None = None, host: str = "127.0.0.1") -> None:
    """ca: the server's own certificate; without it, any server is trusted."""
    cluster: dict[str, Any] = {"server": f"https://{host}:{port}"}
    cluster.update({"certificate-authority": str(ca)} if ca else {"insecure-skip-tls-verify": True})
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "e2e", "cluster": cluster}],
        "users": [{"name": "e2e", "user": {"token": token}}],
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
        "current-context": "e2e",
    }
    path.write_text(json.dumps(document))


CNI_PLUGIN = """#!/bin/sh
[ $CNI_COMMAND != VERSION ] || exec echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'
[ $CNI_COMMAND = ADD ] || exit 0
name='{"name":"'$CNI_IFNAME'","sandbox":"'$CNI_NETNS'"}'
echo '{"cniVersion":"1.0.0","interfaces":['$name'],"ips":[{"address":"192.0.2.2/24","interface":0}]}'
"""
"""A pod with a network of its own has none: it is given an address that it does not have (RFC 5737)."""


def write_containerd(folder: Path) -> None:
    """Its root lies on a tmpfs: an overlay cannot lie on another one."""
    (folder / "cni").mkdir()
    (folder / "cni/loopback").write_text(CNI_PLUGIN)
    (folder / "cni/loopback").chmod(0o755)
    (folder / "cni/10-lo.conflist").write_text('{"cniVersion":"1.0.0","name":"lo","plugins":[{"type":"loopback"}]}')
    (folder / "containerd.toml").write_text(f"""
version = 3
root = "{folder}/scratch/containerd"
state = "{folder}/scratch/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs"]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  enable_cdi = true
  cdi_spec_dirs = ["{folder}/cdi", "/var/run/cdi"]
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{folder}/cni"]
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{IMAGE}"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
""")


def kubelet_settings(folder: Path, port: int) -> dict[str, Any]:
    """The port must not be another program's. A pod that could not start is tried again every 5 s."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "127.0.0.1",
        "port": port,
        "healthzPort": 0,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "podLogsDir": str(folder / "pods"),
        "nodeStatusUpdateFrequency": "1s",
        "syncFrequency": "5s",
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "resolvConf": "",
        "logging": {"verbosity": 3},
    }


def agent_config(folder: Path, dra: Mapping[str, Any]) -> Mapping[str, Any]:
    """The agent's configuration: as shipped, but quick. Tests make device nodes, for which the kernel sends no event:
    the machine is read again often. dra: more keys of that part."""
    return {
        "stateDir": str(folder / "agent/state"),
        "runtimeDir": str(folder / "agent/run"),
        "reservedCpus": "",
        "resyncSeconds": 2,
        "resources": RESOURCES,
        "release": {"pollSeconds": 0.5, "unconfirmedSeconds": 5, "confirmedSeconds": 0.5, "unobservedSeconds": 5},
        "health": {"recoverSeconds": 4, "nvmlSeconds": 2},
        "log": {"level": "debug", "format": "json"},
        "dra": {
            "kubeconfig": str(folder / "agent.kubeconfig"),
            "nodeName": NODE,
            "cdiDir": str(folder / "cdi"),
            "spreadSeconds": 0,
            **dra,
        },
    }
