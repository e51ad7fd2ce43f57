"""How much of its random histories a test goes through: a share in every run, all of them with NODEAGENT_LONG=1."""

from __future__ import annotations

import os

LONG = bool(os.environ.get("NODEAGENT_LONG"))


def share_of(total: int, share: float) -> int:
    """`share` of `total`, at least one; all of it in the long form."""
    return total if LONG else max(1, round(total * share))
