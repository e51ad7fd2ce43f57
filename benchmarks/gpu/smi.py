"""What nvidia-smi prints, as values: `-q -x`, `topo -m`, `mig -lgip` and `mig -lgipp`.

Formats: the DTD that `nvidia-smi --dtd` prints, the legend below the matrix, and NVIDIA's MIG User Guide ("Listing GPU
Instance Profiles", "Listing possible placements").
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_SIZE = re.compile(r"(\d+) MiB")
_PROFILE = re.compile(r"\|\s*(\d+)\s+MIG (\S+)\s+(\d+)\s+(\d+)/(\d+)\s+([\d.]+)\s+\S+\s+(\d+)\s")
_PLACEMENTS = re.compile(r"GPU\s+(\d+) Profile ID\s+(\d+) Placements?\s*:\s*\{([\d,]+)\}:(\d+)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class SmiGpu(NamedTuple):
    """One GPU of `nvidia-smi -q -x`. What it does not report is None."""

    address: str
    """As in sysfs: 0000:3b:00.0."""
    uuid: str
    name: str
    minor: int | None
    memory_mib: int | None
    mig: bool | None
    mig_devices: int


class SmiProfile(NamedTuple):
    """One line of `nvidia-smi mig -lgip`. most: how many instances of it can exist."""

    gpu: int
    name: str
    id: int
    most: int
    multiprocessors: int


class SmiPlacement(NamedTuple):
    """One line of `nvidia-smi mig -lgipp`."""

    gpu: int
    id: int
    starts: tuple[int, ...]
    size: int


class Matrix(NamedTuple):
    """`nvidia-smi topo -m`. links: by pair of GPU numbers; nodes: the NUMA node of each GPU, where it has one."""

    links: Mapping[tuple[int, int], str]
    nodes: Mapping[int, int]


def gpus(xml: str) -> tuple[str, list[SmiGpu]]:
    """Return the driver's version and the GPUs of `nvidia-smi -q -x`. Raise ValueError if the text is not that."""
    try:
        log = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"cannot read nvidia-smi -q -x: {error}") from None
    if log.tag != "nvidia_smi_log":
        raise ValueError(f"cannot read nvidia-smi -q -x: <{log.tag}>, expected <nvidia_smi_log>")
    return _text(log, "driver_version") or "", [_gpu(one) for one in log.findall("gpu")]


def _gpu(one: ElementTree.Element) -> SmiGpu:
    minor, mode = _text(one, "minor_number"), _text(one, "mig_mode/current_mig")
    size = _SIZE.fullmatch(_text(one, "fb_memory_usage/total") or "")
    domain, _, rest = str(one.get("id", "")).lower().partition(":")
    return SmiGpu(
        address=f"{int(domain or '0', 16):04x}:{rest}",
        uuid=_text(one, "uuid") or "",
        name=_text(one, "product_name") or "",
        minor=int(minor) if minor is not None else None,
        memory_mib=int(size[1]) if size else None,
        mig={"Enabled": True, "Disabled": False}.get(mode or ""),
        mig_devices=len(one.findall("mig_devices/mig_device")),
    )


def _text(one: ElementTree.Element, path: str) -> str | None:
    found = (one.findtext(path) or "").strip()
    return None if found in ("", "N/A", "[N/A]") else found


def profiles(text: str) -> list[SmiProfile]:
    """Return the profiles of `nvidia-smi mig -lgip`."""
    found = (_PROFILE.search(line) for line in text.splitlines())
    return [SmiProfile(int(one[1]), one[2], int(one[3]), int(one[5]), int(one[7])) for one in found if one]


def placements(text: str) -> list[SmiPlacement]:
    """Return the lines of `nvidia-smi mig -lgipp`."""
    return [
        SmiPlacement(int(one[1]), int(one[2]), tuple(map(int, one[3].split(","))), int(one[4]))
        for one in _PLACEMENTS.finditer(text)
    ]


def matrix(text: str) -> Matrix:
    """Return the links of `nvidia-smi topo -m` between GPUs. Raise ValueError if there is no matrix."""
    rows = [_ESCAPES.sub("", line).split("\t") for line in text.splitlines()]
    head = next((row for row in rows if any(cell.strip() == "GPU0" for cell in row)), None)
    if head is None:
        raise ValueError("cannot read nvidia-smi topo -m: there is no GPU0 in its head")
    columns = [cell.strip() for cell in head]
    links, nodes = dict[tuple[int, int], str](), dict[int, int]()
    for row in rows[rows.index(head) + 1 :]:
        gpu = _number(row[0])
        if gpu is None:
            continue
        for name, cell in zip(columns, row, strict=False):
            other = _number(name)
            if other is not None and other != gpu:
                links[gpu, other] = cell.strip()
            if name == "NUMA Affinity" and cell.strip().isdigit():
                nodes[gpu] = int(cell)
    return Matrix(links, nodes)


def _number(name: str) -> int | None:
    found = re.fullmatch(r"\s*GPU(\d+)\s*", name)
    return int(found[1]) if found else None


def pairs(found: Matrix) -> Iterator[tuple[int, int, str]]:
    """Yield each pair of GPUs once, with its link."""
    yield from ((a, b, link) for (a, b), link in sorted(found.links.items()) if a < b)
