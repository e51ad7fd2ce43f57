"""How each program of a node is called. Nothing listens elsewhere than on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.e2e.nodefiles import KUBELET_CONFIG, NODE

SERVICES, API_SERVICE, API_PORT = "127.0.96.0/24", "127.0.96.1", 443
"""The addresses of Services, and the first of them, which pods find the API server at: on loopback, as nothing here
translates addresses (forward.py)."""


def command(name: str, folder: Path, ports: Mapping[str, int], gates: Iterable[str] = ()) -> list[str]:
    """The words; any name that is none of Kubernetes is an agent's. gates: of Kubernetes, to be turned on."""
    programs = {
        "etcd": _etcd,
        "kube-apiserver": _apiserver,
        "kube-scheduler": _scheduler,
        "kube-controller-manager": _controllers,
        "kubelet": _kubelet,
        "containerd": _containerd,
    }
    if name not in programs:
        return _agent(folder)
    flags = [f"--{flag}={value}" for flag, value in programs[name](folder, ports).items()]
    return [name, *flags, *(f"--feature-gates={gate}=true" for gate in gates)]


def _etcd(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    clients, peers = (f"http://127.0.0.1:{ports[one]}" for one in ("etcd", "peer"))
    return {
        "data-dir": folder / "scratch/etcd",
        "listen-client-urls": clients,
        "advertise-client-urls": clients,
        "listen-peer-urls": peers,
        "initial-advertise-peer-urls": peers,
        "initial-cluster": f"default={peers}",
        "unsafe-no-fsync": "true",
    }


def _apiserver(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    return {
        "etcd-servers": f"http://127.0.0.1:{ports['etcd']}",
        "secure-port": ports["api"],
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "cert-dir": folder / "apicert",
        "token-auth-file": folder / "tokens.csv",
        "service-account-issuer": "https://e2e",
        "service-account-key-file": folder / "sa.pub",
        "service-account-signing-key-file": folder / "sa.key",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "service-cluster-ip-range": SERVICES,
        "endpoint-reconciler-type": "none",
        "allow-privileged": "true",
    }


def _scheduler(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    return {"kubeconfig": folder / "admin.kubeconfig", "secure-port": 0, "leader-elect": "false"}


def _controllers(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    own = {"service-account-private-key-file": folder / "sa.key", "root-ca-file": folder / "apicert/apiserver.crt"}
    return {**_scheduler(folder, ports), **own}


def _kubelet(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    return {
        "config": KUBELET_CONFIG,
        "kubeconfig": folder / "kubelet.kubeconfig",
        "cert-dir": folder / "kubeletcert",
        "hostname-override": NODE,
        "node-ip": "127.0.0.1",
    }


def _containerd(folder: Path, ports: Mapping[str, int]) -> dict[str, object]:
    return {"config": folder / "containerd.toml"}


def _agent(folder: Path) -> list[str]:
    """The made-up machine is the agent's alone, but for the cgroups: the others need the real one."""
    cgroups = f"{folder}/machine/sys/fs/cgroup"
    bind = f"mkdir -p {cgroups} && mount --rbind /sys/fs/cgroup {cgroups} && mount --rbind {folder}/machine/sys /sys"
    bind += f" && mount --bind {folder}/machine/proc/driver /proc/driver"
    script = f'{bind} && exec "$@"'
    agent = [sys.executable, "-m", "nodeagent", "run", "--config", f"{folder}/agent/config.yaml"]
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *agent]
