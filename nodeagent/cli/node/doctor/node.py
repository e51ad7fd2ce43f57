"""What the checks know of a node: its files below a root, its configuration, its kubelet, and its agent's pages.

Each part is read once, when a check first asks for it. Nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from nodeagent.cli.node.doctor.probes import Probes
from nodeagent.cli.shared.source import with_divided
from nodeagent.config.load import load as load_config
from nodeagent.config.operation import KubeletConfigConfig
from nodeagent.config.schema import Config
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import ConfigError, HostError, NodeagentError, PeerError
from nodeagent.host.devices.all_kinds import Kind, load_kinds
from nodeagent.host.processes import Process, running, sees_all
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet_files.cpu_state import KubeletState
from nodeagent.managers.kubelet import Kubelet, look
from nodeagent.managers.kubelet_conflicts import reserved_cpus
from nodeagent.resources.offer import Offer, offers, selectors
from nodeagent.state.store import FILE, read_only

CONFIG = "etc/nodeagent/config.yaml"


class NotCapturedError(NodeagentError):
    """A check needs what this capture does not have."""


class Node:
    """A node as it is now, or as a capture has it."""

    def __init__(
        self,
        *,
        root: str,
        page: Callable[[str], Any],
        live: bool,
        now_s: float,
        config_file: Path | None = None,
        kubelet_dir: Path | None = None,
        state_dir: Path | None = None,
        socket: Path | None = None,
        probes: Probes | None = None,
    ) -> None:
        """root: where /sys, /proc and /etc are. page: as of Facts. live: whether this is the running machine. Paths
        that are not given are those of the configuration, below the root."""
        self.files = SysFs(root)
        self.live = live
        self.now_s = now_s
        self.config_file = config_file or Path(self.files.path(CONFIG))
        self.probes = probes or Probes()
        self._page = page
        self._given = kubelet_dir, state_dir, socket

    # ---------------------------------------------------------------- files

    def text(self, path: str) -> str | None:
        """Return a file's text, or None if there is no such file. path: without the leading slash. Raise HostError."""
        return self.files.text(self._inside(path), None)

    def kernel_text(self, path: str) -> str | None:
        """Return a file of the kernel, or None if this kernel has none. Raise NotCapturedError if a capture lacks it,
        HostError if it cannot be read."""
        found = self.text(path)
        if found is None and not self.live:
            raise NotCapturedError(path)
        return found

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, none if it is missing. Raise HostError."""
        return self.files.names(self._inside(path))

    def below(self, path: str) -> Path:
        """Return where a path of the node is found from here."""
        return Path(self.files.path(self._inside(path.lstrip("/"))))

    def _inside(self, path: str) -> str:
        """Return a path that leads nowhere out of a captured tree: what names it may be part of the capture."""
        return path if self.live or ".." not in path else os.path.normpath(f"/{path}")[1:]

    @property
    def in_pod(self) -> bool:
        """Return whether this runs in a pod, which does not see all of the host's files."""
        return self.live and bool(os.environ.get("KUBERNETES_SERVICE_HOST"))

    # ---------------------------------------------------------------- configuration

    @cached_property
    def config_error(self) -> str:
        """Why the configuration cannot be used, or ""."""
        try:
            if self.has_config:
                self._readable(self.config_file)
                load_config(self.config_file)
            return ""
        except ConfigError as error:
            return str(error)

    def _readable(self, path: Path) -> None:
        """Raise HostError if this user may not read a file: what follows from it is unknown then, not its default."""
        if not os.access(path, os.R_OK):
            raise HostError(f"{path} may not be read by this user")

    @property
    def has_config(self) -> bool:
        """Return whether there is a configuration file; the agent has defaults without one."""
        return self.config_file.exists()

    @cached_property
    def config(self) -> Config:
        """The configuration, or the defaults where it cannot be used."""
        return load_config(self.config_file) if self.has_config and not self.config_error else Config()

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of devices."""
        return load_kinds()

    def offers(self) -> tuple[Offer, ...]:
        """Return the configured resources. Raise ConfigError if one cannot be served."""
        return offers(self.config, self.kinds)

    def serves(self, *kinds: str) -> bool:
        """Return whether any resource of these kinds is served."""
        return any(one.kind in kinds for one in self.config.served)

    @property
    def kubelet_dir(self) -> Path:
        """Return kubelet's folder."""
        return self._given[0] or self.below(self.config.kubelet_dir)

    @property
    def state_dir(self) -> Path:
        """Return the ledger's folder."""
        return self._given[1] or self.below(self.config.state_dir)

    @property
    def socket(self) -> Path:
        """Return the status socket."""
        return self._given[2] or self.below(f"{self.config.runtime_dir}/status.sock")

    # ---------------------------------------------------------------- the machine

    @cached_property
    def inventory(self) -> Inventory:
        """The machine, without NVML."""
        look_for = with_divided(selectors(self.config), self.state_dir, self.files)
        return scan(self.files, self.kinds, look_for, cgroup_root=self.config.pinning.cgroup_root)

    @cached_property
    def kubelet(self) -> Kubelet:
        """This node's kubelet."""
        return look(self.files, self.kubelet_dir, self._named())

    def _named(self) -> KubeletConfigConfig:
        named = self.config.kubelet_config
        if self.live:
            return named
        file, folder = (str(self.below(one)) if one else "" for one in (named.file, named.drop_ins))
        return KubeletConfigConfig(file=file, drop_ins=folder)

    def cpu_manager(self) -> KubeletState:
        """Return what kubelet's CPU manager has. Raise PeerError if that is unknown."""
        if self.kubelet.cpus is None:
            raise PeerError(self.kubelet.cpus_error)
        return self.kubelet.cpus

    def reserved(self) -> CpuSet:
        """Return the CPUs that are never granted. Raise ConfigError if they are not those of this machine."""
        return reserved_cpus(self.config, self.kubelet, self.inventory)

    def grantable(self) -> CpuSet:
        """Return the online CPUs that can be granted. Raise ConfigError as `reserved` does."""
        return self.inventory.cpus_online - self.reserved()

    def running(self, *names: str) -> tuple[Process, ...]:
        """Return the processes with one of these names (the kernel's, at most 15 characters). Raise HostError if not
        all of the host's are visible, NotCapturedError if the capture has none at all."""
        if not self.live and next(self.files.numbered("proc", ""), None) is None:
            raise NotCapturedError("proc")
        if not sees_all(self.files):
            raise HostError("the host's processes cannot be seen from this PID namespace")
        return running(self.files, lambda name: name in names)

    # ---------------------------------------------------------------- the agent

    def page(self, path: str) -> Any:
        """Return a page of the running agent. Raise PeerError if there is none."""
        return self._page(path)

    @cached_property
    def agent_error(self) -> str:
        """Why the agent does not answer, or ""."""
        try:
            self._page("/v1/status")
            return ""
        except PeerError as error:
            return str(error)

    @cached_property
    def status(self) -> dict[str, Any]:
        """The agent's status; empty if no agent answers."""
        if self.agent_error:
            return {}
        found = self._page("/v1/status")
        return found if isinstance(found, dict) else {}

    def listed(self, key: str) -> list[str]:
        """Return a list of texts of the status; empty if no agent answers."""
        found = self.status.get(key)
        return [str(one) for one in found] if isinstance(found, list) else []

    @property
    def has_ledger(self) -> bool:
        """Return whether there is a ledger. Raise OSError if that cannot be seen."""
        try:
            (self.state_dir / FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def ledger(self) -> tuple[Grant, ...]:
        """Return the grants of the ledger file. Raise StateError if they cannot be read."""
        return read_only(self.state_dir)
