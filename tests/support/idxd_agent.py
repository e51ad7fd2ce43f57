"""The whole agent whose kernel is the one of tests/doubles/idxd_kernel.py for DSA and IAA: python -m
tests.support.idxd_agent, with the words of `nodeagent`.

The kernel's state is in the tree of files and outlives the process. IDXD_NODE is a JSON file: root (the tree), doom
(see tests.support.vfio_agent.Doom). A step is the moment before or after a write to the kernel, or to the journal.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nodeagent.cli import main
from nodeagent.host import vfio
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.managers.dsa.journal import DsaJournal
from tests.builders.devices import DeviceTree
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.vfio_agent import Doom


def kernel_of(facts: dict[str, Any]) -> IdxdKernel:
    """The kernel of a node, as its tree has it."""
    return IdxdKernel(DeviceTree(Path(facts["root"])))


def install(node: Path) -> None:
    """Have this process write to the double, and die as the file says."""
    facts = json.loads(node.read_text())
    doom = Doom(Path(facts["doom"]))
    vfio.TimedPut.__init__.__defaults__ = (doom.around(kernel_of(facts).put), vfio.DEADLINE_S)  # type: ignore[misc]
    Accelerators.__init__.__defaults__ = (None, IdxdKernel.numbers_of)  # type: ignore[misc]
    DsaJournal.change = doom.around(DsaJournal.change)  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["IDXD_NODE"]))
    sys.exit(main())
