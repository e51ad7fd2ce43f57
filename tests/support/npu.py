"""The kind of docs/kinds.md that has all hooks, as it is written there, and the machine that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders.devices import DeviceTree
from tests.support.paths import CHECKOUT

CARD = "0000:3b:00.0"
RESOURCE = {"name": "npu", "kind": "npu", "serve": "dra"}


def source() -> str:
    """The code of the page."""
    blocks = (CHECKOUT / "docs" / "kinds.md").read_text().split("```python\n")[1:]
    (found,) = [one.partition("```")[0] for one in blocks if "class Npu:" in one]
    return found


def kind() -> Any:
    """The kind itself, for tests in this process."""
    names: dict[str, Any] = {"__name__": "npu_of_the_page"}
    exec(source(), names)
    return names["Npu"]()


def card(tree: DeviceTree, address: str = CARD, cores: int = 4) -> None:
    """A card of the vendor's with its state."""
    files = {"npu_cores": cores, "npu_state": "ok"}
    tree.pci(address, pci_class="120000", vendor="1ae0", numa_node=0, files=files)


def install(folder: Path, module: str, text: str, **kinds: str) -> None:
    """A distribution in a folder as an installer would leave it. kinds: classes of the module, by entry point."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    lines = "".join(f"{name} = {module}:{one}\n" for name, one in kinds.items())
    (info / "entry_points.txt").write_text(f"[nodeagent.kinds]\n{lines}")
