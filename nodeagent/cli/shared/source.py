"""Where the offline verbs get their inventory: a file, a captured tree, or this machine."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document
from nodeagent.errors import InputError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.nvml.client import Probe
from nodeagent.host.nvml.values import Failure, Snapshot
from nodeagent.host.pci import NVIDIA
from nodeagent.host.snapshot import NO_SELECTORS, Selectors, scan
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.managers import state_files

LARGEST_FILE_BYTES = 256 << 20


def add_root(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects the tree to read the machine from."""
    parser.add_argument("--root", metavar="DIR", help="read a captured tree of /sys, /proc and /dev (default: /)")


def check_root(root: str) -> None:
    """Raise InputError if `root` is no captured tree that can be read: a machine must not look empty for that."""
    try:
        for folder in (Path(root), Path(root) / "sys"):
            next(folder.iterdir(), None)
    except FileNotFoundError:
        missing = "it has no folder sys" if Path(root).exists() else "expected a folder with sys below it"
        raise InputError(f"cannot read --root {root}: {missing}") from None
    except OSError as error:
        raise InputError(f"cannot read --root {root}: {error.filename}: {error.strerror}") from None


def with_divided(selected: Selectors, state_dir: Path, sysfs: SysFs) -> Selectors:
    """Return what to look for, with the accelerators that the agent has divided into work queues, if this user may read
    which."""
    if not os.access(state_dir / state_files.DSA_QUEUES, os.R_OK):
        return selected
    from nodeagent.managers.dsa.journal import DsaJournal

    divided = DsaJournal(state_dir, sysfs.text(BOOT_ID, "")).read
    return replace(selected, dsa=replace(selected.dsa, divided=divided))


def read_root(root: str | None, selected: Selectors = NO_SELECTORS) -> Inventory:
    """Return the inventory of this machine, or of a captured tree (NVML is queried only on the machine itself). Raise
    InputError if `root` is not a captured tree.

    selected: character and USB devices to look for.
    """
    if root is not None:
        check_root(root)
    return scan_machine(SysFs(root or "/"), selected, live=root is None)


def scan_machine(sysfs: SysFs, selected: Selectors = NO_SELECTORS, *, live: bool) -> Inventory:
    """Return the inventory of a machine, with what NVML says of it if it is this one (`live`)."""
    families = load_kinds()
    inventory = scan(sysfs, families, selected)
    if live and any(device.vendor == NVIDIA for device in inventory.devices):
        inventory = scan(sysfs, families, selected, nvml=asyncio.run(_ask_nvml()))
    return inventory


async def _ask_nvml() -> Snapshot | Failure:
    probe = Probe()
    try:
        return await probe.snapshot()
    finally:
        await probe.close()


def read_file(path: str) -> Inventory:
    """Return the inventory in a file of JSON or YAML, as `nodeagent inventory` writes both. Raise InputError if it
    cannot be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read --inventory {path}: {error.strerror}") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise InputError(f"cannot read --inventory {path}: it is larger than {LARGEST_FILE_BYTES >> 20} MiB")
    return from_document(data if data.lstrip()[:1] in (b"", b"{", b"[") else _as_json(data, path), source=path)


def _as_json(text: bytes, path: str) -> bytes:
    """Return a YAML document as JSON, which is then read as strictly as any. Raise InputError if it is no YAML, or has
    values that JSON has not."""
    import yaml

    try:
        return msgspec.json.encode(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # noqa: S506 - safe
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"cannot read inventory {path}: {' '.join(str(error).split())}") from None
