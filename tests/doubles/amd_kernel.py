"""The part of amdgpu and KFD that partitions GPUs, on a tree of files: what becomes of what is written.

As strict as the driver (drivers/gpu/drm/amd/amdgpu: amdgpu_gfx.c, amdgpu_xcp.c, amdgpu_gmc.c, aqua_vanjaram.c; amdkfd:
kfd_device.c, kfd_topology.c). A compute partition that the memory partition does not allow is EINVAL; while a process
may use the GPU through KFD, or on an older kernel any GPU, it is EBUSY. KFD then takes its nodes away and adds new ones
at the end, so that other GPUs' nodes get other numbers. A memory partition is a request, which no file shows, one for
all GPUs of a hive; requesting the one that is there does nothing, and does not take an earlier request back. It comes
true when the driver is loaded again, which also chooses the compute partition again. No event is sent.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.builders.devices import DeviceTree

COUNT = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4}
SUPPORTED = {8: ("SPX", "DPX", "QPX", "CPX"), 6: ("SPX", "TPX", "CPX"), 4: ("SPX", "DPX", "CPX")}
"""By number of compute dies (XCC)."""
MEMORY: Mapping[str, tuple[str, ...]] = {
    "SPX": ("NPS1",),
    "DPX": ("NPS1", "NPS2"),
    "TPX": ("NPS1", "NPS4"),
    "QPX": ("NPS1", "NPS4"),
    "CPX": ("NPS1", "NPS4"),
}
AUTO = {"NPS1": "SPX", "NPS2": "DPX", "NPS4": "CPX", "NPS8": "CPX"}
"""What a driver that is loaded chooses, of a GPU with 8 dies."""


@dataclass
class Gpu:
    address: str
    card: int
    hive: str
    dies: int
    memories: tuple[str, ...]
    compute: str = "SPX"
    memory: str = "NPS1"
    requested: str = ""
    loads: int = 0

    @property
    def partitions(self) -> int:
        return COUNT.get(self.compute, self.dies)

    @property
    def possible(self) -> list[str]:
        return [one for one in SUPPORTED[self.dies] if self.memory in MEMORY[one]]


@dataclass
class AmdKernel:
    """`put` is to be given to what writes."""

    tree: DeviceTree
    older: bool = False
    """Whether any process that uses KFD keeps every GPU from being partitioned."""
    before: Callable[[str, str], None] = lambda address, text: None
    """Called before each write takes effect; may raise or hang."""
    after: Callable[[str, str], None] = lambda address, text: None
    refusals: dict[str, int] = field(default_factory=dict)
    """Error number of a GPU whose driver refuses every write."""
    written: list[tuple[str, str, str]] = field(default_factory=list)
    gpus: dict[str, Gpu] = field(default_factory=dict)
    _nodes: list[tuple[str, int]] = field(default_factory=list)
    _processes: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """GPUs that each process may use through KFD."""

    def __post_init__(self) -> None:
        (self.tree.root / "proc/1/fd").mkdir(parents=True)
        (self.tree.root / "sys/class/kfd/kfd/proc").mkdir(parents=True)
        self.tree.node("/dev/kfd")

    def gpu(
        self, address: str, *, hive: str = "", dies: int = 8, memories: Sequence[str] = ("NPS1", "NPS4"), uuid: int = 0
    ) -> None:
        """A GPU, unpartitioned. hive: XGMI connects those with the same name. Without `memories` there is no choice."""
        card = 1 + 16 * len(self.gpus)
        one = Gpu(address, card, hive, dies, tuple(memories))
        self.tree.pci(address, pci_class="120000", vendor="1002", device="74a1", driver="amdgpu", numa_node=0)
        self.tree.write(f"sys/bus/pci/devices/{address}/unique_id", f"{uuid or 0x1000 + card:016x}")
        self.tree.drm(address, card)
        for number in range(card, card + dies):
            self.tree.node(f"/dev/dri/renderD{128 + number}")
        self.tree.node(f"/dev/dri/card{card}")
        self.gpus[address] = one
        self._nodes += [(address, 0)]
        self._show()

    def put(self, path: str, text: str) -> None:
        """Take what is written to a file. Raise OSError as the driver does."""
        parts = Path(path).relative_to(self.tree.root).parts
        assert parts[:4] == ("sys", "bus", "pci", "devices") and len(parts) == 6, path
        address, file = parts[4:]
        self.before(address, text)
        self.written.append((address, file, text))
        if address not in self.gpus:
            raise _error(errno.ENOENT)
        if address in self.refusals:
            raise _error(self.refusals[address])
        if file == "current_compute_partition":
            self._partition(self.gpus[address], text)
        elif file == "current_memory_partition":
            self._request(self.gpus[address], text)
        else:
            raise AssertionError(f"nothing writes to {file}")
        self.after(address, text)

    def _partition(self, gpu: Gpu, text: str) -> None:
        mode = next((one for one in (*COUNT, "CPX") if text.upper().startswith(one)), "")
        if not mode:
            raise _error(errno.EINVAL)
        if mode == gpu.compute:
            return
        if mode not in gpu.possible:
            raise _error(errno.EINVAL)
        if self._processes if self.older else any(gpu.address in some for some in self._processes.values()):
            raise _error(errno.EBUSY)
        gpu.compute = mode
        self._renumber(gpu)

    def _request(self, gpu: Gpu, text: str) -> None:
        mode = next((one for one in gpu.memories if text.upper().startswith(one)), "")
        if len(gpu.memories) < 2:
            raise _error(errno.EACCES)
        if not mode:
            raise _error(errno.EINVAL)
        if mode != gpu.memory:
            for one in self._hive(gpu):
                one.requested = mode

    def _hive(self, gpu: Gpu) -> list[Gpu]:
        return [one for one in self.gpus.values() if one is gpu or (gpu.hive and one.hive == gpu.hive)]

    # ---------------------------------------------------------------- what others do

    def reload(self) -> None:
        """modprobe -r amdgpu && modprobe amdgpu: refused while anything uses a GPU."""
        assert not self._processes, "the module is in use"
        for gpu in self.gpus.values():
            gpu.memory, gpu.requested = gpu.requested or gpu.memory, ""
            self._loaded(gpu)

    def reboot(self) -> None:
        """A request that no unloading has passed on is lost."""
        for gpu in self.gpus.values():
            gpu.requested = ""
            self._loaded(gpu)

    def _loaded(self, gpu: Gpu) -> None:
        gpu.compute, gpu.loads = AUTO[gpu.memory], gpu.loads + 1
        driver = self.tree.root / "sys/bus/pci/devices" / gpu.address / "driver"
        target = os.readlink(driver)
        fresh = driver.with_name(f"driver-{gpu.loads}")
        fresh.symlink_to(target)  # made before the old one goes: another inode
        os.replace(fresh, driver)
        self._renumber(gpu)

    def computes(self, pid: int, *gpus: str) -> None:
        """A process opens /dev/kfd; its device cgroup lets it use these GPUs, or all."""
        self._processes[pid] = gpus or tuple(self.gpus)
        self._show()

    def opens(self, pid: int, path: str) -> None:
        """A process opens a device node."""
        folder = self.tree.root / f"proc/{pid}/fd"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(3 + len(list(folder.iterdir())))).symlink_to(path)

    def ends(self, pid: int) -> None:
        self._processes.pop(pid, None)
        shutil.rmtree(self.tree.root / f"proc/{pid}", ignore_errors=True)
        self._show()

    # ---------------------------------------------------------------- what is shown

    def _renumber(self, gpu: Gpu) -> None:
        others = [one for one in self._nodes if one[0] != gpu.address]
        self._nodes = [*others, *((gpu.address, number) for number in range(gpu.partitions))]
        self._show()

    def _show(self) -> None:
        kfd = self.tree.root / "sys/class/kfd/kfd"
        shutil.rmtree(kfd / "topology", ignore_errors=True)
        self.tree.kfd(0, None)
        numbers = {place: number for number, place in enumerate(self._nodes, 1)}
        for (address, partition), number in numbers.items():
            gpu = self.gpus[address]
            peers = [at for (other, _), at in numbers.items() if other != address and self._linked(address, other)]
            memory = (192 << 30) // int(gpu.memory[-1])
            render = 128 + gpu.card + partition
            self.tree.kfd(number, address, peers, partition=partition, render=render, memory_bytes=memory)
            self.tree.write(f"sys/class/kfd/kfd/topology/nodes/{number}/gpu_id", _gpu_id(gpu, partition))
        for gpu in self.gpus.values():
            files = {
                "current_compute_partition": gpu.compute,
                "available_compute_partition": ", ".join(gpu.possible),
                "current_memory_partition": gpu.memory,
                **({"available_memory_partition": ", ".join(gpu.memories)} if len(gpu.memories) > 1 else {}),
            }
            for name, text in files.items():
                self.tree.write(f"sys/bus/pci/devices/{gpu.address}/{name}", text)
        shutil.rmtree(kfd / "proc")
        (kfd / "proc").mkdir()
        for pid, addresses in self._processes.items():
            (kfd / f"proc/{pid}").mkdir()
            for address in addresses:
                for partition in range(self.gpus[address].partitions):
                    (kfd / f"proc/{pid}/vram_{_gpu_id(self.gpus[address], partition)}").write_text("0\n")

    def _linked(self, a: str, b: str) -> bool:
        return bool(self.gpus[a].hive) and self.gpus[a].hive == self.gpus[b].hive


def _gpu_id(gpu: Gpu, partition: int) -> int:
    """KFD's hash of a node: that of a partition is another one than that of the whole."""
    return 10000 * gpu.card + 1000 * list(SUPPORTED[gpu.dies]).index(gpu.compute) + partition + 7


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
