"""The kernel's side of interrupts and their affinity, as strict as the kernel: what it refuses and with which error,
where it delivers, which interrupts a PCI function has, and what becomes of them when a queue goes or the machine boots.

Sources: kernel/irq/proc.c (write_irq_affinity: EIO for a managed interrupt before the text is looked at; EINVAL for
CPUs of which none is online; irq_affinity_list_proc_show), arch/x86/kernel/apic/vector.c (one CPU of the online ones is
chosen, the one with most free vectors; ENOSPC where none has one), drivers/pci/msi/msi.c (msi_irqs), Linux 6.12.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError
from tests.doubles.cpufreq import Dead


@dataclass
class _Line:
    device: str
    name: str
    asked: CpuSet
    delivered: int
    managed: bool


class FakeIrqs:
    """Interrupts below a root; `put` stands for a write to a kernel file."""

    def __init__(self, root: Path, *, cpus: int = 8, vectors: int = 200) -> None:
        """vectors: how many interrupts one CPU can have."""
        self.root, self.vectors = root, vectors
        self.online = CpuSet(range(cpus))
        self.lines: dict[int, _Line] = {}
        self.writes: list[tuple[int, str]] = []
        self.dies_after: int | None = None
        """After how many more writes the process that writes is dead."""
        self._next = 24
        (root / "proc/irq").mkdir(parents=True, exist_ok=True)
        self._write("sys/devices/system/cpu/online", str(self.online))
        self._write("proc/interrupts", "")
        self._write("proc/2/stat", "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0")
        self.boots("boot-1")

    # ---------------------------------------------------------------- the call

    def put(self, path: str, value: str) -> None:
        """Write a value and a newline. Raise HostError as host.cgroup.write.put does."""
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise Dead
            self.dies_after -= 1
        file = Path(path)
        line = self.lines.get(int(file.parent.name))
        if line is None or file.name != "smp_affinity_list":
            raise _refused(path, errno.ENOENT, value)
        if line.managed:
            raise _refused(path, errno.EIO, value)
        try:
            asked = CpuSet.parse(value)
        except InputError:
            raise _refused(path, errno.EINVAL, value) from None
        if not asked & self.online:
            raise _refused(path, errno.EINVAL, value)
        if number := self._deliver(line, asked):
            raise _refused(path, number, value)
        self.writes.append((int(file.parent.name), value))
        self._render()

    # ---------------------------------------------------------------- what else happens on a machine

    def add(self, device: str, name: str, asked: str = "", *, managed: bool = False) -> int:
        """A driver requests another interrupt. Return its number, which no earlier one had."""
        number, self._next = self._next, self._next + 1
        cpus = CpuSet.parse(asked) if asked else self.online
        line = _Line(device, name, cpus, -1, managed)
        assert not self._deliver(line, cpus)
        self.lines[number] = line
        self._render()
        return number

    def free(self, number: int) -> None:
        """A driver gives an interrupt back."""
        (self.root / f"sys/bus/pci/devices/{self.lines.pop(number).device}/msi_irqs/{number}").unlink()
        shutil.rmtree(self.root / f"proc/irq/{number}")
        shutil.rmtree(self.root / f"sys/kernel/irq/{number}")
        self._render()

    def rename(self, number: int, name: str) -> None:
        """A driver requests the same interrupt under another name, as when its interface has got another name."""
        self.lines[number].name = name
        self._render()

    def other(self, number: int, cpus: str) -> None:
        """Another program writes an affinity."""
        dies, self.dies_after = self.dies_after, None
        self.put(str(self.root / f"proc/irq/{number}/smp_affinity_list"), cpus)
        self.writes.pop()
        self.dies_after = dies

    def boots(self, boot_id: str) -> None:
        """The machine boots: every interrupt is where its driver first wants it."""
        self._write("proc/sys/kernel/random/boot_id", boot_id)
        for line in self.lines.values():
            assert not self._deliver(line, self.online)
        self._render()

    def asked(self, number: int) -> str:
        return str(self.lines[number].asked)

    def affinities(self) -> dict[int, str]:
        return {number: str(line.asked) for number, line in self.lines.items()}

    # ---------------------------------------------------------------- its own

    def _deliver(self, line: _Line, asked: CpuSet) -> int:
        """Choose where a line is delivered. Return the number of an error."""
        load = dict.fromkeys(asked & self.online, 0)
        for one in self.lines.values():
            if one is not line and one.delivered in load:
                load[one.delivered] += 1
        free = [cpu for cpu, used in load.items() if used < self.vectors]
        if not free:
            return errno.ENOSPC
        line.asked, line.delivered = asked, min(free, key=lambda cpu: (load[cpu], cpu))
        return 0

    def _render(self) -> None:
        for number, line in self.lines.items():
            self._write(f"proc/irq/{number}/smp_affinity_list", str(line.asked))
            self._write(f"proc/irq/{number}/effective_affinity_list", str(line.delivered))
            self._write(f"sys/kernel/irq/{number}/actions", line.name)
            self._write(f"sys/bus/pci/devices/{line.device}/msi_irqs/{number}", "msix")

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def _refused(path: str, number: int, value: str) -> HostError:
    return HostError(f"cannot write {path}: {os.strerror(number)}, value {value!r}")
