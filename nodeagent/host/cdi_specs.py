"""The device nodes that a CDI device of any vendor stands for. Read only.

Source: the Container Device Interface specification, 1.1.0: each file in a CDI folder is JSON or YAML by its suffix and
names a kind, devices with their edits, and edits for all of its devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

STATIC_FOLDER = Path("/etc/cdi")
LARGEST_SPEC_BYTES = 4 << 20
CDI_VALUE = "="
"""Separator between a CDI kind and the name of a device."""
_SUFFIXES = (".json", ".yaml", ".yml")


class _Node(msgspec.Struct):
    path: str
    host_path: str = msgspec.field(name="hostPath", default="")


class _Edits(msgspec.Struct):
    nodes: list[_Node] = msgspec.field(name="deviceNodes", default_factory=list)


class _Device(msgspec.Struct):
    name: str
    edits: _Edits = msgspec.field(name="containerEdits", default_factory=_Edits)


class _Spec(msgspec.Struct):
    kind: str
    devices: list[_Device] = msgspec.field(default_factory=list)
    edits: _Edits = msgspec.field(name="containerEdits", default_factory=_Edits)


def nodes_of(folders: Sequence[Path], names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the paths of the host's device nodes by CDI device name (VENDOR/CLASS=NAME), of those that are found.

    Blocks. A file that cannot be read or is no CDI spec is left out, as runtimes do.
    """
    kinds = {name.partition("=")[0] for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for spec in _specs(folders) if names else ():
        if spec.kind in kinds:
            found |= {name: paths for name, paths in _devices(spec) if name in names}
    return found


def _devices(spec: _Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
    for device in spec.devices:
        nodes = (*spec.edits.nodes, *device.edits.nodes)
        yield f"{spec.kind}={device.name}", tuple(node.host_path or node.path for node in nodes)


def _specs(folders: Iterable[Path]) -> Iterator[_Spec]:
    for path in (path for folder in folders for path in _files(folder)):
        try:
            with path.open("rb") as file:
                yield msgspec.convert(_content(path, file.read(LARGEST_SPEC_BYTES + 1)), _Spec)
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue


def _content(path: Path, text: bytes) -> Any:
    if len(text) > LARGEST_SPEC_BYTES:
        raise ValueError(f"cannot read {path}: it has more than {LARGEST_SPEC_BYTES} bytes")
    return msgspec.json.decode(text) if path.suffix == ".json" else yaml.safe_load(text)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(one for one in folder.iterdir() if one.suffix in _SUFFIXES and one.is_file())
    except OSError:
        return []
