"""NVMe targets connected and disconnected by the product's own modules, on the kernel as it runs, and the records that
it keeps in /run/fabrics:

    fabrics.py connect NQN PORT [KILL]     as claim c; KILL: at which write of the journal it kills itself, from 1
    fabrics.py disconnect NQN
    fabrics.py show NQN PORT
Prints JSON: error, records, and the connections to the subsystem.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from nodeagent.core.fabrics.target import NO_SECRETS, Port, Timeouts
from nodeagent.errors import HostError
from nodeagent.host.fabrics.connections import Connections, host
from nodeagent.host.fabrics.kernel import HostKernel
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.managers.fabrics.connector import Connector, Wanted, nothing_to_hide
from nodeagent.managers.fabrics.journal import FabricsJournal

STATE = Path("/run/fabrics")
HOST_NQN = "nqn.2024-01.com.example:node-a"


class Mortal(FabricsJournal):
    """Kills the process before a write."""

    left = 0

    def change(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().change(*args)


async def main(do: str, nqn: str, *rest: str) -> dict[str, Any]:
    sysfs = SysFs()
    journal = Mortal(STATE, sysfs.text(BOOT_ID))
    connections = Connections(sysfs, HostKernel(sysfs))
    connector = Connector(
        journal, connections, lambda disk: sysfs.exists(f"dev/{disk}"), nothing_to_hide, connect_s=5.0
    )
    device, error, began = f"nvmeof-{nqn[-3:]}", "", time.monotonic()
    try:
        if do == "connect":
            port = Port(transport="tcp", traddr="127.0.0.1", trsvcid=int(rest[0]), nqn=nqn)
            journal.left = int(rest[1]) if len(rest) > 1 else 0
            timeouts = Timeouts(reconnect_delay=1, fast_io_fail_tmo=2)
            asked = Wanted(
                device=device,
                claim="c",
                grant="c-0",
                port=port,
                host=host(sysfs, HOST_NQN),
                timeouts=timeouts,
                secrets=NO_SECRETS,
            )
            await connector.connect(asked)
        elif do == "disconnect":
            error = "; ".join((await connector.disconnect([device])).values())
    except HostError as caught:
        error = str(caught)
    records = connector.records()
    return {
        "error": error,
        "seconds": round(time.monotonic() - began, 1),
        "records": {one.port.nqn: one.controller for one in records.values()},
        "nodes": [node.host_path for one in records.values() if one.edits for node in one.edits.device_nodes],
        "connections": {one.name: one.state for one in connections.to(nqn)},
    }


if __name__ == "__main__":
    STATE.mkdir(exist_ok=True)
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))), flush=True)
    os._exit(0)  # not held up by a thread that hangs in the kernel
