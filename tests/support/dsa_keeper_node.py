"""A node with an accelerator that is given to the agent, on a double of the kernel, and the keeper of an agent that may
be killed and started again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodeagent.core.dsa.division import Queue, Rule, device_id
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.accelerators.accel import Accel
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.accelerators.dsa_queue import DsaQueue
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper
from nodeagent.managers.dsa.wanted import Wanted
from tests.builders.devices import DeviceTree
from tests.doubles.idxd_kernel import IdxdKernel

AT = "0000:6a:01.0"
BIG, SMALL = Queue(size=32, priority=10), Queue(size=16, priority=5)
QUEUES = (BIG, BIG, SMALL)
IDS = [device_id(AT, slot, queue) for slot, queue in enumerate(QUEUES)]


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


class Mortal(DsaJournal):
    """Calls before and after each write to the file."""

    before: Callable[[str], None] = staticmethod(lambda step: None)

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(state_dir, boot_id)
        self._file._durable = False  # no power cut is tried

    def change(self, *args: Any) -> None:
        self.before("journal")
        super().change(*args)
        self.before("journal")


class Direct(TimedPut):
    """Writes in the caller's thread, so that it dies with it."""

    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {text.strip()} to {path}: {error.strerror}") from None


class Node:
    """An accelerator with its kernel, and an agent's keeper, which may be killed and started again."""

    def __init__(self, folder: Path, **kernel: Any) -> None:
        self.kernel = IdxdKernel(DeviceTree(folder / "root"), **kernel)
        self.kernel.add("dsa0", AT, wqs=6)
        self.state = folder / "state"
        self.state.mkdir()
        self.boot = 0
        self.start()

    def start(self) -> None:
        self.sysfs = SysFs(self.kernel.tree.root)
        self.journal = Mortal(self.state, f"boot-{self.boot}")
        self.keeper = QueueKeeper(self.journal, self.accelerators(), self.kernel.passes)

    def accelerators(self) -> Accelerators:
        """The kernel, as the agent reads and writes it."""
        return Accelerators(self.sysfs, Direct(self.kernel.put), self.kernel.numbers_of)

    def die_at(self, step: Callable[[str], None]) -> None:
        self.journal.before = step  # type: ignore[method-assign]
        self.kernel.before = self.kernel.after = lambda path, text: step("write")

    def make(self, slot: int, claim: str = "c", queues: tuple[Queue, ...] = QUEUES) -> bool:
        wanted = Wanted(address=AT, slot=slot, claim=claim, grant=f"g-{claim}", queues=queues)
        return self.keeper.make(wanted)

    def down(self, *slots: int) -> dict[tuple[str, int], str]:
        return self.keeper.take_down([(AT, slot) for slot in slots])

    def label(self, slot: int) -> str:
        """The name that the agent gives to a queue."""
        return self.keeper.records()[AT].label(slot)

    def during_record(self, number: int, act: Callable[[], object]) -> None:
        """Have something done before a record is written (0, 2, …) or after it (1, 3, …)."""
        steps = itertools.count()

        def step(_step: str) -> None:
            if next(steps) == number:
                act()

        self.journal.before = step  # type: ignore[method-assign]

    def is_made(self, slot: int) -> bool:
        wq, queue, label = f"wq0.{slot}", QUEUES[slot], self.label(slot)
        files = {"type": "user", "name": label, "mode": "dedicated", "size": str(queue.size)}
        files |= {"priority": str(queue.priority), "threshold": "0", "state": "enabled"}
        there = {file: self.kernel.get(wq, file) for file in files}
        return there == files and self.kernel.driver(wq) == "user"

    def is_untouched(self) -> bool:
        return self.kernel.is_untouched("dsa0") and not self.keeper.records() and not self.journal.path.exists()

    def slots(self, queues: tuple[Queue, ...] | None = QUEUES) -> list[str]:
        """The slots that a scan offers."""
        rules = () if queues is None else (Rule(accelerators=("dsa*",), queues=queues),)
        selector = all_kinds.DsaSelector(rules=rules, divided=self.keeper.records)
        kinds = Accel(), Dsa(), DsaQueue()
        found = all_kinds.discover(self.sysfs, kinds, all_kinds.read_context(self.sysfs, dsa=selector))
        self.said = next(one.reason or "" for one in found.kinds if one.kind == "dsa-queue")
        self.others = [one.id for one in found.devices if one.kind == "dsa"]
        self.whole = [one.id for one in found.devices if one.kind == "accel"]
        return [str(one.attributes["slot"]) for one in found.devices if one.kind == "dsa-queue"]
