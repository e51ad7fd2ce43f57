"""The whole agent on a tree whose accelerators have the kernel of tests/doubles/idxd_kernel.py, killed at a step that a
file names: python -m tests.support.queues_agent, with the words of `nodeagent`.

The kernel's state is in the tree of files and outlives the process. QUEUES_NODE is a JSON file: root (the tree), doom
(see tests.support.vfio_agent.Doom). A step is the moment before or after a write to the kernel, or to the journal.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nodeagent.cli import main
from nodeagent.host import vfio
from nodeagent.managers.queues.journal import QueueJournal
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.vfio_agent import Doom


def install(node: Path) -> None:
    """Have this process write to the double, and die as the file says."""
    facts = json.loads(node.read_text())
    kernel, doom = IdxdKernel(Path(facts["root"])), Doom(Path(facts["doom"]))
    vfio.TimedPut.__init__.__defaults__ = (doom.around(kernel.put), vfio.DEADLINE_S)  # type: ignore[misc]
    QueueJournal.change = doom.around(QueueJournal.change)  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["QUEUES_NODE"]))
    sys.exit(main())
