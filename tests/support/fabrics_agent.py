"""The whole agent whose kernel is the one of tests/doubles/fabrics_kernel.py for NVMe over fabrics: python -m
tests.support.fabrics_agent, with the words of `nodeagent`.

The kernel's connections are in the tree of files and outlive the process. FABRICS_NODE is a JSON file: root (the tree),
targets (the NQNs that answer), doom (see tests.support.vfio_agent.Doom). A step is the moment before or after a change
in the kernel, or in the journal.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nodeagent.cli import main
from nodeagent.managers.fabrics import connector
from nodeagent.managers.fabrics.journal import FabricsJournal
from tests.builders.devices import DeviceTree
from tests.doubles.fabrics_kernel import FabricsKernel, Target
from tests.support.vfio_agent import Doom


def kernel_of(facts: dict[str, Any]) -> FabricsKernel:
    """The kernel of a node, with the connections that its tree has."""
    kernel = FabricsKernel(DeviceTree(Path(facts["root"])), [Target(nqn) for nqn in facts["targets"]])
    kernel.load()
    return kernel


def install(node: Path) -> None:
    """Have this process talk to the double, and die as the file says."""
    facts = json.loads(node.read_text())
    doom = Doom(Path(facts["doom"]))

    def host_kernel(sysfs: object) -> FabricsKernel:
        kernel = kernel_of(facts)
        kernel.before = lambda step: doom.step()
        return kernel

    connector.HostKernel = host_kernel  # type: ignore[assignment, misc]
    FabricsJournal.change = doom.around(FabricsJournal.change)  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["FABRICS_NODE"]))
    sys.exit(main())
