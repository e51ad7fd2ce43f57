"""Registers a Shelf in a folder until it is killed: python doomed.py FOLDER COUNT."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from shelf import CPU, Shelf

from nodeagent.kube.registration import Registrar

if __name__ == "__main__":
    asyncio.run(Registrar([Shelf(CPU, int(sys.argv[2]))], Path(sys.argv[1])).run())
