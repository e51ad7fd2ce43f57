"""A real kubelet in the guest, with containerd and systemd's cgroups; the rest of Kubernetes on this machine.

    NODEAGENT_E2E_BIN=/folder make vm-test

The folder is that of tests/e2e; kubelet has to be a static binary. The guest reaches this machine's loopback at
HOST_ADDRESS (QEMU's user network). Without it the tests are skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import grounds, kubeapi, nodefiles, programs
from tests.e2e.cluster import ADMIN, KUBELET, free_port
from tests.e2e.kubeapi import KubeApi, until
from tests.vm import vmnode
from tests.vm.vmguest import Guest
from tests.vm.vmpods import CPU

HOST_ADDRESS, GUEST_ADDRESS, NODE = "10.0.2.2", "10.0.2.15", nodefiles.NODE
FIRST_LINE = "grep Cpus_allowed_list /proc/self/status; exec sleep infinity"
OWN: Mapping[str, int] = {"one": 2, "two": 1}
"""Pods with so many CPUs of their own."""
CLAIMED, SHARED = "claimed", "shared"
NETWORK = ("-netdev", "user,id=user", "-netdev", "hubport,id=uplink,hubid=0,netdev=user")
KUBECONFIG = "/etc/kubernetes/nodeagent.kubeconfig"
LIFE_S, STEP_S = 3600.0, 480.0
WATCHDOG = "10min"
"""Where one core emulates sixteen that a kubelet and a runtime keep busy, half a second of work takes a minute."""
RESOURCES = [{"name": "cpu", "kind": "cpu", "serve": "both"}]
QUIET = {"nodeStatusUpdateFrequency": "5s", "syncFrequency": "30s", "logging": {"verbosity": 0}}
"""One core emulates sixteen, and kubelet would use most of it."""
UNHURRIED = r'\n  plugin_registration_timeout = "15s"\n  plugin_request_timeout = "10s"'
"""What docs/pinning.md advises for NRI where a node has few CPUs for itself."""
UPLINK = f"""
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'until file=$$(grep -l 52:54:00:00:00:01 /sys/class/net/*/address); do sleep 1; done; \
card=$$(basename $$(dirname $$file)); ip link set $$card up && ip addr replace {GUEST_ADDRESS}/24 dev $$card && \
ip route replace default via {HOST_ADDRESS}'
Restart=on-failure
RestartSec=1
[Install]
WantedBy=multi-user.target
"""
"""The guest's network, also after a reboot."""
UNIT = f"""
[Unit]
After=containerd.service uplink.service
[Service]
ExecStart=/usr/local/bin/kubelet --config={nodefiles.KUBELET_CONFIG} --kubeconfig=/etc/kubernetes/kubelet.kubeconfig \
--hostname-override={NODE} --node-ip={GUEST_ADDRESS}
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"""


