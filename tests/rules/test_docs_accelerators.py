"""docs/accelerators.md against the product: its configurations are taken, its claims find what they select."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.config.load import parse
from nodeagent.core.dra.pool import ALL_FEATURES, PoolDevice
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.resources.catalog import dra_of
from nodeagent.resources.offer import selectors
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.idxd_kernel import IdxdKernel
from tests.support.paths import CHECKOUT

PAGE = CHECKOUT / "docs" / "accelerators.md"
GIB = 1 << 30
CLAUSE = re.compile(r'(!?)device\.attributes\["nodeagent\.dev"\]\.(\w+)(?: (==|>=) (?:"([^"]*)"|(\d+)))?')

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation lies in the checkout")


def blocks() -> list[Any]:
    return [yaml.safe_load(one) for one in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)]


def whole_machine(folder: Path) -> DeviceTree:
    """A machine with all that the page names."""
    tree = DeviceTree(machine(folder, "1s1n4c"))
    tree.pci("0000:6a:01.0", pci_class="088000", driver="idxd")
    tree.queue("0000:6a:01.0", "dsa0", 0, mode="dedicated")
    tree.queue("0000:6a:01.0", "dsa0", 1)
    tree.pci("0000:6a:02.0", pci_class="088000", driver="idxd")
    tree.queue("0000:6a:02.0", "iax1", 0)
    IdxdKernel(tree).add("dsa2", "0000:e7:01.0")
    tree.sgx({0: GIB})
    for n, services in enumerate(("sym;asym", "dc")):
        pf, vf = f"0000:7{n}:00.0", f"0000:7{n}:00.1"
        files = {"qat/cfg_services": services, "qat/state": "up"}
        tree.pci(pf, pci_class="0b4000", device="4940", driver="4xxx", files=files)
        folder = tree.vf(pf, 0, vf, driver="vfio-pci", group=40 + n)
        (folder / "device").write_text("0x4941\n")
        (folder / "class").write_text("0x0b4000\n")
    for node in ("/dev/tpmrm0", "/dev/watchdog1"):
        tree.node(node)
    return tree


def test_every_resource_of_the_page_serves_something_and_every_claim_finds_a_device(tmp_path: Path) -> None:
    tree = whole_machine(tmp_path / "root")
    found: dict[str, list[PoolDevice]] = {}
    for one in (block for block in blocks() if "resources" in block):
        config = parse(yaml.safe_dump(one), source="docs/accelerators.md")
        seen = scan(SysFs(tree.root), builtin_kinds(), selectors(config))
        catalog: Catalog = dra_of(config, builtin_kinds(), "node").catalog
        for kind, pool in catalog.kinds.items():
            found.setdefault(kind, []).extend(pool.pool(seen, Ledger(), NO_HEALTH, ALL_FEATURES).devices)
        served = {device.attributes["resource"] for devices in found.values() for device in devices}
        assert served >= {it["name"] for it in one["resources"]}
    classes = {
        it["metadata"]["name"] for it in yaml.safe_load_all((CHECKOUT / "deploy/deviceclasses.yaml").read_text())
    }
    claims = [one for one in blocks() if one.get("kind") == "ResourceClaim"]
    assert len(claims) == 5
    for one in claims:
        (request,) = [it["exactly"] for it in one["spec"]["devices"]["requests"]]
        assert request["deviceClassName"] in classes
        kind = request["deviceClassName"].partition(".")[0]
        fits = [it for it in found[kind] if all(selected(c["cel"]["expression"], it) for c in request["selectors"])]
        asked = request.get("capacity", {}).get("requests", {})
        assert [it for it in fits if asked.keys() <= it.capacity.keys()], one["metadata"]["name"]


def selected(expression: str, device: PoolDevice) -> bool:
    """What CEL makes of the few forms that the page has."""
    return all(_holds(*CLAUSE.fullmatch(clause).groups(), device) for clause in expression.split(" && "))  # type: ignore[union-attr]


def _holds(
    negated: str, name: str, operator: str | None, text: str | None, number: str | None, device: PoolDevice
) -> bool:
    value = device.attributes[name]
    if operator is None:
        return value is not bool(negated)
    wanted = text if number is None else int(number)
    return value == wanted if operator == "==" else int(str(value)) >= int(str(wanted))
