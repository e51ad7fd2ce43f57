"""The whole agent on a tree whose PCI functions have the kernel of tests/doubles/pci_drivers.py, killed at a step that
a file names: python -m tests.support.vfio_agent, with the words of `nodeagent`.

What the agent writes to its sysfs is taken by that kernel in the agent's own process, at once as by the real one; the
tree has its state, which outlives the process. A step is the moment before or after a write to the kernel, or to the
journal of what is bound. VFIO_NODE is a JSON file: root, tables (functions by driver), doom (see `Doom`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodeagent.cli import main
from nodeagent.host import vfio
from nodeagent.managers.passthrough.journal import PassthroughJournal
from tests.doubles.pci_drivers import PciKernel


class Doom:
    """A file with a name and a number: at that step from now on this process is killed, if the file is still there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name, self._left = "", 0

    def step(self) -> None:
        try:
            name, number = self._path.read_text().split()
        except FileNotFoundError:
            return
        if name != self._name:
            self._name, self._left = name, int(number)
        self._left -= 1
        if self._left == 0:
            try:
                self._path.unlink()
            except FileNotFoundError:
                return  # it was taken back
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            self.step()
            answer = work(*args)
            self.step()
            return answer

        return stepped


def install(node: Path) -> None:
    """Have this process write to the double, and die as the file says."""
    facts = json.loads(node.read_text())
    tables = {driver: frozenset(functions) for driver, functions in facts["tables"].items()}
    kernel, doom = PciKernel(Path(facts["root"]), tables), Doom(Path(facts["doom"]))
    vfio.TimedPut.__init__.__defaults__ = (doom.around(kernel.put), vfio.DEADLINE_S)  # type: ignore[misc]
    PassthroughJournal.change = doom.around(PassthroughJournal.change)  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["VFIO_NODE"]))
    sys.exit(main())
