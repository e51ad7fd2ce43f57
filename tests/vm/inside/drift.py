"""Runs in the guest: writes something wrong into a file of a control group and waits until it is put right.

drift.py FILE WRONG    prints the seconds until FILE says again what it said before
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

LIMIT_S = 20.0
BETWEEN_S = 0.0005


def main(file: str, wrong: str) -> None:
    path = Path(file)
    right = path.read_text()
    path.write_text(wrong)
    began = time.monotonic()
    if path.read_text() == right:
        raise SystemExit(f"{file} was not changed by {wrong!r}")
    while path.read_text() != right:
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"{file} still says {path.read_text()!r}, not {right!r}")
        time.sleep(BETWEEN_S)
    print(f"{time.monotonic() - began:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
