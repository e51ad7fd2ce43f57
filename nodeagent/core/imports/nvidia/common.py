"""What both of NVIDIA's programs have: the folders of the driver, and the kind of device."""

from __future__ import annotations

from nodeagent.core.imports.findings import Said, State

VENDOR = "10de"
"""NVIDIA's PCI vendor (pci-ids)."""
WHOLE = {"vendor": VENDOR, "parent": ""}
"""Whole GPUs."""
INSTANCES = {"vendor": VENDOR, "mig_profile": "?*"}
"""MIG instances."""
HOOK_FOLDERS = ("/usr/bin", "/usr/local/nvidia/toolkit")
HOOKS = frozenset({"", *(f"{folder}/{name}" for folder in HOOK_FOLDERS for name in ("nvidia-ctk", "nvidia-cdi-hook"))})
"""Where the agent looks for the program that renews a container's loader cache."""
DRIVER_ROOT = "nvidia.driverRoot"


def driver_root(value: str) -> Said:
    """Return what becomes of the root of the driver's files."""
    if value in ("", "/"):
        return Said(State.BUILT_IN, why="the host's own root is searched anyway")
    return Said(State.TRANSLATED, DRIVER_ROOT)


def hook(value: object) -> Said:
    """Return what becomes of the path of the program that renews the loader's cache."""
    if isinstance(value, str) and value in HOOKS:
        return Said(State.BUILT_IN, why="it is found there")
    return Said(
        State.LOST,
        why=f"the hook is looked for in {' and '.join(HOOK_FOLDERS)}; programs run without it, `ldconfig -p` does not "
        "list the driver then",
    )
