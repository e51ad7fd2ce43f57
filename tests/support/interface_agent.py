"""The whole agent in whose eyes another network namespace is the host's, killed at a step that a file names:
python -m tests.support.interface_agent, with the words of `nodeagent`.

INTERFACE_NODE is a JSON file: host (path of the namespace), doom (see tests.support.vfio_agent.Doom). A step is the
moment before or after a change in the kernel, or in the journal of what was moved. Pairs in a group are read as
interfaces of devices, as tests.support.namespaces describes. With rdma (the file of tests.doubles.rdma_kernel) and root
(the folder with /sys) there are RDMA devices too, in the exclusive mode.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from msgspec.structs import replace

from nodeagent.cli import main
from nodeagent.host.netlink import interfaces
from nodeagent.host.netlink.connection import Netlink
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.netlink.messages import attributes, read_number
from nodeagent.managers.network.interface_journal import InterfaceJournal
from nodeagent.managers.network.interface_mover import InterfaceMover
from nodeagent.managers.network.interfaces import InterfacesManager
from nodeagent.managers.network.rdma_mover import RdmaMover
from tests.doubles.rdma_kernel import RdmaKernel
from tests.support.namespaces import FIRST_GROUP, GROUP, device_of
from tests.support.vfio_agent import Doom


def install(node: Path) -> None:
    """Have this process take the namespace for the host's, and die as the file says."""
    facts = json.loads(node.read_text())
    doom, real = Doom(Path(facts["doom"])), interfaces._read_link
    InterfacesManager.__init__.__kwdefaults__["host"] = facts["host"]
    InterfaceMover.__init__.__defaults__ = (facts["host"],)  # type: ignore[misc]
    Netlink.change = doom.around(Netlink.change)  # type: ignore[method-assign]
    InterfaceJournal.change = doom.around(InterfaceJournal.change)  # type: ignore[method-assign]

    if "rdma" in facts:
        kernel = RdmaKernel(Path(facts["host"]), root=Path(facts["root"]), file=Path(facts["rdma"]))
        kernel.before = lambda name: doom.step()
        InterfacesManager.__init__.__kwdefaults__["connect"] = kernel.connect
        RdmaMover.__init__.__defaults__ = (kernel.connect,)  # type: ignore[misc]

    def read(data: bytes) -> Link:
        link, group = real(data), read_number(attributes(data[16:]).get(GROUP))
        return replace(link, kind="", parent=device_of(group)) if group >= FIRST_GROUP else link

    interfaces._read_link = read


if __name__ == "__main__":
    install(Path(os.environ["INTERFACE_NODE"]))
    sys.exit(main())
