"""Paths on this node, and whether they can be used, checked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from nodeagent.config.schema import Config
from nodeagent.errors import ConfigError
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs.record_file import set_aside
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet import sockets
from nodeagent.managers.deviceplugin.manager import check as check_device_plugin
from nodeagent.managers.dra.manager import check as check_dra
from nodeagent.version import VERSION

STATUS_SOCKET = "status.sock"
log = structlog.get_logger()


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """Paths and options from the configuration and the command line."""

    sysfs: SysFs
    config_file: Path | None
    kubelet_dir: Path
    state_dir: Path
    runtime_dir: Path
    accept_loss: bool = False
    """Whether a ledger written by a newer build may be moved aside."""


def paths_of(
    config: Config, *, config_file: Path | None, root: str, kubelet_dir: str | None, accept_loss: bool = False
) -> Paths:
    """Return the paths; the command line takes precedence over the configuration."""
    return Paths(
        sysfs=SysFs(root),
        config_file=config_file,
        kubelet_dir=Path(kubelet_dir or config.kubelet_dir).absolute(),
        state_dir=Path(config.state_dir),
        runtime_dir=Path(config.runtime_dir),
        accept_loss=accept_loss,
    )


def checked(config: Config, where: Paths) -> tuple[all_kinds.Kind, ...]:
    """Return the kinds to look for. Raise ConfigError if what is configured cannot be served here."""
    families = all_kinds.load_kinds()
    check_served(config, families, where.kubelet_dir)
    sockets.checked(where.runtime_dir / STATUS_SOCKET)
    _check_folder(where.state_dir, 0o700)
    _check_folder(where.runtime_dir, 0o755)
    return families


def damaged_records(where: Paths) -> list[str]:
    """Return a note for each record of what the agent has changed that could not be read and was set aside. Blocks."""
    return [
        f"{where.state_dir / name} could not be read and was set aside: what it recorded stays as it is, "
        "see docs/operations.md; remove the file once that is dealt with"
        for name in set_aside(where.state_dir)
    ]


def check_served(config: Config, families: Sequence[all_kinds.Kind], kubelet_dir: Path) -> None:
    """Raise ConfigError if a resource cannot be served, or its sockets cannot be in kubelet's folder."""
    check_device_plugin(config, families, kubelet_dir)
    check_dra(config, kubelet_dir)


def _check_folder(folder: Path, mode: int) -> None:
    """Create a folder of the agent if it is missing. Raise ConfigError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write")
    except OSError as error:
        raise ConfigError(f"cannot use folder {folder}: {error.strerror}") from None


def log_start(where: Paths) -> None:
    """Log what runs, and where its files are."""
    folders = {"kubelet_dir": where.kubelet_dir, "state_dir": where.state_dir}
    log.info(
        "starting",
        version=VERSION,
        config=str(where.config_file or "built-in defaults"),
        root=where.sysfs.root,
        status_socket=str(where.runtime_dir / STATUS_SOCKET),
        **{name: str(folder) for name, folder in folders.items()},
    )
