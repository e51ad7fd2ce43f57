"""Where things are, for tests that start programs or read files of the checkout."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that `tests` is a package in."""
NVML_STATE_DOUBLE = CHECKOUT / "tests" / "doubles" / "nvml_state_double.c"
DATA = CHECKOUT / "tests" / "data"
"""Facts that were recorded elsewhere; its README says where."""
NVML_DOUBLE = CHECKOUT / "tests" / "doubles" / "nvml_double.c"
SHARED = Path(os.environ.get("NODEAGENT_SHARED", CHECKOUT.parent / "shared"))
"""Captures of whole machines, next to the checkout: an extra, without which few tests are skipped."""
