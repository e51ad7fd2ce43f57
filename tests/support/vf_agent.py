"""The whole agent whose kernel is the one of tests/doubles/vf_kernel.py for virtual functions, killed at a step that a
file names: python -m tests.support.vf_agent, with the words of `nodeagent`.

A step is the moment before or after a change in the kernel, or in the journal of what was set. The kernel's state is in
a file, which outlives the process. VF_NODE is a JSON file: pf (PCI address), interface, count (of virtual functions),
state (the kernel's file), doom (see tests.support.vfio_agent.Doom). With INTERFACE_NODE it is the agent of
tests.support.interface_agent as well.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nodeagent.cli import main
from nodeagent.managers.network.vf_properties import VfPropertiesManager
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.managers.network.vf_setter import VfSetter
from tests.doubles.vf_kernel import VfKernel
from tests.support import interface_agent
from tests.support.vfio_agent import Doom


def kernel_of(facts: dict[str, Any]) -> VfKernel:
    """The kernel of a node, with the state that its file has."""
    kernel = VfKernel(file=Path(facts["state"]))
    kernel.add(facts["interface"], facts["pf"], facts["count"])
    return kernel


def install(node: Path) -> None:
    """Have this process talk to the double, and die as the file says."""
    facts = json.loads(node.read_text())
    kernel, doom = kernel_of(facts), Doom(Path(facts["doom"]))
    kernel.before = lambda step: doom.step()
    VfPropertiesManager.__init__.__kwdefaults__["exchange"] = kernel.open
    VfSetter.__init__.__defaults__ = (kernel.open,)  # type: ignore[misc]
    VfPropertyJournal.change = doom.around(VfPropertyJournal.change)  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(os.environ["VF_NODE"]))
    if "INTERFACE_NODE" in os.environ:
        interface_agent.install(Path(os.environ["INTERFACE_NODE"]))
    sys.exit(main())
