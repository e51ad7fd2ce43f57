"""Another device plugin, as a process of its own: it offers ids that it is told, and gives what it is asked for.

    python -m tests.doubles.other_plugin FOLDER RESOURCE ID...

FOLDER: kubelet's device-plugins folder. Ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from nodeagent.kube.kubelet.registration import Registrar
from tests.support.shelf import Shelf


async def _main(folder: Path, resource: str, ids: list[str]) -> None:
    task = asyncio.ensure_future(Registrar([Shelf(resource, ids=ids)], folder).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        pass


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
