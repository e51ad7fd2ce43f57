"""The pages of an agent that does not run: what its status socket would show of a machine, a ledger and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nodeagent.admin.status import grant_document
from nodeagent.cli.shared.facts import Facts
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import OTHER_PLUGIN
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import to_document

NOW_S = 1_800_000_000.0


def facts_of(
    inventory: Inventory,
    ledger: Ledger,
    folder: Path,
    *,
    pinned: Iterable[Mapping[str, Any]] = (),
    health: Iterable[Mapping[str, Any]] = (),
    devices: Iterable[Mapping[str, Any]] = (),
    **status: Any,
) -> Facts:
    """Facts of a node with these pages; its ledger file, if any, and its tree lie below `folder`."""
    grants = [grant_document(one) for one in ledger.grants.values()]
    grants += [{**grant_document(one), "api": OTHER_PLUGIN} for one in ledger.foreign.values()]
    pages: dict[str, Any] = {
        "/v1/inventory": to_document(inventory),
        "/v1/grants": grants,
        "/v1/health": list(health),
        "/v1/devices": list(devices),
        "/v1/status": {
            "inventory": {"cpus_reserved": str(ledger.reserved)},
            "pinning": {"mode": "nri", "pinned": list(pinned), "intruders": {"irqs": [], "threads": []}},
            "refused": {},
            "dra": {},
            "kubelet": {"settings": {}},
            "resources": [],
            **status,
        },
    }
    return Facts(page=pages.__getitem__, root=str(folder / "root"), state_dir=folder / "state", now_s=NOW_S)
