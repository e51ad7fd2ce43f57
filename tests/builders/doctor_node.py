"""A node in a folder, for `nodeagent doctor`: its /sys, /proc and /etc, its kubelet's folder, its ledger, its agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nodeagent.cli.node.doctor.node import Node
from nodeagent.cli.node.doctor.probes import DiskSpace, Probes
from nodeagent.core.ledger.ledger import GRANTED, Change
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.errors import PeerError
from nodeagent.state.store import Store
from nodeagent.version import VERSION
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet_process import kubelet, process, put

BOOT = "0b6e1c1a-4d0e-4c1e-9d52-3a8f3a2f9e11"
GPU = "0000:41:00.0"


class FakeProbes(Probes):
    """A machine that answers what it was told to."""

    def __init__(self, **answers: Any) -> None:
        self.answers_by_name = answers

    def space(self, folder: Path) -> DiskSpace:
        return self._said("space", DiskSpace(str(folder), "ext4", 1 << 30, 1000, 2000))

    def sync_s(self, folder: Path) -> float:
        return self._said("sync_s", 0.001)

    def clock_is_synchronised(self) -> bool:
        return self._said("clock_is_synchronised", True)

    def output(self, *words: str) -> str:
        return self._said(words[0].rpartition("/")[2], "")

    def answers(self, host: str, port: int) -> bool:
        return self._said("answers", False)

    def library_error(self) -> str:
        return self._said("library_error", "")

    def _said(self, name: str, otherwise: Any) -> Any:
        return self.answers_by_name.get(name, otherwise)


class BuiltNode:
    """Eight cores on two NUMA nodes, on which all is well and no agent runs."""

    def __init__(self, folder: Path) -> None:
        self.root = machine(folder / "root", "1s2n8c")
        self.devices = DeviceTree(self.root)
        self.kubelet_dir = folder / "kubelet"
        self.kubelet_dir.mkdir()
        self.state_dir = folder / "state"
        self.socket = folder / "status.sock"
        self.live = True
        self.probes: dict[str, Any] = {}
        self.status: dict[str, Any] | None = None
        self.refusal = "cannot ask the agent at status.sock: No such file or directory"
        self.configuration: dict[str, Any] = {}
        (self.root / "proc/self/ns").mkdir(parents=True)
        (self.root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
        self.write("proc/sys/kernel/random/boot_id", BOOT)
        self.process(1, "/sbin/init", name="systemd")

    def write(self, path: str, text: str) -> Path:
        return self.devices.write(path, text)

    def configure(self, **config: Any) -> None:
        self.configuration |= config
        self.write("etc/nodeagent/config.yaml", json.dumps(self.configuration))

    def process(self, pid: int, *words: str, name: str) -> None:
        process(self.root, pid, *words, name=name)

    def kubelet(self, text: str = "", *flags: str) -> None:
        """A kubelet that runs, with a configuration file."""
        put(self.root / "var/lib/k.yaml", text)
        kubelet(self.root, self.kubelet_dir, "--config=/var/lib/k.yaml", *flags)

    def kubelet_file(self, path: str, text: str = "") -> None:
        (self.kubelet_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (self.kubelet_dir / path).write_text(text)

    def checkpoint(self, *resources: str) -> None:
        registered = {one: ["a"] for one in resources}
        data = {"Data": {"PodDeviceEntries": None, "RegisteredDevices": registered}, "Checksum": 0}
        self.kubelet_file("device-plugins/kubelet_internal_checkpoint", json.dumps(data))

    def gpu(self, driver: str | None = "nvidia") -> None:
        self.devices.pci(GPU, pci_class="030200", vendor="10de", device="2330", driver=driver, numa_node=0)

    def cgroups(self, controllers: str = "cpuset cpu memory", pods_cpus: str = "0-7") -> None:
        """cgroup v2 with the pods of kubelet's systemd driver."""
        self.write("sys/fs/cgroup/cgroup.controllers", controllers)
        files = {
            "cgroup.controllers": controllers,
            "cgroup.events": "populated 1\nfrozen 0",
            "cpuset.cpus": pods_cpus,
            "cpuset.cpus.effective": pods_cpus,
            "cpuset.cpus.partition": "member",
            "cpuset.mems": "",
            "cpuset.mems.effective": "0-1",
        }
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/kubepods.slice/{name}", text)

    def grant(self, cpus: str, boot: str = BOOT) -> None:
        """A grant in the ledger."""
        self.state_dir.mkdir(exist_ok=True, mode=0o700)
        holder = Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/cpu", namespace="a", pod="b", container="c")
        store = Store(self.state_dir)
        grant = Grant(id=f"g-{cpus}", holder=holder, cpus=CpuSet.parse(cpus), boot_id=boot)
        store.save([Change(action=GRANTED, grant=grant)], op="test", at=1.0)
        store.close()

    def answer(self, **status: Any) -> None:
        """An agent answers with this status."""
        good = {"version": VERSION, "ready": True, "boot_id": BOOT, "refused": {}, "inventory": {}}
        self.status = {**good, "not_ready": [], "notes": [], "conflicts": [], **status}

    def page(self, path: str) -> Any:
        if self.status is None:
            raise PeerError(self.refusal)
        return self.status

    def node(self) -> Node:
        return Node(
            root=str(self.root),
            page=self.page,
            live=self.live,
            now_s=1.0,
            kubelet_dir=self.kubelet_dir,
            state_dir=self.state_dir,
            socket=self.socket,
            probes=FakeProbes(**self.probes),
        )
