"""Captures of nodes: made of a tree and of what a test says the agent showed, or taken as they came from a node.

A capture that a user sent is a fixture as it is: `with opened(path) as facts:` gives its facts.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from nodeagent.cli.node.capture import archive
from nodeagent.cli.node.capture.collect import Gathered, Node, gather
from nodeagent.cli.node.replay.opened import opened as opened
from nodeagent.cli.shared.capture_format import FORMAT, MANIFEST, Manifest, page_member
from nodeagent.cli.shared.facts import Facts
from nodeagent.config.schema import Config

NOWHERE = Path("/nonexistent")


def gathered(root: Path, *, state: Path = NOWHERE, kubelet: Path = NOWHERE, socket: Path = NOWHERE) -> Gathered:
    """What a capture of a tree consists of."""
    node = Node(
        root=str(root), socket=str(socket), state_dir=state, kubelet_dir=kubelet, config=Config(), config_file=None
    )
    return gather(node, lambda _: None)


def capture(path: Path, root: Path, *, pages: Mapping[str, Any] | None = None, state: Path = NOWHERE) -> Path:
    """Write a capture of a tree, of an agent with these pages."""
    found = gathered(root, state=state)
    for page, document in (pages or {}).items():
        found.members.files[page_member(page)] = json.dumps(document).encode()
    manifest = msgspec.json.encode(found.manifest(host="node-a", anonymized=False))
    archive.write(str(path), (MANIFEST, manifest), found.members, found.at_s)
    return path


@contextlib.contextmanager
def facts_of_tree(folder: Path, root: Path, **more: Any) -> Iterator[Facts]:
    """The facts of a captured tree, through a capture of it."""
    with opened(capture(folder / "node.tar.zst", root, **more)) as facts:
        yield facts


# ---------------------------------------------------------------- archives that no agent wrote


def manifest(members: int, **more: Any) -> bytes:
    """A manifest that says so many members follow."""
    given = {"format": FORMAT, "nodeagent": "1", "at_s": 0.0, "time": "", "host": "h", "timezone": "", **more}
    return json.dumps({"anonymized": False, "members": members, **given}).encode()


def packed(*members: tarfile.TarInfo | tuple[str, bytes], first: bytes | None = None) -> bytes:
    """A compressed tar with a manifest and these members: (name, content), or a member without content."""
    made, whole = io.BytesIO(), first if first is not None else manifest(len(members))
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for one in ((MANIFEST, whole), *members):
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
            else:
                info = tarfile.TarInfo(one[0])
                info.size = len(one[1])
                tar.addfile(info, io.BytesIO(one[1]))
    return zstandard.ZstdCompressor().compress(made.getvalue())


def member(name: str, type_: bytes, target: str = "") -> tarfile.TarInfo:
    """A member without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info


def contents(path: Path) -> tuple[Manifest, dict[str, bytes], dict[str, str]]:
    """What is in a capture: the manifest, the files and the links, by name."""
    stream = io.BytesIO(zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read())
    with tarfile.open(fileobj=stream) as tar:
        members = tar.getmembers()
        files = {one.name: tar.extractfile(one).read() for one in members if one.isfile()}  # type: ignore[union-attr]
        links = {one.name: one.linkname for one in members if one.issym()}
    return msgspec.json.decode(files.pop(MANIFEST), type=Manifest), files, links