class ControlPlane:
    """The API server and what it needs, as processes of this machine on loopback."""

    def __init__(self, folder: Path, gates: Sequence[str] = ()) -> None:
        """gates: features of Kubernetes that are turned on, but for kubelet."""
        self.folder = folder
        self._gates = tuple(gates)
        self.ports = {name: free_port() for name in ("api", "etcd", "peer")}
        self.api = KubeApi(self.ports["api"], ADMIN)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        tokens = (f"{ADMIN},admin,admin,system:masters", f"{KUBELET},system:node:{NODE},{NODE},system:nodes")
        (self.folder / "tokens.csv").write_text("\n".join(tokens) + "\n")
        nodefiles.write_kubeconfig(self.folder / "admin.kubeconfig", self.ports["api"], ADMIN)
        for words in (("genrsa", "-out", "sa.key", "2048"), ("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")):
            subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)
        for name in ("etcd", "kube-apiserver"):
            self._start(name)
        until("the API server is ready", self.api.ready, STEP_S)
        for name in ("kube-controller-manager", "kube-scheduler"):
            self._start(name)
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        until("there is a default service account", lambda: self.api.find(account), STEP_S)
        for name in ("rbac.yaml", "deviceclasses.yaml"):
            for document in yaml.safe_load_all((vmnode.vmimage.CHECKOUT / "deploy" / name).read_text()):
                self.api.create(document)

    def down(self) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The API server keeps its connections and answers nothing."""
        server = self._processes["kube-apiserver"]
        server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.send_signal(signal.SIGCONT)

    def _start(self, name: str) -> None:
        gates = self._gates if name.startswith("kube-") else ()
        words = programs.command(name, self.folder, self.ports, gates)
        with (self.folder / f"{name}.log").open("wb") as log:
            env = {**os.environ, "PATH": grounds.path()}
            self._processes[name] = subprocess.Popen(words, stdout=log, stderr=log, env=env)


class Node:
    """What tests touch: the guest, and the API server that its kubelet belongs to."""

    def __init__(self, guest: Guest, plane: ControlPlane) -> None:
        self.guest, self.plane, self.api = guest, plane, plane.api
        self._containers: dict[str, str] = {}
        """By pod: what it ran when it was last looked at, for while the API server cannot be asked."""

    def ready(self) -> None:
        self.guest.run("nodeagent status | grep ', ready'", STEP_S, until=True)

    def grants(self, *, until: bool = False) -> dict[str, str]:
        """CPUs by the id of their grant. until: as soon as an agent answers, which is none while it is replaced."""
        found = json.loads(self.guest.run("nodeagent grants -o json", until=until))
        return {one["id"]: one["cpus"] for one in found}

    def status(self) -> dict[str, Any]:
        """As soon as the agent answers: where one core emulates sixteen, kubelet's start alone may keep it too long."""
        found: dict[str, Any] = json.loads(self.guest.run("nodeagent status -o json", until=True))
        return found

    def run_pod(self, name: str, cpus: int = 0, claim: str = "") -> None:
        """Create a pod with so many CPUs of its own, and wait until it runs."""
        self.create_pod(name, cpus, claim)
        self.runs(name)

    def create_pod(self, name: str, cpus: int = 0, claim: str = "") -> None:
        """It says in its first line on which CPUs it may run."""
        limits = {CPU: str(cpus)} if cpus else {}
        document = kubeapi.pod(name, claims={"mine": claim} if claim else None, limits=limits)
        document["spec"]["containers"][0]["command"] = ["/bin/sh", "-c", FIRST_LINE]
        self.api.create(document)

    def runs(self, name: str, after: str = "") -> None:
        """Wait until a pod's container runs. after: the id of an earlier one, which it is not."""
        try:
            until(f"pod {name} runs", lambda: self.container(name) not in ("", after), STEP_S)
        except AssertionError as error:
            status = (self.api.find(kubeapi.pod_path(name)) or {}).get("status")
            said = self.guest.run("nodeagent status; systemctl --no-pager status kubelet containerd nodeagent | cat")
            raise AssertionError(f"{error}: {json.dumps(status)}\n{said}") from None

    def runs_or_is_rejected(self, name: str, after: str) -> bool:
        """Wait until another container of a pod runs, or kubelet has rejected the pod. Return whether it has
        been rejected."""

        def look() -> str:
            status = (self.api.find(kubeapi.pod_path(name)) or {"status": {}})["status"]
            rejected = status.get("reason") == "UnexpectedAdmissionError"
            return "rejected" if rejected else "runs" if self.container(name) not in ("", after) else ""

        return until(f"pod {name} runs or is rejected", look, STEP_S) == "rejected"

    def first_cpus(self, pod: str) -> str:
        """On which CPUs the first instruction of a pod's newest container ran."""
        newest = f"$(ls -tr /var/log/pods/default_{pod}_*/main/*.log | tail -n 1)"
        said = self.guest.run(f"grep -m 1 Cpus_allowed_list {newest}", until=True)
        return said.split()[-1]

    def container(self, pod: str) -> str:
        """The id of a pod's running container; "" while there is none."""
        status = (self.api.find(kubeapi.pod_path(pod)) or {"status": {}})["status"]
        found = [one for one in status.get("containerStatuses", ()) if "running" in one["state"]]
        self._containers[pod] = found[0]["containerID"].rpartition("/")[2] if found else ""
        return self._containers[pod]

    def delete_pod(self, name: str) -> None:
        self.api.delete(kubeapi.pod_path(name))
        until(f"pod {name} is gone", lambda: self.api.find(kubeapi.pod_path(name)) is None, STEP_S)

    def effective(self, pod: str) -> str:
        """On which CPUs a pod's container may run, by the kernel."""
        return self.guest.run(f"cat $({self.scope(pod)})/cpuset.cpus.effective").strip()

    def kill(self, pod: str, *others: str) -> None:
        """End the processes of a pod's container, for kubelet to start it again. others: more processes."""
        self.guest.run(f"kill -9 $(cat $({self.scope(pod)})/cgroup.procs) {' '.join(others)}")

    def listed_since(self, since: float) -> None:
        """Wait until kubelet has listed pods after that time."""
        until("kubelet lists pods", lambda: (self.status()["listed_at"] or 0) > since, STEP_S)

    def scope(self, pod: str) -> str:
        """The command that finds the cgroup of a pod's container."""
        return f"find /sys/fs/cgroup/kubepods.slice -name cri-containerd-{self._containers[pod]}.scope"


@contextlib.contextmanager
def node(*, gates: Sequence[str] = (), **config: Any) -> Iterator[Node]:
    """A node with the agent's unit running and ready. gates: of Kubernetes, turned on but for kubelet; config: keys of
    the agent's configuration. Skips where there can be none."""
    with without_agent(gates=gates, **config) as made:
        _install_agent(made.guest, made.plane)
        made.ready()
        yield made


