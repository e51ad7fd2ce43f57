"""Registers a Shelf in a folder until it is killed: python -m tests.support.doomed FOLDER COUNT."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from nodeagent.kube.kubelet.registration import Registrar
from tests.support.shelf import CPU, Shelf

if __name__ == "__main__":
    asyncio.run(Registrar([Shelf(CPU, int(sys.argv[2]))], Path(sys.argv[1])).run())
