"""The facts of a node that is not here: of a capture, or of a captured tree without an agent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nodeagent.cli.node.replay.unpack import unpack
from nodeagent.cli.shared.capture_format import CONFIG, SCANNED, STATE, TREE, Manifest, page_member
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.source import check_root
from nodeagent.config.schema import Config
from nodeagent.errors import InputError, PeerError, cause_of


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Facts]:
    """Open a capture, or a folder with a captured tree. Its copy is removed at the end. Raise InputError if it is
    neither."""
    if path.is_dir():
        yield tree_facts(path)
        return
    with _temporary() as folder:
        manifest = unpack(path, folder)
        with _in_zone(manifest.timezone):
            yield capture_facts(folder, manifest, path)


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """Make a folder that is removed at the end, also after an error."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="nodeagent-replay-")
    except OSError as error:
        raise InputError(f"cannot replay a capture: no temporary folder: {error.strerror}") from None
    with folder as name:
        yield Path(name)


def capture_facts(folder: Path, manifest: Manifest, source: Path) -> Facts:
    """Return the facts of a capture that is unpacked in a folder. source: its name, for errors."""
    config = folder / CONFIG
    with contextlib.suppress(FileNotFoundError):
        return Facts(
            page=_page(folder, manifest, source, lambda text: json.loads(_harmless(text))),
            root=str(folder / TREE),
            state_dir=folder / STATE,
            now_s=manifest.at_s,
            text=_page(folder, manifest, source, _harmless),
            config_file=config if config.exists() else None,
            kubelet_dir=_kubelet_dir(folder, manifest),
            scanned=_harmless((folder / SCANNED).read_text()).encode(),
        )
    raise InputError(f"cannot replay {source}: it has no {SCANNED}")


def _kubelet_dir(folder: Path, manifest: Manifest) -> Path:
    """Put kubelet's folder where it was in the tree, so that what names it finds it. Return its path."""
    place = folder / f"{TREE}{os.path.normpath(f'/{manifest.kubelet_dir or Config().kubelet_dir}')}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for one in [*(folder / "kubelet").glob("*")]:
            one.rename(place / one.name)
    except OSError:
        return folder / "kubelet"  # a link or a file is in the way
    return place


_CONTROL = re.compile(r"((?<!\\)(?:\\\\)*)\\u00(?:[01][0-9a-f]|7f|[89][0-9a-f])", re.I)
_RAW = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}


def _harmless(text: str) -> str:
    """Return JSON or text without what would move a terminal's cursor: a capture comes from elsewhere."""
    return _CONTROL.sub("\\1\N{REPLACEMENT CHARACTER}", text.translate(_RAW))


def _page(folder: Path, manifest: Manifest, source: Path, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def page(name: str) -> Any:
        try:
            return convert((folder / page_member(name)).read_text())
        except FileNotFoundError:
            why = manifest.missing.get(name) or manifest.missing.get("pages") or "it is not part of it"
            raise PeerError(f"cannot read {name} of {source}: {why}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read {name} of {source}: {cause_of(error)}") from None

    return page


def tree_facts(path: Path) -> Facts:
    """Return the facts of a captured tree, which has no agent: what needs none can be asked. Raise InputError if it is
    none."""
    inner = [one for one in path.iterdir() if one.is_dir()] if not (path / "sys").exists() else []
    root = inner[0] if len(inner) == 1 else path
    check_root(str(root))

    def page(name: str) -> Any:
        raise PeerError(f"cannot read {name} of {path}: it is a captured tree without an agent")

    return Facts(page=page, root=str(root), state_dir=root / STATE, now_s=time.time(), text=page)


@contextlib.contextmanager
def _in_zone(zone: str) -> Iterator[None]:
    """Show times as on the node."""
    before = os.environ.get("TZ")
    if zone and "\0" not in zone:
        _set_zone(zone)
    try:
        yield
    finally:
        if zone:
            _set_zone(before)


def _set_zone(zone: str | None) -> None:
    if zone is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = zone
    time.tzset()