@contextlib.contextmanager
def without_agent(*, gates: Sequence[str] = (), **config: Any) -> Iterator[Node]:
    """A node that is Ready in its API server; the agent's wheel and unit are installed and not started."""
    if not os.environ.get("NODEAGENT_VM"):
        pytest.skip("tests in a guest run with `make vm-test`")
    if reason := grounds.lacking():
        pytest.skip(reason)
    dra = {"kubeconfig": KUBECONFIG, "nodeName": NODE}
    config = {"resyncSeconds": 3600, "release": {}, "resources": RESOURCES, "dra": dra, **config}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-plane-", ignore_cleanup_errors=True)))
        plane = ControlPlane(folder, gates)
        stack.callback(plane.down)
        plane.up()
        guest = stack.enter_context(vmnode.booted(life_s=LIFE_S, devices=NETWORK, **config))
        _prepare(guest, plane)
        made = Node(guest, plane)
        until("the node is Ready", lambda: _is_ready(plane.api), STEP_S)
        yield made


@contextlib.contextmanager
def pods(node: Node) -> Iterator[dict[str, str]]:
    """Pods with CPUs of their own, one of a claim, one without any; the CPUs on which each may run."""
    for name, count in OWN.items():
        node.run_pod(name, count)
    node.api.create(kubeapi.claim("claim", kubeapi.request("cpus", "cpu", cpus="2")))
    node.run_pod(CLAIMED, claim="claim")
    node.run_pod(SHARED)
    found = {name: node.effective(name) for name in (*OWN, CLAIMED, SHARED)}
    assert sorted(found[name] for name in (*OWN, CLAIMED)) == sorted(node.grants().values())
    yield found
    for name in found:
        node.delete_pod(name)


def _prepare(guest: Guest, plane: ControlPlane) -> None:
    """The network, the runtime with its images, kubelet."""
    vmnode.prepare_runtime(guest)
    guest.run(f"sed -i 's/^  disable = false/&{UNHURRIED}/' /etc/containerd/config.toml")
    guest.run("systemctl restart containerd")
    nodefiles.write_image(guest.share / "box.tar", grounds.busybox() or Path())
    guest.run("ctr -n k8s.io images import /share/box.tar")
    kubernetes = guest.share / "kubernetes"
    kubernetes.mkdir()
    settings = nodefiles.kubelet_settings(kubernetes, 10250)
    settings |= {"cgroupDriver": "systemd", "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock"}
    settings |= {"podLogsDir": "/var/log/pods", "failCgroupV1": True, "address": GUEST_ADDRESS, **QUIET}
    (kubernetes / nodefiles.KUBELET_CONFIG.name).write_text(json.dumps(settings))
    nodefiles.write_kubeconfig(kubernetes / "kubelet.kubeconfig", plane.ports["api"], KUBELET, host=HOST_ADDRESS)
    (kubernetes / "kubelet.service").write_text(UNIT)
    (kubernetes / "uplink.service").write_text(UPLINK)
    shutil.copy(Path(os.environ["NODEAGENT_E2E_BIN"]) / "kubelet", kubernetes)
    for place in (nodefiles.KUBELET_CONFIG, "/etc/kubernetes/kubelet.kubeconfig"):
        guest.run(f"install -D -m 644 /share/kubernetes/$(basename {place}) {place}")
    guest.run("install -m 755 /share/kubernetes/kubelet /usr/local/bin/ && mkdir -p /etc/cni/net.d", 300)
    loopback = '{"cniVersion":"1.0.0","name":"lo","plugins":[{"type":"loopback"}]}'
    guest.run(f"echo '{loopback}' >/etc/cni/net.d/10-lo.conflist")
    guest.run("cp /share/kubernetes/*.service /etc/systemd/system/ && systemctl enable --now uplink kubelet")


def _install_agent(guest: Guest, plane: ControlPlane) -> None:
    """With the drop-in for DRA and the token that its pod on this node would have."""
    uid = plane.api.call("GET", f"/api/v1/nodes/{NODE}")["metadata"]["uid"]
    bound = {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": uid}
    asked = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1"}
    asked["spec"] = {"boundObjectRef": bound, "audiences": ["https://e2e"]}
    path = "/api/v1/namespaces/nodeagent/serviceaccounts/nodeagent/token"
    token = plane.api.call("POST", path, asked)["status"]["token"]
    nodefiles.write_kubeconfig(guest.share / "agent.kubeconfig", plane.ports["api"], token, host=HOST_ADDRESS)
    guest.run(f"install -D -m 600 /share/agent.kubeconfig {KUBECONFIG}")
    drop_in = "/etc/systemd/system/nodeagent.service.d/nodeagent-dra.conf"
    guest.run(f"install -D -m 644 /share/systemd/nodeagent-dra.conf {drop_in}")
    guest.run(
        f"printf '[Service]\\nWatchdogSec={WATCHDOG}\\n' >{drop_in.replace('-dra', '-slow')} && systemctl daemon-reload"
    )
    guest.run("systemctl enable --now --no-block nodeagent")


def _is_ready(api: KubeApi) -> bool:
    found = api.find(f"/api/v1/nodes/{NODE}") or {"status": {}}
    return any(one["type"] == "Ready" and one["status"] == "True" for one in found["status"].get("conditions", ()))
